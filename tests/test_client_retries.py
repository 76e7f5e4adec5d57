"""What the client repeats, and what it does not: every failure, at every kind of call.

The servers break the connection, or answer what is asked for, once or for ever; whatever follows comes from a real
broker's answers. Pauses are made short where they do not matter.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker.client import (
    BrokerError,
    Client,
    ConnectionFailed,
    ConnectionLost,
    Forbidden,
    LeaseLost,
    OutcomeUnknown,
    QueueFull,
    transport,
)
from conftest import PATIENCE, Broker
from scripted import call_in, error, http, result, server

STORED = result({"message_id": "1", "duplicate": False})
DELIVERED = result({"messages": []})
LOST = None
# Ways of not knowing: the connection breaks, a gateway answers, the broker itself does not know.
IN_DOUBT: dict[str, bytes | None] = {
    "lost": LOST,
    "gateway": http("502 Bad Gateway", "<html>nobody home</html>"),
    "told": error("unavailable", retryable=True, outcome="unknown"),
}
NOT_DONE = error("unavailable", retryable=True)

CALLS: dict[str, tuple[Callable[[Client], Awaitable[Any]], bytes]] = {
    "enqueue": (lambda client: client.enqueue("q", 1), STORED),
    "enqueue_batch": (
        lambda client: client.enqueue_batch("q", [{"body": 1}, {"body": 2}]),
        result({"messages": [{"message_id": "1", "duplicate": False}] * 2}),
    ),
    "publish": (
        lambda client: client.publish("t", 1),
        result({"message_id": "1", "duplicate": False, "deliveries": 1}),
    ),
    "delete": (lambda client: client.delete("r"), result({"deleted": True})),
    "delete_batch": (lambda client: client.delete_batch(["r"]), result({"results": [{"deleted": True}]})),
    "extend_visibility": (
        lambda client: client.extend_visibility("r", 5),
        result({"visible_at": "2026-11-22T16:10:53.123456Z"}),
    ),
    "extend_visibility_batch": (lambda client: client.extend_visibility_batch(["r"], 5), result({"results": []})),
    "dequeue": (lambda client: client.dequeue("q"), DELIVERED),
    "dequeue that waits": (lambda client: client.dequeue("q", wait=20), DELIVERED),
    "get_queue": (lambda client: client.get_queue("q"), result({})),
    "count_messages": (lambda client: client.count_messages("q"), result({})),
    "create_queue": (lambda client: client.create_queue("q"), result({})),
    "rpc.discover": (lambda client: client.call("rpc.discover"), result({})),
}
ONCE: dict[str, tuple[Callable[[Client], Awaitable[Any]], bytes]] = {
    "dequeue at most once": (lambda client: client.dequeue("q", delivery="at_most_once"), DELIVERED),
    "update_queue": (lambda client: client.update_queue("q", paused=True), result({})),
    "delete_queue": (lambda client: client.delete_queue("q"), result({"deleted_messages": 0, "complete": True})),
    "redrive": (lambda client: client.redrive("q"), result({"moved": 0, "complete": True})),
    "broadcast": (lambda client: client.broadcast("t"), result({"messages": 0, "deliveries": 0, "complete": True})),
    "unsubscribe": (lambda client: client.unsubscribe("s"), result({"deleted_messages": 0})),
    "call": (lambda client: client.call("update_message", queue="q"), result({})),
    "enqueue as JSON without a key": (lambda client: client.call_json("enqueue", {"body": "1"}), STORED),
}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_PAUSE_SECONDS", 0.001)


@asynccontextmanager
async def scripted(*answers: bytes | None, deadline: float = PATIENCE) -> AsyncIterator[tuple[Client, list[Any]]]:
    """Yield a client of a server that gives these answers, the last one for ever, and the calls that it got."""
    calls: list[Any] = []
    left = list(answers)

    def answer(request: bytes) -> bytes | None:
        calls.append(call_in(request))
        return left.pop(0) if len(left) > 1 else left[0]

    async with server(answer) as url, Client(url, deadline=deadline) as client:
        yield client, calls


async def failure_of(call: Awaitable[Any]) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        await call
    return caught.value


@pytest.mark.parametrize("doubt", IN_DOUBT)
@pytest.mark.parametrize("name", CALLS)
async def test_what_is_harmless_twice_is_repeated_in_doubt_as_it_was_sent(name: str, doubt: str) -> None:
    call, good = CALLS[name]
    async with scripted(IN_DOUBT[doubt], IN_DOUBT[doubt], good) as (client, calls):
        await call(client)

    assert len(calls) == 3
    assert calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize("doubt", IN_DOUBT)
@pytest.mark.parametrize("name", ONCE)
async def test_what_may_have_been_done_and_must_not_be_done_twice_is_sent_once(name: str, doubt: str) -> None:
    call, good = ONCE[name]
    async with scripted(IN_DOUBT[doubt], good) as (client, calls):
        failure = await failure_of(call(client))

    assert len(calls) == 1
    assert isinstance(failure, OutcomeUnknown)
    assert (failure.outcome, failure.idempotency_key) == ("unknown", None)


@pytest.mark.parametrize("name", [*CALLS, *ONCE])
async def test_what_was_certainly_not_done_is_repeated_whatever_it_is(name: str) -> None:
    call, good = (CALLS | ONCE)[name]
    async with scripted(NOT_DONE, NOT_DONE, good) as (client, calls):
        await call(client)

    assert len(calls) == 3


@pytest.mark.parametrize("name", [*CALLS, *ONCE])
async def test_what_the_broker_refuses_is_not_repeated(name: str) -> None:
    call, good = (CALLS | ONCE)[name]
    async with scripted(error("forbidden", -32003), good) as (client, calls):
        failure = await failure_of(call(client))

    assert len(calls) == 1
    assert isinstance(failure, Forbidden)
    assert not isinstance(failure, OutcomeUnknown)


@pytest.mark.parametrize("name", [*CALLS, *ONCE])
async def test_without_a_deadline_everything_is_sent_once_and_as_it_is(name: str) -> None:
    call, good = (CALLS | ONCE)[name]
    async with scripted(NOT_DONE, good, deadline=0) as (client, calls):
        failure = await failure_of(call(client))

    assert len(calls) == 1
    assert (failure.type, failure.outcome) == ("unavailable", "none")
    assert "idempotency_key" not in json.dumps(calls)


async def test_every_message_that_is_sent_has_a_key_of_its_own() -> None:
    async with scripted(STORED) as (client, calls):
        await client.enqueue("q", 1)
        await client.enqueue("q", 1, idempotency_key=None)
        await client.call("publish", topic="t", body=1)
        for _ in range(2):
            with pytest.raises(KeyError):
                await client.enqueue_batch("q", [{"body": 1}, {"body": 2}])

    messages = [each for call in calls for each in call["params"].get("messages", [call["params"]])]
    keys = [message["idempotency_key"] for message in messages]
    assert len(set(keys)) == len(keys) == 7
    assert all(1 <= len(key) <= 128 for key in keys)


async def test_a_key_that_the_caller_gives_is_left_as_it_is() -> None:
    async with scripted(STORED) as (client, calls):
        await client.enqueue("q", 1, idempotency_key="mine")
        with pytest.raises(KeyError):
            await client.enqueue_batch("q", [{"body": 1, "idempotency_key": "one"}, {"body": 2}])

    assert calls[0]["params"]["idempotency_key"] == "mine"
    one, two = (message["idempotency_key"] for message in calls[1]["params"]["messages"])
    assert one == "one"
    assert two not in (None, "one")


async def test_params_that_are_no_messages_are_for_the_broker_to_refuse() -> None:
    async with scripted(error("invalid_params", -32602)) as (client, calls):
        for params in ({"messages": [1, None]}, {"messages": 5}, {"body": 1, "headers": 5}):
            assert (await failure_of(client.call("enqueue_batch", **params))).type == "invalid_params"

    assert [call["params"].get("messages") for call in calls] == [[1, None], 5, None]


@pytest.mark.parametrize(
    ("call", "keys"),
    [
        (lambda client: client.enqueue("q", 1, idempotency_key="mine"), 1),
        (lambda client: client.enqueue("q", 1), 1),
        (lambda client: client.publish("t", 1), 1),
        (lambda client: client.enqueue_batch("q", [{"body": 1}, {"body": 2, "idempotency_key": "two"}]), 2),
        (lambda client: client.call_json("enqueue", {"body": "1", "idempotency_key": '"mine"'}), 1),
        (lambda client: client.delete("r"), 0),
        (lambda client: client.dequeue("q"), 0),
    ],
)
async def test_a_deadline_that_ends_in_doubt_says_so_with_the_keys_to_repeat_it_by(
    call: Callable[[Client], Awaitable[Any]], keys: int
) -> None:
    async with scripted(LOST, deadline=0.2) as (client, calls):
        failure = await failure_of(call(client))

    assert isinstance(failure, ConnectionLost)
    assert isinstance(failure, OutcomeUnknown)
    assert isinstance(failure, ConnectionFailed)
    assert failure.outcome == failure.data["outcome"] == "unknown"
    assert len(calls) > 1
    params = calls[-1]["params"]
    sent = [each.get("idempotency_key") for each in params.get("messages", [params])]
    assert failure.idempotency_keys == tuple(key for key in sent if key is not None)
    assert len(failure.idempotency_keys) == keys
    assert failure.idempotency_key == (sent[0] if keys == 1 else None)


async def test_of_what_only_reads_nothing_is_ever_in_doubt() -> None:
    async with scripted(LOST, deadline=0.2) as (client, calls):
        failure = await failure_of(client.get_queue("q"))

    assert len(calls) > 1
    assert isinstance(failure, ConnectionFailed)
    assert not isinstance(failure, OutcomeUnknown)
    assert failure.outcome == "none"


async def test_a_doubt_stays_though_the_last_attempt_was_certainly_not_done() -> None:
    """The first may have stored the message, and nobody has been told whether."""
    async with scripted(LOST, error("queue_full", 1014, retryable=True), deadline=0.2) as (client, calls):
        failure = await failure_of(client.enqueue("q", 1))

    assert len(calls) > 2
    assert isinstance(failure, OutcomeUnknown)
    # Or the deadline has cut the last attempt off.
    assert failure.type in ("queue_full", "unavailable")
    assert failure.outcome == "unknown"
    assert failure.idempotency_key == calls[0]["params"]["idempotency_key"]


async def test_a_doubt_stays_though_a_repeat_was_refused() -> None:
    async with scripted(LOST, error("forbidden", -32003)) as (client, calls):
        failure = await failure_of(client.enqueue("q", 1))

    assert len(calls) == 2
    assert isinstance(failure, OutcomeUnknown)
    assert failure.type == "forbidden"


async def test_a_lease_that_is_lost_is_certain_also_at_a_repeat() -> None:
    async with scripted(LOST, error("lease_lost", 1004)) as (client, _):
        failure = await failure_of(client.delete("r"))

    assert isinstance(failure, LeaseLost)
    assert not isinstance(failure, OutcomeUnknown)


async def test_a_limit_that_lasts_is_what_the_call_ends_with() -> None:
    full = error("queue_full", 1014, retryable=True, limit=3)
    async with scripted(full, deadline=0.2) as (client, calls):
        failure = await failure_of(client.enqueue("q", 1))

    assert len(calls) > 1
    assert isinstance(failure, QueueFull)
    assert not isinstance(failure, OutcomeUnknown)


async def test_a_message_that_only_a_repeat_found_gone_counts_as_deleted() -> None:
    async with scripted(LOST, result({"deleted": False})) as (client, _):
        assert await client.delete("r") is True
    async with scripted(NOT_DONE, result({"deleted": False})) as (client, _):
        assert await client.delete("r") is False
    gone = {"results": [{"deleted": False}, {"error": {"code": 1004, "message": "m", "data": {"type": "lease_lost"}}}]}
    async with scripted(LOST, result(gone)) as (client, _):
        deleted, lost = await client.delete_batch(["r", "s"])
    assert deleted is True
    assert isinstance(lost, LeaseLost)


@pytest.mark.parametrize(
    "refusal",
    [
        error("overloaded", -32002, retryable=True, retry_after=1),
        error("unavailable", retryable=True, status="503 Service Unavailable", head="Retry-After: 1\r\n"),
        error("overloaded", -32002, retryable=True, status="429 Too Many Requests", head="Retry-After: 1\r\n"),
        http("503 Service Unavailable", "<html>a proxy's</html>", "Retry-After: 1\r\n"),
    ],
    ids=["data", "503", "429", "a proxy"],
)
async def test_nobody_is_asked_again_before_he_said(refusal: bytes) -> None:
    async with scripted(refusal, result({})) as (client, calls):
        began_at = time.monotonic()
        await client.get_queue("q")

    assert time.monotonic() - began_at >= 1
    assert len(calls) == 2


async def test_who_asks_for_more_time_than_there_is_is_not_waited_for() -> None:
    async with scripted(error("overloaded", -32002, retryable=True, retry_after=3600)) as (client, calls):
        async with asyncio.timeout(PATIENCE):
            failure = await failure_of(client.get_queue("q"))

    assert len(calls) == 1
    assert failure.type == "overloaded"


async def test_a_deadline_is_kept_where_nobody_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with Client(url, deadline=0.5, attempt_timeout=600) as client, asyncio.timeout(PATIENCE):
            began_at = time.monotonic()
            failure = await failure_of(client.enqueue("q", 1))

    assert time.monotonic() - began_at >= 0.4
    assert isinstance(failure, OutcomeUnknown)


async def test_a_broker_that_comes_within_the_deadline_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "broker.client")
    port = free_port()
    async with Client(f"http://127.0.0.1:{port}", deadline=PATIENCE) as client:
        calling = asyncio.create_task(client.count_messages())
        async with asyncio.timeout(PATIENCE):
            while not caplog.records:  # It has failed, and is about to be sent again.
                await asyncio.sleep(0.001)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"}}")
            writer.write(result({"total": 0}))
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", port):
            assert await calling == {"total": 0}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.mark.parametrize("answer", [http("404 Not Found", "nothing here"), http("200 OK", "<html></html>")])
async def test_an_address_where_there_is_no_broker_is_said_at_once(answer: bytes) -> None:
    async with scripted(answer) as (client, calls), asyncio.timeout(PATIENCE):
        failure = await failure_of(client.get_queue("q"))

    assert len(calls) == 1
    assert "is the address right?" in str(failure)


async def test_another_deadline_may_be_set_over_the_same_connections(broker_url: str) -> None:
    async with Client(broker_url, deadline=7) as client:
        hasty = client.with_deadline(0)
        await hasty.enqueue("default", 1)

        assert (client.deadline, hasty.deadline) == (7, 0)
        assert (await client.count_messages("default"))["total"] == 1


def test_pauses_are_random_grow_and_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "FIRST_PAUSE_SECONDS", 0.1)
    first = [transport.pause_before(0) for _ in range(1000)]
    late = [transport.pause_before(10_000) for _ in range(1000)]

    assert 0 <= min(first) < 0.02
    assert 0.08 < max(first) <= 0.1
    assert min(late) < 1
    assert 4 < max(late) <= transport.LONGEST_PAUSE_SECONDS
    assert min(transport.pause_before(3, 2.0) for _ in range(100)) >= 2


class Breaking:
    """Something between client and broker that passes requests on, and loses every other answer."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._requests = 0

    @property
    def lost(self) -> int:
        return (self._requests + 1) // 2

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        _, answered = await self._broker.post(body)
        self._requests += 1
        if self._requests % 2 == 0:
            writer.write(http("200 OK", answered.decode()))
            await writer.drain()
        writer.close()


async def test_with_every_other_answer_lost_each_message_is_stored_and_deleted_once(broker: Broker) -> None:
    queue, topic = f"q-{uuid.uuid4().hex}", f"t-{uuid.uuid4().hex}"
    await broker.call("create_queue", queue=queue)
    await broker.call("create_topic", topic=topic)
    await broker.call("subscribe", topic=topic, name="one", queue=queue)
    breaking = Breaking(broker)
    async with await asyncio.start_server(breaking.serve, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with Client(url) as client:
            for n in range(10):
                await client.enqueue(queue, n)
                await client.enqueue_batch(queue, [{"body": [n, 1]}, {"body": [n, 2]}])
                await client.publish(topic, {"n": n})
            stored = [message async for message in client.list_messages(queue)]
            bodies = [json.dumps(message.body) for message in stored]
            assert len(bodies) == len(set(bodies)) == 40

            [message] = await client.dequeue(queue)  # what the lost answer leased is somebody's for now
            assert await client.delete(message.receipt) is True
    assert breaking.lost > 30
    assert (await broker.call("count_messages", queue=queue))["total"] == 39
