"""A message that is published again under its key is published once, and says what came of the first.

Time passes by moving the times that are stored; the sweeper is kept from sweeping.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker.errors import BrokerError
from broker.model import NewMessage
from broker.storage import publishing, subscriptions, sweeps, topics
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.group_commit import AGAIN, Again
from broker.storage.publishing import PublishCall, Published
from conftest import Broker, Connect, StartBroker
from gate import Gate, wait_until_blocked
from test_concurrency import transaction
from test_idempotency import pass_time
from test_messages import bodies, error_type, take
from test_topics import publish, rows, stored, subscribe, subscribed


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs."""
    started: Broker = await start_broker(sweep_interval=3600)
    return started


async def test_a_key_publishes_one_message(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "one", "two")
    first = await publish(broker, idempotency_key="k")
    assert (first["duplicate"], first["deliveries"]) == (False, 2)
    for _ in range(2):
        assert await publish(broker, idempotency_key="k") == {**first, "duplicate": True}
    assert (await publish(broker, idempotency_key="K"))["duplicate"] is False
    assert (await publish(broker))["duplicate"] is False
    assert await stored(connection) == {"one": 3, "two": 3}


async def test_a_duplicate_says_how_many_copies_there_were_the_first_time(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    first = await publish(broker, idempotency_key="k")
    await subscribe(broker, "three")
    assert (await publish(broker, idempotency_key="k")) == {**first, "duplicate": True}
    assert (await publish(broker, idempotency_key="l"))["deliveries"] == 3
    assert bodies(await take(broker, 9, "three")) == [1], "who came later gets no copy of the first"
    for subscription in (await broker.call("list_subscriptions"))["subscriptions"]:
        await broker.call("unsubscribe", subscription_id=subscription["subscription_id"])
    assert (await publish(broker, idempotency_key="k")) == {**first, "duplicate": True}


async def test_a_message_without_subscribers_has_used_its_key(broker: Broker) -> None:
    await broker.call("create_topic", topic="topic")
    first = await publish(broker, idempotency_key="k")
    await subscribe(broker, "q")
    assert await publish(broker, idempotency_key="k") == {**first, "duplicate": True}
    assert first["deliveries"] == 0
    assert await take(broker, queue="q") == []


async def test_a_key_belongs_to_its_topic_and_no_queue_shares_it(broker: Broker, connection: Connection) -> None:
    for topic in ("same", "other"):
        await subscribe(broker, "q", topic=topic)
    await broker.call("create_queue", queue="same")
    assert (await broker.call("enqueue", queue="same", body=0, idempotency_key="k"))["duplicate"] is False
    for topic in ("same", "other"):
        assert (await publish(broker, topic, topic=topic, idempotency_key="k"))["duplicate"] is False
    assert (await broker.call("enqueue", queue="same", body=0, idempotency_key="k"))["duplicate"]
    assert (await broker.call("enqueue", queue="q", body="same", idempotency_key="k"))["duplicate"] is False
    assert await stored(connection) == {"q": 3, "same": 1}


async def test_a_topic_that_is_created_again_has_no_keys(broker: Broker) -> None:
    await subscribe(broker, "q")
    await publish(broker, idempotency_key="k")
    await broker.call("delete_topic", topic="topic")
    await broker.call("create_topic", topic="topic")
    assert (await publish(broker, "another", idempotency_key="k"))["duplicate"] is False


@pytest.mark.parametrize("is_swept", [False, True])
async def test_a_key_is_remembered_for_300_seconds(broker: Broker, connection: Connection, is_swept: bool) -> None:
    """Whatever the windows of the queues are."""
    await broker.call("create_queue", queue="q", idempotency_window=1)
    await subscribe(broker, "q")
    first = await publish(broker, idempotency_key="k")
    await pass_time(connection, 299)
    if is_swept:
        assert await sweeps.forget_keys(connection, 100) == 0
    assert await publish(broker, idempotency_key="k") == {**first, "duplicate": True}
    await pass_time(connection, 1)
    if is_swept:
        assert await sweeps.forget_keys(connection, 100) == 1
    second = await publish(broker, "another", idempotency_key="k")
    assert second["duplicate"] is False
    await pass_time(connection, 299)
    assert await publish(broker, "another", idempotency_key="k") == {**second, "duplicate": True}


@pytest.mark.parametrize("body", [2, "1", 1.0, [1]])
@pytest.mark.parametrize("delivery", ["immediate", "on_broadcast"])
async def test_another_body_under_the_same_key_is_a_conflict(
    broker: Broker, connection: Connection, body: Any, delivery: str
) -> None:
    await broker.call("create_topic", topic="topic", delivery=delivery)
    await subscribe(broker, "q")
    await publish(broker, 1, idempotency_key="k")
    error = await broker.error("publish", topic="topic", body=body, idempotency_key="k")
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1007, "idempotency_conflict", "none")
    assert error["data"]["key"] == "k"
    assert await rows(connection, "messages") == 1


async def test_only_the_body_counts(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "q", filter={"a": ["b"]})
    first = await publish(broker, headers={"a": "b"}, sender="s", ttl=50, idempotency_key="k")
    assert first["deliveries"] == 1
    assert await publish(broker, headers={"a": "c"}, delay=5, idempotency_key="k") == {**first, "duplicate": True}
    (message,) = await take(broker, 9, "q")
    assert (message["headers"], message["sender"]) == ({"a": "b"}, "s")


async def test_a_duplicate_is_neither_too_large_nor_too_many(broker: Broker) -> None:
    await subscribe(broker, "q")
    first = await publish(broker, "some text", idempotency_key="k")
    await broker.call("update_queue", queue="q", max_message_bytes=5, max_messages=1)
    assert await publish(broker, "some text", idempotency_key="k") == {**first, "duplicate": True}
    assert await error_type(broker, "publish", topic="topic", body=1, idempotency_key="l") == "queue_full"


async def test_what_a_topic_stores_is_stored_once_also_after_it_was_broadcast(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_topic", topic="topic", delivery="on_broadcast")
    await subscribe(broker, "q")
    first = await publish(broker, idempotency_key="k")
    assert (first["duplicate"], first["deliveries"]) == (False, 0)
    assert await publish(broker, idempotency_key="k") == {**first, "duplicate": True}
    assert await broker.call("broadcast", topic="topic") == {"messages": 1, "deliveries": 1, "complete": True}
    assert await publish(broker, idempotency_key="k") == {**first, "duplicate": True}
    assert await stored(connection) == {"q": 1}
    (message,) = await take(broker, queue="q")
    assert message["published_id"] == first["message_id"]


async def test_a_publisher_that_was_cut_off_repeats_it(start_broker: StartBroker, connection: Connection) -> None:
    """Its connection dies while the statement waits; it is sent again to another broker, while the first goes on."""
    broker, other = [await start_broker(sweep_interval=3600, request_timeout=60) for _ in range(2)]
    await subscribe(broker, "one", "two")
    async with connection.transaction():
        await connection.execute("LOCK TABLE broker.idempotency_keys IN SHARE MODE")
        calls = [asyncio.create_task(publish(each, idempotency_key="k")) for each in (broker, other, broker)]
        waits = "SELECT count(*) FROM pg_locks WHERE relation = 'broker.idempotency_keys'::regclass AND NOT granted"
        async with asyncio.timeout(20):
            while await (await connection.execute(waits)).fetchone() != (2,):
                await asyncio.sleep(0.01)
        calls[0].cancel()
        await asyncio.wait(calls[:1])
    again = [await call for call in calls[1:]] + [await publish(each, idempotency_key="k") for each in (broker, other)]
    assert len({each["message_id"] for each in again}) == 1
    assert {each["deliveries"] for each in again} == {2}
    assert await stored(connection) == {"one": 1, "two": 1}


async def test_a_publish_whose_copies_are_not_stored_has_used_no_key(broker: Broker, connection: Connection) -> None:
    """The connection dies when the second copy is to be inserted."""
    await subscribe(broker, "one", "two")
    await connection.execute(
        """
        CREATE FUNCTION broker.dies() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_terminate_backend(pg_backend_pid())
            WHERE NEW.queue_id = (SELECT id FROM broker.queues WHERE name = 'two');
            RETURN NEW;
        END
        $$;
        CREATE TRIGGER dies BEFORE INSERT ON broker.messages FOR EACH ROW EXECUTE FUNCTION broker.dies()
        """
    )
    error = await broker.error("publish", topic="topic", body=1, idempotency_key="k")
    assert (error["data"]["type"], error["data"]["outcome"]) == ("unavailable", "unknown")
    assert await rows(connection, "idempotency_keys") == 0
    assert await rows(connection, "messages") == 0
    await connection.execute("DROP TRIGGER dies ON broker.messages")
    answer = await publish(broker, idempotency_key="k")
    assert (answer["duplicate"], answer["deliveries"]) == (False, 2)


# Calls that share a statement


def call(body: int, key: str | None = None, topic: str = "topic") -> PublishCall:
    return PublishCall(topic, NewMessage(str(body), None, None, None, None, key))


def kind(result: Published | BrokerError | Again) -> str:
    if isinstance(result, Published):
        return f"{'duplicate' if result.is_duplicate else 'new'} {result.deliveries}"
    return result.type if isinstance(result, BrokerError) else "again"


async def kinds(connection: Connection, *calls: PublishCall) -> list[str]:
    return [kind(each) for each in await publishing.publish(connection, calls)]


async def test_equal_calls_are_merged_and_another_body_is_run_again(connection: Connection) -> None:
    await subscribed(connection, "one", "two")
    await subscribed(connection, "one", topic="other")
    assert await kinds(
        connection,
        call(1, "a"),
        call(1, "a"),
        call(2, "a"),
        call(1, "b"),
        call(1, "a", "other"),
        call(1),
        call(1),
        call(1, "a", "nowhere"),
        call(1, "a", "nowhere"),
    ) == [
        "new 2", "duplicate 2", "again", "new 2", "new 1", "new 2", "new 2", "topic_not_found", "topic_not_found",
    ]  # fmt: skip
    assert await stored(connection) == {"one": 5, "two": 4}


async def test_of_one_statement_s_calls_those_that_are_refused_spoil_no_others(connection: Connection) -> None:
    await subscribed(connection, "q")
    assert await kinds(connection, call(1, "old"), call(1, "known")) == ["new 1", "new 1"]
    await connection.execute("UPDATE broker.queues SET max_message_bytes = 2 WHERE name = 'q'")
    assert await kinds(
        connection, call(999, "a"), call(1, "b"), call(2, "old"), call(1, "known"), call(1, None, "nowhere"), call(5)
    ) == ["message_too_large", "new 1", "idempotency_conflict", "duplicate 1", "topic_not_found", "new 1"]
    assert await stored(connection) == {"q": 4}
    keys = await (await connection.execute("SELECT key FROM broker.idempotency_keys ORDER BY key")).fetchall()
    assert keys == [("b",), ("known",), ("old",)]


async def test_whoever_is_behind_a_refused_call_in_a_full_queue_is_run_again(connection: Connection) -> None:
    await subscribed(connection, "q", "r")
    await connection.execute("UPDATE broker.queues SET max_message_bytes = 2, max_messages = 2 WHERE name = 'q'")
    assert await kinds(connection, call(999), call(1), call(2)) == ["message_too_large", "new 2", "again"]
    assert await kinds(connection, call(2), call(3)) == ["new 2", "queue_full"]
    assert await stored(connection) == {"q": 2, "r": 2}


async def test_calls_that_share_a_key_all_get_their_answer(database: Database, connection: Connection) -> None:
    await subscribed(connection, "one", "two")
    calls = Calls(database)
    results = await asyncio.gather(
        *(calls.publish("topic", call(n % 2, "k").message) for n in range(30)), return_exceptions=True
    )
    done = [each for each in results if isinstance(each, Published)]
    assert len(done) == 15
    assert {each.deliveries for each in done} == {2}
    assert len({each.id for each in done}) == 1
    assert sum(not each.is_duplicate for each in done) == 1
    assert {type(each).__name__ for each in results if each not in done} == {"IdempotencyConflict"}
    assert await stored(connection) == {"one": 1, "two": 1}


# Two at once


async def test_of_two_with_one_key_the_second_waits_and_is_the_duplicate(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await subscribed(one, "q", "r")
    async with transaction(one):
        (first,) = await publishing.publish(one, [call(1, "k")])
        task = asyncio.ensure_future(publishing.publish(two, [call(1, "k"), call(2, "l"), call(3)]))
        await wait_until_blocked(observer, two)
        await subscribed(observer, "s")
    results = await task
    assert [kind(each) for each in results] == ["duplicate 2", "new 2", "new 2"]
    assert isinstance(first, Published)
    assert isinstance(results[0], Published)
    assert results[0].id == first.id
    assert await stored(one) == {"q": 3, "r": 3}


async def test_a_key_whose_transaction_is_rolled_back_is_free(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await subscribed(one, "q")
    await one.execute("BEGIN")
    await publishing.publish(one, [call(1, "k")])
    task = asyncio.ensure_future(publishing.publish(two, [call(2, "k")]))
    await wait_until_blocked(observer, two)
    await one.execute("ROLLBACK")
    assert [kind(each) for each in await task] == ["new 1"]
    assert await stored(one) == {"q": 1}


async def test_a_call_that_meets_a_conflict_under_the_lock_is_refused_alone(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await subscribed(one, "q")
    async with transaction(one):
        await publishing.publish(one, [call(1, "k")])
        task = asyncio.ensure_future(publishing.publish(two, [call(2, "k"), call(3)]))
        await wait_until_blocked(observer, two)
    assert [kind(each) for each in await task] == ["idempotency_conflict", "new 1"]
    assert await stored(one) == {"q": 2}


async def test_a_key_that_is_forgotten_meanwhile_is_used_anew(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    await subscribed(one, "q")
    await publishing.publish(one, [call(1, "k")])
    async with gate.holding_back(two, publishing.publish(two, [call(1, "k")])) as task:
        await pass_time(one, 301)
        assert await sweeps.forget_keys(one, 10) == 1
    assert [kind(each) for each in await task] == ["new 1"]


async def test_statements_with_the_same_keys_in_opposite_orders_never_deadlock(connect: Connect) -> None:
    connections = [await connect() for _ in range(4)]
    await subscribed(connections[0], "q")
    await subscribed(connections[0], "q", topic="other")
    calls = [call(1, f"k{n}", ("topic", "other")[n % 2]) for n in range(50)]

    async def send(connection: Connection, order: int) -> None:
        for _ in range(10):
            await connection.execute("DELETE FROM broker.idempotency_keys WHERE key IN ('k0', 'k1')")
            assert AGAIN not in await publishing.publish(connection, calls[::order])

    await asyncio.gather(*(send(connection, 1 if n % 2 else -1) for n, connection in enumerate(connections)))


# The standby


@pytest.mark.parametrize(
    "what",
    ["copies", "no subscribers", "stored", "a duplicate", "a duplicate without copies", "a topic", "a subscription"],
)
async def test_every_answer_is_of_a_transaction_that_wrote(connection: Connection, what: str) -> None:
    """Or it would not wait for the standby: an id alone is not enough, see database.confirm."""
    await subscribed(connection, "q")
    await topics.create(connection, "nobody", None)
    await topics.create(connection, "later", "on_broadcast")
    await publishing.publish(connection, [call(1, "k", topic) for topic in ("topic", "nobody")])
    params: dict[str, Any] = {"queue": "q", "url": None, "filter": None, "attributes": {}}
    work: dict[str, Callable[[], Awaitable[Any]]] = {
        "copies": lambda: publishing.publish(connection, [call(1)]),
        "no subscribers": lambda: publishing.publish(connection, [call(1, None, "nobody")]),
        "stored": lambda: publishing.publish(connection, [call(1, None, "later")]),
        "a duplicate": lambda: publishing.publish(connection, [call(1, "k")]),
        "a duplicate without copies": lambda: publishing.publish(connection, [call(1, "k", "nobody")]),
        "a topic": lambda: topics.create(connection, "topic", None),
        "a subscription": lambda: subscriptions.subscribe(connection, "topic", "q", **params),
    }

    async def position() -> Any:
        return await (await connection.execute("SELECT pg_current_wal_insert_lsn()")).fetchone()

    async with connection.transaction():
        before = await position()
        await work[what]()
        assert await position() != before
        cursor = await connection.execute("SELECT pg_current_xact_id_if_assigned() IS NOT NULL")
        assert await cursor.fetchone() == (True,)
