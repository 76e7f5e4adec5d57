"""Publish: a copy for each subscription that wants it, all in one transaction.

The sweeper is kept from sweeping but where a test says so. Time passes by moving the times that are stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from broker import waiting
from broker.errors import MessageTooLarge
from broker.model import NewMessage
from broker.storage import dead_letters, low_water, publishing, sweeps
from broker.storage.database import Connection
from broker.storage.publishing import PublishCall, Published
from conftest import Broker, StartBroker
from outside import eventually
from test_messages import bodies, error_type, pass_time, seconds_between, send, take
from test_topics import publish, rows, stored, subscribe, subscribed

NO_SUCH_FIELDS = {"topic", "published_id"}
TEXTS = [
    b"1.0", b"1e400", b"123456789012345678901234567890", rb'"\u0000"', b'{"a":1,"a":2}', b'{ "b" :\t[ ] , "a" : { } }',
    '"\u00e4\U0001f4a5"'.encode(), b"null", b"false", rb'"\ud83d\ude00 \/ \u00e4"',
]  # fmt: skip


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs."""
    started: Broker = await start_broker(sweep_interval=3600)
    return started


@pytest.fixture(autouse=True)
def always_in_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers find what `pass_time` has moved below their low-water hints whenever a queue seems empty."""
    monkeypatch.setattr(low_water, "DOUBT_SHARE", 0)


async def listed(broker: Broker, queue: str) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = (await broker.call("list_messages", queue=queue, limit=1000))["messages"]
    return messages


# Copies


async def test_each_subscription_gets_a_copy_with_an_id_of_its_own(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    answer = await publish(broker, {"a": 1})
    assert (answer["duplicate"], answer["deliveries"]) == (False, 2)
    (one,), (two,) = await take(broker, 9, "one"), await take(broker, 9, "two")
    assert len({one["message_id"], two["message_id"], answer["message_id"]}) == 3
    for copy, queue in ((one, "one"), (two, "two")):
        assert (copy["queue"], copy["body"], copy["receive_count"]) == (queue, {"a": 1}, 1)
        assert (copy["topic"], copy["published_id"]) == ("topic", answer["message_id"])
    assert await broker.call("delete", receipt=one["receipt"]) == {"deleted": True}
    await broker.call("extend_visibility", receipt=two["receipt"], visibility_timeout=0)
    assert bodies(await take(broker, 9, "two")) == [{"a": 1}], "what becomes of one copy is no business of the other"


async def test_a_copy_shows_its_topic_wherever_it_is_shown(broker: Broker) -> None:
    await subscribe(broker, "q")
    answer = await publish(broker)
    (in_list,) = await listed(broker, "q")
    got = await broker.call("get_message", queue="q", message_id=in_list["message_id"])
    updated = await broker.call("update_message", queue="q", message_id=in_list["message_id"], body=2)
    (taken,) = await take(broker, queue="q")
    await broker.call("extend_visibility", receipt=taken["receipt"], visibility_timeout=0)
    (once,) = await take(broker, queue="q", delivery="at_most_once")
    for copy in (in_list, got, updated, taken, once):
        assert (copy["topic"], copy["published_id"]) == ("topic", answer["message_id"])


async def test_what_is_no_copy_shows_no_topic(broker: Broker) -> None:
    await send(broker, 1)
    (in_list,) = await listed(broker, "default")
    (taken,) = await take(broker)
    await broker.call("extend_visibility", receipt=taken["receipt"], visibility_timeout=0)
    (once,) = await take(broker, delivery="at_most_once")
    for message in (in_list, taken, once):
        assert not NO_SUCH_FIELDS & message.keys()


async def test_every_copy_has_all_that_was_sent(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    headers = {"kind": "é", "": "", "empty": "", "quote": '"\\'}
    await publish(broker, "x", headers=headers, sender="mé", delay=0, ttl=100)
    for queue in ("one", "two"):
        (copy,) = await take(broker, queue=queue)
        assert (copy["headers"], copy["sender"], copy["dead_letter"]) == (headers, "mé", None)
        assert seconds_between(copy["enqueued_at"], copy["expires_at"]) == 100
    await publish(broker, "y")
    (copy,) = await take(broker, queue="one")
    assert (copy["headers"], copy["sender"], copy["expires_at"]) == ({}, None, None)


@pytest.mark.parametrize("text", TEXTS)
async def test_the_very_bytes_of_the_body_come_out(broker: Broker, text: bytes) -> None:
    await subscribe(broker, "one", "two")
    call = b'{"jsonrpc":"2.0","id":1,"method":"publish","params":{"topic":"topic","body":%s}}'
    _, answer = await broker.post(call % text)
    assert b'"deliveries":2' in answer
    for queue in (b"one", b"two"):
        _, taken = await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"dequeue","params":{"queue":"%s"}}' % queue)
        assert b'"body":' + text + b"," in taken


async def test_what_is_null_is_as_each_queue_says(broker: Broker) -> None:
    await broker.call("create_queue", queue="plain")
    await broker.call("create_queue", queue="slow", delay=50, message_ttl=500)
    for queue in ("plain", "slow"):
        await broker.call("create_topic", topic="topic")
        await broker.call("subscribe", topic="topic", name=queue, queue=queue)
    await publish(broker, 1)
    await publish(broker, 2, delay=7, ttl=70)
    await publish(broker, 3, delay=0)
    times = {
        queue: [
            (
                seconds_between(each["enqueued_at"], each["visible_at"]),
                each["expires_at"] and seconds_between(each["enqueued_at"], each["expires_at"]),
            )
            for each in await listed(broker, queue)
        ]
        for queue in ("plain", "slow")
    }
    assert times == {"plain": [(0, None), (7, 70), (0, None)], "slow": [(50, 500), (7, 70), (0, 500)]}
    assert bodies(await take(broker, 9, "slow")) == [3]
    assert bodies(await take(broker, 9, "plain")) == [1, 3]


async def test_a_copy_expires_by_itself(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "one", "two")
    await publish(broker, ttl=60)
    await pass_time(connection, 60)
    assert await take(broker, queue="one") == []
    assert await sweeps.remove_expired(connection, 10) == {"one": 1, "two": 1}


async def test_two_subscriptions_to_one_queue_make_two_copies(broker: Broker) -> None:
    await subscribe(broker, "q")
    await broker.call("subscribe", topic="topic", name="again", queue="q")
    assert (await publish(broker))["deliveries"] == 2
    one, two = await take(broker, 9, "q")
    assert one["message_id"] != two["message_id"]
    assert one["published_id"] == two["published_id"]


async def test_subscriptions_of_two_topics_to_one_queue_tell_them_apart(broker: Broker) -> None:
    for topic in ("b", "a"):
        await subscribe(broker, "q", topic=topic)
        await publish(broker, topic, topic=topic)
    assert [(each["body"], each["topic"]) for each in await take(broker, 9, "q")] == [("b", "b"), ("a", "a")]


async def test_a_paused_queue_gets_its_copy(broker: Broker) -> None:
    await subscribe(broker, "q")
    await broker.call("update_queue", queue="q", paused=True)
    assert (await publish(broker))["deliveries"] == 1
    assert await take(broker, queue="q") == []
    await broker.call("update_queue", queue="q", paused=False)
    assert bodies(await take(broker, queue="q")) == [1]


async def test_without_subscribers_a_message_is_dropped(broker: Broker, connection: Connection) -> None:
    await broker.call("create_topic", topic="topic")
    answer = await publish(broker)
    assert (answer["duplicate"], answer["deliveries"]) == (False, 0)
    assert await rows(connection, "messages") == 0
    await subscribe(broker, "q")
    assert await take(broker, queue="q") == []


async def test_messages_come_in_the_order_in_which_they_were_published(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    for n in range(10):
        await publish(broker, n)
    for queue in ("one", "two"):
        assert bodies(await take(broker, 10, queue)) == list(range(10))


async def test_a_hundred_subscriptions_get_a_hundred_copies(broker: Broker, connection: Connection) -> None:
    names = [f"q{n}" for n in range(100)]
    await subscribe(broker, *names)
    answers = await asyncio.gather(*(publish(broker, n) for n in range(20)))
    assert {each["deliveries"] for each in answers} == {100}
    assert len({each["message_id"] for each in answers}) == 20
    assert await stored(connection) == dict.fromkeys(names, 20)


# Filters


@pytest.mark.parametrize(
    ("wanted", "headers", "matches"),
    [
        (None, {}, True),
        ({}, {}, True),
        ({}, {"a": "1"}, True),
        ({"a": ["1"]}, {"a": "1"}, True),
        ({"a": ["1"]}, {"a": "1", "b": "2"}, True),
        ({"a": ["1"]}, {"a": "2"}, False),
        ({"a": ["1"]}, {"a": ""}, False),
        ({"a": ["1"]}, {}, False),
        ({"a": ["1"]}, {"A": "1"}, False),
        ({"a": ["1"]}, {"b": "1"}, False),
        ({"a": ["x"]}, {"a": "X"}, False),
        ({"a": ["x"]}, {"a": "xy"}, False),
        ({"a": ["1", "2", "3"]}, {"a": "3"}, True),
        ({"a": ["1", "1"]}, {"a": "1"}, True),
        ({"a": ["1"], "b": ["2"]}, {"a": "1", "b": "2"}, True),
        ({"a": ["1"], "b": ["2"]}, {"a": "1"}, False),
        ({"a": ["1"], "b": ["2"]}, {"a": "1", "b": "3"}, False),
        ({"a": ["1"], "b": ["2"], "c": ["3", "4"]}, {"a": "1", "b": "2", "c": "4", "d": "5"}, True),
        ({"é ä": ["ö💥"]}, {"é ä": "ö💥"}, True),
        ({"e\u0301": ["x"]}, {"é": "x"}, False),
        ({"": [""]}, {"": ""}, True),
        ({"": [""]}, {}, False),
        ({"a": ["null"]}, {}, False),
        ({"a": ["$.b", "%", "_"]}, {"a": "b"}, False),
        ({"a": ['"\\{}[]']}, {"a": '"\\{}[]'}, True),
    ],
)
async def test_a_message_matches_where_each_header_has_one_of_its_values(
    broker: Broker, wanted: Any, headers: dict[str, str], matches: bool
) -> None:
    await subscribe(broker, "q", filter=wanted)
    await subscribe(broker, "all")
    assert (await publish(broker, headers=headers))["deliveries"] == 1 + matches
    assert bodies(await take(broker, 9, "q")) == [1] * matches
    assert bodies(await take(broker, 9, "all")) == [1]


async def test_each_message_of_one_statement_is_filtered_by_its_own_headers(broker: Broker) -> None:
    await subscribe(broker, "even", filter={"n": ["0", "2", "4"]})
    await subscribe(broker, "odd", filter={"n": ["1", "3", "5"]})
    await asyncio.gather(*(publish(broker, n, headers={"n": str(n)}) for n in range(7)))
    assert sorted(bodies(await take(broker, 9, "even"))) == [0, 2, 4]
    assert sorted(bodies(await take(broker, 9, "odd"))) == [1, 3, 5]


# What is refused


async def test_a_queue_that_does_not_take_a_body_of_this_size_is_named_and_nobody_gets_it(
    broker: Broker, connection: Connection
) -> None:
    await subscribe(broker, "wide", "narrow", "narrower")
    await broker.call("update_queue", queue="narrow", max_message_bytes=8)
    await broker.call("update_queue", queue="narrower", max_message_bytes=5)
    error = await broker.error("publish", topic="topic", body="12345678", idempotency_key="k")
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1005, "message_too_large", "none")
    assert (error["data"]["queue"], error["data"]["limit"], error["data"]["given"]) == ("narrower", 5, 10)
    assert await rows(connection, "messages") == 0
    assert await rows(connection, "idempotency_keys") == 0
    assert (await publish(broker, "123", idempotency_key="k"))["deliveries"] == 3


async def test_a_queue_whose_filter_does_not_match_refuses_nothing(broker: Broker) -> None:
    await subscribe(broker, "wide")
    await subscribe(broker, "narrow", filter={"a": ["b"]})
    await broker.call("update_queue", queue="narrow", max_message_bytes=5, max_messages=1)
    for _ in range(2):
        assert (await publish(broker, "12345678"))["deliveries"] == 1


@pytest.mark.parametrize("delivery", ["immediate", "on_broadcast"])
@pytest.mark.parametrize("is_subscribed", [False, True])
async def test_no_body_is_larger_than_any_queue_would_take(
    connection: Connection, delivery: str, is_subscribed: bool
) -> None:
    await subscribed(connection, *["q"] * is_subscribed, delivery=delivery)
    await connection.execute("UPDATE broker.queues SET max_message_bytes = 1048576")

    async def result(size: int) -> Any:
        call = PublishCall("topic", NewMessage(f'"{"x" * (size - 2)}"', None, None, None, None))
        return (await publishing.publish(connection, [call]))[0]

    error = await result(2**20 + 1)
    assert isinstance(error, MessageTooLarge)
    assert (error.data["limit"], error.data["given"]) == (2**20, 2**20 + 1)
    assert isinstance(await result(2**20), Published)


async def test_a_full_queue_is_named_and_nobody_gets_the_message(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "wide", "full")
    await broker.call("update_queue", queue="full", max_messages=2)
    for n in range(2):
        await publish(broker, n, idempotency_key=f"k{n}")
    error = await broker.error("publish", topic="topic", body=2, idempotency_key="k2")
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1014, "queue_full", "none")
    assert (error["data"]["queue"], error["data"]["limit"], error["data"]["retryable"]) == ("full", 2, True)
    assert await stored(connection) == {"wide": 2, "full": 2}
    assert (await publish(broker, 0, idempotency_key="k0"))["duplicate"], "a duplicate needs no room"
    (message,) = await take(broker, queue="full")
    await broker.call("delete", receipt=message["receipt"])
    assert (await publish(broker, 2, idempotency_key="k2"))["duplicate"] is False
    assert await stored(connection) == {"wide": 3, "full": 2}


async def test_two_copies_for_one_queue_need_room_for_two(broker: Broker, connection: Connection) -> None:
    await subscribe(broker, "q")
    await broker.call("subscribe", topic="topic", name="again", queue="q")
    await broker.call("update_queue", queue="q", max_messages=3)
    await publish(broker)
    assert (await broker.error("publish", topic="topic", body=1))["data"]["queue"] == "q"
    assert await stored(connection) == {"q": 2}


async def test_of_messages_at_once_as_many_are_taken_as_there_is_room_for(
    broker: Broker, connection: Connection
) -> None:
    await subscribe(broker, "wide", "full")
    await broker.call("update_queue", queue="full", max_messages=5, max_message_bytes=100)
    answers = await asyncio.gather(
        *(broker.answer("publish", topic="topic", body="x" * (200 if n % 3 == 0 else 1)) for n in range(15))
    )
    kinds = [each["error"]["data"]["type"] if "error" in each else "published" for each in answers]
    assert kinds.count("message_too_large") == 5
    # Who is refused takes no room, so what came behind is stored as long as there is some; statements that are under
    # way at once do not see each other's, so it may be a few more.
    published = kinds.count("published")
    assert 5 <= published < 10
    assert kinds.count("queue_full") == 10 - published
    assert await stored(connection) == {"wide": published, "full": published}


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("topic", "-"),
        ("headers", {"a": 1}),
        ("headers", {"a": "x" * 4096}),
        ("headers", {f"h{n}": "" for n in range(65)}),
        ("sender", "x" * 129),
        ("delay", -1),
        ("delay", 31_536_001),
        ("ttl", 0),
        ("ttl", 31_536_001),
        ("idempotency_key", ""),
        ("idempotency_key", "x" * 129),
        ("queue", "q"),
    ],
)
async def test_what_cannot_be_published_is_refused(broker: Broker, param: str, value: Any) -> None:
    await subscribe(broker, "q")
    error = await broker.error("publish", **{"topic": "topic", "body": 1, param: value})
    assert error["code"] == -32602
    assert error["data"]["param"].startswith(param)
    assert await take(broker, queue="q") == []
    error = await broker.error("publish", topic="topic")
    assert (error["code"], error["data"]["param"]) == (-32602, "body")


# Dead letters


async def test_a_dead_letter_and_what_is_redriven_keep_topic_and_published_id(
    broker: Broker, connection: Connection
) -> None:
    await broker.call("create_queue", queue="dead")
    await broker.call("create_queue", queue="work", max_receives=1, dead_letter_queue="dead")
    await broker.call("create_topic", topic="topic")
    await broker.call("subscribe", topic="topic", name="s", queue="work")
    answer = await publish(broker, headers={"a": "b"})
    (copy,) = await take(broker, queue="work")
    await pass_time(connection, 60)
    assert (await dead_letters.settle(connection, 10)).moved == {"dead": 1}
    (dead,) = await listed(broker, "dead")
    (taken,) = await take(broker, queue="dead")
    await broker.call("extend_visibility", receipt=taken["receipt"], visibility_timeout=0)
    assert await broker.call("redrive", queue="dead") == {"moved": 1, "complete": True}
    (again,) = await take(broker, queue="work")
    for each in (dead, taken, again):
        assert (each["message_id"], each["topic"], each["published_id"]) == (
            copy["message_id"], "topic", answer["message_id"],
        )  # fmt: skip
    assert dead["dead_letter"]["source_queue"] == "work"


# Whoever waits


async def parked(broker: Broker, *queues: str) -> dict[str, asyncio.Task[list[dict[str, Any]]]]:
    """Let a consumer wait for each queue."""
    before = broker.server.waiting.waiting
    tasks = {queue: asyncio.create_task(take(broker, queue=queue, wait=30)) for queue in queues}

    async def all_wait() -> bool:
        return broker.server.waiting.waiting == before + len(queues)

    await eventually(all_wait)
    return tasks


def published_now(broker: Broker) -> Awaitable[Any]:
    return publish(broker, 1)


def published_for_later(broker: Broker) -> Awaitable[Any]:
    return publish(broker, 1, delay=0.3)


@pytest.mark.parametrize("how", [published_now, published_for_later])
@pytest.mark.parametrize("where", ["here", "in another broker"])
async def test_who_waits_for_any_of_the_queues_is_woken(
    start_broker: StartBroker,
    monkeypatch: pytest.MonkeyPatch,
    how: Callable[[Broker], Awaitable[Any]],
    where: str,
) -> None:
    """Nobody looks by itself within a minute: who is not told waits until the deadline."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 60.0)
    brokers = [await start_broker(sweep_interval=3600) for _ in range(2)]
    publisher, other = brokers
    await subscribe(publisher, "one", "two", "three")
    hears = other if where == "in another broker" else publisher
    heard = await parked(hears, "default")
    await publisher.call("enqueue", body="they know each other")
    await heard["default"]
    tasks = await parked(hears, "one", "two", "three")
    await how(publisher)
    async with asyncio.timeout(20):
        assert [bodies(await task) for task in tasks.values()] == [[1], [1], [1]]


async def test_a_client_that_hangs_up_while_it_publishes_leaves_nobody_asleep(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, connection: Connection
) -> None:
    """Its message is stored all the same, as nobody can tell any more who wanted the answer."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 60.0)
    await subscribe(broker, "q")
    tasks = await parked(broker, "q")
    async with connection.transaction():
        await connection.execute("LOCK TABLE broker.messages IN SHARE MODE")
        call = asyncio.create_task(publish(broker, "left behind"))

        async def is_under_way() -> bool:
            cursor = await connection.execute(
                "SELECT FROM pg_stat_activity WHERE query LIKE '%/* publish */%' AND wait_event_type = 'Lock'"
                " AND datname = current_database()"
            )
            return bool(await cursor.fetchall())

        await connection.execute("SELECT pg_stat_clear_snapshot()")
        while not await is_under_way():
            await connection.execute("SELECT pg_stat_clear_snapshot()")
        call.cancel()
        await asyncio.wait([call])
    async with asyncio.timeout(20):
        assert bodies(await tasks["q"]) == ["left behind"]


# Metrics


async def test_published_messages_and_copies_are_counted(broker: Broker) -> None:
    await subscribe(broker, "one", "two")
    for _ in range(3):
        await publish(broker, idempotency_key="k")
    await publish(broker)
    assert await error_type(broker, "publish", topic="nowhere", body=1) == "topic_not_found"
    metrics = broker.server.metrics.text().decode()
    assert "wonderq_messages_published_total 2.0" in metrics
    assert "wonderq_messages_enqueued_total 4.0" in metrics
    assert "wonderq_messages_duplicate_total 2.0" in metrics
