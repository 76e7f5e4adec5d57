"""Promise 8: a message that is sent again under its key is stored once.

Time passes by moving the times that are stored; the sweeper is kept from sweeping.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.errors import BrokerError
from broker.model import NewMessage
from broker.storage import idempotency, queues, sweeps
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.group_commit import AGAIN, Again
from broker.storage.storing import EnqueueCall, Stored
from conftest import Broker, Connect, StartBroker
from gate import Gate, wait_until_blocked
from test_concurrency import transaction


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs."""
    started: Broker = await start_broker(sweep_interval=3600)
    return started


async def pass_time(connection: Connection, seconds: float) -> None:
    """Let so much time pass for every key."""
    await connection.execute(
        """
        UPDATE broker.idempotency_keys
        SET first_used_at = first_used_at - %(by)s::interval, expires_at = expires_at - %(by)s::interval
        """,
        {"by": f"{seconds} s"},
    )


async def send(broker: Broker, key: str | None, body: Any = 1, queue: str = "default", **how: Any) -> tuple[str, bool]:
    answer = await broker.call("enqueue", queue=queue, body=body, idempotency_key=key, **how)
    assert set(answer) == {"message_id", "duplicate"}
    return answer["message_id"], answer["duplicate"]


async def send_batch(
    broker: Broker, *messages: tuple[str | None, Any], queue: str = "default"
) -> list[tuple[str, bool]]:
    batch = [{"body": body, "idempotency_key": key} for key, body in messages]
    answer = await broker.call("enqueue_batch", queue=queue, messages=batch)
    return [(each["message_id"], each["duplicate"]) for each in answer["messages"]]


async def bodies(broker: Broker, queue: str = "default") -> list[Any]:
    listed = await broker.call("list_messages", queue=queue, limit=1000)
    return [message["body"] for message in listed["messages"]]


async def error_of(broker: Broker, method: str, /, **params: Any) -> dict[str, Any]:
    data: dict[str, Any] = (await broker.error(method, **params))["data"]
    return data


async def test_a_key_stores_one_message(broker: Broker) -> None:
    first, is_duplicate = await send(broker, "k")
    assert not is_duplicate
    assert await send(broker, "k") == (first, True)
    assert await send(broker, "K") != (first, True)
    assert await send(broker, None) != (first, True)
    assert await bodies(broker) == [1, 1, 1]


async def test_a_key_belongs_to_its_queue(broker: Broker) -> None:
    await broker.call("create_queue", queue="other")
    first, _ = await send(broker, "k")
    second, is_duplicate = await send(broker, "k", body=2, queue="other")
    assert not is_duplicate
    assert first != second


async def test_a_key_is_remembered_when_its_message_is_gone(broker: Broker) -> None:
    first, _ = await send(broker, "k")
    (message,) = (await broker.call("dequeue"))["messages"]
    assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}
    assert await send(broker, "k") == (first, True)
    assert await bodies(broker) == []
    await broker.call("purge_queue", queue="default")
    assert await send(broker, "k") == (first, True)


async def test_a_queue_that_is_created_again_has_no_keys(broker: Broker) -> None:
    await broker.call("create_queue", queue="q")
    await send(broker, "k", queue="q")
    await broker.call("delete_queue", queue="q")
    await broker.call("create_queue", queue="q")
    assert (await send(broker, "k", body="another", queue="q"))[1] is False


@pytest.mark.parametrize("body", [2, "1", 1.0, [1], {"a": 1}])
async def test_another_body_under_the_same_key_is_a_conflict(broker: Broker, body: Any) -> None:
    await send(broker, "k", 1)
    error = await broker.error("enqueue", body=body, idempotency_key="k")
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1007, "idempotency_conflict", "none")
    assert error["data"]["key"] == "k"
    assert await bodies(broker) == [1]


async def test_bodies_are_compared_byte_for_byte(broker: Broker) -> None:
    async def error_code(body: bytes) -> int | None:
        request = b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"idempotency_key":"k","body":' + body + b"}}"
        _, answer = await broker.post(request)
        return 1007 if b"idempotency_conflict" in answer else None

    assert await error_code(b'{"a":1}') is None
    assert await error_code(b'{"a":1}') is None
    assert await error_code(b'{"a": 1}') == 1007
    assert await error_code(b'{"a":1.0}') == 1007


async def test_only_the_body_counts(broker: Broker) -> None:
    first, _ = await send(broker, "k", delay=100, headers={"a": "b"}, sender="x", ttl=7)
    assert await send(broker, "k", headers={"c": "d"}) == (first, True)
    (message,) = (await broker.call("list_messages", queue="default"))["messages"]
    assert (message["status"], message["headers"], message["sender"]) == ("delayed", {"a": "b"}, "x")


@pytest.mark.parametrize("is_swept", [False, True])
async def test_a_key_is_free_again_when_its_window_is_over(
    broker: Broker, connection: Connection, is_swept: bool
) -> None:
    await broker.call("create_queue", queue="q", idempotency_window=60)
    first, _ = await send(broker, "k", queue="q")
    await pass_time(connection, 59)
    if is_swept:
        assert await sweeps.forget_keys(connection, 100) == 0
    assert await send(broker, "k", queue="q") == (first, True), "a duplicate does not make the window any longer"
    await pass_time(connection, 1)
    if is_swept:
        assert await sweeps.forget_keys(connection, 100) == 1
    second, is_duplicate = await send(broker, "k", body="another", queue="q")
    assert not is_duplicate
    assert await send(broker, "k", body="another", queue="q") == (second, True)
    await pass_time(connection, 59)
    assert await send(broker, "k", body="another", queue="q") == (second, True), "a window of its own"


async def test_a_window_that_was_shortened_counts_at_once_and_one_that_was_extended_from_the_next_use_on(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_queue", queue="q", idempotency_window=60)
    first, _ = await send(broker, "k", queue="q")
    await pass_time(connection, 30)
    await broker.call("update_queue", queue="q", idempotency_window=600)
    await pass_time(connection, 29)
    assert await send(broker, "k", queue="q") == (first, True)
    await pass_time(connection, 2)
    second, is_duplicate = await send(broker, "k", queue="q")
    assert not is_duplicate
    await pass_time(connection, 30)
    await broker.call("update_queue", queue="q", idempotency_window=20)
    assert (await send(broker, "k", queue="q"))[1] is False
    assert second != first


async def test_inside_a_batch_the_second_is_the_duplicate(broker: Broker) -> None:
    first, second, third, fourth = await send_batch(broker, ("a", 1), ("a", 1), (None, 1), ("b", 2))
    assert first == (second[0], False)
    assert second[1] is True
    assert (third[1], fourth[1]) == (False, False)
    assert await bodies(broker) == [1, 1, 2]
    assert await send_batch(broker, ("b", 2), ("c", 3), ("a", 1)) == [
        (fourth[0], True),
        ((await broker.call("list_messages", queue="default"))["messages"][-1]["message_id"], False),
        (first[0], True),
    ]
    assert await bodies(broker) == [1, 1, 2, 3]


async def test_a_conflict_fails_the_whole_batch_and_uses_none_of_its_keys(broker: Broker) -> None:
    await send(broker, "k", 1)
    batch = [{"body": n, "idempotency_key": f"n{n}"} for n in range(3)] + [{"body": 2, "idempotency_key": "k"}]
    data = await error_of(broker, "enqueue_batch", messages=batch)
    assert (data["type"], data["index"], data["key"]) == ("idempotency_conflict", 3, "k")
    assert await bodies(broker) == [1]
    assert [duplicate for _, duplicate in await send_batch(broker, ("n0", "another"), ("n2", 2))] == [False, False]


async def test_a_conflict_inside_a_batch_fails_it(broker: Broker) -> None:
    batch = [{"body": 0}, {"body": 1, "idempotency_key": "k"}, {"body": 2, "idempotency_key": "k"}]
    data = await error_of(broker, "enqueue_batch", messages=batch)
    assert (data["type"], data["index"]) == ("idempotency_conflict", 2)
    assert await bodies(broker) == []
    assert (await send(broker, "k", 2))[1] is False


async def test_a_refused_message_uses_no_key(broker: Broker) -> None:
    await broker.call("create_queue", queue="q", max_message_bytes=5)
    data = await error_of(broker, "enqueue", queue="q", body="too long", idempotency_key="k")
    assert (data["type"], data["limit"], data["given"]) == ("message_too_large", 5, 10)
    assert (await send(broker, "k", "abc", queue="q"))[1] is False
    batch = [{"body": 1, "idempotency_key": "l"}, {"body": 1, "idempotency_key": "l"}, {"body": "too long"}]
    assert (await error_of(broker, "enqueue_batch", queue="q", messages=batch))["index"] == 2
    assert (await send(broker, "l", "abc", queue="q"))[1] is False
    assert (await error_of(broker, "enqueue", queue="x", body=1, idempotency_key="k"))["type"] == "queue_not_found"


async def test_a_duplicate_is_neither_too_large_nor_too_many(broker: Broker) -> None:
    await broker.call("create_queue", queue="q", max_messages=2)
    first, _ = await send(broker, "k", "some text", queue="q")
    await send(broker, "l", queue="q")
    await broker.call("update_queue", queue="q", max_message_bytes=5)
    assert await send(broker, "k", "some text", queue="q") == (first, True)
    assert (await error_of(broker, "enqueue", queue="q", body=1, idempotency_key="m"))["type"] == "queue_full"
    await broker.call("update_queue", queue="q", max_messages=3)
    sent = await send_batch(broker, ("k", "some text"), ("l", 1), ("m", 1), queue="q")
    assert [duplicate for _, duplicate in sent] == [True, True, False]


@pytest.mark.parametrize("key", ["", "x" * 129, "a\0b", 1, ["k"]])
async def test_what_is_no_key_is_refused(broker: Broker, key: Any) -> None:
    error = await broker.error("enqueue", body=1, idempotency_key=key)
    assert (error["code"], error["data"]["param"]) == (-32602, "idempotency_key")


async def test_any_text_is_a_key(broker: Broker) -> None:
    for key in ("x" * 128, "ä" * 128, "💥" * 128, " ", "null", "a'b\\c"):
        first, _ = await send(broker, key)
        assert await send(broker, key) == (first, True)


async def test_keys_are_counted(broker: Broker) -> None:
    for _ in range(3):
        await send(broker, "k")
    metrics = broker.server.metrics.text().decode()
    assert "wonderq_messages_enqueued_total 1.0" in metrics
    assert "wonderq_messages_duplicate_total 2.0" in metrics


async def test_ended_keys_are_forgotten_in_bounded_batches(connection: Connection) -> None:
    new = [NewMessage("1", None, None, None, None, f"k{n}") for n in range(5)]
    await idempotency.enqueue(connection, [EnqueueCall("default", new, has_keys=True)])
    await pass_time(connection, 301)
    assert [await sweeps.forget_keys(connection, 2) for _ in range(4)] == [2, 2, 1, 0]


# Calls that share a statement


def call(*messages: tuple[str | None, int], queue: str = "default") -> EnqueueCall:
    new = [NewMessage(str(body), None, None, None, None, key) for key, body in messages]
    return EnqueueCall(queue, new, has_keys=True)


def kind(result: Stored | BrokerError | Again) -> str:
    if isinstance(result, Stored):
        return "".join("d" if place in result.duplicates else "n" for place in range(len(result.ids)))
    return result.type if isinstance(result, BrokerError) else "again"


def kinds(results: list[Stored | BrokerError | Again]) -> list[str]:
    return [kind(result) for result in results]


async def test_equal_calls_are_merged_and_what_else_shares_a_key_is_run_again(connection: Connection) -> None:
    results = await idempotency.enqueue(
        connection,
        [
            call(("a", 1)),
            call(("a", 1)),
            call(("a", 2)),
            call(("b", 1), ("a", 1)),
            call(("b", 1)),
            call((None, 1)),
            call(("c", 1), ("c", 2)),
            call(("a", 1), ("a", 1)),
            call(("a", 1), queue="nowhere"),
            call(("a", 1), queue="nowhere"),
        ],
    )
    assert kinds(results) == [
        "n", "d", "again", "again", "n", "n", "idempotency_conflict", "dd", "queue_not_found", "queue_not_found",
    ]  # fmt: skip
    cursor = await connection.execute("SELECT count(*), count(DISTINCT id) FROM broker.messages")
    assert await cursor.fetchone() == (3, 3)


async def test_calls_that_share_a_key_all_get_their_answer(database: Database) -> None:
    calls = Calls(database)
    sent = [call(("a", n % 2), ("b", 1)) if n % 3 else call(("a", n % 2)) for n in range(30)]
    results = await asyncio.gather(*(calls.enqueue(each.queue, each.messages) for each in sent), return_exceptions=True)
    stored = {result.ids[0] for result in results if isinstance(result, Stored)}
    assert len(stored) == 1
    refused = [result for result in results if not isinstance(result, Stored)]
    assert {type(error).__name__ for error in refused} == {"IdempotencyConflict"}
    assert len(refused) == 15
    async with database._pool.connection() as connection:
        cursor = await connection.execute("SELECT count(*) FROM broker.messages")
        assert await cursor.fetchone() == (2,)


# Two at once


async def test_of_two_with_one_key_the_second_waits_and_is_the_duplicate(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    async with transaction(one):
        (first,) = await idempotency.enqueue(one, [call(("k", 1))])
        task = asyncio.ensure_future(idempotency.enqueue(two, [call(("k", 1), ("l", 2))]))
        await wait_until_blocked(observer, two)
    (second,) = await task
    assert isinstance(first, Stored)
    assert isinstance(second, Stored)
    assert (second.ids[0], set(second.duplicates)) == (first.ids[0], {0})


async def test_a_key_whose_transaction_is_rolled_back_is_free(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await one.execute("BEGIN")
    await idempotency.enqueue(one, [call(("k", 1))])
    task = asyncio.ensure_future(idempotency.enqueue(two, [call(("k", 2))]))
    await wait_until_blocked(observer, two)
    await one.execute("ROLLBACK")
    assert kinds(await task) == ["n"]


async def test_a_batch_that_meets_a_conflict_under_the_lock_stores_nothing_and_is_run_again(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    async with transaction(one):
        await idempotency.enqueue(one, [call(("k", 1))])
        task = asyncio.ensure_future(idempotency.enqueue(two, [call(("j", 2), ("k", 2)), call(("x", 1))]))
        await wait_until_blocked(observer, two)
    assert kinds(await task) == ["again", "again"]
    cursor = await observer.execute("SELECT array_agg(key ORDER BY key) FROM broker.idempotency_keys")
    assert await cursor.fetchone() == (["k"],)
    assert kinds(await idempotency.enqueue(two, [call(("j", 2), ("k", 2))])) == ["idempotency_conflict"]


async def test_a_single_call_that_meets_a_conflict_under_the_lock_is_refused_alone(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    async with transaction(one):
        await idempotency.enqueue(one, [call(("k", 1))])
        task = asyncio.ensure_future(idempotency.enqueue(two, [call(("k", 2)), call(("x", 1))]))
        await wait_until_blocked(observer, two)
    assert kinds(await task) == ["idempotency_conflict", "n"]


async def test_a_key_that_is_forgotten_meanwhile_is_used_anew(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    await idempotency.enqueue(one, [call(("k", 1))])
    async with gate.holding_back(two, idempotency.enqueue(two, [call(("k", 1))])) as task:
        await pass_time(one, 301)
        assert await sweeps.forget_keys(one, 10) == 1
    assert kinds(await task) == ["n"]


async def test_statements_with_the_same_keys_in_opposite_orders_never_deadlock(connect: Connect) -> None:
    connections = [await connect() for _ in range(4)]
    keys = [f"k{n}" for n in range(50)]

    async def store(connection: Connection, order: int) -> None:
        for _ in range(10):
            await connection.execute("DELETE FROM broker.idempotency_keys WHERE key = 'k0'")
            batch = call(*((key, 1) for key in keys[::order]))
            while (await idempotency.enqueue(connection, [batch])) == [AGAIN]:
                pass

    await asyncio.gather(*(store(connection, 1 if n % 2 else -1) for n, connection in enumerate(connections)))


async def test_every_answer_is_of_a_transaction_that_wrote(connection: Connection) -> None:
    """Or it would not wait for the standby: see database.confirm."""

    async def writes(work: Any) -> bool:
        async with connection.transaction():
            await work
            cursor = await connection.execute("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
            (wrote,) = await cursor.fetchone() or (False,)
            return bool(wrote)

    await idempotency.enqueue(connection, [call(("k", 1))])
    assert await writes(idempotency.enqueue(connection, [call(("k", 1))]))
    assert await writes(queues.create(connection, "default", {}))
