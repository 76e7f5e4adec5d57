"""The Python client, through the socket: a real broker, and servers that break the connection on purpose."""

import asyncio
import json
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

import aiohttp
import pytest

from broker.client import BrokerError, Client, ConnectionFailed, LeaseLost, OutcomeUnknown, QueueNotFound
from broker.client import client as client_module
from conftest import PATIENCE, StartBroker
from scripted import http, server


@pytest.fixture
async def client(broker_url: str) -> AsyncIterator[Client]:
    async with Client(broker_url) as client:
        yield client


@pytest.fixture
async def queue(client: Client) -> str:
    name = f"client-{uuid.uuid4().hex}"
    await client.create_queue(name)
    return name


async def enqueue_text(url: str, queue: str, body: str) -> None:
    """Enqueue a body that this client would not write, as another producer may."""
    request = f'{{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{{"queue":"{queue}","body":{body}}}}}'
    headers = {"Content-Type": "application/json"}
    async with aiohttp.request("POST", f"{url}/rpc", data=request, headers=headers) as response:
        assert "result" in await response.json()


async def failure_of(call: Awaitable[Any]) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        await call
    return caught.value


async def test_a_message_arrives_with_everything_that_was_sent(client: Client, queue: str) -> None:
    body = {"text": "Ωmega", "number": 123456789012345678901234567890, "nothing": None, "zero": "\x00"}
    message_id = await client.enqueue(queue, body, headers={"kind": "greeting"}, sender="me", ttl=60)

    [message] = await client.dequeue(queue, visibility_timeout=20)

    assert (message.message_id, message.queue, message.body) == (message_id, queue, body)
    assert (message.headers, message.sender, message.receive_count) == ({"kind": "greeting"}, "me", 1)
    assert message.expires_at == message.enqueued_at + timedelta(seconds=60)
    assert message.first_received_at is not None
    assert message.visible_at == message.first_received_at + timedelta(seconds=20)
    assert message.dead_letter is None


async def test_the_text_of_a_body_can_be_had_as_it_was_sent(broker_url: str, client: Client, queue: str) -> None:
    await enqueue_text(broker_url, queue, '{"a": 1.0, "a": 1e400}')

    [message] = await client.dequeue(queue)

    assert bytes(message.body_json) == b'{"a": 1.0, "a": 1e400}'
    assert message.body == {"a": float("inf")}


async def test_a_body_that_python_cannot_hold_spoils_no_other(broker_url: str, client: Client) -> None:
    queue = f"client-{uuid.uuid4().hex}"
    await client.create_queue(queue, max_message_bytes=10_000)
    await enqueue_text(broker_url, queue, "9" * 5000)
    await client.enqueue(queue, 10**4000)

    unreadable, readable = await client.dequeue(queue, max_messages=2)

    assert readable.body == 10**4000
    with pytest.raises(ValueError, match="digits"):
        _ = unreadable.body
    assert await client.delete(unreadable.receipt)


async def test_the_messages_of_a_batch_come_in_order(client: Client, queue: str) -> None:
    ids = await client.enqueue_batch(queue, [{"body": n, "sender": f"s{n}"} for n in range(5)])

    messages = await client.dequeue(queue, max_messages=10)

    assert [message.message_id for message in messages] == ids
    assert [message.body for message in messages] == [0, 1, 2, 3, 4]
    assert [message.sender for message in messages] == ["s0", "s1", "s2", "s3", "s4"]


async def test_delete_says_whether_there_was_anything_to_delete(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    [message] = await client.dequeue(queue)

    assert await client.delete(message.receipt) is True
    assert await client.delete(message.receipt) is False


async def test_delete_batch_gives_each_receipt_its_own_outcome(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": 1}, {"body": 2}])
    one, two = await client.dequeue(queue, max_messages=2)

    results = await client.delete_batch([one.receipt, two.receipt, one.receipt, "not a receipt"])

    assert results[:3] == [True, True, False]
    assert isinstance(results[3], BrokerError)
    assert (results[3].type, results[3].code) == ("invalid_receipt", 1010)


async def test_extend_visibility_returns_when_the_lease_ends(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    [message] = await client.dequeue(queue, visibility_timeout=10)

    visible_at = await client.extend_visibility(message.receipt, 600)

    assert message.visible_at + timedelta(seconds=500) < visible_at
    assert visible_at < message.visible_at + timedelta(seconds=1200)
    assert visible_at.utcoffset() == timedelta(0)
    assert datetime.now(UTC) < visible_at


async def test_a_message_given_back_is_delivered_again(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    [first] = await client.dequeue(queue)
    await client.extend_visibility(first.receipt, 0)

    [second] = await client.dequeue(queue, wait=20)

    assert (second.message_id, second.receive_count) == (first.message_id, 2)
    assert second.receipt != first.receipt
    assert (await failure_of(client.delete(first.receipt))).type == "lease_lost"


async def test_a_message_delivered_at_most_once_has_no_receipt(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)

    [message] = await client.dequeue(queue, delivery="at_most_once")

    assert message.receipt is None
    assert (await client.count_messages(queue))["total"] == 0
    assert (await failure_of(client.delete(message.receipt))).type == "invalid_params"


async def test_attributes_that_are_not_given_are_not_sent(client: Client) -> None:
    queue = f"client-{uuid.uuid4().hex}"
    created = await client.create_queue(queue, message_ttl=60, visibility_timeout=5)

    # Had `message_ttl` been sent as null, this would be another queue.
    again = await client.create_queue(queue, visibility_timeout=5)

    assert created == again
    assert (created["message_ttl"], created["visibility_timeout"], created["delay"]) == (60, 5, 0)
    assert (await failure_of(client.create_queue(queue, message_ttl=None))).type == "queue_exists"


async def test_queues_can_be_looked_into(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    await client.enqueue(queue, 2, delay=600)
    await client.dequeue(queue)
    await client.enqueue(queue, 3)

    counts = {"ready": 1, "delayed": 1, "leased": 1, "total": 3, "exact": True}
    assert await client.count_messages(queue) == counts
    assert await client.count_messages(queue, "delayed") == {"total": 1, "exact": True}
    assert (await client.count_messages())["total"] >= 3
    assert (await client.get_queue(queue))["counts"] == counts


async def test_leases_can_be_extended_many_at_a_time(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": 1}, {"body": 2}])
    one, two = await client.dequeue(queue, max_messages=2, visibility_timeout=10)
    await client.delete(two.receipt)

    until, gone, wrong = await client.extend_visibility_batch([one.receipt, two.receipt, "not a receipt"], 600)

    assert isinstance(until, datetime)
    assert until > one.visible_at + timedelta(seconds=500)
    assert isinstance(gone, LeaseLost)
    assert isinstance(wrong, BrokerError)
    assert wrong.type == "invalid_receipt"


async def test_queues_and_messages_are_listed_page_by_page(
    client: Client, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{queue}-{n}" for n in range(3)]
    for name in names:
        await client.create_queue(name)
    ids = await client.enqueue_batch(names[0], [{"body": n} for n in range(205)])
    monkeypatch.setattr(client_module, "PAGE", 2)

    listed = [each["queue"] async for each in client.list_queues(f"{queue}-", counts=True)]
    messages = [message async for message in client.list_messages(names[0])]

    assert listed == names
    assert [message.message_id for message in messages] == ids
    assert {(message.status, message.receipt) for message in messages} == {("ready", None)}
    assert messages[7].body == 7
    assert [message async for message in client.list_messages(names[0], "leased")] == []


async def test_queues_are_changed_emptied_and_deleted(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(7)])

    changed = await client.update_queue(queue, visibility_timeout=5, message_ttl=None)

    assert (changed["visibility_timeout"], changed["message_ttl"]) == (5, None)
    assert await client.purge_queue(queue) == 7
    await client.enqueue(queue, 1)
    assert await client.delete_queue(queue) == 1
    with pytest.raises(QueueNotFound):
        await client.get_queue(queue)


async def test_dead_letters_go_back_all_or_so_many(client: Client, queue: str) -> None:
    other, dead = f"{queue}-other", f"{queue}-dead"
    await client.create_queue(dead)
    await client.create_queue(other, max_receives=1, dead_letter_queue=dead)
    await client.enqueue_batch(other, [{"body": n} for n in range(5)])
    for message in await client.dequeue(other, max_messages=5):
        await client.extend_visibility(message.receipt, 0)
    async with asyncio.timeout(PATIENCE):
        while (await client.count_messages(dead))["total"] < 5:
            await asyncio.sleep(0.05)  # until the sweeper has moved them

    assert await client.redrive(dead, max_messages=2) == 2
    assert await client.redrive(dead, to=queue) == 3
    assert (await client.count_messages(other))["total"] == 2
    assert (await client.count_messages(queue))["total"] == 3


async def test_a_call_may_wait_longer_than_other_calls_may_take(broker_url: str, client: Client, queue: str) -> None:
    await client.enqueue(queue, 1, delay=1)

    # Answers are due within half a second, but for the wait that was asked for.
    async with Client(broker_url, deadline=0, attempt_timeout=0.5) as hasty:
        [message] = await hasty.dequeue(queue, wait=20)

    assert message.body == 1


async def test_more_consumers_than_a_hundred_can_wait_over_one_client(client: Client, queue: str) -> None:
    waiting = [asyncio.create_task(client.dequeue(queue, wait=50)) for _ in range(150)]

    ids = await client.enqueue_batch(queue, [{"body": n} for n in range(150)])

    messages = [message for [message] in await asyncio.gather(*waiting)]
    assert sorted(message.message_id for message in messages) == sorted(ids)


async def test_a_consumer_that_is_cancelled_takes_no_message_with_it(client: Client, queue: str) -> None:
    waiting = asyncio.create_task(client.dequeue(queue, wait=50))
    await client.count_messages(queue)
    waiting.cancel()
    await asyncio.wait({waiting})

    await client.enqueue(queue, 1)

    # The first consumer may have been given the message before it hung up; then it comes back as it was.
    [message] = await client.dequeue(queue, wait=20)
    assert message.receive_count == 1


@pytest.fixture
async def topic(client: Client) -> str:
    name = f"client-{uuid.uuid4().hex}"
    await client.create_topic(name)
    return name


async def test_what_is_published_comes_to_every_queue_that_subscribes(client: Client, topic: str, queue: str) -> None:
    other = f"{queue}-other"
    await client.create_queue(other)
    every = await client.subscribe(topic, "every", queue=queue)
    some = await client.subscribe(topic, "some", queue=other, filter={"kind": ["news", "sports"]})

    news = await client.publish(topic, {"n": 1}, headers={"kind": "news"}, sender="me")
    weather = await client.publish(topic, {"n": 2}, headers={"kind": "weather"})

    [one, two] = await client.dequeue(queue, max_messages=10)
    [copy] = await client.dequeue(other, max_messages=10)
    assert (every.queue, every.url, every.filter, every.state, every.secret) == (queue, None, None, "active", None)
    assert some.filter == {"kind": ["news", "sports"]}
    assert (news.duplicate, news.deliveries, weather.deliveries) == (False, 2, 1)
    assert [(one.topic, one.published_id), (two.topic, two.published_id)] == [
        (topic, news.message_id),
        (topic, weather.message_id),
    ]
    assert (copy.body, copy.headers, copy.sender, copy.published_id) == (
        {"n": 1},
        {"kind": "news"},
        "me",
        news.message_id,
    )
    assert len({one.message_id, copy.message_id, news.message_id}) == 3  # a copy has an id of its own


async def test_what_was_not_published_is_no_copy(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    [message] = await client.dequeue(queue)

    assert (message.topic, message.published_id) == (None, None)


async def test_a_publish_that_is_repeated_under_its_key_makes_no_more_copies(
    client: Client, topic: str, queue: str
) -> None:
    await client.subscribe(topic, "only", queue=queue)
    first = await client.publish(topic, 1, idempotency_key="key")
    again = await client.publish(topic, 1, idempotency_key="key")

    assert (again.message_id, again.duplicate, again.deliveries) == (first.message_id, True, 1)
    assert (await client.count_messages(queue))["total"] == 1


async def test_a_subscription_that_ended_gets_no_more(client: Client, topic: str, queue: str) -> None:
    subscription = await client.subscribe(topic, "only", queue=queue)

    assert await client.unsubscribe(subscription.subscription_id) == 0
    assert (await client.publish(topic, 1)).deliveries == 0
    assert (await failure_of(client.unsubscribe(subscription.subscription_id))).type == "subscription_not_found"


async def test_a_topic_stores_until_it_is_told_to_broadcast(client: Client, queue: str) -> None:
    topic = f"client-{uuid.uuid4().hex}"
    created = await client.create_topic(topic, "on_broadcast")
    stored = await client.publish(topic, 1)
    await client.subscribe(topic, "late", queue=queue)

    given_out = await client.broadcast(topic)

    [message] = await client.dequeue(queue)
    assert (created["topic"], created["delivery"]) == (topic, "on_broadcast")
    assert stored.deliveries == 0
    assert (given_out.messages, given_out.deliveries, given_out.complete) == (1, 1, True)
    assert (message.body, message.published_id) == (1, stored.message_id)


async def test_the_secret_of_a_url_is_told_once(start_broker: StartBroker) -> None:
    broker = await start_broker(webhook_allow=("127.0.0.0/8",))
    async with Client(broker.url) as client:
        await client.create_topic("pushed")
        first = await client.subscribe("pushed", "one", url="http://127.0.0.1:9/", max_receives=3)
        again = await client.subscribe("pushed", "one", url="http://127.0.0.1:9/", max_receives=3)

    assert first.url == again.url == "http://127.0.0.1:9/"
    assert first.secret is not None
    assert first.secret.startswith("whsec_")
    assert (again.subscription_id, again.secret) == (first.subscription_id, None)


async def test_any_method_can_be_called_by_its_name(client: Client, queue: str) -> None:
    message_id = await client.enqueue(queue, {"any": "JSON"})

    message = await client.call("get_message", queue=queue, message_id=message_id)

    assert (message["status"], message["body"]) == ("ready", {"any": "JSON"})
    assert (await client.call("rpc.discover"))["openrpc"] == "1.3.2"


async def test_an_error_carries_what_a_program_decides_by(client: Client) -> None:
    error = await failure_of(client.enqueue("no-such-queue", 1))

    assert (error.code, error.type, error.retryable, error.outcome) == (1001, "queue_not_found", False, "none")
    assert error.data["type"] == "queue_not_found"
    assert str(error) == f"{error.message} (queue_not_found, 1001)"


async def test_an_error_of_a_batch_names_the_element(client: Client, queue: str) -> None:
    error = await failure_of(client.enqueue_batch(queue, [{"body": 1}, {"body": "x" * 5000}]))

    assert (error.type, error.data["index"]) == ("message_too_large", 1)
    assert (await client.count_messages(queue))["total"] == 0


async def test_what_is_no_json_is_never_sent(client: Client, queue: str) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        await client.enqueue(queue, float("nan"))
    with pytest.raises(TypeError):
        await client.enqueue(queue, {1, 2})
    with pytest.raises(UnicodeEncodeError):
        await client.enqueue(queue, "\ud800")
    assert (await client.count_messages(queue))["total"] == 0


async def test_a_broker_that_is_not_there_has_certainly_done_nothing() -> None:
    with socket.socket() as bound_but_deaf:
        bound_but_deaf.bind(("127.0.0.1", 0))
        port = bound_but_deaf.getsockname()[1]
        async with Client(f"http://127.0.0.1:{port}", deadline=0) as client:
            error = await failure_of(client.enqueue("default", 1))

    assert isinstance(error, ConnectionFailed)
    assert not isinstance(error, OutcomeUnknown)
    assert (error.type, error.retryable, error.outcome) == ("unavailable", True, "none")
    assert str(port) in str(error)


async def test_a_connection_that_breaks_after_sending_leaves_the_outcome_unknown() -> None:
    requests = []
    async with server(lambda request: requests.append(request)) as url, Client(url, deadline=0) as client:
        error = await failure_of(client.enqueue("default", 1))

    assert isinstance(error, ConnectionFailed)
    assert isinstance(error, OutcomeUnknown)
    assert (error.type, error.retryable, error.outcome) == ("unavailable", True, "unknown")
    assert len(requests) == 1  # It was not sent again.


async def test_an_answer_that_does_not_come_in_time_leaves_the_outcome_unknown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with Client(url, deadline=0, attempt_timeout=0.2) as client:
            error = await failure_of(client.enqueue("default", 1))

    assert isinstance(error, ConnectionFailed)
    assert isinstance(error, OutcomeUnknown)
    assert error.outcome == "unknown"


@pytest.mark.parametrize(
    "answer",
    [
        http("502 Bad Gateway", "<html>nobody home</html>"),
        http("200 OK", '{"hello":"world"}'),
        http("200 OK", ""),
        http("301 Moved Permanently", ""),
    ],
)
async def test_an_answer_that_is_not_the_brokers_leaves_the_outcome_unknown(answer: bytes) -> None:
    async with server(lambda _: answer) as url, Client(url, deadline=0) as client:
        error = await failure_of(client.enqueue("default", 1))

    assert isinstance(error, ConnectionFailed)
    assert isinstance(error, OutcomeUnknown)
    assert error.outcome == "unknown"


async def test_an_error_that_came_with_another_status_is_the_brokers_own() -> None:
    data = {"type": "unavailable", "retryable": True, "outcome": "none", "retry_after": 1}
    body = {"jsonrpc": "2.0", "id": None, "error": {"code": -32001, "message": "Draining.", "data": data}}
    answer = http("503 Service Unavailable", json.dumps(body))
    async with server(lambda _: answer) as url, Client(url, deadline=0) as client:
        error = await failure_of(client.enqueue("default", 1))

    assert not isinstance(error, ConnectionFailed)
    assert (error.code, error.outcome, error.data["retry_after"]) == (-32001, "none", 1)


async def test_a_token_goes_with_every_call() -> None:
    requests: list[bytes] = []

    def answer(request: bytes) -> bytes:
        requests.append(request)
        return http("200 OK", '{"jsonrpc":"2.0","id":1,"result":{"total":0,"exact":true}}')

    async with server(answer) as url, Client(url, token="secret-token") as client:
        assert await client.count_messages() == {"total": 0, "exact": True}

    assert b"\r\nAuthorization: Bearer secret-token\r\n" in requests[0]
    assert json.loads(requests[0].split(b"\r\n\r\n")[1])["params"] == {}


async def test_a_client_that_is_not_open_says_so() -> None:
    with pytest.raises(RuntimeError, match="async with Client"):
        await Client().count_messages()


async def test_an_address_without_a_scheme_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="must begin with http://"):
        Client("127.0.0.1:8080")


async def test_client_and_token_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bytes] = []

    def answer(request: bytes) -> bytes:
        requests.append(request)
        return http("200 OK", '{"jsonrpc":"2.0","id":1,"result":{"total":0,"exact":true}}')

    async with server(answer) as url:
        monkeypatch.setenv("BROKER_URL", url)
        monkeypatch.setenv("BROKER_TOKEN", "secret-token")
        async with Client.from_environment() as client:
            await client.count_messages()

    assert b"\r\nAuthorization: Bearer secret-token\r\n" in requests[0]


def test_the_client_loads_nothing_of_the_server_and_only_two_libraries() -> None:
    """In a process of its own, with all its modules, and with nothing else to be found than what it says it needs."""
    script = """
import importlib, importlib.metadata, pkgutil, sys
import broker.client
for module in pkgutil.iter_modules(broker.client.__path__):
    importlib.import_module(f"broker.client.{module.name}")
own = {name for name in sys.modules if name.startswith("broker.")}
assert {name for name in own if not name.startswith("broker.client")} == set(), own
roots = {name.partition(".")[0] for name in sys.modules}
known = importlib.metadata.packages_distributions()
print(*sorted({distribution for root in roots for distribution in known.get(root, [])}))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    # What aiohttp itself depends on, and nothing of what the server uses.
    of_aiohttp = {
        "aiohappyeyeballs", "aiosignal", "attrs", "frozenlist", "multidict", "propcache", "yarl", "idna",
    }  # fmt: skip
    loaded = set(ran.stdout.split())
    assert {"aiohttp", "msgspec"} <= loaded
    assert loaded - of_aiohttp - {"aiohttp", "msgspec", "wonderq", "setuptools", "typing_extensions"} == set()
