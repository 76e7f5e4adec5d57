"""Messages are handed out: dequeue, and when the next one will be ready.

Why the statements are written as they are stands in `messages.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from operator import itemgetter
from typing import Any

import msgspec

from broker.model import (
    FRESH,
    MAX_BODY_BYTES_PER_ANSWER,
    RETURNED,
    Lease,
    Message,
    message_id_of,
    receipt_of,
    timestamp,
    timestamp_or_null,
)
from broker.storage.binary import moment_of, random_uuids
from broker.storage.database import Connection, one_line
from broker.storage.low_water import UNKNOWN, Floors, View

NO_HEADERS = msgspec.Raw(b"{}")

# Locks: the rows it picks, and it waits for none of them (SKIP LOCKED). Two at once: each row is locked by
# one of them and skipped by the other; a row that the other has already leased no longer lies in the past of
# its lane when the lock is taken, so it is not picked. Each lane is first looked at for its first ready message,
# whoever has locked it, from the low-water hint on; from there its rows are picked, so that what was taken but cannot
# be removed from the index yet is walked past once. What is delayed or leased lies behind the end of the scan. Each
# queue stands in the input once, so no row is picked twice. What is leased for the last time goes to lane 2, which
# nothing here reads. What has used up its deliveries because max_receives was lowered may lie in lane 1 still, and is
# walked past; the first ready message that is learnt from is looked for among those too, because max_receives may be
# raised again.
_PICK = """
/* dequeue */
WITH wanted AS MATERIALIZED (
    SELECT
        w.n,
        statement_timestamp() AS now,
        q.id AS queue_id,
        q.id * 4::bigint + w.first_lane AS first_lane,
        q.id * 4::bigint + 1 - w.first_lane AS second_lane,
        coalesce(w.first_floor, '-infinity') AS first_floor,
        coalesce(w.second_floor, '-infinity') AS second_floor,
        CASE WHEN q.paused THEN 0 ELSE w.max_messages END AS max_messages,
        coalesce(w.visibility_timeout, q.visibility_timeout) AS seconds,
        coalesce(q.max_receives, 2147483647) AS max_receives
    FROM unnest(
        %(queues)b::text[], %(max_messages)b::int[], %(visibility_timeouts)b::float8[], %(first_lanes)b::int[],
        %(first_floors)b::timestamptz[], %(second_floors)b::timestamptz[]
    ) WITH ORDINALITY AS w (queue, max_messages, visibility_timeout, first_lane, first_floor, second_floor, n)
    JOIN broker.queues q ON q.name = w.queue AND q.deleted_at IS NULL
),
looked AS MATERIALIZED (
    SELECT
        w.*,
        coalesce(
            (
                SELECT visible_at
                FROM broker.messages
                WHERE (queue_id * 4::bigint + lane) = w.first_lane AND lane >= 0
                    AND visible_at >= w.first_floor AND visible_at <= w.now
                    AND (expires_at IS NULL OR expires_at > w.now)
                ORDER BY visible_at, id
                LIMIT 1
            ),
            'infinity'
        ) AS first_ready,
        coalesce(
            (
                SELECT visible_at
                FROM broker.messages
                WHERE (queue_id * 4::bigint + lane) = w.second_lane AND lane >= 0
                    AND visible_at >= w.second_floor AND visible_at <= w.now
                    AND (expires_at IS NULL OR expires_at > w.now)
                ORDER BY visible_at, id
                LIMIT 1
            ),
            'infinity'
        ) AS second_ready
    FROM wanted w
),
first_lane AS MATERIALIZED (
    SELECT w.n, w.seconds, w.max_receives, m.*
    FROM looked w
    CROSS JOIN LATERAL (
        SELECT queue_id, id, visible_at, body_bytes
        FROM broker.messages
        WHERE (queue_id * 4::bigint + lane) = w.first_lane AND lane >= 0
            AND visible_at >= w.first_ready AND visible_at <= w.now
            AND (expires_at IS NULL OR expires_at > w.now) AND receive_count < w.max_receives
        ORDER BY visible_at, id
        LIMIT w.max_messages
        FOR UPDATE SKIP LOCKED
    ) m
),
second_lane AS MATERIALIZED (
    SELECT w.n, w.seconds, w.max_receives, m.*
    FROM looked w
    CROSS JOIN LATERAL (
        SELECT queue_id, id, visible_at, body_bytes
        FROM broker.messages
        WHERE (queue_id * 4::bigint + lane) = w.second_lane AND lane >= 0
            AND visible_at >= w.second_ready AND visible_at <= w.now
            AND (expires_at IS NULL OR expires_at > w.now) AND receive_count < w.max_receives
        ORDER BY visible_at, id
        LIMIT w.max_messages - (SELECT count(*) FROM first_lane f WHERE f.n = w.n)
        FOR UPDATE SKIP LOCKED
    ) m
),
lanes AS MATERIALIZED (
    SELECT *, 1 AS place FROM first_lane
    UNION ALL
    SELECT *, 2 AS place FROM second_lane
),
picked AS MATERIALIZED (
    SELECT n, seconds, max_receives, queue_id, id, position
    FROM (
        SELECT *, row_number() OVER in_order AS position, sum(body_bytes) OVER in_order AS bytes
        FROM lanes
        WINDOW in_order AS (ORDER BY n, place, visible_at, id ROWS UNBOUNDED PRECEDING)
    ) AS c
    WHERE position = 1 OR bytes <= %(max_bytes)s
),
stamp AS MATERIALIZED (
    SELECT clock_timestamp() AS now
    FROM picked
    LIMIT 1
),
"""

# The messages, numbered in hand-out order, and for each queue a row of number 0 that says how it was looked at,
# in the column of dead_letter.
_ANSWER = """
)
SELECT
    position, n, id, token, body, headers, sender, receive_count, enqueued_at, first_received_at, expires_at,
    topic, published_id, dead_letter
FROM taken
UNION ALL
SELECT
    0, w.n, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    json_build_array(
        w.queue_id,
        w.seconds,
        (SELECT count(*) FROM picked) < (SELECT count(*) FROM lanes),
        (SELECT now FROM stamp),
        (SELECT now FROM stamp) + interval '1 second' * w.seconds,
        w.now,
        pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
        CASE WHEN w.first_ready < 'infinity' THEN w.first_ready END,
        CASE WHEN w.second_ready < 'infinity' THEN w.second_ready END
    )
FROM looked w
"""

# The tokens are made by the broker: gen_random_uuid() took a fifth of the statement where PostgreSQL is built
# without OpenSSL, and opens /dev/urandom for each.
_LEASE = one_line(
    _PICK
    + """
taken AS (
    UPDATE broker.messages m
    SET
        lane = CASE WHEN m.receive_count + 1 < p.max_receives THEN 1 ELSE 2 END,
        lease_token = (%(tokens)b::uuid[])[p.position],
        receive_count = m.receive_count + 1,
        first_received_at = coalesce(m.first_received_at, s.now),
        visible_at = s.now + interval '1 second' * p.seconds
    FROM picked p
    CROSS JOIN stamp s
    WHERE m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id
    RETURNING
        p.position, p.n, m.id, uuid_send(m.lease_token) AS token, m.body, m.headers, m.sender, m.receive_count,
        timestamptz_send(m.enqueued_at) AS enqueued_at,
        timestamptz_send(m.first_received_at) AS first_received_at,
        timestamptz_send(m.expires_at) AS expires_at, m.topic, m.published_id, m.dead_letter
"""
    + _ANSWER
)

# At most once: the row is gone, committed, before anybody sees the message. What it returns is what the
# message was, so the delivery is counted on the way out.
_REMOVE = one_line(
    _PICK
    + """
taken AS (
    DELETE FROM broker.messages m
    USING picked p
    CROSS JOIN stamp s
    WHERE m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id
    RETURNING
        p.position, p.n, m.id, NULL::bytea AS token, m.body, m.headers, m.sender, m.receive_count + 1 AS receive_count,
        timestamptz_send(m.enqueued_at) AS enqueued_at,
        timestamptz_send(coalesce(m.first_received_at, s.now)) AS first_received_at,
        timestamptz_send(m.expires_at) AS expires_at, m.topic, m.published_id, m.dead_letter
"""
    + _ANSWER
)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted from one queue. `visibility_timeout` in seconds, None for the queue's."""

    queue: str
    max_messages: int
    visibility_timeout: float | None = None
    fresh_first: bool = False
    floors: Floors = UNKNOWN


class Delivery(msgspec.Struct, frozen=True):
    """Messages that were handed out, in order, and the leases to give back if nobody hears of them.

    `is_cut` where there may be more messages, which were too large for one answer.
    """

    messages: list[Message]
    leases: list[Lease]
    lease_seconds: float
    is_cut: bool = False


@dataclass(frozen=True, slots=True)
class HandOut:
    """What one statement handed out by queue (those that do not exist are missing), and what it saw of the lanes.

    `view` is None, and `first_ready` empty, where no queue exists. `redelivered` is how many of a queue's messages had
    been delivered before; it is missing where none had.
    """

    deliveries: dict[str, Delivery]
    view: View | None
    first_ready: dict[str, Floors]
    redelivered: dict[str, int]


async def hand_out(connection: Connection, wanted: Sequence[Wanted], *, at_most_once: bool = False) -> HandOut:
    """Lease messages of several queues, each named once (or remove them, `at_most_once`).

    Stops after 8 MiB of bodies in all, never before the first message. A paused queue hands out nothing.
    """
    params = {
        "queues": [each.queue for each in wanted],
        "max_messages": [each.max_messages for each in wanted],
        "visibility_timeouts": [each.visibility_timeout for each in wanted],
        "first_lanes": [FRESH if each.fresh_first else RETURNED for each in wanted],
        "first_floors": [each.floors[FRESH if each.fresh_first else RETURNED] for each in wanted],
        "second_floors": [each.floors[RETURNED if each.fresh_first else FRESH] for each in wanted],
        "max_bytes": MAX_BODY_BYTES_PER_ANSWER,
    }
    if not at_most_once:
        params["tokens"] = random_uuids(sum(each.max_messages for each in wanted))
    cursor = await connection.execute(_REMOVE if at_most_once else _LEASE, params, binary=True)
    handed_out = HandOut({}, None, {}, {})
    view = None
    by_number: dict[int, tuple[_Look, Delivery, str, Any]] = {}
    times: dict[bytes | None, Any] = {None: None}
    for row in sorted(await cursor.fetchall(), key=_position):
        if row[0] == 0:
            n, look = row[1], msgspec.json.decode(row[-1], type=_Look)
            each = wanted[n - 1]
            first_ready = (look.first, look.second) if each.fresh_first else (look.second, look.first)
            handed_out.deliveries[each.queue] = delivery = Delivery([], [], look.visibility_timeout, look.is_cut)
            handed_out.first_ready[each.queue] = Floors(*first_ready)
            view = View(look.now, look.xmin, look.xmax)
            visible_at = timestamp_or_null(look.handed_out_at if at_most_once else look.lease_ends_at)
            by_number[n] = (look, delivery, each.queue, visible_at)
            continue
        (
            _, n, number, token, body, headers, sender, receive_count, enqueued_at, first_received_at, expires_at,
            topic, published_id, dead_letter,
        ) = row  # fmt: skip
        for time in (enqueued_at, first_received_at, expires_at):
            if time not in times:
                times[time] = timestamp(moment_of(time))
        look, delivery, queue, visible_at = by_number[n]
        if receive_count > 1:
            handed_out.redelivered[queue] = handed_out.redelivered.get(queue, 0) + 1
        receipt = None
        if token is not None:
            lease = Lease(look.queue_id, number, token)
            delivery.leases.append(lease)
            receipt = receipt_of(lease)
        message = Message(
            message_id_of(number), queue, receipt, body, headers or NO_HEADERS, sender, receive_count,
            times[enqueued_at], times[first_received_at], visible_at, times[expires_at], dead_letter,
        )  # fmt: skip
        if published_id is not None:
            message.topic, message.published_id = topic, message_id_of(published_id)
        delivery.messages.append(message)
    return replace(handed_out, view=view)


class _Look(msgspec.Struct, array_like=True):
    """How one queue was looked at.

    `handed_out_at` and `lease_ends_at` are None where nothing was picked. `first` and `second` are when the first
    ready messages became visible, of the two lanes in the order in which they were looked at.
    """

    queue_id: int
    visibility_timeout: float
    is_cut: bool
    handed_out_at: datetime | None
    lease_ends_at: datetime | None
    now: datetime
    xmin: int
    xmax: int
    first: datetime | None
    second: datetime | None


_position = itemgetter(0)


class DequeueCall(msgspec.Struct, frozen=True):
    """A consumer's call. Those of one queue that are served by one statement name the same `visibility_timeout`."""

    queue: str
    max_messages: int
    visibility_timeout: float | None


def share_out(calls: Sequence[DequeueCall], delivery: Delivery) -> list[Delivery]:
    """Give each call as many messages as it asked for, the first calls first, while there are any."""
    shares = []
    start = 0
    for call in calls:
        end = start + call.max_messages
        shares.append(
            Delivery(
                delivery.messages[start:end], delivery.leases[start:end], delivery.lease_seconds,
                delivery.is_cut and end >= len(delivery.messages),
            )
        )  # fmt: skip
        start = end
    return shares


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
                AND m.visible_at >= coalesce(w.fresh_floor, '-infinity')
                AND (m.expires_at IS NULL OR m.expires_at > greatest(m.visible_at, statement_timestamp()))
                AND m.receive_count < coalesce(q.max_receives, 2147483647)
            ORDER BY m.visible_at, m.id
            LIMIT 1
        ),
        (
            SELECT m.visible_at
            FROM broker.messages m
            WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
                AND m.visible_at >= coalesce(w.returned_floor, '-infinity')
                AND (m.expires_at IS NULL OR m.expires_at > greatest(m.visible_at, statement_timestamp()))
                AND m.receive_count < coalesce(q.max_receives, 2147483647)
            ORDER BY m.visible_at, m.id
            LIMIT 1
        )
    ) - statement_timestamp())::float8,
    q.paused
FROM unnest(%(queues)b::text[], %(fresh_floors)b::timestamptz[], %(returned_floors)b::timestamptz[])
    AS w (name, fresh_floor, returned_floor)
JOIN broker.queues q ON q.name = w.name AND q.deleted_at IS NULL
"""


async def next_visible(
    connection: Connection, queues: Sequence[str], floors: Mapping[str, Floors] | None = None
) -> dict[str, float | None]:
    """Return for each queue in how many seconds it will have a message to hand out (≤ 0: it has one).

    None where it has none, or is paused. A queue that does not exist is missing. `floors` are the low-water hints.
    """
    hints = [(floors or {}).get(queue, UNKNOWN) for queue in queues]
    cursor = await connection.execute(
        _NEXT_VISIBLE,
        {
            "queues": list(queues),
            "fresh_floors": [hint.fresh for hint in hints],
            "returned_floors": [hint.returned for hint in hints],
        },
        binary=True,
    )
    return {name: None if paused or seconds is None else seconds for name, seconds, paused in await cursor.fetchall()}
