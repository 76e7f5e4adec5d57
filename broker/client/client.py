"""The typed methods of a broker as coroutines, over one HTTP session.

Parameters carry the names, the units (seconds) and the limits of `rpc_schema.json`; those that are not given are not
sent. `Client.call` reaches the methods that have no function of their own here.
"""

from __future__ import annotations

import copy
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from typing import Any, Self, TypeVar, Unpack

import msgspec

from broker.client import tracing
from broker.client.consumer import Consumer
from broker.client.errors import BrokerError, error_of
from broker.client.messages import (
    Broadcast,
    ConsumerOptions,
    Handler,
    Message,
    MessageOptions,
    Messages,
    NewMessage,
    Published,
    QueueAttributes,
    Subscription,
    SubscriptionOptions,
)
from broker.client.transport import HARMLESS_TWICE, KEYED, Answer, Call, Transport

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8080"
# Queues at a time; messages are a tenth of it, because of their bodies.
PAGE = 1_000


class Client:
    """One broker, to be used as `async with Client(url, token) as client`.

    A call that fails is repeated within `deadline` seconds (beyond its own `wait`) where that is safe, and what it
    sends gets an idempotency key, where the caller gave none, so that it is safe. `deadline=0`: each call is sent
    once and as it is. An attempt that is not answered within `attempt_timeout` seconds (beyond `wait`) is given up; it
    is longer than the broker takes to give a call up (`--request-timeout`, 10), so that its answer, which knows
    the outcome, comes first. A coroutine that is cancelled hangs up, and what was leased for it the broker takes back.
    """

    def __init__(
        self, url: str = DEFAULT_URL, token: str | None = None, *, deadline: float = 30.0, attempt_timeout: float = 15.0
    ) -> None:
        self._transport = Transport(url, token, attempt_timeout)
        self._deadline = deadline

    @classmethod
    def from_environment(cls, *, deadline: float = 30.0) -> Self:
        """Return a client of the broker that BROKER_URL and BROKER_TOKEN name."""
        url, token = (os.environ.get(name) or None for name in ("BROKER_URL", "BROKER_TOKEN"))
        return cls(url or DEFAULT_URL, token, deadline=deadline)

    def with_deadline(self, deadline: float) -> Self:
        """Return this client with another deadline, over the same connections."""
        other = copy.copy(self)
        other._deadline = deadline
        return other

    @property
    def deadline(self) -> float:
        """For how many seconds a call is repeated; 0: not at all."""
        return self._deadline

    async def __aenter__(self) -> Self:
        self._transport.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._transport.close()

    async def call(self, method: str, /, **params: Any) -> Any:
        """Call any method by its name; return its result as Python values.

        Raises `BrokerError`, and ValueError or TypeError for what is no JSON (NaN, a set).
        """
        return json.loads(bytes((await self._request(method, params)).result))

    async def call_json(self, method: str, params: Mapping[str, str]) -> str:
        """Call any method with params that are JSON text; return its result as such: no byte of either changes.

        So no key is added to what is enqueued, and it is repeated in doubt only where one is given.
        """
        text = ",".join(f"{json.dumps(name)}:{value}" for name, value in params.items())
        try:
            wait = min(float(params.get("wait", 0)), 3600)
            key, delivery = (json.loads(params.get(name, "null")) for name in ("idempotency_key", "delivery"))
        except ValueError:
            wait, key, delivery = 0, None, None  # the broker says what is wrong with them
        keys = () if key is None else (str(key),)
        call = Call(method, f"{{{text}}}", wait, keys, bool(keys) or _is_harmless_twice(method, delivery))
        return bytes((await self._transport.carry_out(call, self._deadline)).result).decode()

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
        """Lease messages, at most 1 unless `max_messages` says more; none if none came within `wait`.

        What was leased by an attempt whose answer was lost comes back when its lease ends. At most once it is lost,
        so such a call is not repeated: OutcomeUnknown.
        """
        params = _given(max_messages=max_messages, visibility_timeout=visibility_timeout, wait=wait, delivery=delivery)
        answer = await self._request("dequeue", {"queue": queue, **params})
        return msgspec.json.decode(answer.result, type=Messages).messages

    async def delete(self, receipt: str | None) -> bool:
        """Delete a message that was handed out; return False if it was gone before.

        True also where that was found out by a repeat: then it may have been this call that removed it.
        """
        answer = await self._request("delete", {"receipt": receipt})
        return bool(json.loads(bytes(answer.result))["deleted"]) or answer.was_in_doubt

    async def delete_batch(self, receipts: Iterable[str | None]) -> list[bool | BrokerError]:
        """Delete 1 to 1,000 messages, each by itself; return for each what `delete` returns or raises."""
        answer = await self._request("delete_batch", {"receipts": list(receipts)})
        results = json.loads(bytes(answer.result))["results"]
        return [error_of(**r["error"]) if "error" in r else r["deleted"] or answer.was_in_doubt for r in results]

    async def extend_visibility(self, receipt: str | None, visibility_timeout: float) -> datetime:
        """Let a lease end so many seconds from now (0 gives the message back); return when that is."""
        result = await self.call("extend_visibility", receipt=receipt, visibility_timeout=visibility_timeout)
        return datetime.fromisoformat(result["visible_at"])

    async def extend_visibility_batch(
        self, receipts: Iterable[str | None], visibility_timeout: float
    ) -> list[datetime | BrokerError]:
        """Do so with 1 to 1,000 leases; return for each what `extend_visibility` returns or raises."""
        params = {"receipts": list(receipts), "visibility_timeout": visibility_timeout}
        results = (await self.call("extend_visibility_batch", **params))["results"]
        return [error_of(**r["error"]) if "error" in r else datetime.fromisoformat(r["visible_at"]) for r in results]

    async def consume(self, queue: str, handler: Handler, **options: Unpack[ConsumerOptions]) -> None:
        """Let a handler have every message, until SIGTERM or SIGINT; see `Consumer`."""
        await Consumer(self, queue, handler, **options).run()

    async def create_queue(self, queue: str, **attributes: Unpack[QueueAttributes]) -> dict[str, Any]:
        """Create a queue, or find it there with the attributes named; return its attributes."""
        return dict(await self.call("create_queue", queue=queue, **attributes))

    async def update_queue(self, queue: str, **attributes: Unpack[QueueAttributes]) -> dict[str, Any]:
        """Change the attributes named (None clears); return all of them."""
        return dict(await self.call("update_queue", queue=queue, **attributes))

    async def get_queue(self, queue: str) -> dict[str, Any]:
        """Return a queue's attributes, its `counts` and its `oldest_ready_age`."""
        return dict(await self.call("get_queue", queue=queue))

    async def list_queues(self, prefix: str = "", *, counts: bool = False) -> AsyncIterator[dict[str, Any]]:
        """Yield the queues whose name begins so, by name."""
        after = None
        while True:
            page = await self.call("list_queues", prefix=prefix, counts=counts, limit=PAGE, after=after)
            for queue in page["queues"]:
                yield queue
            if (after := page["next"]) is None:
                return

    async def list_messages(self, queue: str, status: str | None = None) -> AsyncIterator[Message]:
        """Yield the messages of a queue, or those of one status, by id; leases none."""
        after = None
        while True:
            params = {"queue": queue, "status": status, "limit": max(1, PAGE // 10), "after": after}
            page = msgspec.json.decode((await self._request("list_messages", params)).result, type=Messages)
            for message in page.messages:
                yield message
            if (after := page.next) is None:
                return

    async def purge_queue(self, queue: str) -> int:
        """Remove every message, those that are leased too; return how many there were."""
        return await self._until_complete("purge_queue", "purged", queue=queue)

    async def delete_queue(self, queue: str) -> int:
        """Delete a queue with all its messages; return how many there were."""
        return await self._until_complete("delete_queue", "deleted_messages", queue=queue)

    async def redrive(self, queue: str, to: str | None = None, max_messages: int | None = None) -> int:
        """Move dead letters back to where each came from, or to one queue; return how many."""
        if max_messages is None:
            return await self._until_complete("redrive", "moved", queue=queue, to=to)
        return int((await self.call("redrive", queue=queue, to=to, max_messages=max_messages))["moved"])

    async def count_messages(self, queue: str | None = None, status: str | None = None) -> dict[str, Any]:
        """Count messages by status, or those of one status, in one queue or in all of them."""
        return dict(await self.call("count_messages", **_given(queue=queue, status=status)))

    async def create_topic(self, topic: str, delivery: str | None = None) -> dict[str, Any]:
        """Create a topic that delivers "immediate" or "on_broadcast", or find it there; return it."""
        return dict(await self.call("create_topic", topic=topic, **_given(delivery=delivery)))

    async def subscribe(self, topic: str, name: str, **options: Unpack[SubscriptionOptions]) -> Subscription:
        """Let a queue, or a url, get copies of what is published from now on, or find the subscription there.

        Not repeated in doubt: the secret of a url is told once.
        """
        answer = await self._request("subscribe", {"topic": topic, "name": name, **options})
        return msgspec.json.decode(answer.result, type=Subscription)

    async def unsubscribe(self, subscription_id: str) -> int:
        """End a subscription; return how many messages that waited for its url were removed with it."""
        return int((await self.call("unsubscribe", subscription_id=subscription_id))["deleted_messages"])

    async def publish(self, topic: str, body: Any, **options: Unpack[MessageOptions]) -> Published:
        """Put a copy of a message into the queue of each subscription that wants it; all are committed then."""
        answer = await self._request("publish", {"topic": topic, "body": body, **options})
        return msgspec.json.decode(answer.result, type=Published)

    async def broadcast(self, topic: str) -> Broadcast:
        """Give what an "on_broadcast" topic has stored to all who subscribe now."""
        return msgspec.json.decode((await self._request("broadcast", {"topic": topic})).result, type=Broadcast)

    async def _until_complete(self, method: str, counted: str, **params: Any) -> int:
        total, is_complete = 0, False
        while not is_complete:
            result = await self.call(method, **params)
            total, is_complete = total + result[counted], result["complete"]
        return total

    async def _request(self, method: str, params: Mapping[str, Any]) -> Answer:
        """Make one call; return its answer with the JSON text of its result."""
        keys: tuple[str, ...] = ()
        if method in KEYED:
            params, keys = self._ready_to_send(params)
        # The standard library's JSON here and for bodies: it keeps integers of any size, reads 1e400,
        # and refuses to send NaN, which msgspec would turn into null.
        text = json.dumps(params, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        wait = params.get("wait")
        return await self._transport.carry_out(
            Call(
                method,
                text,
                wait if isinstance(wait, int | float) else 0.0,
                keys,
                _is_harmless_twice(method, params.get("delivery")) or (method in KEYED and bool(self._deadline)),
            ),
            self._deadline,
        )

    def _ready_to_send(self, params: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """Return params with trace headers and, where the call may be repeated, with keys; and these."""
        own = uuid.uuid4().hex if self._deadline else None
        keys: list[str] = []

        def ready(message: Any, own: str | None) -> Any:
            if not isinstance(message, Mapping):
                return message  # the broker says what is wrong with it
            given, headers = message.get("idempotency_key"), tracing.headers_with_trace(message.get("headers"))
            key = own if given is None else given
            keys.extend([] if key is None else [str(key)])
            return {**message, **_given(headers=headers, idempotency_key=key)}

        if "messages" not in params:
            params = ready(params, own)
        elif isinstance(params["messages"], list | tuple):
            messages = [ready(each, own and f"{own}-{n}") for n, each in enumerate(params["messages"])]
            params = {**params, "messages": messages}
        return params, tuple(keys)


def _is_harmless_twice(method: str, delivery: object) -> bool:
    """Whether to do this twice is to do it once; of `dequeue` at most once the first may have removed messages."""
    return method in HARMLESS_TWICE or (method == "dequeue" and delivery != "at_most_once")


def _given(**params: Any) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
