"""All queues together: how many messages there are, and for how long the oldest has been ready.

The counts are of the kind that `counting` gives of one queue, from a sample of the table and from walks; they cost
the same however many messages there are, and little more with ten thousand queues than with one.
"""

from __future__ import annotations

from broker.model import FRESH, RETURNED
from broker.storage.counting import (
    EXACT_UP_TO,
    LONGEST_WALK,
    SAMPLED,
    SHORT,
    STATUS,
    STATUSES,
    Counted,
    Part,
    walk_through,
)
from broker.storage.database import Connection
from broker.storage.messages import IS_ALIVE

# Deleted queues are not counted, nor what topics store. `queues` are those that have much of a part.
_SAMPLE_ALL = (
    SAMPLED
    + """
in_lane AS (
    SELECT lane, is_future, count(*) AS rows
    FROM sample
    WHERE is_alive
    GROUP BY lane, is_future
),
in_all AS (
    SELECT
        (lane & 3)::int AS lane, is_future, sum(rows)::bigint AS rows,
        array_agg((lane / 4)::int) FILTER (WHERE rows > 100) AS queues
    FROM in_lane
    WHERE (lane / 4)::int NOT IN (
        SELECT q.id FROM broker.queues q WHERE q.deleted_at IS NOT NULL
        UNION ALL
        SELECT t.id FROM broker.topics t
    )
    GROUP BY 1, 2
)
SELECT s.stride, a.lane, a.is_future, a.rows, a.queues
FROM size s
LEFT JOIN in_all a ON true
"""
)

_BOTH_LANES = "= ANY (ARRAY[q.id * 4::bigint, q.id * 4::bigint + 1])"
_HELD_LANES = "= ANY (ARRAY[q.id * 4::bigint + 1, q.id * 4::bigint + 2])"


def _walk_all(status: str, queues: str, entries: str) -> str:
    return f"""
SELECT '{status}', count(*) FILTER (WHERE e.is_alive), count(*) = %(entries)s
FROM (
    SELECT of_queue.is_alive
    FROM {queues} q
    CROSS JOIN LATERAL ({entries}) AS of_queue
    LIMIT %(entries)s
) AS e
HAVING '{status}' = ANY (%(statuses)s::text[])
"""


# No locks. For each status that is asked for, a walk through one queue after the other, which ends where it has become
# too long to be exact. So it begins with the queues that have much. Where it must come to the end it looks at each
# queue, which takes 2 µs; so one look, for both, tells where anything lies behind the fresh ones that are ready.
_WALK_ALL = f"""
WITH queue AS MATERIALIZED (
    SELECT q.id
    FROM unnest(%(first)s::int[]) AS f (id)
    JOIN broker.queues q ON q.id = ANY (ARRAY[f.id])
    WHERE q.deleted_at IS NULL
    UNION ALL
    SELECT q.id
    FROM broker.queues q
    WHERE q.deleted_at IS NULL AND q.id NOT IN (SELECT unnest(%(first)s::int[]))
),
with_more AS MATERIALIZED (
    SELECT q.id
    FROM queue q
    CROSS JOIN LATERAL (
        SELECT
        FROM broker.messages m
        WHERE ((m.queue_id * 4::bigint + m.lane), m.visible_at) > (q.id * 4::bigint, statement_timestamp())
            AND (m.queue_id * 4::bigint + m.lane) <= q.id * 4::bigint + 2 AND m.lane >= 0
        LIMIT 1
    ) AS more
)
{_walk_all("ready", "queue", walk_through(_BOTH_LANES, "'-infinity'", "statement_timestamp()"))}
UNION ALL
{_walk_all("delayed", "with_more", walk_through("= q.id * 4::bigint", "statement_timestamp()", "'infinity'"))}
UNION ALL
{_walk_all("leased", "with_more", walk_through(_HELD_LANES, "statement_timestamp()", "'infinity'"))}
"""


# No locks. The first entry of each lane: where that has expired and is not removed yet, the lane is passed over until
# the next sweep, so that each takes one look and no more.
_OLDEST = f"""
SELECT max(extract(epoch FROM statement_timestamp() - oldest.visible_at))::float8
FROM broker.queues q
CROSS JOIN unnest(%(lanes)s::int[]) AS l (lane)
CROSS JOIN LATERAL (
    SELECT m.visible_at, {IS_ALIVE} AS is_alive
    FROM broker.messages m
    WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + l.lane AND m.lane >= 0
        AND m.visible_at <= statement_timestamp()
    ORDER BY m.visible_at, m.id
    LIMIT 1
) AS oldest
WHERE q.deleted_at IS NULL AND q.name > %(after)s AND oldest.is_alive
"""


async def oldest_ready_age_after(connection: Connection, name: str) -> float | None:
    """Return for how many seconds a message has been ready in one of the queues whose names come after this one.

    None where none is. A queue whose oldest message has expired, and is not removed yet, is passed over.
    """
    row = await (await connection.execute(_OLDEST, {"after": name, "lanes": [FRESH, RETURNED]})).fetchone()
    return None if row is None else row[0]


async def count_all(connection: Connection) -> Counted:
    """Return what lies in all queues together."""
    rows = await (await connection.execute(_SAMPLE_ALL)).fetchall()
    figures = dict.fromkeys(STATUSES, 0)
    first: set[int] = set()
    stride = rows[0][0]
    for _, lane, is_future, met, queues in rows:
        if met is not None:
            figures[STATUS[Part(lane, is_future)]] += stride * met
            first.update(queues or ())
    if stride == 1:  # That was the whole table.
        return Counted.of(figures, None, ())
    # Of 10,000 messages a sample does not make so many; they need not be looked for.
    estimated = {status for status in STATUSES if figures[status] > 10 * EXACT_UP_TO}
    doubtful = set(STATUSES) - estimated
    for entries in (EXACT_UP_TO + 1, LONGEST_WALK):
        params = {"first": list(first), "entries": entries, "statuses": list(doubtful)}
        rows = await (await connection.execute(_WALK_ALL, params)).fetchall()
        for status, counted, is_cut in rows:
            figures[status] = max(counted, figures[status]) if is_cut else counted
        cut = {status for status, _, is_cut in rows if is_cut}
        estimated = estimated - doubtful | cut
        # Expired messages may hide how few there are behind them.
        doubtful = {status for status in cut if figures[status] <= SHORT}
        if not doubtful:
            break
    return Counted.of(figures, None, estimated)
