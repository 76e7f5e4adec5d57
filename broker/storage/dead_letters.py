"""Messages that have used up their deliveries: to their dead-letter queue, and back from there.

A message that is leased for the last time that its queue's `max_receives` permits lies in lane 2, which no dequeue
reads. So it is never handed out once more, whether or not anything here has run. What the sweeper finds in the past of
that lane it moves, in one statement, to the queue's `dead_letter_queue`; where there is none it is dropped.

A message that moves keeps its id and gets another queue_id. Old receipts name the old one, and so find nothing.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from broker.errors import BrokerError, InvalidParams, QueueNotFound
from broker.storage.database import Connection, Database, time_left

# Messages that one transaction moves.
REDRIVE_BATCH = 1_000

# What a message becomes that comes into another queue, now.
_ARRIVES = """
        lane = 0,
        visible_at = p.now,
        moved_at = p.now,
        expires_at = NULL,
        first_received_at = NULL,
        lease_token = NULL,
        receive_count = 0
"""


def _dead_letter(reason: str) -> str:
    """Return what is written into a message of the queue s.name that becomes a dead letter."""
    return f"""
        dead_letter = json_build_object(
            'source_queue', s.name,
            'reason', '{reason}',
            'receive_count', m.receive_count,
            'dead_at', to_char(p.now AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')
        )
    """


# Locks: the rows it picks, waiting for none, and no other. Two at once move different rows. Whoever waits for a row
# meanwhile, to delete it by its receipt or its id, to extend its lease or to purge its queue, finds it in another queue
# and leaves it alone. The target may be taken from the source and deleted while this runs: it is then as if this had
# come before. What is stamped is stamped after the transaction has its id, as low_water.py asks for.
# max_receives may have been raised since the lease was taken: then the message is ready again.
_SETTLE = f"""
/* dead letters */
WITH ended AS MATERIALIZED (
    SELECT queue_id, id, receive_count
    FROM broker.messages
    WHERE lane = 2 AND visible_at <= statement_timestamp()
        AND (expires_at IS NULL OR expires_at > visible_at)
    ORDER BY visible_at
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM ended
    LIMIT 1
),
sorted AS MATERIALIZED (
    SELECT
        e.queue_id, e.id, q.name, t.id AS target_id, t.name AS target,
        CASE
            WHEN q.deleted_at IS NOT NULL THEN 'removed'
            WHEN e.receive_count < coalesce(q.max_receives, 2147483647) THEN 'returned'
            WHEN q.dead_letter_queue_id IS NULL THEN 'dropped'
            WHEN t.id IS NOT NULL THEN 'moved'
        END AS fate
    FROM ended e
    LEFT JOIN broker.queues q ON q.id = e.queue_id
    LEFT JOIN broker.queues t ON t.id = q.dead_letter_queue_id AND t.deleted_at IS NULL
),
moved AS (
    UPDATE broker.messages m
    SET queue_id = s.target_id, {_ARRIVES}, {_dead_letter("max_receives")}
    FROM sorted s
    CROSS JOIN stamp p
    WHERE m.queue_id = ANY (ARRAY[s.queue_id]) AND m.id = s.id AND s.fate = 'moved'
),
returned AS (
    UPDATE broker.messages m
    SET lane = 1, visible_at = p.now
    FROM sorted s
    CROSS JOIN stamp p
    WHERE m.queue_id = ANY (ARRAY[s.queue_id]) AND m.id = s.id AND s.fate = 'returned'
),
removed AS (
    DELETE FROM broker.messages m
    USING sorted s
    WHERE m.queue_id = ANY (ARRAY[s.queue_id]) AND m.id = s.id AND s.fate IN ('dropped', 'removed')
)
SELECT fate, name, target, count(*)
FROM sorted
GROUP BY fate, name, target
"""


@dataclass(frozen=True)
class Settled:
    """What became of messages whose time in their queue was over: how many, by the queue that they are in now.

    `dropped` by the queue that they were in, and `dead`, those that were moved or dropped, as well.
    """

    moved: Mapping[str, int] = field(default_factory=dict)
    returned: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    dead: Mapping[str, int] = field(default_factory=dict)

    @property
    def messages(self) -> int:
        return sum(sum(queues.values()) for queues in (self.moved, self.returned, self.dropped))


async def settle(connection: Connection, batch: int) -> Settled:
    """Move, drop or return up to `batch` messages that have used up their deliveries."""
    return await _settle(connection, _SETTLE, batch)


# Locks and two at once: as _SETTLE. What somebody holds is left until its lease has ended. A copy that was made by a
# transaction which did not see the end is found by a later sweep.
_SETTLE_ENDED = f"""
/* ended subscriptions */
WITH ended AS MATERIALIZED (
    SELECT s.queue_id, m.id, q.name, t.id AS target_id, t.name AS target
    FROM broker.subscriptions s
    JOIN broker.queues q ON q.id = s.queue_id
    LEFT JOIN broker.queues t ON t.id = q.dead_letter_queue_id AND t.deleted_at IS NULL
    CROSS JOIN LATERAL (
        SELECT id
        FROM broker.messages
        WHERE queue_id = s.queue_id AND (lane = 0 OR visible_at <= statement_timestamp())
            AND (expires_at IS NULL OR expires_at > statement_timestamp())
        ORDER BY id
        LIMIT %(batch)s
        FOR UPDATE SKIP LOCKED
    ) AS m
    WHERE s.state = 'ended'
    LIMIT %(batch)s
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM ended
    LIMIT 1
),
moved AS (
    UPDATE broker.messages m
    SET queue_id = s.target_id, {_ARRIVES}, {_dead_letter("subscription_ended")}
    FROM ended s
    CROSS JOIN stamp p
    WHERE m.queue_id = ANY (ARRAY[s.queue_id]) AND m.id = s.id AND s.target_id IS NOT NULL
),
removed AS (
    DELETE FROM broker.messages m
    USING ended s
    WHERE m.queue_id = ANY (ARRAY[s.queue_id]) AND m.id = s.id AND s.target_id IS NULL
)
SELECT CASE WHEN target IS NULL THEN 'dropped' ELSE 'moved' END, name, target, count(*)
FROM ended
GROUP BY name, target
"""


async def settle_ended(connection: Connection, batch: int) -> Settled:
    """Move or drop up to `batch` messages of subscriptions whose endpoint wanted no more."""
    return await _settle(connection, _SETTLE_ENDED, batch)


async def _settle(connection: Connection, statement: str, batch: int) -> Settled:
    found: dict[str, Counter[str]] = {
        "moved": Counter(), "returned": Counter(), "dropped": Counter(), "dead": Counter()
    }  # fmt: skip
    cursor = await connection.execute(statement, {"batch": batch})
    for fate, queue, target, messages in await cursor.fetchall():
        if fate in found:
            found[fate][target if fate == "moved" else queue] += messages
        if fate in ("moved", "dropped"):
            found["dead"][queue] += messages
    return Settled(**found)


# A statement that read the old max_receives may still lease by it. So what it has used up is looked for at every sweep
# of the first seconds, and once more when every such statement is over.
_MARK_EXHAUSTED = """
WITH lowered AS MATERIALIZED (
    SELECT id, max_receives
    FROM broker.queues
    WHERE deleted_at IS NULL AND max_receives_lowered_at IS NOT NULL
        AND max_receives_lowered_at NOT BETWEEN statement_timestamp() - interval '1 minute'
            AND statement_timestamp() - interval '5 seconds'
),
exhausted AS MATERIALIZED (
    SELECT m.queue_id, m.id
    FROM lowered q
    CROSS JOIN LATERAL (
        SELECT queue_id, id
        FROM broker.messages
        WHERE (queue_id * 4::bigint + lane) = q.id * 4::bigint + 1 AND lane >= 0
            AND receive_count >= q.max_receives
        ORDER BY visible_at, id
        LIMIT %(batch)s
        FOR UPDATE SKIP LOCKED
    ) AS m
    LIMIT %(batch)s
)
UPDATE broker.messages m
SET lane = 2
FROM exhausted e
WHERE m.queue_id = ANY (ARRAY[e.queue_id]) AND m.id = e.id
"""

# Also those are seen that somebody has locked.
_ALL_ARE_MARKED = """
UPDATE broker.queues q
SET max_receives_lowered_at = NULL
WHERE q.deleted_at IS NULL
    AND q.max_receives_lowered_at NOT BETWEEN statement_timestamp() - interval '1 minute'
        AND statement_timestamp() + interval '1 minute'
    AND NOT EXISTS (
        SELECT
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
            AND m.receive_count >= q.max_receives
    )
"""


async def mark_exhausted(connection: Connection, batch: int) -> int:
    """Mark up to `batch` messages of queues whose `max_receives` was lowered; return how many have none left."""
    marked = (await connection.execute(_MARK_EXHAUSTED, {"batch": batch})).rowcount
    if not marked:
        await connection.execute(_ALL_ARE_MARKED)
    return marked


_BOUNDS = """
SELECT q.id, coalesce((SELECT max(m.id) FROM broker.messages m WHERE m.queue_id = q.id), 0)
FROM broker.queues q
WHERE q.name = %(queue)s AND q.deleted_at IS NULL
"""

# Dead letters that nobody holds, and that have somewhere to go: a queue of a subscription that has ended is none,
# because what lies there becomes a dead letter again.
_REDRIVEN = """
    FROM broker.messages m
    CROSS JOIN LATERAL (
        SELECT q.id, q.name
        FROM broker.queues q
        WHERE q.name = coalesce(%(to)s::text, m.dead_letter ->> 'source_queue') AND q.deleted_at IS NULL
            AND q.id <> m.queue_id
            AND NOT EXISTS (SELECT FROM broker.subscriptions s WHERE s.queue_id = q.id AND s.state = 'ended')
            AND (%(like)s::text[] IS NULL OR q.name LIKE ANY (%(like)s::text[]))
    ) AS t
    WHERE m.queue_id = %(queue_id)s::int AND m.id > %(after)s::bigint AND m.id <= %(newest)s::bigint
        AND m.dead_letter IS NOT NULL
        AND (m.lane = 0 OR (m.lane = 1 AND m.visible_at <= statement_timestamp()))
        AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())
"""

# Locks: the rows it picks, waiting for none, and no other. Two at once, or with a dequeue: each row is taken by one.
_REDRIVE = f"""
/* redrive */
WITH picked AS MATERIALIZED (
    SELECT m.queue_id, m.id, t.id AS target_id, t.name AS target
    {_REDRIVEN}
    ORDER BY m.id
    LIMIT %(batch)s
    FOR UPDATE OF m SKIP LOCKED
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM picked
    LIMIT 1
),
moved AS (
    UPDATE broker.messages m
    SET queue_id = s.target_id, {_ARRIVES}, dead_letter = NULL
    FROM picked s
    CROSS JOIN stamp p
    WHERE m.queue_id = ANY (ARRAY[s.queue_id]) AND m.id = s.id
)
SELECT target, count(*), max(id)
FROM picked
GROUP BY target
"""

_HAS_MORE = f"""
SELECT EXISTS (SELECT {_REDRIVEN})
"""

_EXISTS = """
SELECT FROM broker.queues WHERE name = %(queue)s AND deleted_at IS NULL
"""


@dataclass(frozen=True)
class Redriven:
    """How many messages were moved, by the queue that they are in now; whether none is left."""

    moved: Mapping[str, int]
    complete: bool


async def redrive(
    database: Database, queue: str, to: str | None, max_messages: int | None, *, like: Sequence[str] | None = None
) -> Redriven:
    """Move the dead letters of a queue to another one (None: each to where it came from), oldest first.

    Only to queues that are `like` one of these patterns of LIKE, where there are any. Those that somebody holds stay,
    and those whose queue is no more, or is one of a subscription that has ended. Works in
    transactions of 1,000 until it is done, has moved `max_messages`, or its time is over. Raises QueueNotFound, and
    InvalidParams where `to` is the queue.
    """
    if to == queue:
        raise InvalidParams(reason="`to` must be another queue than `queue`.", param="to", given=to)
    deadline = time.monotonic() + database.request_timeout
    stop_at = deadline - database.request_timeout * 0.4
    row = await database.read(lambda connection: _first_row(connection, _BOUNDS, {"queue": queue}))
    if row is None:
        raise QueueNotFound(queue=queue)
    if to is not None:
        target = await database.read(lambda connection: _first_row(connection, _EXISTS, {"queue": to}))
        if target is None:
            raise QueueNotFound(queue=to)
    queue_id, newest = row
    moved: Counter[str] = Counter()
    after = -1
    while time.monotonic() < stop_at:
        batch = REDRIVE_BATCH if max_messages is None else min(REDRIVE_BATCH, max_messages - moved.total())
        if not batch:
            break
        work = partial(redrive_batch, queue_id=queue_id, to=to, batch=batch, after=after, newest=newest, like=like)
        try:
            batch_moved, after = await database.write(work, timeout=time_left(deadline))
        except BrokerError as error:
            # What is committed is counted, or a repeated call would not say how many there were.
            if moved and error.retryable:
                break
            raise
        if not batch_moved:
            break
        moved.update(batch_moved)
    params = {
        "queue_id": queue_id,
        "to": to,
        "after": -1,
        "newest": newest,
        "like": like,
    }  # from -1: what was locked for a moment
    try:
        more = await database.read(
            lambda connection: _first_row(connection, _HAS_MORE, params), timeout=time_left(deadline)
        )
    except BrokerError:
        if not moved:
            raise
        return Redriven(moved, complete=False)  # what was moved is, whatever became of the question
    return Redriven(moved, complete=more == (False,))


async def redrive_batch(
    connection: Connection,
    queue_id: int,
    to: str | None,
    batch: int,
    after: int = -1,
    newest: int = 2**63 - 1,
    like: Sequence[str] | None = None,
) -> tuple[Counter[str], int]:
    """Move up to `batch` dead letters; return how many, by the queue that they are in now, and the last one's id."""
    params = {"queue_id": queue_id, "to": to, "batch": batch, "after": after, "newest": newest, "like": like}
    rows = await (await connection.execute(_REDRIVE, params)).fetchall()
    moved = Counter({target: messages for target, messages, _ in rows})
    return moved, max((last for *_, last in rows), default=after)


async def _first_row(connection: Connection, statement: str, params: Mapping[str, Any]) -> tuple[Any, ...] | None:
    return await (await connection.execute(statement, params)).fetchone()
