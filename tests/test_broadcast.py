"""Broadcast: what a topic has stored goes to every subscription that there is now, each message in one transaction.

The sweeper is kept from sweeping but where a test says so. Time passes by moving the times that are stored.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from broker import waiting
from broker.errors import BrokerError, MessageTooLarge, QueueFull, Unavailable
from broker.storage import broadcasting, low_water, queues, subscriptions, sweeps, topics
from broker.storage.broadcasting import Broadcast, broadcast_batch
from broker.storage.database import Connection, Database
from broker.sweeper import sweep_once
from conftest import Broker, Connect, StartBroker
from gate import Gate
from test_concurrency import transaction
from test_messages import bodies, error_type, pass_time, seconds_between, take
from test_publishing import TEXTS, listed, parked
from test_topics import ID_OF_TOPIC, fill_topic, publish, published, rows, stored, subscribe, subscribed

DONE = {"messages": 0, "deliveries": 0, "complete": True}


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs, with a topic that delivers on broadcast."""
    started: Broker = await start_broker(sweep_interval=3600)
    await started.call("create_topic", topic="topic", delivery="on_broadcast")
    return started


@pytest.fixture(autouse=True)
def always_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers find what `pass_time` has moved below their low-water hints whenever a queue seems empty."""
    monkeypatch.setattr(low_water, "DOUBT_SHARE", 0)


async def broadcast(broker: Broker) -> dict[str, Any]:
    answer: dict[str, Any] = await broker.call("broadcast", topic="topic")
    return answer


async def number_of(connection: Connection, topic: str = "topic") -> int:
    row = await (await connection.execute(ID_OF_TOPIC, [topic])).fetchone()
    assert row is not None
    number: int = row[0]
    return number


async def copies(connection: Connection) -> list[tuple[str, int, int]]:
    """Return for each queue how many copies it has, and of how many messages."""
    cursor = await connection.execute(
        """
        SELECT q.name, count(*), count(DISTINCT m.published_id)
        FROM broker.messages m
        JOIN broker.queues q ON q.id = m.queue_id
        GROUP BY q.name
        ORDER BY q.name
        """
    )
    return await cursor.fetchall()


# What a broadcast gives out


async def test_what_is_published_is_stored_until_it_is_broadcast(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "one", "two")
    sent = [await publish(broker, n) for n in range(3)]
    assert [each["deliveries"] for each in sent] == [0, 0, 0]
    assert await stored(connection) == {"topic": 3}
    assert await take(broker, 9, "one") == []
    assert await broadcast(broker) == {"messages": 3, "deliveries": 6, "complete": True}
    for queue in ("one", "two"):
        taken = await take(broker, 9, queue)
        assert bodies(taken) == [0, 1, 2], "the oldest first"
        assert [(each["topic"], each["published_id"]) for each in taken] == [
            ("topic", each["message_id"]) for each in sent
        ]
    assert await broadcast(broker) == DONE
    assert await stored(connection) == {"one": 3, "two": 3}


async def test_a_broadcast_goes_to_those_who_are_there_now_and_gives_them_what_was_stored_before_they_came(
    broker: Broker,
) -> None:
    gone, _ = await subscribe(broker, "gone", "stays")
    await publish(broker, "before")
    await broker.call("unsubscribe", subscription_id=gone)
    await subscribe(broker, "new")
    assert await broadcast(broker) == {"messages": 1, "deliveries": 2, "complete": True}
    await subscribe(broker, "late")
    assert await broadcast(broker) == DONE
    for queue, found in (("gone", []), ("stays", ["before"]), ("new", ["before"]), ("late", [])):
        assert bodies(await take(broker, 9, queue)) == found


async def test_filters_are_those_of_the_time_of_the_broadcast(broker: Broker) -> None:
    await subscribe(broker, "all")
    await subscribe(broker, "red", filter={"colour": ["red"]})
    await publish(broker, 1, headers={"colour": "red"})
    await publish(broker, 2, headers={"colour": "blue"})
    await publish(broker, 3)
    await subscribe(broker, "blue", filter={"colour": ["blue", "green"], "size": ["1"]})
    await publish(broker, 4, headers={"colour": "blue", "size": "1"})
    assert await broadcast(broker) == {"messages": 4, "deliveries": 6, "complete": True}
    for queue, found in (("all", [1, 2, 3, 4]), ("red", [1]), ("blue", [4])):
        assert bodies(await take(broker, 9, queue)) == found


async def test_without_subscribers_the_messages_are_given_to_nobody_and_gone(
    broker: Broker, connection: Connection
) -> None:
    await publish(broker)
    await publish(broker)
    assert await broadcast(broker) == {"messages": 2, "deliveries": 0, "complete": True}
    assert await rows(connection, "messages") == 0
    await subscribe(broker, "late")
    assert await broadcast(broker) == DONE


async def test_a_topic_that_delivers_at_once_has_nothing_to_broadcast(broker: Broker) -> None:
    await broker.call("create_topic", topic="other")
    error = await broker.error("broadcast", topic="other")
    assert (error["code"], error["data"]["param"], error["data"]["outcome"]) == (-32602, "topic", "none")


@pytest.mark.parametrize("text", TEXTS)
async def test_the_very_bytes_of_the_body_come_out(broker: Broker, text: bytes) -> None:
    await subscribe(broker, "one", "two")
    await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"publish","params":{"topic":"topic","body":%s}}' % text)
    assert (await broadcast(broker))["deliveries"] == 2
    for queue in (b"one", b"two"):
        _, taken = await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"dequeue","params":{"queue":"%s"}}' % queue)
        assert b'"body":' + text + b"," in taken


async def test_every_copy_has_all_that_was_published(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    headers = {"kind": "é", "": "", "quote": '"\\'}
    await publish(broker, headers=headers, sender="mé")
    await broadcast(broker)
    one, two = [(await take(broker, queue=queue))[0] for queue in ("one", "two")]
    for copy in (one, two):
        assert (copy["headers"], copy["sender"], copy["receive_count"]) == (headers, "mé", 1)
    assert one["message_id"] != two["message_id"]


async def test_a_delay_counts_from_publish_on_and_without_one_each_queue_has_its_own_from_the_broadcast_on(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_queue", queue="slow", delay=50)
    await subscribe(broker, "plain")
    await broker.call("subscribe", topic="topic", name="slow", queue="slow")
    for n, delay in enumerate((None, 0, 100, 10)):
        await publish(broker, n, delay=delay)
    await pass_time(connection, 20)
    await broadcast(broker)
    waits = {
        queue: [
            round(seconds_between(each["enqueued_at"], each["visible_at"]), -1) for each in await listed(broker, queue)
        ]
        for queue in ("plain", "slow")
    }
    assert waits == {"plain": [0, 0, 80, 0], "slow": [50, 50, 80, 0]}


async def test_a_ttl_counts_from_publish_on_and_without_one_each_queue_has_its_own(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_queue", queue="brief", message_ttl=50)
    await subscribe(broker, "plain")
    await broker.call("subscribe", topic="topic", name="brief", queue="brief")
    await publish(broker, "own", ttl=100)
    await publish(broker, "of the queue")
    await pass_time(connection, 20)
    await broadcast(broker)
    left = {
        queue: [
            each["expires_at"] and round(seconds_between(each["enqueued_at"], each["expires_at"]), -1)
            for each in await listed(broker, queue)
        ]
        for queue in ("plain", "brief")
    }
    assert left == {"plain": [80, None], "brief": [80, 50]}


async def test_what_expires_before_is_not_given_out_swept_or_not(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "q")
    await publish(broker, "expired", ttl=60)
    await publish(broker, "expired while it was delayed", ttl=60, delay=90)
    await publish(broker, "stays")
    await pass_time(connection, 60)
    assert await broadcast(broker) == {"messages": 1, "deliveries": 1, "complete": True}
    assert bodies(await take(broker, 9, "q")) == ["stays"]
    await pass_time(connection, 60)
    assert await sweeps.remove_expired(connection, 10) == {"topic topic": 2}


async def test_two_subscriptions_to_one_queue_make_two_copies(broker: Broker) -> None:
    await subscribe(broker, "q")
    await broker.call("subscribe", topic="topic", name="again", queue="q")
    await publish(broker)
    assert (await broadcast(broker))["deliveries"] == 2
    assert bodies(await take(broker, 9, "q")) == [1, 1]


async def test_a_paused_queue_gets_its_copies(broker: Broker) -> None:
    await subscribe(broker, "q")
    await broker.call("update_queue", queue="q", paused=True)
    await publish(broker)
    assert (await broadcast(broker))["deliveries"] == 1
    await broker.call("update_queue", queue="q", paused=False)
    assert bodies(await take(broker, queue="q")) == [1]


async def test_a_broadcast_goes_on_over_many_transactions(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "one", "two")
    await fill_topic(connection, "topic", 1234)
    assert await broadcast(broker) == {"messages": 1234, "deliveries": 2468, "complete": True}
    assert await copies(connection) == [("one", 1234, 1234), ("two", 1234, 1234)]


async def test_copies_are_counted(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    await publish(broker)
    metrics = broker.server.metrics.text().decode()
    assert "wonderq_messages_published_total 1.0" in metrics
    assert "wonderq_messages_enqueued_total 0.0" in metrics
    await broadcast(broker)
    assert "wonderq_messages_enqueued_total 2.0" in broker.server.metrics.text().decode()


@pytest.mark.parametrize("where", ["here", "in another broker"])
async def test_who_waits_for_any_of_the_queues_is_woken(
    start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Nobody looks by itself within a minute: who is not told waits until the deadline."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 60.0)
    caller, other = [await start_broker(sweep_interval=3600) for _ in range(2)]
    hears = other if where == "in another broker" else caller
    await caller.call("create_topic", topic="topic", delivery="on_broadcast")
    await subscribe(caller, "one", "two")
    await publish(caller)
    heard = await parked(hears, "default")
    await caller.call("enqueue", body="they know each other")
    await heard["default"]
    tasks = await parked(hears, "one", "two")
    await broadcast(caller)
    async with asyncio.timeout(20):
        assert [bodies(await task) for task in tasks.values()] == [[1], [1]]


# What stops it


@pytest.mark.parametrize(
    ("limits", "kind", "error_class"),
    [({"max_messages": 2}, "queue_full", QueueFull), ({"max_message_bytes": 5}, "message_too_large", MessageTooLarge)],
)
async def test_a_queue_that_does_not_take_a_message_stops_it_and_all_from_there_on_stays(
    broker: Broker, connection: Connection, limits: dict[str, int], kind: str, error_class: type[BrokerError]
) -> None:
    await subscribe(broker, "wide", "narrow")
    await broker.call("update_queue", queue="narrow", **limits)
    for n, body in enumerate(("a", "b", "large", "c")):
        await publish(broker, body, idempotency_key=str(n))
    assert await broadcast(broker) == {"messages": 2, "deliveries": 4, "complete": False}
    assert await stored(connection) == {"wide": 2, "narrow": 2, "topic": 2}
    for _ in range(2):
        error = await broker.error("broadcast", topic="topic")
        assert (error["code"], error["data"]["type"]) == (error_class.code, kind)
        assert (error["data"]["queue"], error["data"]["limit"]) == ("narrow", next(iter(limits.values())))
        assert error["data"]["outcome"] == "none"
    assert await stored(connection) == {"wide": 2, "narrow": 2, "topic": 2}
    await broker.call("update_queue", queue="narrow", max_messages=None, max_message_bytes=100)
    assert await broadcast(broker) == {"messages": 2, "deliveries": 4, "complete": True}
    for queue in ("wide", "narrow"):
        assert bodies(await take(broker, 9, queue)) == ["a", "b", "large", "c"]


async def test_a_queue_whose_filter_does_not_match_stops_nothing(broker: Broker) -> None:
    await subscribe(broker, "wide")
    await subscribe(broker, "narrow", filter={"a": ["b"]})
    await broker.call("update_queue", queue="narrow", max_message_bytes=1, max_messages=1)
    await publish(broker, "x")
    await publish(broker, 1, headers={"a": "b"})
    await publish(broker, "x")
    assert await broadcast(broker) == {"messages": 3, "deliveries": 4, "complete": True}


async def test_a_broadcast_whose_time_is_over_says_so_and_is_repeated(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each transaction the clock that it looks at is a tenth of its time further."""
    monkeypatch.setattr(broadcasting, "MESSAGES_IN_A_BATCH", 1)
    await subscribed(connection, "one", "two", delivery="on_broadcast")
    await published(connection, *map(str, range(10)))
    in_all = Broadcast(0, [], complete=False)
    rounds = 0
    while not in_all.complete:
        with monkeypatch.context() as patched:
            patched.setattr(broadcasting, "time", ClockOfWork(database.request_timeout / 10))
            given = await broadcasting.broadcast(database, "topic")
        assert 0 < given.messages < 10
        assert given.deliveries == 2 * given.messages
        in_all = Broadcast(in_all.messages + given.messages, [], given.complete)
        rounds += 1
    assert in_all.messages == 10
    assert rounds > 1
    assert await copies(connection) == [("one", 10, 10), ("two", 10, 10)]


class ClockOfWork:
    """Each time that somebody looks, so much later."""

    def __init__(self, step: float) -> None:
        self._now = time.monotonic()
        self._step = step

    def monotonic(self) -> float:
        self._now += self._step
        return self._now


async def test_a_broadcast_that_the_database_breaks_off_has_lost_and_doubled_nothing(
    database: Database, connection: Connection, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message is locked by somebody, and one copy cannot be inserted: the connection dies under it."""
    monkeypatch.setattr(broadcasting, "MESSAGES_IN_A_BATCH", 2)
    await subscribed(connection, "one", "two", delivery="on_broadcast")
    await published(connection, *map(str, range(7)))
    await connection.execute(
        """
        CREATE FUNCTION broker.dies() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM pg_terminate_backend(pg_backend_pid());
            RETURN NEW;
        END
        $$;
        CREATE TRIGGER dies BEFORE INSERT ON broker.messages FOR EACH ROW WHEN (NEW.body::text = '4')
        EXECUTE FUNCTION broker.dies()
        """
    )
    given = await broadcasting.broadcast(database, "topic")
    assert (given.messages, given.deliveries, given.complete) == (4, 8, False)
    assert await stored(connection) == {"one": 4, "two": 4, "topic": 3}
    with pytest.raises(Unavailable):
        await broadcasting.broadcast(database, "topic")
    await connection.execute("DROP TRIGGER dies ON broker.messages")
    given = await broadcasting.broadcast(database, "topic")
    assert (given.messages, given.complete) == (3, True)
    assert await copies(connection) == [("one", 7, 7), ("two", 7, 7)]


# Two at once


async def test_two_broadcasts_from_two_brokers_make_no_second_copy_and_leave_nothing(
    start_broker: StartBroker, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcasting, "MESSAGES_IN_A_BATCH", 10)
    brokers = [await start_broker(sweep_interval=3600) for _ in range(2)]
    await brokers[0].call("create_topic", topic="topic", delivery="on_broadcast")
    await subscribe(brokers[0], "one", "two")
    await fill_topic(connection, "topic", 500)

    async def until_complete(broker: Broker) -> tuple[int, int]:
        messages = deliveries = 0
        while True:
            given = await broadcast(broker)
            messages += given["messages"]
            deliveries += given["deliveries"]
            if given["complete"]:
                return messages, deliveries

    given = await asyncio.gather(*(until_complete(broker) for broker in brokers for _ in range(2)))
    assert (sum(each for each, _ in given), sum(each for _, each in given)) == (500, 1000)
    assert await copies(connection) == [("one", 500, 500), ("two", 500, 500)]
    assert await stored(connection) == {"one": 500, "two": 500}


async def test_of_two_at_once_each_message_is_taken_by_one_and_who_comes_second_knows_there_is_more(
    database: Database, connect: Connect
) -> None:
    one, two = await connect(), await connect()
    await subscribed(one, "q", delivery="on_broadcast")
    await published(one, *map(str, range(5)))
    number = await number_of(one)
    async with transaction(one):
        taken, _, _, _ = await broadcast_batch(one, number, "topic", 3)
        assert taken == 3
        given = await broadcasting.broadcast(database, "topic")
        assert (given.messages, given.complete) == (2, False)
    assert (await broadcasting.broadcast(database, "topic")).complete
    assert await copies(two) == [("q", 5, 5)]


async def test_what_is_taken_after_the_snapshot_is_not_given_out_again(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    await subscribed(one, "q", delivery="on_broadcast")
    await published(one, "1", "2", "3")
    number = await number_of(one)
    async with gate.holding_back(two, broadcast_batch(two, number, "topic", 2)) as task:
        first, *_ = await broadcast_batch(one, number, "topic", 10)
    second, *_ = await task
    assert first + second == 3
    assert await copies(one) == [("q", 3, 3)]


async def test_a_message_that_is_being_published_is_given_out_by_the_next_broadcast(
    database: Database, connect: Connect
) -> None:
    one = await connect()
    await subscribed(one, "q", delivery="on_broadcast")
    async with transaction(one):
        await published(one, "1")
        assert await broadcasting.broadcast(database, "topic") == Broadcast(0, [], complete=True)
    assert (await broadcasting.broadcast(database, "topic")).messages == 1


async def test_a_copy_for_somebody_who_unsubscribes_meanwhile_leaves_nothing_behind(
    database: Database, connect: Connect, gate: Gate
) -> None:
    one, two = await connect(), await connect()
    (gone, _) = await subscribed(one, "gone", "stays", delivery="on_broadcast")
    await published(one, "1")
    async with gate.holding_back(two, broadcast_batch(two, await number_of(one), "topic", 10)) as task:
        await subscriptions.unsubscribe(database, gone)
        await queues.delete(database, "gone")
    assert (await task)[0] == 1
    assert (await sweep_once(one)).of_deleted == 1
    assert await stored(one) == {"stays": 1}


async def test_a_topic_that_is_deleted_while_it_is_broadcast_waits_for_it_and_leaves_nothing(
    database: Database, connect: Connect
) -> None:
    one, observer = await connect(), await connect()
    await subscribed(one, "q", delivery="on_broadcast")
    await published(one, "1", "2")
    async with transaction(one):
        assert (await broadcast_batch(one, await number_of(one), "topic", 1))[0] == 1
        task = asyncio.ensure_future(topics.delete(database, "topic"))
        waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        async with asyncio.timeout(20):
            while not await (await observer.execute(waits)).fetchall():
                await asyncio.sleep(0.01)
    assert await task == (1, True)
    assert await stored(one) == {"q": 1}


async def test_a_broadcast_of_a_topic_that_is_gone_meanwhile_gives_out_nothing(
    database: Database, connect: Connect
) -> None:
    one = await connect()
    await subscribed(one, "q", delivery="on_broadcast")
    await published(one, "1")
    number = await number_of(one)
    async with transaction(one):
        await topics._delete(one, "topic")
    assert (await broadcast_batch(one, number, "topic", 10))[0] == 1, "it has read the topic before"
    assert await stored(one) == {}


async def test_an_enqueue_does_not_wait_for_a_broadcast(connect: Connect, broker: Broker) -> None:
    one = await connect()
    await subscribe(broker, "q")
    await publish(broker)
    async with transaction(one):
        assert (await broadcast_batch(one, await number_of(one), "topic", 10))[0] == 1
        await broker.call("enqueue", queue="q", body=2)
        await publish(broker, 3)
        assert bodies(await take(broker, 9, "q")) == [2]


async def test_an_unknown_topic_is_not_found(broker: Broker) -> None:
    await broker.call("delete_topic", topic="topic")
    assert await error_type(broker, "broadcast", topic="topic") == "topic_not_found"
