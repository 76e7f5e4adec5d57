"""A subscription whose endpoint wanted no more: no copies, and what lies in its queue becomes dead letters.

Time passes by moving the times that are stored.
"""

from __future__ import annotations

import asyncio
from typing import Any

from broker.errors import BrokerError
from broker.model import Subscription
from broker.storage import dead_letters, inspection, leases, queues, subscriptions, sweeps
from broker.storage.database import Connection, Database
from broker.sweeper import sweep_once
from conftest import Connect, StartBroker, dequeue
from gate import Gate
from test_concurrency import transaction
from test_messages import pass_time
from test_topics import published, rows, stored, subscribed
from test_url_subscriptions import number, state, subscribe, topic

__all__ = ["topic"]  # a fixture: there is one in every test


async def ended(connection: Connection, *bodies: str, **attributes: Any) -> Subscription:
    """Let an endpoint end its subscription, with these messages before it."""
    await queues.create(connection, "dead", {})
    made, _ = await subscribe(connection, **attributes)
    await published(connection, *bodies)
    await subscriptions.end(connection, number(made))
    return made


async def test_who_has_ended_gets_no_more_copies(connection: Connection) -> None:
    await ended(connection)
    assert await state(connection) == "ended"
    assert (await published(connection, "1"))[0].deliveries == 0
    await subscribed(connection, "q")
    assert (await published(connection, "1"))[0].deliveries == 1
    again, secret = await subscribe(connection)
    assert (again.state, secret) == ("ended", None), "it stays so until it is unsubscribed"


async def test_what_lies_there_is_dead_lettered(connection: Connection) -> None:
    made = await ended(connection, "1", "2", dead_letter_queue="dead")
    await connection.execute(
        "UPDATE broker.messages SET visible_at = visible_at + interval '1 h' WHERE body::text = '2'"
    )
    assert (await sweeps.chores(connection)).ended_subscriptions
    assert (await dead_letters.settle_ended(connection, 10)).moved == {"dead": 2}
    assert not (await sweeps.chores(connection)).ended_subscriptions
    letters, _ = await inspection.list_by_id(connection, "dead", None, 10, -1)
    assert [bytes(each.body) for each in letters] == [b"1", b"2"]
    for each in letters:
        dead_letter = each.dead_letter
        assert dead_letter is not None
        assert b'"subscription_ended"' in bytes(dead_letter)
        assert made.queue.encode() in bytes(dead_letter)
        assert (each.status, each.topic, each.receive_count) == ("ready", "topic", 0)


async def test_what_is_held_follows_when_its_lease_ends_and_may_be_deleted_before(connection: Connection) -> None:
    made, _ = await subscribe(connection)
    await queues.create(connection, "dead", {})
    await queues.update(connection, made.queue, {"dead_letter_queue": "dead"})
    await published(connection, "1", "2", "3")
    held = (await dequeue(connection, made.queue, 2, 60)).leases
    await subscriptions.end(connection, number(made))
    assert (await dead_letters.settle_ended(connection, 10)).moved == {"dead": 1}
    assert (await dead_letters.settle_ended(connection, 10)).moved == {}
    assert await leases.delete(connection, held[:1]) == [True]
    await pass_time(connection, 60)
    assert (await dead_letters.settle_ended(connection, 10)).moved == {"dead": 1}
    (result,) = await leases.delete(connection, held[1:])
    assert isinstance(result, BrokerError)
    assert await stored(connection) == {"dead": 2}


async def test_what_has_used_up_its_deliveries_there_is_dead_lettered_once(connection: Connection) -> None:
    made, _ = await subscribe(connection, max_receives=1)
    await queues.create(connection, "dead", {})
    await queues.update(connection, made.queue, {"dead_letter_queue": "dead"})
    await published(connection, "1")
    await dequeue(connection, made.queue, 1, 60)
    await subscriptions.end(connection, number(made))
    await pass_time(connection, 60)
    swept = await sweep_once(connection)
    assert (swept.settled.messages, swept.of_ended.messages) == (1, 0)
    assert await stored(connection) == {"dead": 1}


async def test_without_a_dead_letter_queue_it_is_dropped_and_counted(
    start_broker: StartBroker, connection: Connection
) -> None:
    await ended(connection, "1", "2", "3")
    settled = await dead_letters.settle_ended(connection, 2)
    assert (settled.moved, settled.dropped) == ({}, {"push.topic.s": 2})
    broker = await start_broker(sweep_interval=0.01)
    async with asyncio.timeout(30):
        while "wonderq_messages_dropped_total 1.0" not in broker.server.metrics.text().decode():
            await asyncio.sleep(0.01)
    assert await rows(connection, "messages") == 0


async def test_what_has_expired_there_is_no_dead_letter(connection: Connection) -> None:
    await ended(connection, "1", dead_letter_queue="dead")
    await connection.execute("UPDATE broker.messages SET expires_at = enqueued_at")
    swept = await sweep_once(connection)
    assert (swept.of_ended.messages, swept.expired) == (0, {"push.topic.s": 1})


async def test_a_copy_that_was_under_way_at_the_end_follows(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    await queues.create(one, "dead", {})
    made, _ = await subscribe(one, dead_letter_queue="dead")
    async with gate.holding_back(two, published(two, "1")) as task:
        await subscriptions.end(one, number(made))
        assert (await dead_letters.settle_ended(one, 10)).messages == 0
    assert (await task)[0].deliveries == 1
    assert (await sweep_once(one)).of_ended.moved == {"dead": 1}


async def test_two_sweepers_at_once_move_different_messages(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await ended(one, *map(str, range(5)), dead_letter_queue="dead")
    async with transaction(one):
        assert (await dead_letters.settle_ended(one, 3)).moved == {"dead": 3}
        assert (await dead_letters.settle_ended(two, 10)).moved == {"dead": 2}
    assert await stored(one) == {"dead": 5}


async def test_dead_letters_of_the_end_are_redriven_to_another_queue(
    database: Database, connection: Connection
) -> None:
    made = await ended(connection, "1", "2", dead_letter_queue="dead")
    await sweep_once(connection)
    await queues.create(connection, "next", {})
    redriven = await dead_letters.redrive(database, "dead", "next", None)
    assert (redriven.moved, redriven.complete) == ({"next": 2}, True)
    (one, two) = (await dequeue(connection, "next", 9, None)).messages
    assert (one.topic, two.topic, one.dead_letter) == ("topic", "topic", None)
    assert await subscriptions.unsubscribe(database, made.subscription_id) == 0


async def test_dead_letters_of_the_end_stay_while_they_have_nowhere_to_go_but_back_there(
    connection: Connection, database: Database
) -> None:
    made = await ended(connection, "1", "2", dead_letter_queue="dead")
    await sweep_once(connection)
    for to in (None, made.queue):
        redriven = await dead_letters.redrive(database, "dead", to, None)
        assert (redriven.moved, redriven.complete) == ({}, True)
    assert await stored(connection) == {"dead": 2}


async def test_dead_letters_of_the_end_go_back_to_a_subscription_that_was_made_anew(
    database: Database, connection: Connection
) -> None:
    made = await ended(connection, "1", dead_letter_queue="dead")
    await sweep_once(connection)
    await subscriptions.unsubscribe(database, made.subscription_id)
    await subscribe(connection, dead_letter_queue="dead")
    assert (await dead_letters.redrive(database, "dead", None, None)).moved == {"push.topic.s": 1}
    assert (await sweep_once(connection)).of_ended.messages == 0
    assert await stored(connection) == {"push.topic.s": 1}
