"""What is stored of a subscription with a url: its queue, its secrets, and how its endpoint fares.

Nothing is pushed here: these are the functions that every broker that pushes rests on. Time passes by moving the times
that are stored.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from broker.errors import BrokerError, InvalidParams, Overloaded, QueueInUse, SubscriptionExists, SubscriptionNotFound
from broker.model import Subscription, message_number_of
from broker.storage import counting, inspection, leases, queues, subscriptions, topics
from broker.storage.database import Connection, Database
from broker.storage.subscriptions import PushTarget
from broker.sweeper import sweep_once
from conftest import Connect, dequeue
from gate import Gate, wait_until_blocked
from test_concurrency import transaction
from test_messages import pass_time
from test_topics import published, rows, stored, subscribed

URL = "https://example.com/hook"


@pytest.fixture(autouse=True)
async def topic(connection: Connection) -> None:
    """There is a topic."""
    await topics.create(connection, "topic", None)


async def subscribe(
    connection: Connection, name: str = "s", url: str = URL, topic: str = "topic", **attributes: Any
) -> tuple[Subscription, bytes | None]:
    params: dict[str, Any] = {"queue": None, "url": url, "filter": attributes.pop("filter", None)}
    return await subscriptions.subscribe(connection, topic, name, **params, attributes=attributes)


def number(subscription: Subscription) -> int:
    found = message_number_of(subscription.subscription_id)
    assert found is not None
    return found


async def pass_time_for_endpoints(connection: Connection, seconds: float) -> None:
    """Let so much time pass for secrets and endpoints."""
    await connection.execute(
        "UPDATE broker.subscription_secrets SET ends_at = ends_at - %s * interval '1 second'", [seconds]
    )
    await connection.execute(
        """
        UPDATE broker.subscriptions
        SET
            probe_at = probe_at - %(by)s * interval '1 second',
            paused_until = paused_until - %(by)s * interval '1 second'
        """,
        {"by": seconds},
    )


async def state(connection: Connection) -> str:
    (subscription,), _ = await subscriptions.list_by_id(connection, None, 10, -1)
    return subscription.state


# Its queue


async def test_a_url_gets_a_queue_of_its_own_that_tells_whose_it_is(connection: Connection) -> None:
    made, secret = await subscribe(connection)
    assert (made.queue, made.url, made.state) == ("push.topic.s", URL, "active")
    assert secret is not None
    assert len(secret) == 32
    queue = await queues.get(connection, "push.topic.s")
    assert (queue.max_receives, queue.max_message_bytes, queue.dead_letter_queue) == (10, 2**20, None)
    assert (queue.delay, queue.message_ttl, queue.max_messages, queue.paused) == (0, None, None, False)
    assert (await published(connection, "1"))[0].deliveries == 1
    assert (await counting.count(connection, ["push.topic.s"]))["push.topic.s"].counts.total == 1
    (message,), _ = await inspection.list_by_id(connection, "push.topic.s", None, 10, -1)
    assert message.topic == "topic"


async def test_its_limits_are_those_that_were_named(connection: Connection) -> None:
    await queues.create(connection, "dead", {})
    made, _ = await subscribe(connection, max_receives=3, dead_letter_queue="dead")
    queue = await queues.get(connection, made.queue)
    assert (queue.max_receives, queue.dead_letter_queue) == (3, "dead")
    with pytest.raises(BrokerError, match="There is no queue nowhere"):
        await subscribe(connection, "other", dead_letter_queue="nowhere")
    with pytest.raises(InvalidParams, match="must not lead back"):
        await subscribe(connection, "other", dead_letter_queue="push.topic.other")
    assert await rows(connection, "subscriptions") == 1
    assert await rows(connection, "queues") == 3, "default, dead and the one: what failed has left none"


@pytest.mark.parametrize(
    ("again", "differs"),
    [
        ({}, None),
        ({"max_receives": 3, "dead_letter_queue": "dead"}, None),
        ({"max_receives": None}, None),
        ({"url": URL + "/"}, "url"),
        ({"max_receives": 10}, "max_receives"),
        ({"dead_letter_queue": None}, "dead_letter_queue"),
        ({"dead_letter_queue": "default"}, "dead_letter_queue"),
        ({"filter": {"a": ["b"]}}, "filter"),
    ],
)
async def test_the_same_again_is_the_same_subscription_and_tells_no_secret(
    connection: Connection, again: dict[str, Any], differs: str | None
) -> None:
    await queues.create(connection, "dead", {})
    made, _ = await subscribe(connection, max_receives=3, dead_letter_queue="dead")
    if differs is None:
        assert await subscribe(connection, **again) == (made, None)
    else:
        with pytest.raises(SubscriptionExists, match=f"whose {differs} is not"):
            await subscribe(connection, **again)
    assert await rows(connection, "subscription_secrets") == 1
    assert await rows(connection, "queues") == 3


async def test_what_was_changed_since_counts(connection: Connection) -> None:
    made, _ = await subscribe(connection, max_receives=3)
    await queues.update(connection, made.queue, {"max_receives": 7})
    assert await subscribe(connection, max_receives=7) == (made, None)
    with pytest.raises(SubscriptionExists):
        await subscribe(connection, max_receives=3)


async def test_a_queue_and_a_url_are_different_subscriptions(connection: Connection) -> None:
    await subscribe(connection, "s")
    await queues.create(connection, "q", {})
    params: dict[str, Any] = {"filter": None, "attributes": {}}
    for queue in ("q", "push.topic.s"):
        with pytest.raises(SubscriptionExists):
            await subscriptions.subscribe(connection, "topic", "s", queue=queue, url=None, **params)
    await subscriptions.subscribe(connection, "topic", "t", queue="q", url=None, **params)
    with pytest.raises(SubscriptionExists):
        await subscribe(connection, "t")


async def test_long_names_and_names_that_are_taken_are_told_apart_by_a_number(connection: Connection) -> None:
    await queues.create(connection, "push.topic.s", {})
    taken, _ = await subscribe(connection)
    assert taken.queue == "push.topic.s.2"
    topic = "t" * 128
    await topics.create(connection, topic, None)
    long = [(await subscribe(connection, letter * 128, topic=topic))[0].queue for letter in "abc"]
    assert long == [f"push.{topic}"[:128], f"push.{topic}"[:122] + ".2", f"push.{topic}"[:122] + ".3"]
    (result,) = await published(connection, "1", topic=topic)
    assert result.deliveries == 3
    assert await stored(connection) == dict.fromkeys(long, 1)


async def test_its_queue_is_deleted_with_it_and_in_no_other_way(database: Database, connection: Connection) -> None:
    made, _ = await subscribe(connection)
    await published(connection, "1", "2")
    with pytest.raises(QueueInUse, match="unsubscribe that first"):
        await queues.delete(database, made.queue)
    assert await subscriptions.unsubscribe(database, made.subscription_id) == 2
    assert await rows(connection, "messages") == 0
    assert await rows(connection, "subscription_secrets") == 0
    with pytest.raises(BrokerError, match="There is no queue"):
        await queues.get(connection, made.queue)
    again, secret = await subscribe(connection)
    assert (again.queue, secret is not None) == (made.queue, True)
    assert again.subscription_id != made.subscription_id


async def test_messages_that_are_delayed_or_held_go_with_it_too(database: Database, connection: Connection) -> None:
    made, _ = await subscribe(connection)
    await published(connection, "1", "2", "3")
    (held,) = (await dequeue(connection, made.queue, 1, 60)).leases
    await connection.execute("UPDATE broker.messages SET visible_at = visible_at + interval '1 h' WHERE lane = 0")
    assert await subscriptions.unsubscribe(database, made.subscription_id) == 3
    assert await leases.delete(connection, [held]) == [False]


@pytest.mark.parametrize("how", ["dead_letter_queue", "another subscription", "another topic's url's"])
async def test_who_unsubscribes_is_told_who_else_sends_to_the_queue(
    database: Database, connection: Connection, how: str
) -> None:
    made, _ = await subscribe(connection)
    await topics.create(connection, "other", None)
    params: dict[str, Any] = {"queue": made.queue, "url": None, "filter": None, "attributes": {}}
    if how == "dead_letter_queue":
        await queues.create(connection, "work", {"dead_letter_queue": made.queue})
    elif how == "another subscription":
        await subscriptions.subscribe(connection, "other", "x", **params)
    else:
        await subscribe(connection, "x", topic="other", dead_letter_queue=made.queue)
    for work in (
        lambda: subscriptions.unsubscribe(database, made.subscription_id),
        lambda: topics.delete(database, "topic"),
        lambda: queues.delete(database, made.queue),
    ):
        with pytest.raises(QueueInUse):
            await work()
    assert (await published(connection, "1"))[0].deliveries == 1, "it is all as it was"
    if how == "dead_letter_queue":
        await queues.update(connection, "work", {"dead_letter_queue": None})
    else:
        await topics.delete(database, "other")
    assert await subscriptions.unsubscribe(database, made.subscription_id) == 1


async def test_with_a_topic_all_of_its_urls_go_also_those_that_send_to_each_other(
    database: Database, connection: Connection
) -> None:
    one, _ = await subscribe(connection, "one")
    await subscribe(connection, "two", dead_letter_queue=one.queue)
    params: dict[str, Any] = {"queue": one.queue, "url": None, "filter": None, "attributes": {}}
    await subscriptions.subscribe(connection, "topic", "three", **params)
    await published(connection, "1")
    assert await topics.delete(database, "topic") == (3, True)
    assert await rows(connection, "messages") == 0
    assert await rows(connection, "subscriptions") == 0


async def test_a_copy_that_is_under_way_when_its_url_goes_is_swept(
    database: Database, connect: Connect, gate: Gate
) -> None:
    one, two = await connect(), await connect()
    made, _ = await subscribe(one)
    async with gate.holding_back(two, published(two, "1")) as task:
        assert await subscriptions.unsubscribe(database, made.subscription_id) == 0
    assert (await task)[0].deliveries == 1
    assert (await sweep_once(one)).of_deleted == 1
    assert await stored(one) == {}


# Its secrets


def secrets_of(targets: list[PushTarget]) -> list[bytes]:
    (target,) = targets
    return target.secrets


async def test_a_secret_that_was_replaced_counts_for_24_hours_more(connection: Connection) -> None:
    made, first = await subscribe(connection)
    assert secrets_of(await subscriptions.push_targets(connection)) == [first]
    second = await subscriptions.rotate_secret(connection, made.subscription_id)
    assert secrets_of(await subscriptions.push_targets(connection)) == [second, first], "the newest first"
    await pass_time_for_endpoints(connection, 12 * 3600)
    third = await subscriptions.rotate_secret(connection, made.subscription_id)
    assert len({first, second, third}) == 3
    await pass_time_for_endpoints(connection, 12 * 3600 - 60)
    assert secrets_of(await subscriptions.push_targets(connection)) == [third, second, first]
    await pass_time_for_endpoints(connection, 60)
    assert secrets_of(await subscriptions.push_targets(connection)) == [third, second]
    await pass_time_for_endpoints(connection, 12 * 3600)
    assert secrets_of(await subscriptions.push_targets(connection)) == [third]
    await pass_time_for_endpoints(connection, 10**9)
    assert secrets_of(await subscriptions.push_targets(connection)) == [third], "the last one counts for ever"
    await subscriptions.rotate_secret(connection, made.subscription_id)
    assert await rows(connection, "subscription_secrets") == 2, "what counts no more is forgotten"


async def test_so_many_secrets_count_at_one_time_and_no_more(connection: Connection) -> None:
    made, _ = await subscribe(connection)
    for _ in range(subscriptions.MAX_SECRETS - 1):
        await subscriptions.rotate_secret(connection, made.subscription_id)
    before = secrets_of(await subscriptions.push_targets(connection))
    assert len(before) == subscriptions.MAX_SECRETS
    with pytest.raises(Overloaded):
        await subscriptions.rotate_secret(connection, made.subscription_id)
    assert secrets_of(await subscriptions.push_targets(connection)) == before
    await pass_time_for_endpoints(connection, 24 * 3600)
    await subscriptions.rotate_secret(connection, made.subscription_id)
    assert len(secrets_of(await subscriptions.push_targets(connection))) == 2


async def test_two_who_rotate_at_once_replace_one_secret_after_the_other(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    made, first = await subscribe(one)
    async with transaction(one):
        second = await subscriptions.rotate_secret(one, made.subscription_id)
        task = asyncio.ensure_future(subscriptions.rotate_secret(two, made.subscription_id))
        await wait_until_blocked(observer, two)
    third = await task
    assert secrets_of(await subscriptions.push_targets(one)) == [third, second, first]
    cursor = await one.execute("SELECT count(*) FROM broker.subscription_secrets WHERE ends_at = 'infinity'")
    assert await cursor.fetchone() == (1,)


async def test_a_secret_of_a_subscription_that_goes_meanwhile_is_not_found(
    database: Database, connect: Connect
) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    made, _ = await subscribe(one)
    async with transaction(one):
        await topics._delete(one, "topic")
        task = asyncio.ensure_future(subscriptions.rotate_secret(two, made.subscription_id))
        await wait_until_blocked(observer, two)
    with pytest.raises(SubscriptionNotFound):
        await task


# What is pushed to


async def test_push_targets_are_the_urls_that_have_not_ended(database: Database, connection: Connection) -> None:
    await subscribed(connection, "q")
    made = [(await subscribe(connection, name, f"{URL}/{name}"))[0] for name in ("a", "b", "c")]
    await queues.update(connection, "push.topic.b", {"max_receives": None})
    targets = await subscriptions.push_targets(connection)
    assert [(each.id, each.topic, each.name, each.queue, each.url) for each in targets] == [
        (number(each), "topic", each.name, each.queue, each.url) for each in made
    ]
    assert [each.max_receives for each in targets] == [10, None, 10]
    assert [(each.is_failing, each.paused_for) for each in targets] == [(False, 0)] * 3
    await subscriptions.end(connection, number(made[0]))
    await subscriptions.unsubscribe(database, made[1].subscription_id)
    assert [each.name for each in await subscriptions.push_targets(connection)] == ["c"]


async def test_a_longer_pause_stays(connection: Connection) -> None:
    made, _ = await subscribe(connection)

    async def paused_for() -> float:
        (target,) = await subscriptions.push_targets(connection)
        return target.paused_for

    await subscriptions.pause(connection, number(made), 100)
    assert 90 < await paused_for() <= 100
    await subscriptions.pause(connection, number(made), 10)
    assert 80 < await paused_for() <= 100
    await subscriptions.pause(connection, number(made), 1000)
    assert 900 < await paused_for() <= 1000
    await pass_time_for_endpoints(connection, 1000)
    assert await paused_for() == 0
    await subscriptions.pause(connection, number(made), 10**7)
    assert await paused_for() == 43200, "nobody waits longer without looking again"


async def test_an_endpoint_fails_and_is_active_again(connection: Connection) -> None:
    made, _ = await subscribe(connection)
    await subscriptions.note_active(connection, number(made))
    assert await state(connection) == "active"
    await subscriptions.note_failing(connection, number(made), 5)
    assert await state(connection) == "failing"
    assert (await subscriptions.push_targets(connection))[0].is_failing
    assert (await published(connection, "1"))[0].deliveries == 1, "its copies wait"
    await subscriptions.note_active(connection, number(made))
    assert await state(connection) == "active"
    assert await subscriptions.count_states(connection) == {"active": 1}


async def test_what_is_noted_of_one_that_has_ended_or_has_no_url_changes_nothing(connection: Connection) -> None:
    made, _ = await subscribe(connection)
    await subscriptions.end(connection, number(made))
    await subscriptions.note_failing(connection, number(made), 5)
    await subscriptions.note_active(connection, number(made))
    assert await state(connection) == "ended"
    (other,) = await subscribed(connection, "q", topic="other")
    number_of_other = message_number_of(other)
    assert number_of_other is not None
    for work in (
        subscriptions.note_failing(connection, number_of_other, 5),
        subscriptions.end(connection, number_of_other),
        subscriptions.note_active(connection, 10**9),
    ):
        await work
    assert await subscriptions.count_states(connection) == {"ended": 1, "active": 1}


# Probes


async def failing(connection: Connection, *names: str) -> dict[int, str]:
    """Let there be endpoints that fail, with a message each; return their names by id."""
    made = {}
    for name in names:
        subscription, _ = await subscribe(connection, name)
        made[number(subscription)] = name
    await published(connection, "1")
    for each in made:
        await subscriptions.note_failing(connection, each, 5)
    return made


async def test_an_endpoint_is_probed_once_in_so_many_seconds(connection: Connection) -> None:
    (one,) = await failing(connection, "one")
    assert await subscriptions.claim_probes(connection, 5) == []
    for _ in range(3):
        await pass_time_for_endpoints(connection, 5)
        assert await subscriptions.claim_probes(connection, 5) == [one]
        assert await subscriptions.claim_probes(connection, 5) == []


async def test_of_two_brokers_one_probes(connect: Connect) -> None:
    one, two = await connect(), await connect()
    due = await failing(one, "a", "b", "c")
    await pass_time_for_endpoints(one, 5)
    async with transaction(one):
        assert set(await subscriptions.claim_probes(one, 5)) == due.keys()
        assert await subscriptions.claim_probes(two, 5) == [], "it waits for nobody"
    assert await subscriptions.claim_probes(two, 5) == []
    await pass_time_for_endpoints(one, 5)
    found = [each for n in range(5) for each in await subscriptions.claim_probes((one, two)[n % 2], 5)]
    assert sorted(found) == sorted(due)
    await pass_time_for_endpoints(one, 5)
    both = await asyncio.gather(*(subscriptions.claim_probes(each, 5) for each in (one, two)))
    assert sorted(both[0] + both[1]) == sorted(due)


async def test_no_endpoint_is_probed_that_has_nothing_ready_or_is_paused_or_does_not_fail(
    connection: Connection,
) -> None:
    due = await failing(connection, "due", "paused", "active", "empty", "delayed", "held", "expired")
    ids = {name: each for each, name in due.items()}
    await subscribed(connection, "q")
    await pass_time_for_endpoints(connection, 5)
    await subscriptions.pause(connection, ids["paused"], 60)
    await subscriptions.note_active(connection, ids["active"])
    await dequeue(connection, "push.topic.empty", 1, None, at_most_once=True)
    await dequeue(connection, "push.topic.held", 1, 60)
    for name, delay, ttl in (("delayed", 3600, None), ("expired", 0, 0)):
        await connection.execute(
            """
            UPDATE broker.messages m
            SET visible_at = now() + %s * interval '1 second', expires_at = enqueued_at + %s * interval '1 second'
            FROM broker.queues q
            WHERE q.id = m.queue_id AND q.name = %s
            """,
            [delay, ttl, f"push.topic.{name}"],
        )
    assert await subscriptions.claim_probes(connection, 5) == [ids["due"]]
    await pass_time(connection, 3600)
    await pass_time_for_endpoints(connection, 60)
    assert set(await subscriptions.claim_probes(connection, 5)) == {
        ids[name] for name in ("due", "paused", "delayed", "held")
    }


async def test_a_clock_that_was_set_back_keeps_nobody_from_being_probed(connection: Connection) -> None:
    (one,) = await failing(connection, "one")
    await pass_time_for_endpoints(connection, -3600)
    assert await subscriptions.claim_probes(connection, 5) == [one]
    assert await subscriptions.claim_probes(connection, 5) == []
