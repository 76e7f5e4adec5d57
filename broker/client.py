"""The Python client: the broker's methods as coroutines over one HTTP session.

    async with Client("http://127.0.0.1:8080") as client:
        await client.enqueue("default", {"hello": "world"})
        for message in await client.dequeue("default", wait=20):
            print(message.body)
            await client.delete(message.receipt)

It promises one HTTP request a call, and that whatever goes wrong on the way or at the broker is a
`BrokerError` that says whether the call may have been carried out. It repeats nothing by itself. A
coroutine that is cancelled hangs up, and what the broker leased for it meanwhile it takes back.

Parameters carry the names, the units (seconds) and the limits of `rpc_schema.json`; those that are
not given are not sent. `Client.call` reaches the methods that have no function of their own here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, Self, TypedDict, Unpack

import aiohttp
import msgspec

# Longer than the broker takes to give a call up by itself (`--request-timeout`, 10 s), so that its own
# answer, which knows the outcome, comes first. A `wait` is added.
CALL_TIMEOUT = 30.0
CONNECT_TIMEOUT = 10.0


class BrokerError(Exception):
    """A call failed; `code`, `type`, `retryable`, `outcome` and `data` say how.

    With `outcome` "none" certainly nothing was done; with "unknown" it may have been.
    """

    def __init__(self, code: int, message: str, data: Mapping[str, Any]) -> None:
        super().__init__(code, message, data)
        self.code = code
        self.message = message
        self.data = data
        self.type: str = data.get("type", "internal_error")
        self.retryable: bool = data.get("retryable", False)
        self.outcome: str = data.get("outcome", "unknown")

    def __str__(self) -> str:
        return f"{self.message} ({self.type}, {self.code})"


class ConnectionFailed(BrokerError):
    """No answer came: `outcome` is "none" if nothing was sent, "unknown" if the connection broke later."""


class Message(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A message as it was delivered; `receipt` is None with at-most-once delivery.

    `topic` and `published_id` are None unless it is a copy of what was published.
    """

    message_id: str
    queue: str
    receipt: str | None
    body_json: msgspec.Raw = msgspec.field(name="body")
    headers: dict[str, str]
    sender: str | None
    receive_count: int
    enqueued_at: datetime
    first_received_at: datetime | None
    visible_at: datetime
    expires_at: datetime | None
    dead_letter: dict[str, Any] | None
    topic: str | None = None
    published_id: str | None = None

    @cached_property
    def body(self) -> Any:
        """The body as Python sees it; `bytes(message.body_json)` is the very text that was sent."""
        # Not before it is asked for: a body that Python cannot hold (an integer of 5,000 digits) must
        # fail where it is used, and not spoil the messages beside it.
        return json.loads(bytes(self.body_json))


class MessageOptions(TypedDict, total=False):
    """What can be said about a message beside its body."""

    headers: Mapping[str, str]
    sender: str | None
    delay: float | None
    ttl: float | None
    idempotency_key: str | None


class NewMessage(MessageOptions):
    """One element of `enqueue_batch`."""

    body: Any


class QueueAttributes(TypedDict, total=False):
    """What `create_queue` can be told about a queue."""

    visibility_timeout: float | None
    message_ttl: float | None
    delay: float | None
    max_message_bytes: int | None
    max_receives: int | None
    dead_letter_queue: str | None
    idempotency_window: float | None
    max_messages: int | None
    paused: bool | None


class SubscriptionOptions(TypedDict, total=False):
    """What `subscribe` can be told: `queue` or `url`, and of which messages there are to be copies."""

    queue: str | None
    url: str | None
    filter: Mapping[str, list[str]] | None
    max_receives: int | None
    dead_letter_queue: str | None


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets copies; `secret` is there once, in the answer that made a subscription with a `url`."""

    subscription_id: str
    topic: str
    name: str
    queue: str
    url: str | None
    filter: dict[str, list[str]] | None
    state: str
    secret: str | None


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a message: `deliveries` copies, each of which names this id as its `published_id`."""

    message_id: str
    duplicate: bool
    deliveries: int


class Broadcast(msgspec.Struct, frozen=True, kw_only=True):
    """How many stored messages were given out, in how many copies; not `complete`: call it again."""

    messages: int
    deliveries: int
    complete: bool


class Client:
    """A session with one broker; to be used as `async with Client(url, token) as client`."""

    def __init__(self, url: str = "http://127.0.0.1:8080", token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The broker's URL must begin with http:// or https://, not so {url!r}.")
        self._endpoint = url.rstrip("/") + "/rpc"
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # A call that waits for messages holds its connection meanwhile. So there is no limit to the
        # connections but the caller's number of concurrent calls.
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def call(self, method: str, /, **params: Any) -> Any:
        """Call any method by its name; return its result as Python values.

        Raises `BrokerError`, and ValueError or TypeError for what is no JSON (NaN, a set).
        """
        return json.loads(bytes(await self._request(method, params)))

    async def call_json(self, method: str, params: Mapping[str, str]) -> str:
        """Call any method with params that are JSON text; return its result as such: no byte of either changes."""
        text = ",".join(f"{json.dumps(name)}:{value}" for name, value in params.items())
        try:
            wait = min(float(params.get("wait", 0)), 3600)
        except ValueError:
            wait = 0  # the broker says what is wrong with it
        return bytes(await self._post(method, f"{{{text}}}", wait)).decode()

    async def enqueue(self, queue: str, body: Any, **options: Unpack[MessageOptions]) -> str:
        """Store one message, committed when this returns; return its message_id."""
        result = await self.call("enqueue", queue=queue, body=body, **options)
        return str(result["message_id"])

    async def enqueue_batch(self, queue: str, messages: Iterable[NewMessage]) -> list[str]:
        """Store 1 to 1,000 messages, all or none; return their ids in order."""
        result = await self.call("enqueue_batch", queue=queue, messages=list(messages))
        return [enqueued["message_id"] for enqueued in result["messages"]]

    async def dequeue(
        self,
        queue: str = "default",
        *,
        max_messages: int | None = None,
        visibility_timeout: float | None = None,
        wait: float | None = None,
        delivery: str | None = None,
    ) -> list[Message]:
        """Lease messages, at most 1 unless `max_messages` says more; none if none came within `wait`."""
        params = _given(max_messages=max_messages, visibility_timeout=visibility_timeout, wait=wait, delivery=delivery)
        result = await self._request("dequeue", {"queue": queue, **params})
        return msgspec.json.decode(result, type=_Delivery).messages

    async def delete(self, receipt: str | None) -> bool:
        """Delete a message that was handed out; return False if it was already gone."""
        result = await self.call("delete", receipt=receipt)
        return bool(result["deleted"])

    async def delete_batch(self, receipts: Iterable[str | None]) -> list[bool | BrokerError]:
        """Delete 1 to 1,000 messages, each by itself; return for each what `delete` returns or raises."""
        result = await self.call("delete_batch", receipts=list(receipts))
        results = result["results"]
        return [BrokerError(**one["error"]) if "error" in one else one["deleted"] for one in results]

    async def extend_visibility(self, receipt: str | None, visibility_timeout: float) -> datetime:
        """Let a lease end so many seconds from now (0 gives the message back); return when that is."""
        result = await self.call("extend_visibility", receipt=receipt, visibility_timeout=visibility_timeout)
        return datetime.fromisoformat(result["visible_at"])

    async def create_queue(self, queue: str, **attributes: Unpack[QueueAttributes]) -> dict[str, Any]:
        """Create a queue, or find it there with the attributes named; return its attributes."""
        return dict(await self.call("create_queue", queue=queue, **attributes))

    async def get_queue(self, queue: str) -> dict[str, Any]:
        """Return a queue's attributes, its `counts` and its `oldest_ready_age`."""
        return dict(await self.call("get_queue", queue=queue))

    async def count_messages(self, queue: str | None = None, status: str | None = None) -> dict[str, Any]:
        """Count messages by status, or those of one status, in one queue or in all of them."""
        return dict(await self.call("count_messages", **_given(queue=queue, status=status)))

    async def create_topic(self, topic: str, delivery: str | None = None) -> dict[str, Any]:
        """Create a topic that delivers "immediate" or "on_broadcast", or find it there; return it."""
        return dict(await self.call("create_topic", topic=topic, **_given(delivery=delivery)))

    async def subscribe(self, topic: str, name: str, **options: Unpack[SubscriptionOptions]) -> Subscription:
        """Let a queue, or a url, get copies of what is published from now on, or find the subscription there."""
        params = {"topic": topic, "name": name, **options}
        return msgspec.json.decode(await self._request("subscribe", params), type=Subscription)

    async def unsubscribe(self, subscription_id: str) -> int:
        """End a subscription; return how many messages that waited for its url were removed with it."""
        return int((await self.call("unsubscribe", subscription_id=subscription_id))["deleted_messages"])

    async def publish(self, topic: str, body: Any, **options: Unpack[MessageOptions]) -> Published:
        """Put a copy of a message into the queue of each subscription that wants it; all are committed then."""
        params = {"topic": topic, "body": body, **options}
        return msgspec.json.decode(await self._request("publish", params), type=Published)

    async def broadcast(self, topic: str) -> Broadcast:
        """Give what an "on_broadcast" topic has stored to all who subscribe now."""
        return msgspec.json.decode(await self._request("broadcast", {"topic": topic}), type=Broadcast)

    async def _request(self, method: str, params: Mapping[str, Any]) -> msgspec.Raw:
        """Make one call; return the JSON text of its result."""
        # The standard library's JSON here and for bodies: it keeps integers of any size, reads 1e400,
        # and refuses to send NaN, which msgspec would turn into null.
        text = json.dumps(params, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        wait = params.get("wait")
        return await self._post(method, text, wait if isinstance(wait, int | float) else 0)

    async def _post(self, method: str, params: str, wait: float) -> msgspec.Raw:
        if self._session is None:
            raise RuntimeError("The client is not open: use `async with Client(...) as client`.")
        text = f'{{"jsonrpc":"2.0","id":1,"method":{json.dumps(method)},"params":{params}}}'.encode()
        timeout = aiohttp.ClientTimeout(total=CALL_TIMEOUT + wait, connect=CONNECT_TIMEOUT)
        post = self._session.post(self._endpoint, data=text, timeout=timeout, allow_redirects=False)
        try:
            async with post as response:
                return _read_answer(response.status, await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            is_unsent = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            reason = str(error) or type(error).__name__
            _fail(f"No answer from {self._endpoint}: {reason}", outcome="none" if is_unsent else "unknown")


class _Error(msgspec.Struct):
    code: int
    message: str
    data: dict[str, Any]


class _Answer(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw()
    error: _Error | None = None


class _Delivery(msgspec.Struct):
    messages: list[Message]


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}


def _read_answer(status: int, text: bytes) -> msgspec.Raw:
    try:
        answer = msgspec.json.decode(text, type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answer = _Answer()
    if answer.error is not None:
        raise BrokerError(answer.error.code, answer.error.message, answer.error.data)
    if not bytes(answer.result):
        # Something between here and the broker has answered in its place.
        _fail(f"HTTP {status} came with no answer of a broker; is the address right?", outcome="unknown")
    return answer.result


def _fail(message: str, outcome: str) -> NoReturn:
    raise ConnectionFailed(-32001, message, {"type": "unavailable", "retryable": True, "outcome": outcome})
