"""What the statements on the way of a message read.

Method: a table is filled while its statistics say that it is empty, then every statement is run under EXPLAIN
ANALYZE, rolled back, and run again once the table has been analysed. Rows and pages are counted, not
milliseconds. The statements are recorded from the functions that send them, with the params they send. The
sessions are set up as the broker's are: there a sequential scan of the messages is never right, on small tables
neither, because a table that was small when the plan was made is not small for long.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import msgspec
import pytest

from broker.model import FRESH, LAST, RETURNED, Lease, NewMessage
from broker.storage import (
    broadcasting,
    counting,
    dead_letters,
    handing_out,
    idempotency,
    inspection,
    leases,
    publishing,
    queues,
    storing,
    subscriptions,
    sweeps,
    topics,
    totals,
)
from broker.storage.database import Connection
from broker.storage.publishing import PublishCall
from broker.storage.storing import EnqueueCall
from conftest import Connect, dequeue

MANY = 200_000

# In every case the queue `work` has a little of everything besides, so that each statement finds something.
FILL = """
INSERT INTO broker.messages (
    queue_id, id, enqueued_at, visible_at, expires_at, first_received_at, lease_token, receive_count, body_bytes,
    lane, body
)
SELECT
    q.id, nextval('broker.message_ids'), now() - interval '1 hour',
    now() + %(visible_in)s * interval '1 second' + n * interval '1 microsecond',
    now() + %(expires_in)s::float8 * interval '1 second',
    CASE WHEN %(lane)s::int > 0 THEN now() END,
    CASE WHEN %(lane)s::int > 0 THEN gen_random_uuid() END,
    %(lane)s::int, 222, %(lane)s::int, to_json(repeat('x', 220))
FROM broker.queues q, generate_series(1, %(messages)s::int) n
WHERE q.name = %(queue)s
"""

PAST, FUTURE = -7200, 7200


class Recorder:
    """Stands for a connection, and remembers what was sent through it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.sent: list[tuple[str, Any]] = []

    async def execute(self, statement: str, params: Any = None, *, binary: bool = False) -> Any:
        self.sent.append((statement, params))
        return await self._connection.execute(statement, params, binary=binary)


@dataclass(frozen=True)
class Scan:
    """One scan of the messages in a plan that has run."""

    kind: str
    index: str | None
    rows: float


@dataclass(frozen=True)
class Plan:
    """What a statement did.

    `most_rows` is how many rows the step had that had most, `walked` are the indexes that were read from end to end.
    """

    statement: str
    scans: list[Scan]
    pages: int
    most_rows: float
    walked: set[str]

    def rows(self, index: str) -> float:
        return sum(scan.rows for scan in self.scans if scan.index == index)


LANE = "message_by_queue_lane_and_visible_at"
KEY = "messages_pkey"
EXPIRY = "expiring_message_by_time"
EXHAUSTED = "exhausted_message_by_time"
MOVED = "moved_message_by_id"

Use = Callable[[Connection], Awaitable[object]]


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def _scan(node: dict[str, Any]) -> Scan:
    return Scan(node["Node Type"], node.get("Index Name"), _rows(node))


def _rows(node: dict[str, Any]) -> float:
    removed = ("Rows Removed by Filter", "Rows Removed by Join Filter", "Rows Removed by Index Recheck")
    rows: float = node["Actual Rows"] + sum(node.get(name, 0) for name in removed)
    return rows * float(node["Actual Loops"])


def _is_scan(node: dict[str, Any]) -> bool:
    on_messages = node.get("Relation Name") == "messages" and node["Node Type"] != "ModifyTable"
    return bool(on_messages or node["Node Type"] == "Bitmap Index Scan")


async def plans_of(connection: Connection, use: Use) -> list[Plan]:
    """Return what each statement of a function does; everything is rolled back."""
    recorder = Recorder(connection)
    async with connection.transaction(force_rollback=True):
        await use(cast(Connection, recorder))
    plans = []
    for statement, params in recorder.sent:
        if statement.lstrip().startswith("EXPLAIN"):
            continue
        async with connection.transaction(force_rollback=True):
            cursor = await connection.execute("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) " + statement, params)
            row = await cursor.fetchone()
        assert row is not None
        root = msgspec.json.decode(row[0])[0]["Plan"]
        scans = [_scan(node) for node in _nodes(root) if _is_scan(node)]
        pages = root["Shared Hit Blocks"] + root["Shared Read Blocks"]
        walked = {node["Index Name"] for node in _nodes(root) if "Index Name" in node and "Index Cond" not in node}
        plans.append(Plan(statement, scans, pages, max(map(_rows, _nodes(root))), walked))
    return plans


@pytest.fixture
async def table(connection: Connection) -> Connection:
    """A connection to an empty table that only this test analyses."""
    await connection.execute("ALTER TABLE broker.messages SET (autovacuum_enabled = off)")
    for name in ("work", "other", "stale", "dead"):
        await queues.create(connection, name, {})
    await connection.execute("ANALYZE broker.messages")
    return connection


async def fill(
    connection: Connection,
    how_many: int,
    queue: str = "work",
    lane: int = FRESH,
    visible_in: float = PAST,
    expires_in: float | None = None,
) -> None:
    await connection.execute(
        FILL,
        {
            "queue": queue,
            "messages": how_many,
            "lane": lane,
            "visible_in": visible_in,
            "expires_in": expires_in,
        },
    )


async def some_leases(connection: Connection, how_many: int) -> list[Lease]:
    """Return leases that run in the queue `work`, and inventions where there are not so many."""
    cursor = await connection.execute(
        """
        SELECT m.queue_id, m.id, uuid_send(m.lease_token)
        FROM broker.messages m
        JOIN broker.queues q ON q.id = m.queue_id
        WHERE q.name = 'work' AND m.lease_token IS NOT NULL AND m.visible_at > now()
        ORDER BY md5(m.id::text)
        LIMIT %s
        """,
        [how_many],
    )
    found = [Lease(*row) for row in await cursor.fetchall()]
    return found + [Lease(1, n + 1, uuid4().bytes) for n in range(how_many - len(found))]


async def check_dequeue(connection: Connection, n: int, *, at_most_once: bool, fresh_first: bool) -> None:
    async def use(c: Connection) -> None:
        await dequeue(c, "work", n, None, at_most_once=at_most_once, fresh_first=fresh_first)

    (plan,) = await plans_of(connection, use)
    assert {scan.kind for scan in plan.scans} == {"Index Scan"}, plan
    assert {scan.index for scan in plan.scans} == {LANE, KEY}, plan
    # The first one of each lane besides, for the low-water hint.
    assert plan.rows(LANE) <= n + 2, plan
    assert plan.rows(KEY) <= n, plan
    # Pages for a row: two looks at it, two new versions' worth of index entries, each a few levels deep.
    assert plan.pages <= 60 + 30 * n, plan


async def check_lookup(connection: Connection, n: int, use: Use) -> None:
    """Check a statement that has to do with n messages it knows."""
    (plan,) = await plans_of(connection, use)
    assert {scan.kind for scan in plan.scans} <= {"Index Scan"}, plan
    # Where a message moved to is looked up only of those that are not in their queue.
    assert {scan.index for scan in plan.scans} <= {KEY, MOVED}, plan
    assert plan.rows(KEY) <= 2 * n, plan
    assert plan.rows(MOVED) == 0, plan
    assert plan.pages <= 60 + 30 * n, plan


async def check_every_statement(connection: Connection) -> None:
    for n in (1, 100, 1000):
        for at_most_once in (False, True):
            for fresh_first in (False, True):
                await check_dequeue(connection, n, at_most_once=at_most_once, fresh_first=fresh_first)
    for n in (1, 1000):
        await check_known_messages(connection, n)
    await check_looks(connection)
    await check_sweeps(connection)
    await check_publishing(connection)


async def check_known_messages(connection: Connection, n: int) -> None:
    held = await some_leases(connection, n)
    new = [NewMessage('"body"', None, None, None, None)] * n
    await check_lookup(connection, n, lambda c: storing.enqueue(c, [EnqueueCall("work", new)]))
    keyed = [NewMessage('"body"', None, None, None, None, f"key{place}") for place in range(n)]
    await check_lookup(connection, n, lambda c: idempotency.enqueue(c, [EnqueueCall("work", keyed, has_keys=True)]))
    await check_lookup(connection, n, lambda c: leases.delete(c, held))
    await check_lookup(connection, n, lambda c: leases.extend(c, held, [30] * len(held)))
    await check_lookup(connection, n, lambda c: leases.give_back(c, held))


async def check_looks(connection: Connection) -> None:
    """Check what reads and leaves everything as it was."""

    async def next_visible(c: Connection) -> None:
        await handing_out.next_visible(c, ["work", "other", "stale", "default"])

    (plan,) = await plans_of(connection, next_visible)
    assert {scan.index for scan in plan.scans} == {LANE}
    # One of each lane, and what has expired in the queue `stale`.
    assert plan.rows(LANE) <= 8 + 2000, plan

    async def list_page(c: Connection) -> None:
        await inspection.list_by_id(c, "work", None, 100, -1)

    (plan,) = await plans_of(connection, list_page)
    assert {scan.index for scan in plan.scans} == {KEY}
    assert plan.rows(KEY) <= 101, plan

    async def count(c: Connection) -> None:
        await counting.count(c, ["work"])
        await totals.count_all(c)

    for plan in await plans_of(connection, count):
        kinds = {(scan.kind, scan.index) for scan in plan.scans}
        assert kinds <= {("Index Scan", LANE), ("Tid Range Scan", None)}, plan
        # Each status to where it is too much to be exact, and what has expired in the queue `stale`; or a sample.
        assert plan.rows(LANE) <= 3 * (counting.EXACT_UP_TO + 1) + 3 + 2000, plan
        assert plan.pages <= 60 + 2 * plan.rows(LANE) + counting.SAMPLED_BLOCKS, plan


async def check_sweeps(connection: Connection) -> None:
    async def chores(c: Connection) -> None:
        await sweeps.chores(c)

    (plan,) = await plans_of(connection, chores)
    # By its key it looks for a message of a subscription that has ended.
    assert {scan.index for scan in plan.scans} == {EXPIRY, EXHAUSTED, KEY}, plan
    assert plan.rows(KEY) <= 1, plan
    assert plan.rows(EXPIRY) <= 1, plan
    assert plan.rows(EXHAUSTED) <= 1, plan

    async def remove_expired(c: Connection) -> None:
        await sweeps.remove_expired(c, 1000)

    (plan,) = await plans_of(connection, remove_expired)
    assert {scan.index for scan in plan.scans} == {EXPIRY, KEY}, plan
    assert plan.rows(EXPIRY) <= 1000, plan
    assert plan.rows(KEY) <= 1000, plan

    async def settle(c: Connection) -> None:
        await dead_letters.settle(c, 1000)

    (plan,) = await plans_of(connection, settle)
    assert {scan.index for scan in plan.scans} <= {EXHAUSTED, KEY}, plan
    assert plan.rows(EXHAUSTED) <= 1000, plan
    assert plan.rows(KEY) <= 1000, plan

    async def mark_exhausted(c: Connection) -> None:
        await c.execute("UPDATE broker.queues SET max_receives = 1, max_receives_lowered_at = now()")
        await dead_letters.mark_exhausted(c, 1000)

    plan = (await plans_of(connection, mark_exhausted))[1]
    assert {scan.index for scan in plan.scans} == {LANE, KEY}, plan

    async def redrive(c: Connection) -> None:
        await dead_letters.redrive_batch(c, await queue_id(c, "dead"), None, 1000)

    _, plan = await plans_of(connection, redrive)
    assert {scan.index for scan in plan.scans} == {KEY}, plan
    assert plan.rows(KEY) <= 2 * 1000, plan

    async def settle_ended(c: Connection) -> None:
        await subscribe(c, "dead")
        await c.execute("UPDATE broker.subscriptions SET state = 'ended'")
        await dead_letters.settle_ended(c, 1000)

    plan = (await plans_of(connection, settle_ended))[-1]
    assert {scan.index for scan in plan.scans} <= {KEY}, plan
    assert plan.rows(KEY) <= 2 * 1000, plan

    async def claim_probes(c: Connection) -> None:
        await subscribe(c, "work", "dead")
        await c.execute("UPDATE broker.subscriptions SET url = 'x', state = 'failing', probe_at = '-infinity'")
        await subscriptions.claim_probes(c, 5)

    plan = (await plans_of(connection, claim_probes))[-1]
    assert {scan.index for scan in plan.scans} == {LANE}, plan
    assert plan.rows(LANE) <= 4, plan

    async def count_ended_leases(c: Connection) -> None:
        await sweeps.count_ended_leases(c)

    (plan,) = await plans_of(connection, count_ended_leases)
    assert {scan.index for scan in plan.scans} == {LANE}, plan
    assert plan.rows(LANE) <= 1, plan

    async def purge(c: Connection) -> None:
        await queues.purge_batch(c, await queue_id(c, "work"))

    _, plan = await plans_of(connection, purge)
    assert {scan.index for scan in plan.scans} == {KEY}, plan
    assert plan.rows(KEY) <= 2 * queues.PURGE_BATCH, plan


async def subscribe(connection: Connection, *names: str, topic: str = "topic", how_often: int = 1) -> None:
    """Let queues get copies of what is published, each by several subscriptions."""
    await topics.create(connection, topic, None)
    for name in names:
        await connection.execute(
            """
            INSERT INTO broker.subscriptions (topic_id, queue_id, name)
            SELECT t.id, q.id, q.name || n
            FROM broker.topics t, broker.queues q, generate_series(1, %s) n
            WHERE t.name = %s AND q.name = %s
            """,
            [how_often, topic, name],
        )


async def check_publishing(connection: Connection) -> None:
    """Check that the work is that of the copies, and that no list is searched for each entry of another."""
    for n, subscribed in ((1, 1), (1, 100), (100, 10), (300, 1)):

        async def publish(c: Connection, n: int = n, subscribed: int = subscribed) -> None:
            await subscribe(c, "work", how_often=subscribed)
            messages = [NewMessage('"body"', None, None, None, None, f"key{place}") for place in range(n)]
            await publishing.publish(c, [PublishCall("topic", message) for message in messages])

        plan = (await plans_of(connection, publish))[-1]
        assert {scan.index for scan in plan.scans} <= {KEY}, plan
        assert plan.rows(KEY) == 0, plan
        assert plan.most_rows <= 10 * n * (subscribed + 10), plan
        assert not plan.walked, plan

        async def broadcast(c: Connection, n: int = n, subscribed: int = subscribed) -> None:
            await subscribe(c, "default", how_often=subscribed)
            # What the queue `work` holds is what the topic stores.
            number = await queue_id(c, "work")
            await c.execute("INSERT INTO broker.topics (id, name, delivery) VALUES (%s, 'full', 'immediate')", [number])
            await c.execute("UPDATE broker.subscriptions SET topic_id = %s", [number])
            await broadcasting.broadcast_batch(c, number, "topic", n)

        plan = (await plans_of(connection, broadcast))[-1]
        assert {scan.index for scan in plan.scans} <= {KEY}, plan
        assert plan.rows(KEY) <= 2 * n, plan
        assert plan.most_rows <= 10 * n * (subscribed + 10), plan
        assert not plan.walked, plan


async def queue_id(connection: Connection, name: str) -> int:
    row = await (await connection.execute("SELECT id FROM broker.queues WHERE name = %s", [name])).fetchone()
    assert row is not None
    number: int = row[0]
    return number


async def fill_a_little(connection: Connection) -> None:
    await fill(connection, 1000, lane=LAST, visible_in=FUTURE)
    await fill(connection, 50, lane=LAST)
    await fill(connection, 2000, queue="dead")
    await connection.execute(
        """
        UPDATE broker.messages SET moved_at = now(), dead_letter = '{"source_queue": "work"}'
        WHERE queue_id = %s
        """,
        [await queue_id(connection, "dead")],
    )
    await fill(connection, 100, lane=FRESH)
    await fill(connection, 1000, lane=RETURNED, visible_in=FUTURE)
    await fill(connection, 2000, queue="stale", expires_in=PAST)


CASES = {
    "ready": {"lane": FRESH},
    "returned": {"lane": RETURNED},
    "delayed": {"lane": FRESH, "visible_in": FUTURE},
    "leased": {"lane": RETURNED, "visible_in": FUTURE},
    "in another queue": {"queue": "other"},
}


async def test_an_empty_table_is_read_through_its_indexes(table: Connection) -> None:
    await check_every_statement(table)


async def test_a_table_of_two_hundred_rows_is_read_through_its_indexes(table: Connection) -> None:
    await fill(table, 100)
    await fill(table, 100, lane=RETURNED)
    await check_every_statement(table)
    await table.execute("ANALYZE broker.messages")
    await check_every_statement(table)


@pytest.mark.parametrize("case", list(CASES))
async def test_no_statement_walks_past_what_it_does_not_need(table: Connection, case: str) -> None:
    """On 200,000 messages that came since the table was analysed, and again when it has been."""
    await fill(table, MANY, **CASES[case])  # type: ignore[arg-type]
    await fill_a_little(table)
    await check_every_statement(table)
    await table.execute("ANALYZE broker.messages")
    await check_every_statement(table)


async def test_a_table_that_was_drained_and_fills_up_again_is_read_through_its_indexes(table: Connection) -> None:
    """Statistics of no rows on many pages make every plan look equally cheap.

    They are what a busy queue leaves that is empty most of the time: vacuum counts no rows, and cannot give
    back pages while somebody uses the table.
    """
    await fill(table, MANY)
    await table.execute("DELETE FROM broker.messages")
    await table.execute("VACUUM (TRUNCATE off, ANALYZE) broker.messages")
    row = await (await table.execute("SELECT reltuples, relpages FROM pg_class WHERE relname = 'messages'")).fetchone()
    assert row is not None
    assert row[0] == 0
    assert row[1] > 1000
    await fill(table, MANY)
    await fill_a_little(table)
    await check_every_statement(table)


async def test_many_queues_that_came_since_the_last_analyze_are_found_by_index(
    table: Connection, connect: Connect
) -> None:
    """5,000 queues where the statistics know of four: the receipts' queues are looked up one by one."""
    await table.execute("ANALYZE broker.queues")
    await table.execute("INSERT INTO broker.queues (name) SELECT 'q' || n FROM generate_series(1, 5000) n")
    await fill_a_little(table)
    held = await some_leases(table, 1000)
    for use in (lambda c: leases.delete(c, held), lambda c: leases.extend(c, held, [30] * len(held))):
        await check_lookup(table, 1000, use)


def test_statements_are_short_enough_to_be_remembered() -> None:
    """psycopg takes a longer one apart anew whenever it is sent: a tenth of a millisecond."""
    for statement in (
        handing_out._LEASE,
        handing_out._REMOVE,
        storing._ENQUEUE,
        idempotency._ENQUEUE,
        leases._DELETE,
        leases._EXTEND,
    ):
        assert len(statement) <= 4096
