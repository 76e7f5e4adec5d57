"""What the sweeper does to the tables: remove what has expired, count what came back, tidy up.

Every function may run in any number of brokers at once. None is needed for a promise: expired messages
are invisible and ended leases are ready whether or not anything was swept.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import NamedTuple

from broker.storage.database import Connection
from broker.storage.queues import purge_batch
from broker.storage.storing import COUNTED_MAX_MESSAGES

# Before the name of a topic, where names of queues stand: no queue has a name like that.
OF_TOPIC = "topic "

# No locks. Most sweeps find nothing to do, and one look is cheaper than a statement for each chore.
_CHORES = """
SELECT
    EXISTS (
        SELECT
        FROM broker.messages
        WHERE expires_at IS NOT NULL
            AND greatest(expires_at, visible_at) <= statement_timestamp()
            AND (lane < 2 OR visible_at >= expires_at)
    ),
    EXISTS (
        SELECT
        FROM broker.messages
        WHERE lane = 2 AND visible_at <= statement_timestamp()
            AND (expires_at IS NULL OR expires_at > visible_at)
    ),
    EXISTS (SELECT FROM broker.queues WHERE max_receives_lowered_at IS NOT NULL AND deleted_at IS NULL),
    EXISTS (SELECT FROM broker.idempotency_keys WHERE expires_at <= statement_timestamp()),
    EXISTS (SELECT FROM broker.queues WHERE deleted_at IS NOT NULL)
        OR EXISTS (SELECT FROM broker.topics WHERE deleted_at IS NOT NULL),
    EXISTS (
        SELECT
        FROM broker.subscriptions s
        CROSS JOIN LATERAL (SELECT FROM broker.messages m WHERE m.queue_id = s.queue_id LIMIT 1) AS left_over
        WHERE s.state = 'ended'
    ),
    EXISTS (SELECT FROM broker.queue_sizes)
        OR EXISTS (SELECT FROM broker.queues WHERE max_messages > %(counted_max_messages)s),
    statement_timestamp()
"""


class Chores(NamedTuple):
    """What there may be to do, and when that was looked at, on the database's clock."""

    expired: bool
    exhausted: bool
    lowered_max_receives: bool
    idempotency_keys: bool
    deleted_queues: bool
    ended_subscriptions: bool
    sizes: bool
    at: datetime


async def chores(connection: Connection) -> Chores:
    """Return what there may be to do."""
    cursor = await connection.execute(_CHORES, {"counted_max_messages": COUNTED_MAX_MESSAGES})
    row = await cursor.fetchone()
    assert row is not None, "a select without FROM returns one row"
    return Chores(*row)


# Locks: the rows it picks, waiting for none. Two at once remove different rows. A message that is held lies in
# the future part of the index until its lease ends. What has used up its deliveries before it expired is a dead letter.
_REMOVE_EXPIRED = """
WITH expired AS MATERIALIZED (
    SELECT queue_id, id
    FROM broker.messages
    WHERE expires_at IS NOT NULL
        AND greatest(expires_at, visible_at) <= statement_timestamp()
        AND (lane < 2 OR visible_at >= expires_at)
    ORDER BY greatest(expires_at, visible_at)
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
),
removed AS (
    DELETE FROM broker.messages m
    USING expired e
    WHERE m.queue_id = ANY (ARRAY[e.queue_id]) AND m.id = e.id
    RETURNING m.queue_id
)
SELECT coalesce(q.name, %(of_topic)s || t.name, ''), count(*)
FROM removed r
LEFT JOIN broker.queues q ON q.id = r.queue_id AND q.deleted_at IS NULL
LEFT JOIN broker.topics t ON t.id = r.queue_id
GROUP BY 1
"""


async def remove_expired(connection: Connection, batch: int) -> dict[str, int]:
    """Remove up to `batch` messages that have expired and are held by nobody; return how many of each queue.

    What a topic had stored stands under its name after `OF_TOPIC`, and what a deleted queue had under no name.
    """
    cursor = await connection.execute(_REMOVE_EXPIRED, {"batch": batch, "of_topic": OF_TOPIC})
    return dict(await cursor.fetchall())


# Locks: the rows it picks, waiting for none. An enqueue that has found such a key waits until it is gone, and uses it
# anew.
_FORGET_KEYS = """
WITH ended AS MATERIALIZED (
    SELECT queue_id, key
    FROM broker.idempotency_keys
    WHERE expires_at <= statement_timestamp()
    ORDER BY expires_at
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
)
DELETE FROM broker.idempotency_keys k
USING ended e
WHERE k.queue_id = ANY (ARRAY[e.queue_id]) AND k.key = e.key
"""


async def forget_keys(connection: Connection, batch: int) -> int:
    """Remove up to `batch` idempotency keys whose time is over; return how many."""
    return (await connection.execute(_FORGET_KEYS, {"batch": batch})).rowcount


# Locks: the one row of broker.sweeps; where another broker has it, that one is counting and there is nothing
# to do. One probe of the index for each queue. The stretch of time is written only where something ended in
# it, or a minute has passed, so that an idle broker writes nothing. Who has waited its turn behind another may be
# a little older than what that one wrote, and leaves it; a clock that was set back by more is followed.
_COUNT_ENDED_LEASES = """
WITH sweep AS MATERIALIZED (
    SELECT only_row, ended_leases_seen_until AS since
    FROM broker.sweeps
    FOR UPDATE SKIP LOCKED
),
ended AS MATERIALIZED (
    SELECT q.name, returned.messages
    FROM sweep s
    CROSS JOIN broker.queues q
    CROSS JOIN LATERAL (
        SELECT count(*) AS messages
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
            AND m.visible_at > s.since AND m.visible_at <= statement_timestamp()
            AND m.lease_token IS NOT NULL
    ) AS returned
    WHERE q.deleted_at IS NULL AND returned.messages > 0
),
seen AS (
    UPDATE broker.sweeps u
    SET ended_leases_seen_until = statement_timestamp()
    FROM sweep s
    WHERE u.only_row = s.only_row
        AND (
            EXISTS (SELECT FROM ended)
            OR s.since < statement_timestamp() - interval '1 minute'
            OR s.since > statement_timestamp() + interval '1 minute'
        )
)
SELECT name, messages
FROM ended
"""


async def count_ended_leases(connection: Connection) -> Mapping[str, int]:
    """Return for each queue how many leases have ended since the last count and are not taken again."""
    cursor = await connection.execute(_COUNT_ENDED_LEASES)
    return dict(await cursor.fetchall())


# Queues and topics have ids from one sequence.
_DELETED = """
SELECT d.id
FROM (
    SELECT id, deleted_at FROM broker.queues WHERE deleted_at IS NOT NULL
    UNION ALL
    SELECT id, deleted_at FROM broker.topics WHERE deleted_at IS NOT NULL
) AS d
WHERE d.deleted_at < statement_timestamp() - interval '1 day'
    OR EXISTS (SELECT FROM broker.messages m WHERE m.queue_id = d.id)
ORDER BY d.id
LIMIT 100
"""

# The row goes when nothing can refer to it any more: a transaction that stored a message while the queue was
# being deleted is over after a day.
_FORGET_QUEUE = """
DELETE FROM broker.queues q
WHERE q.id = %(id)s
    AND q.deleted_at < statement_timestamp() - interval '1 day'
    AND NOT EXISTS (SELECT FROM broker.messages m WHERE m.queue_id = q.id)
"""

_FORGET_TOPIC = """
DELETE FROM broker.topics t
WHERE t.id = %(id)s
    AND t.deleted_at < statement_timestamp() - interval '1 day'
    AND NOT EXISTS (SELECT FROM broker.messages m WHERE m.queue_id = t.id)
"""


async def remove_deleted(connection: Connection, batch: int) -> int:
    """Remove up to `batch` messages of each deleted queue and topic, and the rows of long empty ones."""
    cursor = await connection.execute(_DELETED)
    removed = 0
    for (number,) in await cursor.fetchall():
        removed += await purge_batch(connection, number, batch=batch)
        await connection.execute(_FORGET_QUEUE, {"id": number})
        await connection.execute(_FORGET_TOPIC, {"id": number})
    return removed


# A queue with a large max_messages is counted by one broker, and less often the longer that takes: up to half a
# million messages at every sweep, ten million (about a second) every forty seconds. A count of the future is from
# before the clock was set back; one of just now may be that of another broker.
_MEASURE = """
INSERT INTO broker.queue_sizes AS s (queue_id, messages, counted_at)
SELECT q.id, counted.messages, statement_timestamp()
FROM broker.queues q
LEFT JOIN broker.queue_sizes old ON old.queue_id = q.id
CROSS JOIN LATERAL (
    SELECT count(*) AS messages
    FROM (SELECT FROM broker.messages m WHERE m.queue_id = q.id LIMIT q.max_messages) AS rows
) AS counted
WHERE q.deleted_at IS NULL AND q.max_messages > %(counted_max_messages)s
    AND (
        old.counted_at IS NULL
        OR old.counted_at <= statement_timestamp() - interval '1 second' * (old.messages / 500000 * 2)
        OR old.counted_at > statement_timestamp() + interval '1 second'
    )
ORDER BY q.id
ON CONFLICT (queue_id) DO UPDATE
SET messages = excluded.messages, counted_at = excluded.counted_at
"""

_FORGET_MEASURES = """
DELETE FROM broker.queue_sizes s
WHERE NOT EXISTS (
    SELECT
    FROM broker.queues q
    WHERE q.id = s.queue_id AND q.deleted_at IS NULL AND q.max_messages > %(counted_max_messages)s
)
"""


async def measure_queues(connection: Connection) -> int:
    """Count the queues whose max_messages is too large to be checked by every enqueue; return how many."""
    params = {"counted_max_messages": COUNTED_MAX_MESSAGES}
    await connection.execute(_FORGET_MEASURES, params)
    return (await connection.execute(_MEASURE, params)).rowcount
