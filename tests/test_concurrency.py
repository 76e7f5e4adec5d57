"""Two statements at once, in an order that the test decides.

Method, either of two. A transaction is left open, so that the next statement has to wait for its rows; that it
waits is seen in pg_stat_activity. Or a gate is put into the queues, which every statement reads after it has
taken its snapshot and before it locks a message: while the gate is closed others change the rows, so that the
statement meets rows that are not as its snapshot shows them. Nothing sleeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from psycopg import sql

from broker.errors import BrokerError, LeaseLost, MessageLeased, MessageNotFound, QueueExists, QueueNotFound
from broker.model import Lease, NewMessage, message_number_of
from broker.storage import counting, handing_out, inspection, leases, queues, storing, totals
from broker.storage.database import Connection, Database
from broker.storage.handing_out import Delivery
from broker.storage.storing import EnqueueCall, Stored
from broker.sweeper import sweep_once
from conftest import Connect, dequeue, new
from gate import Gate, wait_until_blocked


@asynccontextmanager
async def transaction(connection: Connection) -> AsyncIterator[None]:
    """A transaction that is still open while the test goes on."""
    await connection.execute("BEGIN")
    yield
    if connection.info.transaction_status.name == "INTRANS":
        await connection.execute("COMMIT")


async def send(connection: Connection, how_many: int = 1, queue: str = "default") -> list[int]:
    """Store messages; return their numbers."""
    (stored,) = await storing.enqueue(connection, [EnqueueCall(queue, new(*range(how_many)))])
    assert isinstance(stored, Stored), stored
    return stored.ids


async def take(connection: Connection, how_many: int = 1, queue: str = "default", **how: Any) -> Delivery:
    return await dequeue(connection, queue, how_many, None, **how)


def ids(delivery: Delivery) -> list[int]:
    return [message_number_of(message.message_id) or 0 for message in delivery.messages]


async def let_leases_end(connection: Connection, seconds: float = 60) -> None:
    await connection.execute(
        "UPDATE broker.messages SET visible_at = visible_at - %s * interval '1 second' WHERE lane = 1", [seconds]
    )


async def remaining(connection: Connection) -> set[int]:
    return {row[0] for row in await (await connection.execute("SELECT id FROM broker.messages")).fetchall()}


async def is_lost(work: Awaitable[list[Any]]) -> bool:
    (result,) = await work
    return isinstance(result, LeaseLost)


# Dequeue and dequeue


async def test_two_consumers_never_lease_one_message(connect: Connect) -> None:
    """200 rounds, both at once, each asking for more than half."""
    one, two = await connect(), await connect()
    sent = await send(one, 1000)
    handed_out: Counter[int] = Counter()
    for n in range(200):
        how: dict[str, Any] = {"fresh_first": n % 8 == 0, "at_most_once": n % 3 == 0}
        both = await asyncio.gather(take(one, 3, **how), take(two, 3, **how))
        handed_out.update(itertools.chain.from_iterable(map(ids, both)))
        if n % 50 == 49:
            sent += await send(one, 300)
    assert set(handed_out.values()) == {1}
    assert set(handed_out) <= set(sent)
    assert len(handed_out) == 200 * 6


async def test_dequeue_skips_what_an_open_transaction_has_locked_and_sees_it_afterwards(connect: Connect) -> None:
    one, two = await connect(), await connect()
    sent = await send(one, 5)
    async with transaction(one):
        await one.execute("SELECT FROM broker.messages WHERE id = ANY (%s) FOR UPDATE", [sent[:3]])
        assert ids(await take(two, 5)) == sent[3:]
        assert ids(await take(two, 5)) == []
    assert ids(await take(two, 5)) == sent[:3]


async def test_dequeue_skips_what_is_being_leased_and_gets_it_when_that_is_rolled_back(connect: Connect) -> None:
    one, two = await connect(), await connect()
    sent = await send(one, 2)
    async with transaction(one):
        assert ids(await take(one, 2)) == sent
        assert ids(await take(two, 2)) == []
        await one.execute("ROLLBACK")
    delivery = await take(two, 2)
    assert ids(delivery) == sent
    assert [message.receive_count for message in delivery.messages] == [1, 1]


@pytest.mark.parametrize("at_most_once", [False, True])
@pytest.mark.parametrize("fresh_first", [False, True])
@pytest.mark.parametrize("lane", [0, 1])
@pytest.mark.parametrize("every", [1, 2, 7])
async def test_exactly_as_many_are_handed_out_as_were_asked_for_though_rows_were_updated_meanwhile(
    connect: Connect, gate: Gate, at_most_once: bool, fresh_first: bool, lane: int, every: int
) -> None:
    """The trap: where the rows that were picked are picked again after a lock, more or fewer come out."""
    one, two = await connect(), await connect()
    sent = await send(two, 600)
    await two.execute("UPDATE broker.messages SET lane = %s", [lane])
    async with gate.holding_back(one, take(one, 10, at_most_once=at_most_once, fresh_first=fresh_first)) as taking:
        await two.execute("""UPDATE broker.messages SET headers = '{"is":"new"}' WHERE id %% %s = 0""", [every])
    assert ids(await taking) == sent[:10]
    shown = [bytes(message.headers) for message in (await taking).messages]
    assert shown == [b'{"is":"new"}' if number % every == 0 else b"{}" for number in sent[:10]]
    row = await (await two.execute("SELECT count(*), count(lease_token) FROM broker.messages")).fetchone()
    assert row == ((590, 0) if at_most_once else (600, 10))
    assert ids(await take(two, 600)) == sent[10:]


@pytest.mark.parametrize("at_most_once", [False, True])
async def test_both_lanes_give_exactly_as_many_as_were_asked_for_though_rows_were_updated_meanwhile(
    connect: Connect, gate: Gate, at_most_once: bool
) -> None:
    one, two = await connect(), await connect()
    sent = await send(two, 600)
    await two.execute("UPDATE broker.messages SET lane = 1 WHERE id = ANY (%s)", [sent[-5:]])
    async with gate.holding_back(one, take(one, 10, at_most_once=at_most_once)) as taking:
        for _ in range(3):
            await two.execute("UPDATE broker.messages SET headers = '{}'")
    assert ids(await taking) == sent[-5:] + sent[:5]
    assert ids(await take(two, 600)) == sent[5:-5]


@pytest.mark.parametrize("at_most_once", [False, True])
async def test_what_was_leased_since_the_snapshot_is_not_handed_out_again(
    connect: Connect, gate: Gate, at_most_once: bool
) -> None:
    one, two = await connect(), await connect()
    sent = await send(two, 50)
    async with gate.holding_back(one, take(one, 20, at_most_once=at_most_once)) as taking:
        await two.execute(
            "UPDATE broker.messages SET visible_at = now() + interval '1 hour', lane = 1 WHERE id <= %s", [sent[14]]
        )
        await two.execute("DELETE FROM broker.messages WHERE id BETWEEN %s AND %s", [sent[15], sent[19]])
    assert ids(await taking) == sent[20:40]


async def test_a_lease_that_ended_in_both_snapshots_is_taken_once(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    sent = await send(two)
    await take(two)
    await let_leases_end(two)
    async with gate.holding_back(one, take(one)) as first:
        assert ids(await take(two)) == sent
    assert ids(await first) == []


async def test_what_was_given_back_since_the_snapshot_comes_once(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    sent = await send(two, 3)
    held = await take(two, 1)
    async with gate.holding_back(one, take(one, 3)) as taking:
        await leases.give_back(two, held.leases)
    assert ids(await taking) == sent[1:]
    assert ids(await take(two, 3)) == sent[:1]


async def test_a_message_that_expires_while_it_is_picked_is_judged_by_its_newest_version(
    connect: Connect, gate: Gate
) -> None:
    one, two = await connect(), await connect()
    sent = await send(two, 3)
    async with gate.holding_back(one, take(one, 3)) as taking:
        await two.execute("UPDATE broker.messages SET expires_at = now() - interval '1 s' WHERE id = %s", [sent[0]])
    assert ids(await taking) == sent[1:]


# Delete, extend and give back


async def test_of_two_deletes_the_second_waits_and_answers_false(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await send(one)
    held = (await take(one)).leases
    async with transaction(one):
        assert await leases.delete(one, held) == [True]
        second = asyncio.ensure_future(leases.delete(two, held))
        await wait_until_blocked(observer, two)
    assert await second == [False]


async def test_a_delete_that_is_rolled_back_leaves_the_message_to_the_second(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await send(one)
    held = (await take(one)).leases
    async with transaction(one):
        assert await leases.delete(one, held) == [True]
        second = asyncio.ensure_future(leases.delete(two, held))
        await wait_until_blocked(observer, two)
        await one.execute("ROLLBACK")
    assert await second == [True]
    assert await remaining(two) == set()


async def test_dequeue_does_not_wait_for_a_delete_nor_hand_out_its_message(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await send(one)
    held = (await take(one)).leases
    await let_leases_end(one)
    async with transaction(one):
        assert await leases.delete(one, held) == [True]
        assert ids(await take(two)) == []
    assert ids(await take(two)) == []


@pytest.mark.parametrize("ends", ["COMMIT", "ROLLBACK"])
async def test_a_delete_that_meets_a_new_lease_has_lost_it_if_that_is_committed(connect: Connect, ends: str) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    (sent,) = await send(one)
    held = (await take(one)).leases
    await let_leases_end(one)
    async with transaction(one):
        newer = (await take(one)).leases
        deleting = asyncio.ensure_future(leases.delete(two, held))
        await wait_until_blocked(observer, two)
        await one.execute(sql.SQL(ends))
    if ends == "ROLLBACK":
        assert await deleting == [True]
    else:
        assert await is_lost(deleting)
        assert await remaining(two) == {sent}
        assert await leases.delete(two, newer) == [True]


@pytest.mark.parametrize("statement", ["delete", "extend"])
async def test_a_receipt_loses_to_a_lease_that_was_taken_since_the_snapshot(
    connect: Connect, gate: Gate, statement: str
) -> None:
    """The lease runs in the statement's snapshot; then it ends and another consumer takes the message."""
    one, two = await connect(), await connect()
    sent = await send(two)
    held = (await take(two)).leases
    work: Awaitable[list[Any]] = (
        leases.delete(one, held) if statement == "delete" else leases.extend(one, held, [99] * len(held))
    )
    async with gate.holding_back(one, work) as working:
        await let_leases_end(two)
        newer = await take(two)
        assert ids(newer) == sent
    assert await is_lost(working)
    assert await leases.delete(two, newer.leases) == [True]


async def test_what_is_given_back_too_late_stays_with_its_new_holder(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await send(one)
    held = (await take(one)).leases
    async with transaction(one):
        await let_leases_end(one)
        newer = await take(one)
        giving_back = asyncio.ensure_future(leases.give_back(two, held))
        await wait_until_blocked(observer, two)
    assert await giving_back == 0
    assert newer.messages[0].receive_count == 2
    assert await leases.delete(two, newer.leases) == [True]


async def test_a_lease_that_ends_before_its_extension_gets_the_row_is_not_extended(
    connect: Connect, gate: Gate
) -> None:
    one, two = await connect(), await connect()
    sent = await send(two)
    held = (await take(two)).leases
    async with gate.holding_back(one, leases.extend(one, held, [99] * len(held))) as extending:
        await let_leases_end(two)
    assert await is_lost(extending)
    assert ids(await take(two)) == sent


async def test_dequeue_skips_a_lease_that_is_being_extended(connect: Connect, gate: Gate) -> None:
    """The lease has ended in the consumer's snapshot and was moved on before it could lock the row."""
    one, two = await connect(), await connect()
    await send(two)
    await take(two)
    await let_leases_end(two)
    async with gate.holding_back(one, take(one)) as taking:
        await let_leases_end(two, seconds=-120)
    assert ids(await taking) == []


@pytest.mark.parametrize("statement", ["delete", "extend"])
async def test_a_message_that_was_removed_since_the_snapshot_is_gone(
    connect: Connect, gate: Gate, statement: str
) -> None:
    one, two = await connect(), await connect()
    await send(two)
    held = (await take(two)).leases
    work: Awaitable[list[Any]] = (
        leases.delete(one, held) if statement == "delete" else leases.extend(one, held, [99] * len(held))
    )
    async with gate.holding_back(one, work) as working:
        await two.execute("DELETE FROM broker.messages")
    (result,) = await working
    assert result is False if statement == "delete" else isinstance(result, LeaseLost)


async def test_two_delete_batches_with_the_same_receipts_in_opposite_orders_never_deadlock(connect: Connect) -> None:
    """200 rounds; every message is deleted by exactly one of the two."""
    one, two = await connect(), await connect()
    for _ in range(200):
        await send(one, 20)
        held = (await take(one, 20)).leases
        random.shuffle(held)
        forwards, backwards = await asyncio.gather(leases.delete(one, held), leases.delete(two, held[::-1]))
        assert [first is not second for first, second in zip(forwards, backwards[::-1], strict=True)] == [True] * 20


async def test_delete_extend_give_back_and_purge_in_any_order_never_deadlock(connect: Connect) -> None:
    one, two, three, four = [await connect() for _ in range(4)]
    row = await (await one.execute("SELECT id FROM broker.queues WHERE name = 'default'")).fetchone()
    assert row is not None
    for n in range(50):
        await send(one, 50)
        held = (await take(one, 50)).leases
        orders = [random.sample(held, 40) for _ in range(3)]
        await asyncio.gather(
            leases.delete(one, orders[0]),
            leases.extend(two, orders[1], [0] * len(orders[1])),
            leases.give_back(three, orders[2]),
            queues.purge_batch(four, row[0], batch=1000 if n % 5 == 0 else 10),
        )


# Single messages by their id


async def test_changing_a_message_that_was_leased_since_the_snapshot_is_refused(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    (sent,) = await send(two)
    message_id = f"{sent:016x}"
    change = inspection.update(one, "default", message_id, None, '"new"', None, changes_headers=False)
    async with gate.holding_back(one, change) as changing:
        await take(two)
    with pytest.raises(MessageLeased):
        await changing
    async with gate.holding_back(one, inspection.delete(one, "default", message_id, None)) as deleting:
        await two.execute("UPDATE broker.messages SET headers = '{}'")
    with pytest.raises(MessageLeased):
        await deleting


async def test_a_message_is_deleted_by_id_once(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    (sent,) = await send(one)
    async with transaction(one):
        assert await inspection.delete(one, "default", f"{sent:016x}", None)
        second = asyncio.ensure_future(inspection.delete(two, "default", f"{sent:016x}", None))
        await wait_until_blocked(observer, two)
    assert await second is False


# Purge and the life of queues


async def queue_id(connection: Connection, name: str) -> int:
    row = await (
        await connection.execute("SELECT id FROM broker.queues WHERE name = %s AND deleted_at IS NULL", [name])
    ).fetchone()
    assert row is not None
    number: int = row[0]
    return number


async def test_a_purge_waits_for_a_hand_out_and_removes_what_it_leased(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await send(one, 10)
    number = await queue_id(one, "default")
    async with transaction(one):
        held = (await take(one, 4)).leases
        purging = asyncio.ensure_future(queues.purge_batch(two, number))
        await wait_until_blocked(observer, two)
    assert await purging == 10
    assert await leases.delete(one, held) == [False] * 4


async def test_a_full_batch_is_purged_though_others_delete_meanwhile(connect: Connect) -> None:
    """A batch that comes out smaller means that the queue is empty, so rows that vanish must not make it so."""
    one, two, observer = await connect(), await connect(), await connect()
    sent = await send(one, 100)
    number = await queue_id(one, "default")
    async with transaction(one):
        await one.execute("DELETE FROM broker.messages WHERE id <= %s", [sent[29]])
        purging = asyncio.ensure_future(queues.purge_batch(two, number, batch=50))
        await wait_until_blocked(observer, two)
    assert await purging == 50
    assert await remaining(one) == set(sent[80:])


async def test_dequeue_skips_what_is_being_purged(connect: Connect) -> None:
    one, two = await connect(), await connect()
    await send(one, 10)
    number = await queue_id(one, "default")
    async with transaction(one):
        assert await queues.purge_batch(one, number, batch=10) == 10
        assert ids(await take(two, 10)) == []
    assert ids(await take(two, 10)) == []


async def test_a_delete_waits_for_a_purge_and_answers_false(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    await send(one, 3)
    held = (await take(one, 3)).leases
    number = await queue_id(one, "default")
    async with transaction(one):
        assert await queues.purge_batch(one, number) == 3
        deleting = asyncio.ensure_future(leases.delete(two, held))
        await wait_until_blocked(observer, two)
    assert await deleting == [False] * 3


async def test_a_message_stored_while_its_queue_is_deleted_is_never_seen_and_the_sweeper_removes_it(
    connect: Connect, gate: Gate, database: Database
) -> None:
    one, two = await connect(), await connect()
    await queues.create(two, "short-lived", {})
    async with gate.holding_back(one, storing.enqueue(one, [EnqueueCall("short-lived", new(1))])) as sending:
        assert await queues.delete(database, "short-lived") == (0, True)
    (stored,) = await sending
    assert isinstance(stored, Stored)
    assert await remaining(two) == set(stored.ids)
    with pytest.raises(QueueNotFound):
        await take(two, 1, "short-lived")
    await queues.create(two, "short-lived", {})
    assert ids(await take(two, 1, "short-lived")) == []
    assert (await counting.count(two, ["short-lived"]))["short-lived"].counts.total == 0
    assert (await totals.count_all(two)).counts.total == 0
    assert (await sweep_once(two)).of_deleted == 1
    assert await remaining(two) == set()


async def test_nothing_is_handed_out_twice_by_a_queue_that_is_deleted_meanwhile(connect: Connect, gate: Gate) -> None:
    one, two = await connect(), await connect()
    await queues.create(two, "short-lived", {})
    await send(two, 3, "short-lived")
    async with gate.holding_back(one, take(one, 3, "short-lived")) as taking:
        await two.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'short-lived'")
    held = (await taking).leases
    assert len(held) == 3
    assert await leases.delete(two, held) == [False] * 3
    assert all(isinstance(result, LeaseLost) for result in await leases.extend(two, held, [9] * len(held)))


async def test_enqueue_does_not_wait_for_an_update_of_its_queue_and_goes_by_what_is_committed(
    connect: Connect,
) -> None:
    one, two = await connect(), await connect()
    call = EnqueueCall("default", new('"long"'))
    async with transaction(one):
        await queues.update(one, "default", {"delay": 3600.0, "max_message_bytes": 1})
        (before,) = await storing.enqueue(two, [call])
        assert isinstance(before, Stored)
        assert before.shortest_delay == 0
    (after,) = await storing.enqueue(two, [call])
    assert isinstance(after, BrokerError)
    assert after.type == "message_too_large"


async def test_two_updates_of_a_queue_both_hold(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    async with transaction(one):
        await queues.update(one, "default", {"delay": 5.0})
        second = asyncio.ensure_future(queues.update(two, "default", {"visibility_timeout": 7.0}))
        await wait_until_blocked(observer, two)
    assert (await second).delay == 5
    assert (await queues.get(one, "default")).visibility_timeout == 7


async def test_ten_who_create_one_queue_at_once_all_get_it(connect: Connect) -> None:
    connections = [await connect() for _ in range(10)]
    for n in range(10):
        name = f"new-{n}"
        made = await asyncio.gather(*(queues.create(each, name, {"delay": 3.0}) for each in connections))
        assert len({each.created_at for each in made}) == 1
        await queue_id(connections[0], name)


async def test_of_ten_who_create_one_queue_differently_one_wins_and_the_others_hear_of_it(connect: Connect) -> None:
    connections = [await connect() for _ in range(10)]
    results = await asyncio.gather(
        *(queues.create(each, "new", {"delay": float(n)}) for n, each in enumerate(connections)),
        return_exceptions=True,
    )
    refused = [result for result in results if isinstance(result, QueueExists)]
    assert len(refused) == 9


async def test_who_creates_a_queue_waits_for_its_deletion_and_makes_a_new_one(connect: Connect) -> None:
    one, two, observer = await connect(), await connect(), await connect()
    first = await queues.create(one, "again", {"delay": 1.0})
    async with transaction(one):
        await one.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'again'")
        creating = asyncio.ensure_future(queues.create(two, "again", {"delay": 2.0}))
        await wait_until_blocked(observer, two)
    second = await creating
    assert second.delay == 2
    assert second.created_at != first.created_at


# Everything at once


class Hammer:
    """What many consumers, producers and keepers do to one queue, and what came of it."""

    def __init__(self) -> None:
        self.sent: set[int] = set()
        self.gone: Counter[int] = Counter()
        self.purged = 0
        self.known: list[Lease] = []

    async def strike(self, connection: Connection, chance: random.Random) -> None:
        kind = chance.choices(
            (self.send, self.take, self.take_for_good, self.delete, self.extend, self.give_back, self.look,
             self.change, self.purge, self.sweep),
            (10, 10, 3, 10, 4, 3, 2, 3, 0.2, 1),
        )[0]  # fmt: skip
        await kind(connection, chance)

    def some_leases(self, chance: random.Random) -> list[Lease]:
        """Return leases in no order, old ones too."""
        return chance.sample(self.known, min(len(self.known), chance.randint(1, 60)))

    async def send(self, connection: Connection, chance: random.Random) -> None:
        self.sent.update(await send(connection, chance.randint(1, 40)))
        fleeting = [NewMessage("1", None, None, None, 0.001)] * 3
        await storing.enqueue(connection, [EnqueueCall("fleeting", fleeting)])

    async def take(self, connection: Connection, chance: random.Random) -> None:
        delivery = await dequeue(
            connection, "default", chance.randint(1, 40), chance.choice((0.001, 0.1, 30)),
            fresh_first=chance.random() < 0.2,
        )  # fmt: skip
        self.known = [*self.known[-500:], *delivery.leases]
        await take(connection, 5, "fleeting")

    async def take_for_good(self, connection: Connection, chance: random.Random) -> None:
        self.gone.update(ids(await take(connection, chance.randint(1, 40), at_most_once=True)))

    async def delete(self, connection: Connection, chance: random.Random) -> None:
        wanted = self.some_leases(chance)
        results = await leases.delete(connection, wanted)
        self.gone.update(lease.id for lease, result in zip(wanted, results, strict=True) if result is True)

    async def extend(self, connection: Connection, chance: random.Random) -> None:
        wanted = self.some_leases(chance)
        await leases.extend(connection, wanted, [chance.choice((0, 0.05, 30)) for _ in wanted])

    async def give_back(self, connection: Connection, chance: random.Random) -> None:
        await leases.give_back(connection, self.some_leases(chance))

    async def look(self, connection: Connection, chance: random.Random) -> None:
        await counting.count(connection, ["default", "fleeting"])
        await inspection.list_by_id(connection, "default", None, 50, -1)
        await handing_out.next_visible(connection, ["default", "fleeting"])

    async def change(self, connection: Connection, chance: random.Random) -> None:
        for lease in self.some_leases(chance)[:2]:
            holder = chance.choice((None, lease))
            with contextlib.suppress(MessageNotFound, MessageLeased, LeaseLost):
                await inspection.update(
                    connection, "default", f"{lease.id:016x}", holder, '"changed"', None, changes_headers=False
                )

    async def purge(self, connection: Connection, chance: random.Random) -> None:
        number = await queue_id(connection, "default")
        purged = await queues.purge_batch(connection, number, batch=chance.randint(1, 100))
        self.purged += purged  # not in one line: that would read the sum before it waits

    async def sweep(self, connection: Connection, chance: random.Random) -> None:
        swept = await sweep_once(connection, batch_size=50)
        assert set(swept.expired) <= {"fleeting"}


async def test_under_fire_every_message_is_either_there_or_was_removed_exactly_once(connect: Connect) -> None:
    """Eight connections for six seconds: no deadlock, no error, no message lost and none removed twice."""
    connections = [await connect() for _ in range(8)]
    await queues.create(connections[0], "fleeting", {})
    hammer = Hammer()
    seed = random.randrange(2**32)
    print("seed", seed)
    loop = asyncio.get_running_loop()
    end = loop.time() + 6

    async def run(number: int) -> None:
        chance = random.Random(seed + number)
        while loop.time() < end:
            await hammer.strike(connections[number], chance)

    await asyncio.gather(*(run(number) for number in range(8)))
    default = await queue_id(connections[0], "default")
    cursor = await connections[0].execute("SELECT id FROM broker.messages WHERE queue_id = %s", [default])
    left = {row[0] for row in await cursor.fetchall()}
    assert set(hammer.gone.values()) <= {1}
    assert not left & set(hammer.gone)
    assert left | set(hammer.gone) <= hammer.sent
    assert len(left) + len(hammer.gone) + hammer.purged == len(hammer.sent)
    assert len(hammer.gone) > 100
