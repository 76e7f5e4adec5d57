"""What one sweep does, without a clock: time passes by moving the times that are stored."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from broker.errors import BrokerError
from broker.model import NewMessage
from broker.storage import counting, leases, queues, storing, sweeps
from broker.storage.database import Connection
from broker.storage.dead_letters import Settled
from broker.storage.handing_out import Delivery
from broker.storage.storing import EnqueueCall, Stored
from broker.sweeper import Swept, sweep_once
from conftest import Broker, Connect, StartBroker, dequeue

NOTHING = Swept(
    expired={},
    exhausted=0,
    settled=Settled(),
    of_ended=Settled(),
    forgotten_keys=0,
    ended_leases={},
    of_deleted=0,
    measured_queues=0,
)


async def send(connection: Connection, how_many: int, queue: str = "default", ttl: float | None = None) -> list[int]:
    new = [NewMessage(str(n), None, None, None, ttl) for n in range(how_many)]
    (stored,) = await storing.enqueue(connection, [EnqueueCall(queue, new)])
    assert isinstance(stored, Stored), stored
    return stored.ids


async def take(connection: Connection, how_many: int, queue: str = "default") -> Delivery:
    return await dequeue(connection, queue, how_many, 30)


async def pass_time(connection: Connection, seconds: float) -> None:
    """Let so much time pass for every message."""
    await connection.execute(
        """
        UPDATE broker.messages
        SET
            enqueued_at = enqueued_at - %(by)s::interval,
            visible_at = visible_at - %(by)s::interval,
            expires_at = expires_at - %(by)s::interval
        """,
        {"by": f"{seconds} s"},
    )


async def remaining(connection: Connection) -> set[int]:
    return {row[0] for row in await (await connection.execute("SELECT id FROM broker.messages")).fetchall()}


async def test_a_sweep_of_nothing_does_nothing(connection: Connection) -> None:
    assert await sweep_once(connection) == NOTHING
    assert not NOTHING.filled(1)


async def test_what_has_expired_is_removed_in_bounded_batches_the_oldest_first(connection: Connection) -> None:
    old = await send(connection, 15, ttl=10)
    await pass_time(connection, 5)
    await send(connection, 10, ttl=1)
    kept = await send(connection, 5, ttl=60) + await send(connection, 5)
    await pass_time(connection, 7)
    first = await sweep_once(connection, batch_size=10)
    assert first.expired == {"default": 10}
    assert first.filled(10)
    assert await remaining(connection) == set(old + kept)
    assert (await sweep_once(connection, batch_size=10)).expired == {"default": 10}
    last = await sweep_once(connection, batch_size=10)
    assert last.expired == {"default": 5}
    assert not last.filled(10)
    assert await remaining(connection) == set(kept)


async def test_what_has_expired_is_counted_by_queue(connection: Connection) -> None:
    await queues.create(connection, "other", {"message_ttl": 1.0})
    await send(connection, 2, ttl=1)
    await send(connection, 3, "other")
    await pass_time(connection, 2)
    assert (await sweep_once(connection)).expired == {"default": 2, "other": 3}


async def test_a_message_that_expired_while_it_is_held_is_left_until_its_lease_ends(connection: Connection) -> None:
    held, free = await send(connection, 2, ttl=10)
    delivery = await take(connection, 1)
    await pass_time(connection, 20)
    assert (await sweep_once(connection)).expired == {"default": 1}
    assert await remaining(connection) == {held}
    await leases.extend(connection, delivery.leases, [30] * len(delivery.leases))
    await pass_time(connection, 20)
    assert (await sweep_once(connection)).expired == {}
    await pass_time(connection, 20)
    assert (await sweep_once(connection)).expired == {"default": 1}
    assert await remaining(connection) == set()
    assert free != held


async def test_a_delayed_message_that_expires_before_it_is_visible_is_removed_when_it_would_be(
    connection: Connection,
) -> None:
    """It is invisible all the time; removing it a little later does no harm."""
    new = [NewMessage("1", None, None, 100, 10)]
    await storing.enqueue(connection, [EnqueueCall("default", new)])
    await pass_time(connection, 50)
    assert (await counting.count(connection, ["default"]))["default"].counts.total == 0
    await pass_time(connection, 51)
    assert (await sweep_once(connection)).expired == {"default": 1}


async def test_two_sweepers_at_once_remove_different_messages(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await send(one, 1000, ttl=1)
    await pass_time(one, 2)
    removed: Counter[str] = Counter()
    while await remaining(one):
        for swept in await asyncio.gather(sweep_once(one, 60), sweep_once(two, 60)):
            removed.update(swept.expired)
    assert removed == {"default": 1000}


async def test_a_sweeper_skips_what_another_is_removing(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await send(one, 30, ttl=1)
    await pass_time(one, 2)
    await one.execute("BEGIN")
    assert await sweeps.remove_expired(one, 20) == {"default": 20}
    assert await sweeps.remove_expired(two, 20) == {"default": 10}
    await one.execute("COMMIT")
    assert await remaining(one) == set()


async def test_an_ended_lease_is_counted_once_by_whichever_sweeper_comes(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await queues.create(one, "other", {})
    await send(one, 5)
    await send(one, 2, "other")
    await take(one, 3)
    await take(one, 2, "other")
    assert (await sweep_once(one)).ended_leases == {}
    # The sweeps' own clock is moved with the messages.
    await pass_time(one, 31)
    await one.execute("UPDATE broker.sweeps SET ended_leases_seen_until = ended_leases_seen_until - interval '31 s'")
    counted: Counter[str] = Counter()
    for swept in await asyncio.gather(sweep_once(one), sweep_once(two)):
        counted.update(swept.ended_leases)
    for each in (one, two):
        counted.update((await sweep_once(each)).ended_leases)
    assert counted == {"default": 3, "other": 2}


async def test_what_was_deleted_or_given_back_is_no_ended_lease(connection: Connection) -> None:
    await send(connection, 3)
    delivery = await take(connection, 3)
    await leases.delete(connection, delivery.leases[:1])
    await leases.give_back(connection, delivery.leases[1:2])
    await pass_time(connection, 31)
    await connection.execute("UPDATE broker.sweeps SET ended_leases_seen_until = now() - interval '31 s'")
    assert (await sweep_once(connection)).ended_leases == {"default": 1}


async def test_while_one_counts_ended_leases_the_other_does_not_wait(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await send(one, 1)
    await take(one, 1)
    await one.execute("UPDATE broker.messages SET visible_at = now()")
    await one.execute("UPDATE broker.sweeps SET ended_leases_seen_until = now() - interval '1 s'")
    await one.execute("BEGIN")
    assert await sweeps.count_ended_leases(one) == {"default": 1}
    assert await sweeps.count_ended_leases(two) == {}
    await one.execute("COMMIT")
    assert await sweeps.count_ended_leases(two) == {}


async def test_a_sweeper_that_is_a_little_behind_does_not_count_again_what_another_has_counted(
    connection: Connection,
) -> None:
    """It took its time before the other wrote its own, and must not set that back."""
    await send(connection, 1)
    await take(connection, 1)
    await connection.execute("UPDATE broker.messages SET visible_at = now() + interval '5 s'")
    await connection.execute("UPDATE broker.sweeps SET ended_leases_seen_until = now() + interval '20 s'")
    assert await sweeps.count_ended_leases(connection) == {}
    await pass_time(connection, 10)
    await connection.execute(
        "UPDATE broker.sweeps SET ended_leases_seen_until = ended_leases_seen_until - interval '10 s'"
    )
    assert await sweeps.count_ended_leases(connection) == {}


async def test_a_clock_that_was_set_back_is_followed(connection: Connection) -> None:
    await connection.execute("UPDATE broker.sweeps SET ended_leases_seen_until = now() + interval '1 hour'")
    assert await sweeps.count_ended_leases(connection) == {}
    row = await (await connection.execute("SELECT ended_leases_seen_until <= now() FROM broker.sweeps")).fetchone()
    assert row == (True,)


async def test_an_idle_sweeper_writes_nothing(connection: Connection) -> None:
    await sweep_once(connection)
    before = await (await connection.execute("SELECT xmin, ctid::text FROM broker.sweeps")).fetchone()
    for _ in range(3):
        await sweep_once(connection)
    assert await (await connection.execute("SELECT xmin, ctid::text FROM broker.sweeps")).fetchone() == before


async def test_what_a_deleted_queue_leaves_is_removed_in_bounded_batches(connection: Connection) -> None:
    await queues.create(connection, "gone", {})
    await send(connection, 25, "gone")
    await take(connection, 5, "gone")
    await connection.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'gone'")
    kept = await send(connection, 3)
    first = await sweep_once(connection, batch_size=20)
    assert first.of_deleted == 20
    assert first.filled(20)
    assert (await sweep_once(connection, batch_size=20)).of_deleted == 5
    assert (await sweep_once(connection, batch_size=20)).of_deleted == 0
    assert await remaining(connection) == set(kept)


@pytest.mark.parametrize(("days", "is_kept"), [(0.9, True), (1.1, False)])
async def test_a_deleted_queue_is_forgotten_after_a_day(connection: Connection, days: float, is_kept: bool) -> None:
    """Until then a transaction that had seen it alive may still store a message there."""
    await queues.create(connection, "gone", {})
    await connection.execute(
        "UPDATE broker.queues SET deleted_at = now() - %s * interval '1 day' WHERE name = 'gone'", [days]
    )
    await sweep_once(connection)
    row = await (await connection.execute("SELECT count(*) FROM broker.queues WHERE name = 'gone'")).fetchone()
    assert row == (int(is_kept),)


async def test_two_sweepers_at_once_remove_what_a_deleted_queue_leaves_once(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await queues.create(one, "gone", {})
    await send(one, 500, "gone")
    await one.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'gone'")
    removed = 0
    while await remaining(one):
        removed += sum(swept.of_deleted for swept in await asyncio.gather(sweep_once(one, 70), sweep_once(two, 70)))
    assert removed == 500


async def test_a_queue_with_a_large_limit_is_full_when_it_was_measured(connection: Connection) -> None:
    limit = storing.COUNTED_MAX_MESSAGES + 1
    await queues.create(connection, "large", {"max_messages": limit})
    await connection.execute(
        """
        INSERT INTO broker.messages (queue_id, id, enqueued_at, visible_at, body_bytes, body)
        SELECT q.id, nextval('broker.message_ids'), now(), now(), 1, '1'
        FROM broker.queues q, generate_series(1, %s) n
        WHERE q.name = 'large'
        """,
        [limit],
    )
    # Nobody has counted yet.
    assert len(await send(connection, 1, "large")) == 1
    assert (await sweep_once(connection)).measured_queues == 1
    new = [NewMessage("1", None, None, None, None)]
    (refused,) = await storing.enqueue(connection, [EnqueueCall("large", new)])
    assert isinstance(refused, BrokerError)
    assert refused.type == "queue_full"
    await connection.execute("DELETE FROM broker.messages")
    assert (await sweep_once(connection)).measured_queues == 1
    assert len(await send(connection, 1, "large")) == 1


async def test_the_longer_it_takes_to_count_a_queue_the_less_often_it_is_counted(connection: Connection) -> None:
    await queues.create(connection, "large", {"max_messages": 10_000_000})
    assert (await sweep_once(connection)).measured_queues == 1
    await connection.execute("UPDATE broker.queue_sizes SET messages = 10000000")
    assert (await sweep_once(connection)).measured_queues == 0
    await connection.execute("UPDATE broker.queue_sizes SET counted_at = counted_at - interval '41 s'")
    assert (await sweep_once(connection)).measured_queues == 1


async def test_a_queue_is_counted_again_after_the_clock_was_set_back(connection: Connection) -> None:
    """Otherwise it would count as full until the clock comes to the time of the last count again."""
    await queues.create(connection, "large", {"max_messages": 10_000_000})
    assert (await sweep_once(connection)).measured_queues == 1
    await connection.execute("UPDATE broker.queue_sizes SET counted_at = now() + interval '1 hour'")
    assert (await sweep_once(connection)).measured_queues == 1
    await connection.execute(
        "UPDATE broker.queue_sizes SET counted_at = now() + interval '1 hour', messages = 10000000"
    )
    assert (await sweep_once(connection)).measured_queues == 1


async def test_a_queue_with_a_large_limit_that_was_purged_takes_messages_at_once(broker: Broker) -> None:
    limit = storing.COUNTED_MAX_MESSAGES + 1
    await broker.call("create_queue", queue="large", max_messages=limit)
    for _ in range(11):
        await broker.call("enqueue_batch", queue="large", messages=[{"body": 1}] * 1000)
    async with await broker.server.database.connect() as connection:
        await sweeps.measure_queues(connection)
    assert (await broker.error("enqueue", queue="large", body=1))["code"] == 1014
    assert (await broker.call("purge_queue", queue="large"))["complete"]
    await broker.call("enqueue", queue="large", body=1)


async def test_measures_of_queues_that_need_none_are_forgotten(connection: Connection) -> None:
    await queues.create(connection, "large", {"max_messages": 1_000_000})
    await sweep_once(connection)
    await queues.update(connection, "large", {"max_messages": None})
    await sweep_once(connection)
    assert await (await connection.execute("SELECT count(*) FROM broker.queue_sizes")).fetchone() == (0,)


async def test_two_sweepers_measure_at_once_without_an_error(connect: Connect) -> None:
    connections = [await connect() for _ in range(4)]
    for n in range(20):
        await queues.create(connections[0], f"large-{n}", {"max_messages": 20_000 + n})
    for _ in range(20):
        await asyncio.gather(*(sweeps.measure_queues(each) for each in connections))
        await connections[0].execute("UPDATE broker.queue_sizes SET counted_at = counted_at - interval '11 s'")


async def test_a_running_broker_sweeps_by_itself(start_broker: StartBroker, connection: Connection) -> None:
    broker: Broker = await start_broker(sweep_interval=0.02)
    await broker.call("enqueue", body=1, ttl=0.001)
    async with asyncio.timeout(20):
        while await remaining(connection):
            pass
