"""What happened in each minute: appended by every process, summed up, trimmed, and read.

Rows are inserted and deleted, never updated, and nothing on the way of a message reads or writes them. So no two
processes wait for each other here, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from broker.errors import QueueNotFound
from broker.model import timestamp
from broker.storage.database import Connection
from broker.tally import Rows

# Minutes that are kept, which are as many as can be asked for.
MINUTES_KEPT = 1_440
# About how many rows of single queues are kept.
ROWS_KEPT = 1_000_000
# Minutes that have been over for so long are summed up: by then, everybody has appended what he had, as a rule.
SUMMED_UP_AFTER = 2
# Rows that one statement sums up or removes.
BATCH_SIZE = 10_000
ALL_QUEUES = 0

# Locks: none but those of the rows it inserts, which nobody waits for. A queue that is deleted meanwhile may leave rows
# behind; nobody can ask for them, and they go with their minute. What belongs to no queue that lives counts for all
# queues together.
_APPEND = """
/* statistics */
WITH counted AS MATERIALIZED (
    SELECT
        c.minute, q.id AS queue_id,
        c.enqueued, c.delivered, c.deleted, c.returned, c.dead, c.expired
    FROM unnest(
        %(minutes)s::int[], %(names)s::text[], %(ids)s::int[],
        %(enqueued)s::int[], %(delivered)s::int[], %(deleted)s::int[],
        %(returned)s::int[], %(dead)s::int[], %(expired)s::int[]
    ) AS c (minute, name, id, enqueued, delivered, deleted, returned, dead, expired)
    LEFT JOIN LATERAL (
        SELECT n.id FROM broker.queues n WHERE n.name = c.name AND n.deleted_at IS NULL
        UNION ALL
        SELECT i.id FROM broker.queues i WHERE i.id = ANY (ARRAY[c.id]) AND i.deleted_at IS NULL
    ) AS q ON true
),
appended AS (
    INSERT INTO broker.statistics (
        minute, queue_id, enqueued, delivered, deleted, returned, dead, expired, queues, is_sum
    )
    SELECT
        minute, queue_id,
        sum(enqueued), sum(delivered), sum(deleted), sum(returned), sum(dead), sum(expired), 0, false
    FROM counted
    WHERE queue_id IS NOT NULL
    GROUP BY minute, queue_id
    UNION ALL
    SELECT
        minute, %(all_queues)s::int,
        sum(enqueued), sum(delivered), sum(deleted), sum(returned), sum(dead), sum(expired),
        count(DISTINCT queue_id), false
    FROM counted
    GROUP BY minute
)
SELECT extract(epoch FROM clock_timestamp())::float8
"""


async def append(connection: Connection, rows: Rows) -> float:
    """Append what was counted; return what time it is on the database's clock, in seconds since 1970."""
    counts = list(zip(*rows.values(), strict=True)) or [()] * 6
    params = {
        "minutes": [minute for minute, _ in rows],
        "names": [queue if isinstance(queue, str) else None for _, queue in rows],
        "ids": [queue if isinstance(queue, int) else None for _, queue in rows],
        "all_queues": ALL_QUEUES,
    }
    for kind, of_kind in zip(FIELDS, counts, strict=True):
        params[kind] = list(of_kind)
    row = await (await connection.execute(_APPEND, params)).fetchone()
    assert row is not None, "a select without FROM returns one row"
    return float(row[0])


# Locks: the rows it picks, waiting for none. Two at once sum up different rows, and a minute that was summed up in two
# parts has two sums, which whoever reads adds. What is appended to a minute that is summed up already (because its
# process could not reach the database) is summed up by itself. The rows have no key; within a statement that has locked
# them they are known by where they lie. How many rows of single queues there are is written into a row of all queues,
# also where that row was not among those that are summed up.
_SUM_UP = """
/* statistics */
WITH parts AS MATERIALIZED (
    SELECT ctid
    FROM broker.statistics
    WHERE NOT is_sum
        AND minute::bigint < floor(extract(epoch FROM statement_timestamp()) / 60)::bigint - %(after)s::int
    ORDER BY minute::bigint
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
),
removed AS (
    DELETE FROM broker.statistics
    WHERE ctid = ANY (ARRAY(SELECT ctid FROM parts))
    RETURNING minute, queue_id, enqueued, delivered, deleted, returned, dead, expired
),
summed AS (
    SELECT
        minute, queue_id,
        sum(enqueued) AS enqueued, sum(delivered) AS delivered, sum(deleted) AS deleted, sum(returned) AS returned,
        sum(dead) AS dead, sum(expired) AS expired
    FROM (
        SELECT minute, queue_id, enqueued, delivered, deleted, returned, dead, expired
        FROM removed
        UNION ALL
        SELECT DISTINCT minute, %(all_queues)s::int, 0, 0, 0, 0, 0, 0
        FROM removed
    ) AS r
    GROUP BY minute, queue_id
),
appended AS (
    INSERT INTO broker.statistics (
        minute, queue_id, enqueued, delivered, deleted, returned, dead, expired, queues, is_sum
    )
    SELECT
        minute, queue_id, enqueued, delivered, deleted, returned, dead, expired,
        CASE
            WHEN queue_id = %(all_queues)s::int
            THEN (count(*) FILTER (WHERE queue_id <> %(all_queues)s::int) OVER (PARTITION BY minute))
            ELSE 0
        END,
        true
    FROM summed
)
SELECT count(*) FROM removed
"""


async def sum_up(connection: Connection, batch: int = BATCH_SIZE) -> int:
    """Replace up to `batch` rows of minutes that are over by their sums; return how many."""
    params = {"after": SUMMED_UP_AFTER, "batch": batch, "all_queues": ALL_QUEUES}
    row = await (await connection.execute(_SUM_UP, params)).fetchone()
    assert row is not None, "an aggregate returns one row"
    return int(row[0])


# The newest minute of which the rows of single queues are too many, with all that came after it.
_TOO_MANY = """
SELECT max(minute)
FROM (
    SELECT minute, sum(queues) OVER (ORDER BY minute DESC) AS queues_till_now
    FROM broker.statistics
    WHERE queue_id = %(all_queues)s::int
        AND minute > floor(extract(epoch FROM statement_timestamp()) / 60)::int - %(kept)s::int
) AS m
WHERE queues_till_now > %(rows)s::bigint
"""

# Locks: the rows it picks, waiting for none.
_TRIM = """
/* statistics */
WITH old AS MATERIALIZED (
    SELECT ctid
    FROM broker.statistics
    WHERE (-minute) >= least(
            %(kept)s::int - floor(extract(epoch FROM statement_timestamp()) / 60)::int, -%(too_many)s::int
        )
        AND (
            queue_id <> %(all_queues)s::int
            OR minute <= floor(extract(epoch FROM statement_timestamp()) / 60)::int - %(kept)s::int
        )
    ORDER BY (-minute) DESC
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
)
DELETE FROM broker.statistics
WHERE ctid = ANY (ARRAY(SELECT ctid FROM old))
"""


async def trim(connection: Connection, batch: int = BATCH_SIZE, rows_kept: int = ROWS_KEPT) -> int:
    """Remove up to `batch` rows that are too old, or of single queues and too many; return how many."""
    params = {"kept": MINUTES_KEPT, "rows": rows_kept, "batch": batch, "all_queues": ALL_QUEUES}
    row = await (await connection.execute(_TOO_MANY, params)).fetchone()
    params["too_many"] = (row and row[0]) or 0
    return (await connection.execute(_TRIM, params)).rowcount


_QUEUE_ID = """
SELECT id FROM broker.queues WHERE name = %(queue)s AND deleted_at IS NULL
"""

_READ = """
WITH clock AS MATERIALIZED (
    SELECT floor(extract(epoch FROM statement_timestamp()) / 60)::int AS newest
)
SELECT c.newest, s.minute, s.enqueued, s.delivered, s.deleted, s.returned, s.dead, s.expired
FROM clock c
LEFT JOIN LATERAL (
    SELECT
        minute,
        sum(enqueued) AS enqueued, sum(delivered) AS delivered, sum(deleted) AS deleted, sum(returned) AS returned,
        sum(dead) AS dead, sum(expired) AS expired
    FROM broker.statistics
    WHERE queue_id = %(queue_id)s::int AND minute > c.newest - %(minutes)s::int AND minute <= c.newest
    GROUP BY minute
) AS s ON true
"""


class MinuteCounts(msgspec.Struct):
    """What happened in the minute that began at `started_at`, in messages."""

    started_at: str
    enqueued: int = 0
    delivered: int = 0
    deleted: int = 0
    returned: int = 0
    dead: int = 0
    expired: int = 0


# In the order of the tally's kinds.
FIELDS = MinuteCounts.__struct_fields__[1:]


async def read(connection: Connection, queue: str | None, minutes: int) -> list[MinuteCounts]:
    """Return what happened in each of the last minutes, oldest first, the running one last; None means all queues.

    Raises QueueNotFound.
    """
    queue_id = ALL_QUEUES
    if queue is not None:
        row = await (await connection.execute(_QUEUE_ID, {"queue": queue})).fetchone()
        if row is None:
            raise QueueNotFound(queue=queue)
        (queue_id,) = row
    rows: Sequence[tuple[Any, ...]] = await (
        await connection.execute(_READ, {"queue_id": queue_id, "minutes": minutes})
    ).fetchall()
    newest = rows[0][0]
    counted = {minute: [int(count) for count in counts] for _, minute, *counts in rows if minute is not None}
    return [
        MinuteCounts(_start_of(minute), *counted.get(minute, ())) for minute in range(newest - minutes + 1, newest + 1)
    ]


def _start_of(minute: int) -> str:
    return timestamp(datetime.fromtimestamp(minute * 60, UTC))


# In the transaction of the caller, who deletes the queues. Locks: the rows of these queues; who sums them up or trims
# them at that moment passes over them, or is waited for.
_FORGET_QUEUES = """
DELETE FROM broker.statistics WHERE queue_id = ANY (%(ids)s::int[])
"""


async def forget_queues(connection: Connection, ids: Sequence[int]) -> None:
    """Remove what happened in these queues; it goes on counting for all queues together."""
    await connection.execute(_FORGET_QUEUES, {"ids": ids})
