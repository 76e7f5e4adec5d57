"""How many messages there are: exact up to 10,000, beyond that the planner's estimate.

A message that has expired and is held by nobody does not count, swept or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from broker.model import Counts
from broker.storage.database import Connection
from broker.storage.messages import IS_ALIVE

# Counting stops here; what is beyond is the planner's estimate.
EXACT_UP_TO = 10_000

STATUSES = ("ready", "delayed", "leased")

# One walk through each part of each lane, each at most one entry longer than what is counted exactly.
_COUNT = (
    """
SELECT q.name, ready.counted, delayed.counted, leased.counted, oldest.age
FROM broker.queues q
CROSS JOIN LATERAL (
    SELECT count(*) AS counted
    FROM (
        SELECT
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = ANY (ARRAY[q.id * 4::bigint, q.id * 4::bigint + 1]) AND m.lane >= 0
            AND m.visible_at <= statement_timestamp()
            AND """
    + IS_ALIVE
    + """
        LIMIT %(limit)s
    ) AS rows
) AS ready
CROSS JOIN LATERAL (
    SELECT count(*) AS counted
    FROM (
        SELECT
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint AND m.lane >= 0
            AND m.visible_at > statement_timestamp()
            AND """
    + IS_ALIVE
    + """
        LIMIT %(limit)s
    ) AS rows
) AS delayed
CROSS JOIN LATERAL (
    SELECT count(*) AS counted
    FROM (
        SELECT
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
            AND m.visible_at > statement_timestamp()
        LIMIT %(limit)s
    ) AS rows
) AS leased
CROSS JOIN LATERAL (
    SELECT extract(epoch FROM statement_timestamp() - least(
        (
            SELECT m.visible_at
            FROM broker.messages m
            WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint AND m.lane >= 0
                AND m.visible_at <= statement_timestamp()
                AND """
    + IS_ALIVE
    + """
            ORDER BY m.visible_at, m.id
            LIMIT 1
        ),
        (
            SELECT m.visible_at
            FROM broker.messages m
            WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
                AND m.visible_at <= statement_timestamp()
                AND """
    + IS_ALIVE
    + """
            ORDER BY m.visible_at, m.id
            LIMIT 1
        )
    ))::float8 AS age
) AS oldest
WHERE q.deleted_at IS NULL AND q.name = ANY (%(queues)s::text[])
"""
)


async def count(connection: Connection, queues: Sequence[str]) -> dict[str, tuple[Counts, float | None]]:
    """Return the counts of each queue, and for how many seconds its oldest ready message has been ready.

    A queue that does not exist is missing. A figure is exact up to 10,000 and beyond it an estimate.
    """
    cursor = await connection.execute(_COUNT, {"queues": list(queues), "limit": EXACT_UP_TO + 1})
    counted = {}
    for name, ready, delayed, leased, age in await cursor.fetchall():
        figures = dict(zip(STATUSES, (ready, delayed, leased), strict=True))
        exact = max(figures.values()) <= EXACT_UP_TO
        if not exact:
            await _estimate(connection, name, figures)
        counts = Counts(
            figures["ready"], figures["delayed"], figures["leased"], total=sum(figures.values()), exact=exact
        )
        counted[name] = (counts, None if age is None else max(age, 0.0))
    return counted


_QUEUE_ID = """
SELECT id
FROM broker.queues
WHERE name = %(queue)s AND deleted_at IS NULL
"""

_ESTIMATES = {
    "ready": """
EXPLAIN (FORMAT JSON)
SELECT FROM broker.messages m
WHERE m.queue_id = %(queue_id)s AND m.visible_at <= statement_timestamp()
""",
    "delayed": """
EXPLAIN (FORMAT JSON)
SELECT FROM broker.messages m
WHERE m.queue_id = %(queue_id)s AND m.lane = 0 AND m.visible_at > statement_timestamp()
""",
    "leased": """
EXPLAIN (FORMAT JSON)
SELECT FROM broker.messages m
WHERE m.queue_id = %(queue_id)s AND m.lane = 1 AND m.visible_at > statement_timestamp()
""",
}


async def _estimate(connection: Connection, queue: str, figures: dict[str, int]) -> None:
    """Replace the figures that were counted to their end by the planner's estimates, never less."""
    row = await (await connection.execute(_QUEUE_ID, {"queue": queue})).fetchone()
    if row is None:
        return
    for status, figure in figures.items():
        if figure > EXACT_UP_TO:
            estimate = await _planned_rows(connection, _ESTIMATES[status], {"queue_id": row[0]})
            figures[status] = max(figure, estimate)


async def _planned_rows(connection: Connection, explain: str, params: dict[str, Any]) -> int:
    cursor = await connection.execute(explain, params)
    row = await cursor.fetchone()
    assert row is not None, "EXPLAIN returns one row"
    plan = msgspec.json.decode(row[0]) if isinstance(row[0], (bytes, str, msgspec.Raw)) else row[0]
    return int(plan[0]["Plan"]["Plan Rows"])


# All queues: for each status a walk through the lanes of one queue after the other, given up where it is too
# long to be exact.
_COUNT_ALL = (
    """
SELECT
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM broker.queues q
            CROSS JOIN LATERAL (
                SELECT
                FROM broker.messages m
                WHERE (m.queue_id * 4::bigint + m.lane) = ANY (ARRAY[q.id * 4::bigint, q.id * 4::bigint + 1])
                    AND m.lane >= 0
                    AND m.visible_at <= statement_timestamp()
                    AND """
    + IS_ALIVE
    + """
                LIMIT %(limit)s
            ) AS of_queue
            WHERE q.deleted_at IS NULL
            LIMIT %(limit)s
        ) AS rows
    ) AS ready,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM broker.queues q
            CROSS JOIN LATERAL (
                SELECT
                FROM broker.messages m
                WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint AND m.lane >= 0
                    AND m.visible_at > statement_timestamp()
                    AND """
    + IS_ALIVE
    + """
                LIMIT %(limit)s
            ) AS of_queue
            WHERE q.deleted_at IS NULL
            LIMIT %(limit)s
        ) AS rows
    ) AS delayed,
    (
        SELECT count(*)
        FROM (
            SELECT
            FROM broker.queues q
            CROSS JOIN LATERAL (
                SELECT
                FROM broker.messages m
                WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
                    AND m.visible_at > statement_timestamp()
                LIMIT %(limit)s
            ) AS of_queue
            WHERE q.deleted_at IS NULL
            LIMIT %(limit)s
        ) AS rows
    ) AS leased
"""
)

_ESTIMATES_ALL = (
    """
EXPLAIN (FORMAT JSON)
SELECT FROM broker.messages m
WHERE m.visible_at <= statement_timestamp()
""",
    """
EXPLAIN (FORMAT JSON)
SELECT FROM broker.messages m
WHERE m.visible_at > statement_timestamp() AND m.lane = 0
""",
    """
EXPLAIN (FORMAT JSON)
SELECT FROM broker.messages m
WHERE m.visible_at > statement_timestamp() AND m.lane = 1
""",
)


async def count_all(connection: Connection) -> Counts:
    """Return the counts of all queues together; a figure is exact up to 10,000 and beyond it an estimate."""
    cursor = await connection.execute(_COUNT_ALL, {"limit": EXACT_UP_TO + 1})
    row = await cursor.fetchone()
    assert row is not None, "a select of three figures returns one row"
    figures = list(row)
    exact = max(figures) <= EXACT_UP_TO
    for place, explain in enumerate(_ESTIMATES_ALL):
        if figures[place] > EXACT_UP_TO:
            figures[place] = max(figures[place], await _planned_rows(connection, explain, {}))
    ready, delayed, leased = figures
    return Counts(ready, delayed, leased, total=sum(figures), exact=exact)


def of_status(counts: Counts, status: str) -> dict[str, Any]:
    """Return the figure of one status."""
    total = getattr(counts, status)
    return {"total": total, "exact": counts.exact or total <= EXACT_UP_TO}
