"""Messages come and are handed out: enqueue, dequeue, and when the next one will be ready.

Each function is one statement, and so one transaction. Two at once:

- Rows are locked in the order of the primary key (queue_id, id) wherever a statement waits for a lock, so
  two statements never wait for each other in a circle. `dequeue` does not wait: it skips what is locked.
- READ COMMITTED. A statement that waited for a row looks at the row's newest version before it acts, and
  finds the lease taken, ended or gone.
- Rows picked under a lock go through one MATERIALIZED step before they are joined again for the write. An
  inlined union or join is evaluated anew when a row was updated meanwhile, and hands out more or fewer
  rows than were picked.
- One clock, the database's: `statement_timestamp()`, which an index condition can use.
- A plan must not depend on statistics, which say "empty" while a queue that was drained fills up again. So
  every statement leaves the planner one way: lanes are walked by the number of the lane, which only their
  index knows, and rows are looked up with `m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id`. Of the same
  condition with `=` the planner can make a hash or merge join, or a scan of all messages that looks at the
  list of picked rows for each: 54 seconds for 1,000 messages of 200,000, measured. An array can only be looked
  up in the index of the primary key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from broker.errors import BrokerError, MessageTooLarge, QueueFull, QueueNotFound
from broker.model import (
    FRESH,
    MAX_BODY_BYTES_PER_ANSWER,
    RETURNED,
    Lease,
    Message,
    NewMessage,
    message_id_of,
    receipt_of,
    timestamp,
    timestamp_or_null,
)
from broker.storage.database import Connection

NO_HEADERS = msgspec.Raw(b"{}")

# Up to this many messages a queue's max_messages is checked by counting; beyond, by what the sweeper counted.
COUNTED_MAX_MESSAGES = 10_000

# What every statement that looks at messages shares: expired ones that nobody holds are not there. (In lane 0
# lies what was never handed out, so nobody holds it.)
IS_ALIVE = """(
    m.expires_at IS NULL OR m.expires_at > statement_timestamp()
    OR (m.lane = 1 AND m.visible_at > statement_timestamp())
)"""

# Locks: none but those of the rows it inserts. Two at once: each stores its own messages; ids are given in
# the order of the statements, and within a statement in the order of the input. A call is stored whole or
# not at all: one refused message keeps back the others of its call, and none of any other call.
_ENQUEUE = """
WITH input AS MATERIALIZED (
    SELECT n, call, queue, body, headers, sender, delay, ttl
    FROM unnest(
        %(calls)s::int[], %(queues)s::text[], %(bodies)b::text[], %(headers)s::text[],
        %(senders)s::text[], %(delays)s::float8[], %(ttls)s::float8[]
    ) WITH ORDINALITY AS i (call, queue, body, headers, sender, delay, ttl, n)
),
target AS MATERIALIZED (
    SELECT
        q.id, q.name, q.delay, q.message_ttl, q.max_message_bytes, q.max_messages,
        CASE
            WHEN q.max_messages <= %(counted_max_messages)s THEN (
                SELECT count(*)
                FROM (
                    SELECT
                    FROM broker.messages m
                    WHERE m.queue_id = q.id
                        AND (
                            m.expires_at IS NULL OR m.expires_at > statement_timestamp()
                            OR (m.lane = 1 AND m.visible_at > statement_timestamp())
                        )
                    LIMIT q.max_messages
                ) AS counted
            )
            WHEN q.max_messages IS NOT NULL THEN (
                SELECT s.messages FROM broker.queue_sizes s WHERE s.queue_id = q.id
            )
        END AS size
    FROM broker.queues q
    WHERE q.deleted_at IS NULL AND q.name = ANY (%(queues)s::text[])
),
checked AS MATERIALIZED (
    SELECT
        i.n, i.call, i.queue, i.body, i.headers, i.sender,
        t.id AS queue_id,
        octet_length(i.body) AS body_bytes,
        coalesce(i.delay, t.delay) AS delay,
        coalesce(i.ttl, t.message_ttl) AS ttl,
        t.max_message_bytes,
        t.max_messages,
        CASE
            WHEN t.id IS NULL THEN 'queue_not_found'
            WHEN octet_length(i.body) > t.max_message_bytes THEN 'message_too_large'
            WHEN coalesce(t.size, 0) + count(*) OVER (PARTITION BY t.id ORDER BY i.n) > t.max_messages
                THEN 'queue_full'
        END AS refusal
    FROM input i
    LEFT JOIN target t ON t.name = i.queue
),
accepted AS MATERIALIZED (
    SELECT nextval('broker.message_ids') AS id, c.*
    FROM (
        SELECT *
        FROM checked
        WHERE call NOT IN (SELECT r.call FROM checked r WHERE r.refusal IS NOT NULL)
        ORDER BY n
    ) AS c
),
stored AS (
    INSERT INTO broker.messages (
        queue_id, id, enqueued_at, visible_at, expires_at, body_bytes, lane, sender, headers, body
    )
    SELECT
        queue_id, id, statement_timestamp(),
        statement_timestamp() + delay * interval '1 second',
        statement_timestamp() + ttl * interval '1 second',
        body_bytes, 0, sender, headers::json, body::json
    FROM accepted
    ORDER BY n
)
SELECT c.call, a.id, c.refusal, c.queue, c.body_bytes, c.max_message_bytes, c.max_messages, a.delay
FROM checked c
LEFT JOIN accepted a ON a.n = c.n
ORDER BY c.n
"""


@dataclass(frozen=True)
class EnqueueCall:
    """Messages that are stored in one queue, all or none."""

    queue: str
    messages: Sequence[NewMessage]


@dataclass(frozen=True)
class Stored:
    """What a call has stored: the message ids in order, and the shortest delay among them in seconds."""

    ids: list[int]
    shortest_delay: float


async def enqueue(connection: Connection, calls: Sequence[EnqueueCall]) -> list[Stored | BrokerError]:
    """Store the messages of several calls; return for each call what it stored, or why it stored none.

    An error's `index` is the position of the message that caused it within its call.
    """
    rows = [(n, call.queue, message) for n, call in enumerate(calls) for message in call.messages]
    cursor = await connection.execute(
        _ENQUEUE,
        {
            "calls": [n for n, _, _ in rows],
            "queues": [queue for _, queue, _ in rows],
            "bodies": [message.body for _, _, message in rows],
            "headers": [message.headers for _, _, message in rows],
            "senders": [message.sender for _, _, message in rows],
            "delays": [message.delay for _, _, message in rows],
            "ttls": [message.ttl for _, _, message in rows],
            "counted_max_messages": COUNTED_MAX_MESSAGES,
        },
    )
    answers: list[list[tuple[Any, ...]]] = [[] for _ in calls]
    for row in await cursor.fetchall():
        answers[row[0]].append(row)
    return [_stored_or_refused(answer) for answer in answers]


def _stored_or_refused(rows: list[tuple[Any, ...]]) -> Stored | BrokerError:
    for index, (_, _, refusal, queue, body_bytes, max_message_bytes, max_messages, _) in enumerate(rows):
        match refusal:
            case "queue_not_found":
                return QueueNotFound(queue=queue, index=index)
            case "message_too_large":
                return MessageTooLarge(queue=queue, limit=max_message_bytes, given=body_bytes, index=index)
            case "queue_full":
                return QueueFull(queue=queue, limit=max_messages, retry_after=1, index=index)
    return Stored([row[1] for row in rows], min(row[7] for row in rows))


# Locks: the rows it picks, and it waits for none of them (SKIP LOCKED). Two at once: each row is locked by
# one of them and skipped by the other; a row that the other has already leased no longer lies in the past of
# its lane when the lock is taken, so it is not picked. The scans walk the index of the lane from its oldest
# entry; what is delayed or leased lies behind the end of the scan.
_PICK = """
WITH queue AS MATERIALIZED (
    SELECT id, visibility_timeout, paused
    FROM broker.queues
    WHERE name = %(queue)s AND deleted_at IS NULL
),
first_lane AS MATERIALIZED (
    SELECT queue_id, id, visible_at, body_bytes, 1 AS place
    FROM broker.messages
    WHERE (queue_id * 4::bigint + lane) = (SELECT id * 4::bigint + %(first_lane)s FROM queue WHERE NOT paused)
        AND lane >= 0
        AND visible_at <= statement_timestamp()
        AND (expires_at IS NULL OR expires_at > statement_timestamp())
    ORDER BY visible_at, id
    LIMIT %(max_messages)s
    FOR UPDATE SKIP LOCKED
),
second_lane AS MATERIALIZED (
    SELECT queue_id, id, visible_at, body_bytes, 2 AS place
    FROM broker.messages
    WHERE (queue_id * 4::bigint + lane) = (SELECT id * 4::bigint + %(second_lane)s FROM queue WHERE NOT paused)
        AND lane >= 0
        AND visible_at <= statement_timestamp()
        AND (expires_at IS NULL OR expires_at > statement_timestamp())
    ORDER BY visible_at, id
    LIMIT %(max_messages)s - (SELECT count(*) FROM first_lane)
    FOR UPDATE SKIP LOCKED
),
picked AS MATERIALIZED (
    SELECT
        queue_id, id,
        row_number() OVER in_order AS n,
        sum(body_bytes) OVER in_order AS bytes_so_far
    FROM (SELECT * FROM first_lane UNION ALL SELECT * FROM second_lane) AS both_lanes
    WINDOW in_order AS (ORDER BY place, visible_at, id)
),
"""

_ANSWER = """
)
SELECT coalesce(%(visibility_timeout)s::float8, q.visibility_timeout), t.*
FROM queue q
LEFT JOIN taken t ON true
ORDER BY t.n
"""

_LEASE = (
    _PICK
    + """
taken AS (
    UPDATE broker.messages m
    SET
        lane = 1,
        lease_token = gen_random_uuid(),
        receive_count = m.receive_count + 1,
        first_received_at = coalesce(m.first_received_at, statement_timestamp()),
        visible_at = statement_timestamp() + interval '1 second' * coalesce(
            %(visibility_timeout)s::float8, (SELECT visibility_timeout FROM queue)
        )
    FROM picked p
    WHERE m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id
        AND (p.n = 1 OR p.bytes_so_far <= %(max_bytes)s)
    RETURNING
        p.n, m.queue_id, m.id, m.lease_token, m.body, m.headers, m.sender, m.receive_count,
        m.enqueued_at, m.first_received_at, m.visible_at, m.expires_at
"""
    + _ANSWER
)

# At most once: the row is gone, committed, before anybody sees the message. What it returns is what the
# message was, so the delivery is counted on the way out.
_REMOVE = (
    _PICK
    + """
taken AS (
    DELETE FROM broker.messages m
    USING picked p
    WHERE m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id
        AND (p.n = 1 OR p.bytes_so_far <= %(max_bytes)s)
    RETURNING
        p.n, m.queue_id, m.id, NULL::uuid AS lease_token, m.body, m.headers, m.sender,
        m.receive_count + 1 AS receive_count,
        m.enqueued_at, coalesce(m.first_received_at, statement_timestamp()) AS first_received_at,
        statement_timestamp() AS visible_at, m.expires_at
"""
    + _ANSWER
)


@dataclass(frozen=True)
class Delivery:
    """Messages that were handed out, in order, and the leases to give back if nobody hears of them."""

    messages: list[Message]
    leases: list[Lease]
    lease_seconds: float


async def dequeue(
    connection: Connection,
    queue: str,
    max_messages: int,
    visibility_timeout: float | None,
    *,
    at_most_once: bool = False,
    fresh_first: bool = False,
) -> Delivery:
    """Lease up to `max_messages` (or remove them, `at_most_once`); return them in hand-out order.

    `visibility_timeout` in seconds, None for the queue's. Stops after 8 MiB of bodies, never before the
    first message. A paused queue hands out nothing.

    Raises QueueNotFound.
    """
    cursor = await connection.execute(
        _REMOVE if at_most_once else _LEASE,
        {
            "queue": queue,
            "max_messages": max_messages,
            "visibility_timeout": visibility_timeout,
            "first_lane": FRESH if fresh_first else RETURNED,
            "second_lane": RETURNED if fresh_first else FRESH,
            "max_bytes": MAX_BODY_BYTES_PER_ANSWER,
        },
    )
    rows = await cursor.fetchall()
    if not rows:
        raise QueueNotFound(queue=queue)
    lease_seconds = rows[0][0]
    taken = [row[2:] for row in rows if row[1] is not None]
    leases = [Lease(row[0], row[1], row[2]) for row in taken if row[2] is not None]
    return Delivery([_message(queue, row) for row in taken], leases, lease_seconds)


def _message(queue: str, row: tuple[Any, ...]) -> Message:
    (queue_id, number, token, body, headers, sender, receive_count, *times) = row
    enqueued_at, first_received_at, visible_at, expires_at = times
    return Message(
        message_id=message_id_of(number),
        queue=queue,
        receipt=None if token is None else receipt_of(Lease(queue_id, number, token)),
        body=body,
        headers=headers or NO_HEADERS,
        sender=sender,
        receive_count=receive_count,
        enqueued_at=timestamp(enqueued_at),
        first_received_at=timestamp_or_null(first_received_at),
        visible_at=timestamp(visible_at),
        expires_at=timestamp_or_null(expires_at),
    )


# No locks. Rows that are ready but locked by somebody's running statement count as ready: whoever waits for
# them looks again shortly.
_NEXT_VISIBLE = """
SELECT
    q.name,
    extract(epoch FROM least(
        (
            SELECT m.visible_at
            FROM broker.messages m
            WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint AND m.lane >= 0
                AND (m.expires_at IS NULL OR m.expires_at > greatest(m.visible_at, statement_timestamp()))
            ORDER BY m.visible_at, m.id
            LIMIT 1
        ),
        (
            SELECT m.visible_at
            FROM broker.messages m
            WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
                AND (m.expires_at IS NULL OR m.expires_at > greatest(m.visible_at, statement_timestamp()))
            ORDER BY m.visible_at, m.id
            LIMIT 1
        )
    ) - statement_timestamp())::float8,
    q.paused
FROM broker.queues q
WHERE q.deleted_at IS NULL AND q.name = ANY (%(queues)s::text[])
"""


async def next_visible(connection: Connection, queues: Sequence[str]) -> dict[str, float | None]:
    """Return for each queue in how many seconds it will have a message to hand out (≤ 0: it has one).

    None where it has none, or is paused. A queue that does not exist is missing.
    """
    cursor = await connection.execute(_NEXT_VISIBLE, {"queues": list(queues)})
    return {name: None if paused or seconds is None else seconds for name, seconds, paused in await cursor.fetchall()}
