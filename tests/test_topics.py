"""Topics: their names, their lists, and that nothing of a deleted one stays.

The sweeper is kept from sweeping but where a test says so.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.model import NewMessage, message_id_of
from broker.storage import broadcasting, publishing, queues, subscriptions, sweeps, topics, totals
from broker.storage.database import Connection, Database
from broker.storage.publishing import PublishCall, Published
from broker.sweeper import sweep_once
from conftest import Broker, Connect, StartBroker
from gate import Gate
from test_concurrency import transaction
from test_messages import MOMENT, bodies, error_type, pass_time, seconds_from_now, send, take

ID_OF_TOPIC = "SELECT id FROM broker.topics WHERE name = %s ORDER BY id DESC LIMIT 1"


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs."""
    started: Broker = await start_broker(sweep_interval=3600)
    return started


async def subscribe(broker: Broker, *names: str, topic: str = "topic", **how: Any) -> list[str]:
    """Let queues, which are made where there are none, get copies; return the ids of the subscriptions."""
    await broker.call("create_topic", topic=topic)
    made = []
    for name in names:
        await broker.call("create_queue", queue=name)
        subscribed = await broker.call("subscribe", topic=topic, name=name, queue=name, **how)
        made.append(subscribed["subscription_id"])
    return made


async def publish(broker: Broker, body: Any = 1, topic: str = "topic", **how: Any) -> dict[str, Any]:
    """Publish a message; return the answer."""
    answer: dict[str, Any] = await broker.call("publish", topic=topic, body=body, **how)
    assert set(answer) == {"message_id", "duplicate", "deliveries"}
    return answer


async def published(connection: Connection, *messages: str | NewMessage, topic: str = "topic") -> list[Published]:
    """Publish messages on a connection, in one statement, and none of them in vain."""
    new = [NewMessage(each, None, None, None, None) if isinstance(each, str) else each for each in messages]
    results = await publishing.publish(connection, [PublishCall(topic, each) for each in new])
    done = [each for each in results if isinstance(each, Published)]
    assert len(done) == len(results), results
    return done


async def subscribed(
    connection: Connection, *names: str, topic: str = "topic", delivery: str | None = None
) -> list[str]:
    """Let queues, which are made where there are none, get copies; return the ids of the subscriptions."""
    await topics.create(connection, topic, delivery)
    made = []
    for name in names:
        await queues.create(connection, name, {})
        params: dict[str, Any] = {"queue": name, "url": None, "filter": None, "attributes": {}}
        subscription, _ = await subscriptions.subscribe(connection, topic, name, **params)
        made.append(subscription.subscription_id)
    return made


async def stored(connection: Connection) -> dict[str, int]:
    """Return how many rows there are, of any state, under each name of a queue or topic that has any."""
    cursor = await connection.execute(
        """
        SELECT coalesce(q.name, t.name, '?'), count(*)
        FROM broker.messages m
        LEFT JOIN broker.queues q ON q.id = m.queue_id
        LEFT JOIN broker.topics t ON t.id = m.queue_id
        GROUP BY 1
        """
    )
    return dict(await cursor.fetchall())


async def names(broker: Broker, **params: Any) -> list[str]:
    return [each["topic"] for each in (await broker.call("list_topics", **params))["topics"]]


async def rows(connection: Connection, table: str) -> int:
    row = await (await connection.execute(f"SELECT count(*) FROM broker.{table}".encode())).fetchone()
    assert row is not None
    count: int = row[0]
    return count


# To create one


async def test_a_topic_is_created_once_and_shows_how_it_delivers(broker: Broker) -> None:
    created = await broker.call("create_topic", topic="t")
    assert set(created) == {"topic", "delivery", "created_at"}
    assert (created["topic"], created["delivery"]) == ("t", "immediate")
    assert MOMENT.fullmatch(created["created_at"])
    assert -10 < seconds_from_now(created["created_at"]) <= 0
    assert await broker.call("create_topic", topic="t") == created
    assert await broker.call("create_topic", topic="t", delivery="immediate") == created
    other = await broker.call("create_topic", topic="o", delivery="on_broadcast")
    assert other["delivery"] == "on_broadcast"
    assert await broker.call("create_topic", topic="o") == other, "nobody says how, so it is as it is"


@pytest.mark.parametrize("delivery", ["immediate", "on_broadcast"])
async def test_a_topic_that_delivers_otherwise_exists(broker: Broker, delivery: str) -> None:
    other = {"immediate": "on_broadcast", "on_broadcast": "immediate"}[delivery]
    await broker.call("create_topic", topic="t", delivery=delivery)
    error = await broker.error("create_topic", topic="t", delivery=other)
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1012, "topic_exists", "none")
    assert error["data"]["delivery"] == delivery
    assert (await broker.call("list_topics"))["topics"][0]["delivery"] == delivery


@pytest.mark.parametrize("name", ["", "x" * 129, "-x", ".x", "ä", "a b", "a\0", 1, None])
async def test_what_is_no_name_of_a_topic_is_refused(broker: Broker, name: Any) -> None:
    for method in ("create_topic", "delete_topic"):
        error = await broker.error(method, topic=name)
        assert (error["code"], error["data"]["param"]) == (-32602, "topic")
    assert await names(broker) == []


@pytest.mark.parametrize("name", ["x", "0", "x" * 128, "A.b-c_d"])
async def test_a_name_of_a_topic_is_as_one_of_a_queue(broker: Broker, name: str) -> None:
    assert (await broker.call("create_topic", topic=name))["topic"] == name
    assert await names(broker) == [name]


@pytest.mark.parametrize("delivery", ["", "Immediate", "later", None, 1])
async def test_what_is_no_delivery_is_refused(broker: Broker, delivery: Any) -> None:
    error = await broker.error("create_topic", topic="t", delivery=delivery)
    assert (error["code"], error["data"]["param"]) == (-32602, "delivery")


async def test_two_who_create_one_topic_at_once_get_the_same(broker: Broker, start_broker: StartBroker) -> None:
    other = await start_broker(sweep_interval=3600)
    for n in range(10):
        one, two = await asyncio.gather(*(each.call("create_topic", topic=f"t{n}") for each in (broker, other)))
        assert one == two


async def test_a_topic_and_a_queue_of_one_name_have_nothing_to_do_with_each_other(broker: Broker) -> None:
    await subscribe(broker, "other", topic="same")
    await broker.call("create_queue", queue="same")
    await send(broker, "to the queue", queue="same")
    await publish(broker, "to the topic", topic="same")
    assert bodies(await take(broker, 9, "same")) == ["to the queue"]
    assert bodies(await take(broker, 9, "other")) == ["to the topic"]
    await broker.call("delete_queue", queue="same")
    assert (await publish(broker, topic="same"))["deliveries"] == 1
    await broker.call("create_queue", queue="same")
    await broker.call("delete_topic", topic="same")
    assert (await broker.call("get_queue", queue="same"))["queue"] == "same"


# To list them


async def test_topics_are_listed_by_name_a_page_at_a_time(broker: Broker) -> None:
    assert await broker.call("list_topics") == {"topics": [], "next": None}
    for name in ("b", "a.2", "C", "a.1", "a-1", "a"):
        await broker.call("create_topic", topic=name)
    in_order = ["C", "a", "a-1", "a.1", "a.2", "b"]
    assert await names(broker) == in_order
    listed: list[str] = []
    after = None
    for _ in range(3):
        page = await broker.call("list_topics", limit=2, after=after)
        assert len(page["topics"]) == 2
        listed += [each["topic"] for each in page["topics"]]
        after = page["next"]
    assert (listed, after) == (in_order, None)
    assert await names(broker, prefix="a.") == ["a.1", "a.2"]
    assert await names(broker, prefix="a.", after="a.1") == ["a.2"]
    assert await names(broker, prefix="nobody") == []
    assert set((await broker.call("list_topics"))["topics"][0]) == {"topic", "delivery", "created_at"}


@pytest.mark.parametrize(
    ("param", "value"), [("limit", 0), ("limit", 1001), ("prefix", "x" * 129), ("prefix", "\0"), ("counts", 1)]
)
async def test_what_cannot_be_listed_is_refused(broker: Broker, param: str, value: Any) -> None:
    error = await broker.error("list_topics", **{param: value})
    assert (error["code"], error["data"]["param"]) == (-32602, param)


async def test_a_list_says_how_many_subscriptions_and_stored_messages_there_are(
    broker: Broker, connection: Connection
) -> None:
    await subscribe(broker, "one", "two", topic="at-once")
    await broker.call("create_topic", topic="later", delivery="on_broadcast")
    await subscribe(broker, "one", topic="later")
    await publish(broker, topic="at-once")
    for how in ({}, {"delay": 60}, {"ttl": 1}):
        await publish(broker, topic="later", **how)
    await pass_time(connection, 1)
    listed = (await broker.call("list_topics", counts=True))["topics"]
    assert [(each["topic"], each["subscriptions"], each["messages"]) for each in listed] == [
        ("at-once", 2, 0), ("later", 1, 2),
    ]  # fmt: skip


async def test_stored_messages_are_counted_up_to_ten_thousand(broker: Broker, connection: Connection) -> None:
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await fill_topic(connection, "t", 10_001)
    (listed,) = (await broker.call("list_topics", counts=True))["topics"]
    assert listed["messages"] == 10_000


async def fill_topic(connection: Connection, topic: str, how_many: int) -> None:
    """Let a topic store many messages."""
    await connection.execute(
        """
        INSERT INTO broker.messages (queue_id, id, enqueued_at, visible_at, body_bytes, body)
        SELECT t.id, nextval('broker.message_ids'), now(), now(), 1, '1'
        FROM broker.topics t, generate_series(1, %s) n
        WHERE t.name = %s AND t.deleted_at IS NULL
        """,
        [how_many, topic],
    )


# To delete one


async def test_a_deleted_topic_is_gone_with_its_subscriptions_and_copies_stay(
    broker: Broker, connection: Connection
) -> None:
    one, two = await subscribe(broker, "one", "two")
    await publish(broker)
    assert await broker.call("delete_topic", topic="topic") == {"deleted_messages": 0, "complete": True}
    assert await names(broker) == []
    assert await rows(connection, "subscriptions") == 0
    error = await broker.error("publish", topic="topic", body=1)
    assert (error["code"], error["data"]["topic"]) == (1008, "topic")
    for subscription in (one, two):
        assert await error_type(broker, "unsubscribe", subscription_id=subscription) == "subscription_not_found"
    assert bodies(await take(broker, 9, "one")) == bodies(await take(broker, 9, "two")) == [1]
    assert (await broker.call("delete_queue", queue="one"))["complete"], "nobody sends to it any more"


@pytest.mark.parametrize("method", ["delete_topic", "publish", "broadcast", "subscribe", "list_subscriptions"])
async def test_an_unknown_topic_is_not_found(broker: Broker, method: str) -> None:
    more: dict[str, dict[str, Any]] = {"publish": {"body": 1}, "subscribe": {"name": "s", "queue": "default"}}
    params = more.get(method, {})
    error = await broker.error(method, topic="nowhere", **params)
    assert (error["code"], error["data"]["type"]) == (1008, "topic_not_found")
    assert (error["data"]["topic"], error["data"]["outcome"]) == ("nowhere", "none")
    await broker.call("create_topic", topic="gone")
    await broker.call("delete_topic", topic="gone")
    assert await error_type(broker, method, topic="gone", **params) == "topic_not_found"


async def test_what_a_topic_stored_is_deleted_with_it(broker: Broker, connection: Connection) -> None:
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    for how in ({}, {"delay": 60}, {"ttl": 60}):
        await publish(broker, topic="t", **how)
    assert await broker.call("delete_topic", topic="t") == {"deleted_messages": 3, "complete": True}
    assert await rows(connection, "messages") == 0
    assert await error_type(broker, "delete_topic", topic="t") == "topic_not_found"


async def test_a_name_is_free_at_once_while_old_messages_remain(broker: Broker, connection: Connection) -> None:
    """The call that deleted it was broken off before it had removed the messages."""
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await publish(broker, "old", topic="t", idempotency_key="k")
    await connection.execute("UPDATE broker.topics SET deleted_at = now()")
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await subscribe(broker, "q", topic="t")
    assert await broker.call("broadcast", topic="t") == {"messages": 0, "deliveries": 0, "complete": True}
    assert (await broker.call("list_topics", counts=True))["topics"][0]["messages"] == 0
    assert (await publish(broker, "new", topic="t", idempotency_key="k"))["duplicate"] is False
    assert await broker.call("broadcast", topic="t") == {"messages": 1, "deliveries": 1, "complete": True}
    assert bodies(await take(broker, 9, "q")) == ["new"]
    assert (await sweep_once(connection)).of_deleted == 1
    assert await stored(connection) == {"q": 1}


async def test_a_deletion_that_was_broken_off_goes_on_when_it_is_repeated(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await fill_topic(connection, "t", 3)
    await connection.execute("UPDATE broker.topics SET deleted_at = now()")
    assert await broker.call("delete_topic", topic="t") == {"deleted_messages": 3, "complete": True}
    assert await error_type(broker, "delete_topic", topic="t") == "topic_not_found"


async def test_what_a_deleted_topic_leaves_is_removed_in_bounded_batches_and_its_row_after_a_day(
    connection: Connection,
) -> None:
    for name in ("gone", "kept"):
        await topics.create(connection, name, "on_broadcast")
        await fill_topic(connection, name, 5)
    await connection.execute("UPDATE broker.topics SET deleted_at = now() WHERE name = 'gone'")
    assert [await sweeps.remove_deleted(connection, 2) for _ in range(4)] == [2, 2, 1, 0]
    assert await stored(connection) == {"kept": 5}
    assert await rows(connection, "topics") == 2
    await connection.execute("UPDATE broker.topics SET deleted_at = now() - interval '25 hours' WHERE name = 'gone'")
    assert (await sweeps.chores(connection)).deleted_queues
    await sweeps.remove_deleted(connection, 2)
    assert await rows(connection, "topics") == 1
    assert not (await sweeps.chores(connection)).deleted_queues


async def test_a_running_broker_removes_what_a_deleted_topic_left(
    start_broker: StartBroker, connection: Connection
) -> None:
    broker = await start_broker(sweep_interval=0.01)
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await fill_topic(connection, "t", 2500)
    await connection.execute("UPDATE broker.topics SET deleted_at = now()")
    async with asyncio.timeout(30):
        while await rows(connection, "messages"):
            await asyncio.sleep(0.01)


async def test_a_message_published_while_its_topic_is_deleted_is_seen_by_nobody_and_the_sweeper_removes_it(
    database: Database, connect: Connect, gate: Gate
) -> None:
    one, two = await connect(), await connect()
    await subscribed(one, "q")
    async with gate.holding_back(two, published(two, "1")) as task:
        await topics.delete(database, "topic")
        await queues.delete(database, "q")
    assert (await task)[0].deliveries == 1, "it has seen the topic as it was"
    assert (await totals.count_all(one)).counts.total == 0
    assert (await sweep_once(one)).of_deleted == 1
    assert await rows(one, "messages") == 0


async def test_a_message_that_is_being_stored_when_its_topic_is_deleted_is_given_to_nobody_and_swept(
    database: Database, connect: Connect
) -> None:
    one, two = await connect(), await connect()
    await subscribed(one, "q", delivery="on_broadcast")
    async with transaction(two):
        await published(two, "1")
        assert await topics.delete(database, "topic") == (0, True)
    await subscribed(one, "q", delivery="on_broadcast")
    assert (await broadcasting.broadcast(database, "topic")).messages == 0
    assert (await sweep_once(one)).of_deleted == 1
    assert await rows(one, "messages") == 0


# What topics store is in no queue


@pytest.mark.parametrize("in_topic", [3, 30_000])
async def test_what_topics_store_is_no_message_of_any_queue(
    broker: Broker, connection: Connection, in_topic: int
) -> None:
    """Also in tables that are too large to be counted row by row."""
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await fill_topic(connection, "t", in_topic)
    await connection.execute("ANALYZE broker.messages")
    await send(broker, 1, 2)
    await send(broker, 3, delay=60)
    await take(broker)
    counted = await broker.call("count_messages")
    assert counted == {"ready": 1, "delayed": 1, "leased": 1, "total": 3, "exact": True}
    assert await broker.call("count_messages", status="ready") == {"total": 1, "exact": True}
    assert (await broker.call("get_queue", queue="default"))["counts"]["total"] == 3
    assert await error_type(broker, "get_queue", queue="t") == "queue_not_found"
    assert await error_type(broker, "dequeue", queue="t") == "queue_not_found"


async def test_stored_messages_that_have_expired_are_swept(broker: Broker, connection: Connection) -> None:
    await broker.call("create_topic", topic="t", delivery="on_broadcast")
    await publish(broker, topic="t", ttl=60)
    await publish(broker, topic="t", ttl=60, delay=60)
    await publish(broker, topic="t")
    assert await sweeps.remove_expired(connection, 10) == {}
    await pass_time(connection, 3600)
    assert await sweeps.remove_expired(connection, 10) == {"topic t": 2}
    assert await stored(connection) == {"t": 1}


async def test_ids_of_published_messages_and_copies_are_one_kind(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "q")
    answer = await publish(broker)
    (message,) = await take(broker, queue="q")
    assert message["message_id"] > answer["message_id"]
    (enqueued,) = await send(broker, 1)
    assert enqueued > message["message_id"]
    (row,) = await (
        await connection.execute("SELECT published_id FROM broker.messages WHERE topic = 'topic'")
    ).fetchall()
    assert message_id_of(row[0]) == answer["message_id"]
