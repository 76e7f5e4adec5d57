"""Who gets copies: subscriptions of queues, and what keeps a queue from being deleted."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from broker.errors import QueueInUse, QueueNotFound
from broker.model import message_id_of
from broker.storage import queues, subscriptions
from broker.storage.database import Connection, Database
from broker.sweeper import sweep_once
from conftest import Broker, Connect, StartBroker
from gate import Gate, wait_until_blocked
from test_concurrency import transaction
from test_messages import bodies, error_type, take
from test_topics import publish, published, rows, stored, subscribe, subscribed

FIELDS = {"subscription_id", "topic", "name", "queue", "url", "filter", "state", "secret"}


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker whose sweeper does nothing while a test runs, with a topic and two queues."""
    started: Broker = await start_broker(sweep_interval=3600)
    await started.call("create_topic", topic="topic")
    for queue in ("one", "two"):
        await started.call("create_queue", queue=queue)
    return started


async def listed(broker: Broker, **params: Any) -> list[str]:
    page = await broker.call("list_subscriptions", **params)
    return [each["name"] for each in page["subscriptions"]]


# Subscribe


async def test_a_subscription_shows_what_it_is(broker: Broker) -> None:
    made = await broker.call("subscribe", topic="topic", name="s", queue="one", filter={"a": ["b", "c"]})
    assert set(made) == FIELDS
    assert {name: made[name] for name in FIELDS - {"subscription_id"}} == {
        "topic": "topic", "name": "s", "queue": "one", "url": None, "filter": {"a": ["b", "c"]}, "state": "active",
        "secret": None,
    }  # fmt: skip
    assert (await broker.call("list_subscriptions"))["subscriptions"] == [made]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"filter": None, "url": None, "max_receives": None},
        {"filter": {}},
        {"filter": {"a": ["b"], "c": ["d", "e"]}},
        {"filter": {"é": ["ä\"'\\"]}},
        {"dead_letter_queue": None},
        {"max_receives": None, "dead_letter_queue": None},
    ],
)
async def test_the_same_call_again_changes_nothing(broker: Broker, params: dict[str, Any]) -> None:
    """Whatever the queue's own max_receives and dead_letter_queue are."""
    await broker.call("update_queue", queue="one", max_receives=3, dead_letter_queue="two")
    made = await broker.call("subscribe", topic="topic", name="s", queue="one", **params)
    assert await broker.call("subscribe", topic="topic", name="s", queue="one", **params) == made
    assert await listed(broker) == ["s"]
    assert (await publish(broker, headers={"a": "b", "c": "e", "é": "ä\"'\\"}))["deliveries"] == 1


@pytest.mark.parametrize(
    ("params", "differs"),
    [
        ({"queue": "two"}, "queue"),
        ({"filter": None}, "filter"),
        ({"filter": {}}, "filter"),
        ({"filter": {"a": ["b"]}}, "filter"),
        ({"filter": {"a": ["c", "b"]}}, "filter"),
        ({"filter": {"a": ["b", "c"], "d": ["e"]}}, "filter"),
    ],
)
async def test_another_subscription_of_this_name_exists(broker: Broker, params: dict[str, Any], differs: str) -> None:
    given = {"topic": "topic", "name": "s", "queue": "one", "filter": {"a": ["b", "c"]}}
    made = await broker.call("subscribe", **given)
    error = await broker.error("subscribe", **{**given, **params})
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1013, "subscription_exists", "none")
    assert error["data"]["differs"] == differs
    assert (await broker.call("list_subscriptions"))["subscriptions"] == [made]


async def test_a_filter_is_the_same_in_whatever_order_its_headers_are_named(broker: Broker) -> None:
    made = await broker.call("subscribe", topic="topic", name="s", queue="one", filter={"a": ["b"], "c": ["d"]})
    again = await broker.call("subscribe", topic="topic", name="s", queue="one", filter={"c": ["d"], "a": ["b"]})
    assert again == made


async def test_a_name_belongs_to_its_topic(broker: Broker) -> None:
    await broker.call("create_topic", topic="other")
    one = await broker.call("subscribe", topic="topic", name="s", queue="one")
    two = await broker.call("subscribe", topic="other", name="s", queue="two")
    assert one["subscription_id"] != two["subscription_id"]


@pytest.mark.parametrize("name", ["", "x" * 129, "-x", "ä", "a b", "a\0", 1, None])
async def test_what_is_no_name_of_a_subscription_is_refused(broker: Broker, name: Any) -> None:
    error = await broker.error("subscribe", topic="topic", name=name, queue="one")
    assert (error["code"], error["data"]["param"]) == (-32602, "name")


async def test_a_queue_that_is_not_there_is_not_found(broker: Broker) -> None:
    error = await broker.error("subscribe", topic="topic", name="s", queue="nowhere")
    assert (error["code"], error["data"]["queue"]) == (1001, "nowhere")
    await broker.call("delete_queue", queue="one")
    assert await error_type(broker, "subscribe", topic="topic", name="s", queue="one") == "queue_not_found"
    assert await listed(broker) == []


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({}, "queue"),
        ({"queue": None, "url": None}, "queue"),
        ({"queue": "one", "url": "https://example.com/"}, "url"),
        ({"queue": "one", "max_receives": 3}, "max_receives"),
        ({"queue": "one", "dead_letter_queue": "two"}, "dead_letter_queue"),
    ],
)
async def test_either_a_queue_or_a_url_is_named_and_what_belongs_to_it(
    broker: Broker, params: dict[str, Any], named: str
) -> None:
    error = await broker.error("subscribe", topic="topic", name="s", **params)
    assert (error["code"], error["data"]["param"]) == (-32602, named)
    assert await listed(broker) == []


@pytest.mark.parametrize(
    "filter_",
    [
        [],
        "x",
        {"a": []},
        {"a": "b"},
        {"a": [1]},
        {"a": [None]},
        {"a": ["b\0"]},
        {"a\0": ["b"]},
        {"a": ["x" * 4097]},
        {"a": ["b"] * 101},
        {f"h{n}": ["b"] for n in range(17)},
    ],
)
async def test_what_is_no_filter_is_refused(broker: Broker, filter_: Any) -> None:
    error = await broker.error("subscribe", topic="topic", name="s", queue="one", filter=filter_)
    assert error["code"] == -32602
    assert error["data"]["param"].startswith("filter")
    assert await listed(broker) == []


async def test_a_filter_may_be_as_large_as_is_said(broker: Broker) -> None:
    headers = {f"h{n}": "v" * 99 + str(n) for n in range(16)}
    wanted = {name: [value, *(str(n) for n in range(99))] for name, value in headers.items()}
    await broker.call("subscribe", topic="topic", name="s", queue="one", filter=wanted)
    assert (await broker.call("list_subscriptions"))["subscriptions"][0]["filter"] == wanted
    assert (await publish(broker, headers=headers))["deliveries"] == 1
    assert (await publish(broker, headers={**headers, "h3": "other"}))["deliveries"] == 0


async def test_a_topic_has_so_many_subscriptions_and_no_more(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subscriptions, "MAX_SUBSCRIPTIONS", 2)
    for name in ("a", "b"):
        await broker.call("subscribe", topic="topic", name=name, queue="one")
    error = await broker.error("subscribe", topic="topic", name="c", queue="one")
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (-32002, "overloaded", "none")
    assert (error["data"]["limit"], error["data"]["retryable"]) == (2, True)
    await broker.call("subscribe", topic="topic", name="b", queue="one")
    await broker.call("create_topic", topic="other")
    await broker.call("subscribe", topic="other", name="c", queue="one")


async def test_a_subscription_gets_what_is_published_from_now_on(broker: Broker) -> None:
    await publish(broker, "before")
    await subscribe(broker, "one")
    await publish(broker, "after")
    assert bodies(await take(broker, 9, "one")) == ["after"]


# Unsubscribe


async def test_who_unsubscribes_gets_no_more_and_keeps_what_is_there(broker: Broker) -> None:
    one, _ = await subscribe(broker, "one", "two")
    await publish(broker, 1)
    assert await broker.call("unsubscribe", subscription_id=one) == {"deleted_messages": 0}
    assert (await publish(broker, 2))["deliveries"] == 1
    assert bodies(await take(broker, 9, "one")) == [1]
    assert bodies(await take(broker, 9, "two")) == [1, 2]
    assert await error_type(broker, "unsubscribe", subscription_id=one) == "subscription_not_found"
    (again,) = await subscribe(broker, "one")
    assert again != one, "an id is unique for ever"


@pytest.mark.parametrize("id_", ["", "x", "f" * 16, "0" * 16, message_id_of(2**63 - 1), "ä"])
async def test_an_unknown_subscription_is_not_found(broker: Broker, id_: str) -> None:
    for method in ("unsubscribe", "rotate_secret"):
        error = await broker.error(method, subscription_id=id_)
        assert (error["code"], error["data"]["type"]) == (1009, "subscription_not_found")
        assert (error["data"]["subscription_id"], error["data"]["outcome"]) == (id_, "none")


async def test_a_subscription_of_a_queue_has_no_secret(broker: Broker) -> None:
    (one,) = await subscribe(broker, "one")
    error = await broker.error("rotate_secret", subscription_id=one)
    assert (error["code"], error["data"]["param"]) == (-32602, "subscription_id")


# The list


async def test_subscriptions_are_listed_the_oldest_first_a_page_at_a_time(broker: Broker) -> None:
    await broker.call("create_topic", topic="other")
    for n in range(6):
        topic = "topic" if n % 2 else "other"
        await broker.call("subscribe", topic=topic, name=f"s{9 - n}", queue="one")
    in_order = ["s9", "s8", "s7", "s6", "s5", "s4"]
    assert await listed(broker) == in_order
    assert await listed(broker, topic="topic") == in_order[1::2]
    found: list[str] = []
    after = None
    for size in (4, 2):
        page = await broker.call("list_subscriptions", limit=4, after=after)
        assert len(page["subscriptions"]) == size
        found += [each["name"] for each in page["subscriptions"]]
        after = page["next"]
    assert (found, after) == (in_order, None)
    page = await broker.call("list_subscriptions", topic="topic", limit=2)
    assert [each["name"] for each in page["subscriptions"]] == ["s8", "s6"]
    assert await listed(broker, topic="topic", limit=2, after=page["next"]) == ["s4"]
    await broker.call("create_topic", topic="nobody")
    assert await broker.call("list_subscriptions", topic="nobody") == {"subscriptions": [], "next": None}


@pytest.mark.parametrize(("param", "value"), [("limit", 0), ("limit", 1001), ("after", "x"), ("topic", "")])
async def test_what_cannot_be_listed_is_refused(broker: Broker, param: str, value: Any) -> None:
    error = await broker.error("list_subscriptions", **{param: value})
    assert (error["code"], error["data"]["param"]) == (-32602, param)


# Queues in use


async def test_a_queue_that_a_subscription_names_is_in_use(broker: Broker) -> None:
    (one,) = await subscribe(broker, "one")
    await publish(broker)
    error = await broker.error("delete_queue", queue="one")
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (1011, "queue_in_use", "none")
    assert "one" in error["message"]
    assert "topic" in error["message"]
    assert bodies(await take(broker, 9, "one")) == [1]
    await broker.call("unsubscribe", subscription_id=one)
    assert (await broker.call("delete_queue", queue="one"))["complete"]


async def test_a_queue_is_in_use_as_long_as_any_topic_sends_to_it(broker: Broker) -> None:
    await subscribe(broker, "one")
    await subscribe(broker, "one", topic="other")
    for topic in ("topic", "other"):
        assert await error_type(broker, "delete_queue", queue="one") == "queue_in_use"
        await broker.call("delete_topic", topic=topic)
    assert (await broker.call("delete_queue", queue="one"))["complete"]


async def test_a_queue_with_a_subscription_may_be_purged_and_changed(broker: Broker) -> None:
    await subscribe(broker, "one")
    await publish(broker)
    assert await broker.call("purge_queue", queue="one") == {"purged": 1, "complete": True}
    await broker.call("update_queue", queue="one", max_receives=1, dead_letter_queue="two")
    assert await error_type(broker, "delete_queue", queue="two") == "queue_in_use"


# Two at once


async def test_a_queue_that_is_being_deleted_is_not_found_and_one_that_is_being_subscribed_is_in_use(
    connect: Connect,
) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await subscribed(one)
    await queues.create(one, "q", {})
    async with transaction(one):
        await queues._delete(one, "q")
        params: dict[str, Any] = {"queue": "q", "url": None, "filter": None, "attributes": {}}
        task = asyncio.ensure_future(subscriptions.subscribe(two, "topic", "q", **params))
        await wait_until_blocked(observer, two)
    with pytest.raises(QueueNotFound):
        await task
    await queues.create(one, "q", {})
    async with transaction(one):
        await subscribed(one, "q")
        deletion = asyncio.ensure_future(queues._delete(two, "q"))
        await wait_until_blocked(observer, two)
    with pytest.raises(QueueInUse, match="the subscription q of the topic topic"):
        await deletion


async def test_two_who_subscribe_under_one_name_at_once_get_the_same_subscription(
    broker: Broker, start_broker: StartBroker
) -> None:
    other = await start_broker(sweep_interval=3600)
    for n in range(10):
        one, two = await asyncio.gather(
            *(each.call("subscribe", topic="topic", name=f"s{n}", queue="one") for each in (broker, other))
        )
        assert one == two


async def test_a_copy_that_is_under_way_when_its_subscriber_and_queue_go_is_swept(
    database: Database, connect: Connect, gate: Gate
) -> None:
    one, two = await connect(), await connect()
    (subscription, _) = await subscribed(one, "q", "r")
    async with gate.holding_back(two, published(two, "1", "2")) as task:
        await subscriptions.unsubscribe(database, subscription)
        await queues.delete(database, "q")
    assert [each.deliveries for each in await task] == [2, 2], "it has seen the subscriptions as they were"
    assert await stored(one) == {"q": 2, "r": 2}
    assert (await sweep_once(one)).of_deleted == 2
    assert await stored(one) == {"r": 2}


async def test_whatever_comes_and_goes_at_once_is_refused_as_the_schema_says_and_leaves_nothing(
    broker: Broker, start_broker: StartBroker, connection: Connection
) -> None:
    other = await start_broker(sweep_interval=3600)
    calls: list[tuple[str, dict[str, Any]]] = [
        ("create_topic", {"topic": "t"}),
        ("create_queue", {"queue": "q"}),
        ("subscribe", {"topic": "t", "name": "s", "queue": "q"}),
        ("publish", {"topic": "t", "body": 1}),
        ("publish", {"topic": "t", "body": 1, "idempotency_key": "k"}),
        ("delete_topic", {"topic": "t"}),
        ("delete_queue", {"queue": "q"}),
        ("subscribe", {"topic": "t", "name": "s", "queue": "q"}),
        ("publish", {"topic": "t", "body": 1, "idempotency_key": "k"}),
    ]
    permitted = {None, "topic_not_found", "queue_not_found", "queue_in_use"}

    async def client(n: int) -> set[Any]:
        rng = random.Random(n)
        answers = [
            await (broker, other)[n % 2].answer(method, **params)
            for method, params in (rng.choice(calls) for _ in range(60))
        ]
        return {answer["error"]["data"]["type"] if "error" in answer else None for answer in answers}

    assert set().union(*await asyncio.gather(*(client(n) for n in range(8)))) == permitted
    for method, params in (("delete_topic", {"topic": "t"}), ("delete_queue", {"queue": "q"})):
        await broker.answer(method, **params)
    await sweep_once(connection)
    assert await stored(connection) == {}
    assert await rows(connection, "subscriptions") == 0
