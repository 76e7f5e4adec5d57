"""The low-water hint: what it saves, and that it hides nothing.

Where a test is about the hint alone, the second look at queues that seem empty is switched off, so that a message
which the hint hides stays hidden, and the test fails.
"""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psycopg
import pytest

from broker.model import Lease, NewMessage, message_number_of
from broker.storage import handing_out, leases, low_water, storing
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.handing_out import Delivery, Wanted
from broker.storage.low_water import UNKNOWN, Before, Floors, LowWater, View
from broker.storage.storing import EnqueueCall, Stored
from conftest import PATIENCE, Connect, new
from gate import Gate

START = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def quick_hints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let hints follow the present closely, so that a test need not wait for them.

    Two processors need not agree on the microsecond: without any margin a hint may be higher than it should.
    """
    monkeypatch.setattr(low_water, "MARGIN", timedelta(milliseconds=1))
    monkeypatch.setattr(low_water, "NOTE_EVERY", timedelta(0))


def bodies(delivery: Delivery) -> list[int]:
    return [int(bytes(message.body)) for message in delivery.messages]


async def send(connection: Connection, *contents: int) -> None:
    (stored,) = await storing.enqueue(connection, [EnqueueCall("default", new(*contents))])
    assert isinstance(stored, Stored)


async def traffic(calls: Calls, rounds: int = 5) -> None:
    """Send messages, take and delete them."""
    for n in range(rounds):
        await calls.enqueue("default", new(n, n))
        delivery = await calls.dequeue("default", 2, 30)
        assert len(delivery.messages) == 2
        await calls.delete(delivery.leases)


def known(calls: Calls) -> Floors:
    return calls.low_water.floors("default")


async def now(connection: Connection) -> datetime:
    row = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
    assert row is not None
    moment: datetime = row[0]
    return moment


# What it saves


async def pages_of_a_dequeue(connection: Connection, floors: Floors) -> int:
    """Return how many pages it takes to find one message."""
    wanted = Wanted("default", 1, None, floors=floors)
    pages = 0

    class Explaining:
        async def execute(self, statement: str, params: Any, *, binary: bool) -> Any:
            nonlocal pages
            async with connection.transaction(force_rollback=True):
                cursor = await connection.execute("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement, params)
                row = await cursor.fetchone()
            assert row is not None
            plan = msgspec.json.decode(row[0])[0]["Plan"]
            pages = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
            return await connection.execute(statement, params, binary=binary)

    await handing_out.hand_out(Explaining(), [wanted])  # type: ignore[arg-type]
    return pages


async def test_behind_an_old_snapshot_a_dequeue_does_not_walk_past_what_was_taken(
    calls: Calls, connect: Connect, quick_hints: None
) -> None:
    old, other = await connect(), await connect()
    await other.execute("ALTER TABLE broker.messages SET (autovacuum_enabled = off)")
    await old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await old.execute("SELECT count(*) FROM broker.messages")
    for n in range(20):
        await calls.enqueue("default", new(*[n] * 500))
        await calls.delete((await calls.dequeue("default", 500, 30)).leases)
    await calls.enqueue("default", new(1, 2, 3))
    await calls.dequeue("default", 1, 30)
    await calls.dequeue("default", 1, 30)
    floors = known(calls)
    assert floors.fresh is not None
    assert await pages_of_a_dequeue(other, floors) < 100
    await send(other, 4)
    assert await pages_of_a_dequeue(other, UNKNOWN) > 300


async def test_what_has_expired_and_was_not_swept_is_walked_past_once(
    calls: Calls, connect: Connect, quick_hints: None
) -> None:
    other = await connect()
    await calls.enqueue("default", [NewMessage("0", None, None, None, 0.001)] * 1000)
    await calls.enqueue("default", new(1, 2, 3, 4))
    for n in (1, 2):
        assert bodies(await calls.dequeue("default", 1, 30)) == [n]
    assert await pages_of_a_dequeue(other, known(calls)) < 100


# That it hides nothing


async def test_a_transaction_that_lasts_brings_its_message_below_no_hint(
    calls: Calls, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    slow, other = await connect(), await connect()
    await traffic(calls)
    await slow.execute("BEGIN")
    await send(slow, 77)
    stored_at = await now(other)
    await traffic(calls, 20)
    floors = known(calls)
    assert floors.fresh is not None
    assert floors.fresh < stored_at
    await slow.execute("COMMIT")
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_a_transaction_that_is_old_when_it_stores_its_first_message_brings_it_below_no_hint(
    calls: Calls, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    """It gets its id last, when the hint has passed its beginning."""
    slow = await connect()
    await slow.execute("BEGIN")
    await slow.execute("SELECT now()")
    await traffic(calls, 20)
    await send(slow, 77)
    await traffic(calls, 20)
    await slow.execute("COMMIT")
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_a_statement_that_is_held_up_before_it_stores_anything_brings_its_message_below_no_hint(
    calls: Calls, connect: Connect, gate: Gate, no_doubt: None, quick_hints: None
) -> None:
    """The statement begins and has its snapshot; the hint passes that time; then it stores its message."""
    slow = await connect()
    async with gate.holding_back(slow, send(slow, 77)) as sending:
        began_before = await now(gate.keeper)
        await traffic(calls, 20)
        floors = known(calls)
        assert floors.fresh is not None
        assert floors.fresh > began_before
    await sending
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_a_lock_that_is_given_up_hides_no_message(
    calls: Calls, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    """Somebody has the first message while the others pass; his transaction is rolled back."""
    holder = await connect()
    await calls.enqueue("default", new(77))
    await holder.execute("BEGIN")
    await holder.execute("SELECT FROM broker.messages FOR UPDATE")
    await traffic(calls, 20)
    await holder.execute("ROLLBACK")
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_what_is_given_back_or_made_to_end_now_is_hidden_by_no_hint(
    calls: Calls, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    slow, other = await connect(), await connect()
    await calls.enqueue("default", new(1, 2))
    one, two = [await calls.dequeue("default", 1, 300) for _ in range(2)]
    await slow.execute("BEGIN")
    await slow.execute("SELECT now()")
    await traffic(calls, 10)
    await leases.extend(slow, one.leases, [0])
    await leases.give_back(slow, two.leases)
    await traffic(calls, 10)
    await slow.execute("COMMIT")
    assert sorted(bodies(await calls.dequeue("default", 2, 30))) == [1, 2]
    row = await (await other.execute("SELECT count(*) FROM broker.messages")).fetchone()
    assert row == (2,)


async def test_a_mere_reader_holds_no_hint_back(calls: Calls, connect: Connect, quick_hints: None) -> None:
    reader, other = await connect(), await connect()
    await reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    await reader.execute("SELECT count(*) FROM broker.messages")
    since = await now(other)
    await traffic(calls)
    floors = known(calls)
    assert floors.fresh is not None
    assert floors.fresh > since


async def test_many_brokers_hand_out_everything_whatever_their_hints(
    database_url: str, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    """Three brokers send, take, delete, give back and drop leases; slow transactions come in between."""
    chance = random.Random(3)
    databases = [Database(database_url, request_timeout=PATIENCE) for _ in range(3)]
    for each in databases:
        await each.open(PATIENCE)
    brokers = [Calls(each) for each in databases]
    deleted: set[int] = set()
    sent = 0

    async def broker(calls: Calls) -> None:
        nonlocal sent
        for _ in range(150):
            contents = range(sent, sent + chance.randint(0, 6))
            sent += len(contents)
            if contents:
                await calls.enqueue("default", new(*contents))
            delivery = await calls.dequeue("default", chance.randint(1, 8), chance.choice((0.001, 0.05, 60)))
            fate = chance.random()
            if fate < 0.6:
                results = await calls.delete(delivery.leases) if delivery.leases else []
                numbers = bodies(delivery)
                deleted.update(n for n, result in zip(numbers, results, strict=True) if result is True)
            elif fate < 0.8 and delivery.leases:
                await calls.extend(delivery.leases, 0)

    async def slow_producer() -> None:
        nonlocal sent
        connection = await connect()
        for _ in range(20):
            await connection.execute("BEGIN")
            await connection.execute("SELECT now()")
            await asyncio.sleep(chance.uniform(0, 0.02))
            first, sent = sent, sent + 3
            await send(connection, *range(first, first + 3))
            await asyncio.sleep(chance.uniform(0, 0.05))
            await connection.execute(psycopg.sql.SQL(chance.choice(("COMMIT", "COMMIT", "ROLLBACK"))))

    async with asyncio.timeout(4 * PATIENCE):
        await asyncio.gather(*map(broker, brokers), slow_producer())
        other = await connect()
        # Those whose leases run are made to end, as their holders can.
        cursor = await other.execute(
            "SELECT queue_id, id, uuid_send(lease_token) FROM broker.messages WHERE visible_at > now()"
        )
        held = [Lease(*row) for row in await cursor.fetchall()]
        await leases.extend(other, held, [0] * len(held))
        cursor = await other.execute("SELECT body::text::int FROM broker.messages")
        left = {n for (n,) in await cursor.fetchall()}
        assert not left & deleted
        found: set[int] = set()
        for calls in brokers * 2:
            while (delivery := await calls.dequeue("default", 100, 600)).messages:
                found.update(bodies(delivery))
        cursor = await other.execute(
            "SELECT body::text::int, lane, visible_at, enqueued_at, receive_count FROM broker.messages WHERE lane < 2"
        )
        missed = [row for row in await cursor.fetchall() if row[0] in left - found]
    assert found == left, (missed, [calls.low_water.floors("default") for calls in brokers])
    for each in databases:
        await each.close()


# A clock that was set back, and what nobody could foresee


async def test_messages_below_the_hint_are_found_where_a_queue_seems_empty(
    calls: Calls, connect: Connect, quick_hints: None
) -> None:
    other = await connect()
    await traffic(calls)
    await send(other, 77)
    await other.execute("UPDATE broker.messages SET visible_at = visible_at - interval '1 hour'")
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_the_dequeue_that_notices_that_the_clock_was_set_back_finds_what_is_there(
    calls: Calls, connect: Connect, quick_hints: None
) -> None:
    """The hint lies in what has become the future."""
    await traffic(calls)
    future = datetime.now(UTC) + timedelta(hours=1)
    calls.low_water._floors["default"] = Floors(future, future)
    calls.low_water._newest = future
    await send(await connect(), 77)
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_messages_below_the_hint_of_a_busy_queue_are_found_by_the_look_from_the_beginning(
    calls: Calls, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    other = await connect()
    await traffic(calls)
    await send(other, 77)
    await other.execute("UPDATE broker.messages SET visible_at = visible_at - interval '1 hour'")
    await traffic(calls)
    await calls.low_water.look_from_the_beginning(["default"])
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


async def test_a_lost_connection_makes_every_hint_unknown(
    calls: Calls, connect: Connect, no_doubt: None, quick_hints: None
) -> None:
    other = await connect()
    await traffic(calls)
    assert known(calls) != UNKNOWN
    await other.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await send(other, 77)
    await other.execute("UPDATE broker.messages SET visible_at = visible_at - interval '1 hour'")
    assert bodies(await calls.dequeue("default", 1, 30)) == [77]


def view(seconds: float, xmin: int, xmax: int) -> View:
    return View(START + timedelta(seconds=seconds), xmin, xmax)


NOTHING_READY = {"q": (UNKNOWN, UNKNOWN)}
NO_TIME = Before(None, 0)


@pytest.fixture
def hints(database: Database) -> LowWater:
    return LowWater(database)


def test_the_hint_is_the_newest_time_at_which_no_transaction_of_now_was_under_way(hints: LowWater) -> None:
    hints.learn(view(0, 100, 100), NO_TIME, NOTHING_READY)
    assert hints.floors("q") == UNKNOWN, "one view knows of no time before it"
    hints.learn(view(10, 100, 105), NO_TIME, NOTHING_READY)
    assert hints.floors("q").fresh == START - low_water.MARGIN
    hints.learn(view(20, 103, 110), NO_TIME, NOTHING_READY)
    assert hints.floors("q").fresh == START - low_water.MARGIN, "103 was under way at the second view and is still"
    hints.learn(view(30, 110, 110), NO_TIME, NOTHING_READY)
    assert hints.floors("q").fresh == START + timedelta(seconds=20) - low_water.MARGIN


def test_the_hint_is_not_above_the_first_message_that_is_ready(hints: LowWater) -> None:
    first = Floors(START - timedelta(hours=1), None)
    hints.learn(view(0, 100, 100), NO_TIME, {"q": (UNKNOWN, first)})
    hints.learn(view(10, 100, 100), NO_TIME, {"q": (UNKNOWN, first)})
    assert hints.floors("q") == Floors(first.fresh, START - low_water.MARGIN)


def test_a_statement_that_looked_from_a_higher_hint_does_not_raise_one_that_was_lowered(hints: LowWater) -> None:
    hints.learn(view(0, 100, 100), NO_TIME, NOTHING_READY)
    hints.learn(view(10, 100, 100), NO_TIME, NOTHING_READY)
    high = hints.floors("q")
    hints.forget_queue("q")
    low = Floors(START - timedelta(hours=1), START - timedelta(hours=1))
    hints.learn(view(20, 100, 100), NO_TIME, {"q": (UNKNOWN, low)})
    hints.learn(view(30, 100, 100), NO_TIME, {"q": (high, UNKNOWN)})
    assert hints.floors("q") == low


def test_a_clock_that_was_set_back_makes_every_hint_unknown(hints: LowWater) -> None:
    hints.learn(view(0, 100, 100), NO_TIME, NOTHING_READY)
    hints.learn(view(10, 100, 100), NO_TIME, NOTHING_READY)
    newest = hints.before()
    hints.learn(view(5, 100, 100), NO_TIME, NOTHING_READY)
    assert hints.floors("q") != UNKNOWN, "it was sent before the other was answered"
    hints.learn(view(5, 100, 100), newest, NOTHING_READY)
    assert hints.floors("q") == UNKNOWN
    hints.learn(view(6, 100, 100), hints.before(), NOTHING_READY)
    assert hints.floors("q").fresh == START + timedelta(seconds=5) - low_water.MARGIN


def test_a_transaction_that_lasts_for_long_costs_no_memory(hints: LowWater) -> None:
    for n in range(10 * low_water.MOST_NOTES):
        hints.learn(view(n, 100, 101 + n), NO_TIME, NOTHING_READY)
    assert hints.floors("q") == UNKNOWN
    assert len(hints._notes) <= low_water.MOST_NOTES
    end = 10 * low_water.MOST_NOTES
    hints.learn(view(end, 10**9, 10**9), NO_TIME, NOTHING_READY)
    floor = hints.floors("q").fresh
    assert floor is not None
    assert floor > START + timedelta(seconds=end * 0.9)


async def test_the_messages_of_one_statement_are_told_apart_by_their_numbers(
    calls: Calls, no_doubt: None, quick_hints: None
) -> None:
    """The hint may lie between messages of the same time: none of them is below it."""
    await calls.enqueue("default", new(*range(10)))
    taken: list[int] = []
    while delivery := (await calls.dequeue("default", 3, 30)).messages:
        taken += [message_number_of(message.message_id) or 0 for message in delivery]
    assert len(taken) == 10
    assert taken == sorted(taken)
