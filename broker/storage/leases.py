"""What the holder of a lease can do: delete the message, extend the lease, give the message back.

Why the statements are written as they are stands at the head of `messages.py`. Those of this module change rows
in the order of the primary key (the input is sorted), each row when it comes to it, so two of them cannot wait
for each other in a circle. They take no lock beforehand: that would write a record of its own for every row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import msgspec
import psycopg

from broker.errors import BrokerError, LeaseLost, Unavailable
from broker.model import Lease
from broker.storage.binary import ByteaArray, Int4Array, Int8Array
from broker.storage.database import Connection

# Locks: the rows of the receipts whose lease is the newest, in the order of the primary key, waiting for each.
# Two at once with the same receipt: the second waits, then finds the row gone. With a dequeue that has just
# leased the row anew: who waits looks at the newest token, so the old receipt has lost. The queue is read without
# a lock: deleting a queue makes its messages gone at once, whether their rows are removed yet or not. What was
# not deleted is looked up as of the snapshot: with another token its lease is lost for ever; with this one somebody
# was quicker, and only a new snapshot can tell what became of it. What is not there may have moved to another queue:
# its lease is lost. What is gone was deleted by a transaction that may be committed here and not yet on the standby;
# who answers so has to wait for that, and PostgreSQL lets only those wait who wrote something.
_DELETE_AND_AGES = """
/* delete */
WITH existing AS MATERIALIZED (
    SELECT id
    FROM broker.queues
    WHERE id = ANY (%(queues)b::int[]) AND deleted_at IS NULL
),
wanted AS MATERIALIZED (
    SELECT n, queue_id, id, token, queue_id IN (SELECT id FROM existing) AS has_queue
    FROM unnest(%(queue_ids)b::int[], %(ids)b::bigint[], %(tokens)b::bytea[])
        WITH ORDINALITY AS w (queue_id, id, token, n)
),
deleted AS (
    DELETE FROM broker.messages m
    USING wanted w
    WHERE w.has_queue
        AND m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
        AND uuid_send(m.lease_token) = w.token
    RETURNING w.n, m.expires_at IS NOT NULL AND greatest(m.expires_at, m.visible_at) <= statement_timestamp()
        AND (m.lane < 2 OR m.visible_at >= m.expires_at) AS is_expired,
        CASE
            WHEN m.receive_count = 1
            THEN extract(epoch FROM statement_timestamp() - m.first_received_at)::float8
        END AS age
)
-- What was deleted, what somebody else was quicker with, of what the lease is lost, and how old leases were.
SELECT
    (SELECT array_agg(n) FROM deleted WHERE NOT is_expired),
    array_agg(w.n) FILTER (WHERE w.is_newest),
    array_agg(w.n) FILTER (WHERE NOT w.is_newest AND NOT w.is_gone),
    (SELECT array_agg(age) FROM deleted WHERE age IS NOT NULL),
    CASE WHEN NOT EXISTS (SELECT FROM deleted) THEN pg_logical_emit_message(true, 'wonderq', '') END
FROM (
    SELECT
        w.n,
        CASE
            WHEN m.id IS NULL THEN NOT EXISTS (
                SELECT
                FROM broker.messages e
                WHERE (-e.id) = ANY (ARRAY[-w.id]) AND e.moved_at IS NOT NULL
            )
            ELSE m.expires_at IS NOT NULL AND greatest(m.expires_at, m.visible_at) <= statement_timestamp()
                AND (m.lane < 2 OR m.visible_at >= m.expires_at)
        END AS is_gone,
        m.lease_token IS NOT NULL AND uuid_send(m.lease_token) = w.token AS is_newest
    FROM wanted w
    LEFT JOIN broker.messages m ON w.has_queue AND m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
    WHERE w.n NOT IN (SELECT n FROM deleted)
) AS w
"""


# To ask for the ages takes a twentieth of the statement's time, so most do not.
_DELETE = _DELETE_AND_AGES.replace(
    """,
        CASE
            WHEN m.receive_count = 1
            THEN extract(epoch FROM statement_timestamp() - m.first_received_at)::float8
        END AS age
""",
    "\n",
).replace("    (SELECT array_agg(age) FROM deleted WHERE age IS NOT NULL),\n", "")


async def delete(
    connection: Connection, leases: Sequence[Lease], ages: list[float] | None = None
) -> list[bool | BrokerError]:
    """Delete the messages of these leases; return True, False where it is already gone, or LeaseLost.

    To `ages`, where it is given, is added for how many seconds each message had been leased that was deleted at its
    first delivery: when a later lease began is not known.

    Where a lease stands in the list again its message is gone by its first mention, or the lease is as lost.
    """
    first_mention = {lease: n for n, lease in reversed(list(enumerate(leases)))}
    results: list[bool | BrokerError] = [False] * len(leases)
    undecided = list(first_mention)
    while undecided:
        in_order = _in_order(undecided)
        try:
            statement = _DELETE if ages is None else _DELETE_AND_AGES
            cursor = await connection.execute(statement, _params(in_order), binary=True)
        except psycopg.Error:
            if len(undecided) == len(first_mention):
                raise
            # The others are deleted already: that is to be said, whatever became of these.
            for lease in undecided:
                results[first_mention[lease]] = Unavailable(
                    reason="The database failed while somebody else changed the message", outcome="unknown"
                )
            break
        row = await cursor.fetchone()
        assert row is not None, "a select of aggregates returns one row"
        deleted, raced, lost = ([in_order[n - 1] for n in numbers or ()] for numbers in row[:3])
        if ages is not None:
            ages.extend(row[3] or ())
        for lease in deleted:
            results[first_mention[lease]] = True
        for lease in lost:
            results[first_mention[lease]] = LeaseLost()
        undecided = raced
    if len(first_mention) < len(leases):
        for n, lease in enumerate(leases):
            first = results[first_mention[lease]]
            if isinstance(first, BrokerError):
                results[n] = first
    return results


# Locks and two at once: as delete. A lease that has ended is not extended, even when nobody has taken the
# message yet: somebody may be about to. What is stamped is stamped after the transaction has its id, as
# low_water.py asks for: a lease may be made to end now.
_EXTEND = """
/* extend_visibility */
WITH existing AS MATERIALIZED (
    SELECT id, name
    FROM broker.queues
    WHERE id = ANY (%(queues)b::int[]) AND deleted_at IS NULL
),
wanted AS MATERIALIZED (
    SELECT w.n, w.queue_id, w.id, w.token, w.visibility_timeout, q.name
    FROM unnest(
        %(queue_ids)b::int[], %(ids)b::bigint[], %(tokens)b::bytea[], %(visibility_timeouts)b::float8[]
    ) WITH ORDINALITY AS w (queue_id, id, token, visibility_timeout, n)
    JOIN existing q ON q.id = w.queue_id
    ORDER BY w.n
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
)
UPDATE broker.messages m
SET visible_at = s.now + w.visibility_timeout * interval '1 second'
FROM wanted w
CROSS JOIN stamp s
WHERE m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
    AND uuid_send(m.lease_token) = w.token AND m.visible_at > statement_timestamp()
RETURNING w.n, m.visible_at, w.name
"""


class Extended(msgspec.Struct, frozen=True):
    """The new end of a lease, and the queue that its message lies in."""

    visible_at: datetime
    queue: str


async def extend(
    connection: Connection, leases: Sequence[Lease], visibility_timeouts: Sequence[float]
) -> list[Extended | BrokerError]:
    """Let each lease end so many seconds from now; 0 gives its message back at once.

    A lease that is named more than once ends after the shortest of its times: as if that had been the last.
    """
    shortest: dict[Lease, float] = {}
    for lease, seconds in zip(leases, visibility_timeouts, strict=True):
        shortest[lease] = min(float(seconds), shortest.get(lease, float(seconds)))
    rows = await _for_leases(connection, _EXTEND, list(shortest), visibility_timeouts=shortest.__getitem__)
    extended = {lease: Extended(visible_at, queue) for lease, visible_at, queue in rows}
    return [extended.get(lease) or LeaseLost() for lease in leases]


# Locks: as delete. A lease that was taken anew meanwhile is left alone. The message stays in the lane of the
# returned ones, or comes back to it, stamped with the present, so that it is among the next to be handed out.
_GIVE_BACK = """
/* give back */
WITH wanted AS MATERIALIZED (
    SELECT n, queue_id, id, token
    FROM unnest(%(queue_ids)b::int[], %(ids)b::bigint[], %(tokens)b::bytea[])
        WITH ORDINALITY AS w (queue_id, id, token, n)
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
)
UPDATE broker.messages m
SET
    lane = 1,
    visible_at = s.now,
    lease_token = NULL,
    receive_count = m.receive_count - 1,
    first_received_at = CASE WHEN m.receive_count > 1 THEN m.first_received_at END
FROM wanted w
CROSS JOIN stamp s
WHERE m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
    AND uuid_send(m.lease_token) = w.token
RETURNING w.n
"""


async def give_back(connection: Connection, leases: Sequence[Lease]) -> int:
    """Undo deliveries that nobody heard of, `receive_count` included; return how many were undone."""
    return len(await _for_leases(connection, _GIVE_BACK, leases))


async def _for_leases(
    connection: Connection, statement: str, leases: Sequence[Lease], **more: Callable[[Lease], Any]
) -> list[tuple[Any, ...]]:
    """Run a statement over distinct leases; return its rows with the lease in place of its number.

    `more` names further lists of the statement, and says what they have for a lease.
    """
    if not leases:
        return []
    in_order = _in_order(leases)
    params = _params(in_order) | {name: [value(lease) for lease in in_order] for name, value in more.items()}
    cursor = await connection.execute(statement, params, binary=True)
    return [(in_order[n - 1], *row) for n, *row in await cursor.fetchall()]


def _params(in_order: Sequence[Lease]) -> dict[str, Any]:
    return {
        "queues": Int4Array(list({lease.queue_id for lease in in_order})),
        "queue_ids": Int4Array([lease.queue_id for lease in in_order]),
        "ids": Int8Array([lease.id for lease in in_order]),
        "tokens": ByteaArray([lease.token for lease in in_order]),
    }


def _in_order(leases: Iterable[Lease]) -> list[Lease]:
    return sorted(leases, key=_primary_key)


def _primary_key(lease: Lease) -> tuple[int, int]:
    return lease.queue_id, lease.id
