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

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import islice
from operator import itemgetter
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
from broker.storage.arrays import Int4Array, TextArray, moment_of, random_uuids
from broker.storage.database import Connection, one_line
from broker.storage.low_water import UNKNOWN, Floors, View

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
# not at all: one refused message keeps back the others of its call, and none of any other call. What is
# stored is stamped after the transaction has its id, as low_water.py asks for.
_ENQUEUE = one_line("""
/* enqueue */
WITH target AS MATERIALIZED (
    SELECT
        w.n, q.id, q.delay, q.message_ttl, q.max_message_bytes, q.max_messages,
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
                ) AS c
            )
            WHEN q.max_messages IS NOT NULL THEN (
                SELECT s.messages FROM broker.queue_sizes s WHERE s.queue_id = q.id
            )
        END AS size
    FROM unnest(%(queues)b::text[]) WITH ORDINALITY AS w (name, n)
    LEFT JOIN broker.queues q ON q.name = w.name AND q.deleted_at IS NULL
),
input AS MATERIALIZED (
    SELECT
        i.call, i.body, i.headers, i.sender,
        t.id AS queue_id,
        octet_length(i.body) AS body_bytes,
        coalesce(i.delay, t.delay) AS delay,
        coalesce(i.ttl, t.message_ttl) AS ttl,
        CASE
            WHEN t.id IS NULL THEN 'queue_not_found'
            WHEN octet_length(i.body) > t.max_message_bytes THEN 'message_too_large'
            WHEN coalesce(t.size, 0) + i.place > t.max_messages THEN 'queue_full'
        END AS refusal
    FROM unnest(
        %(calls)b::int[], %(targets)b::int[], %(places)b::int[], %(bodies)b::text[],
        %(headers)b::text[], %(senders)b::text[], %(delays)b::float8[], %(ttls)b::float8[]
    ) WITH ORDINALITY AS i (call, target, place, body, headers, sender, delay, ttl, n)
    JOIN target t ON t.n = i.target
    ORDER BY i.n
),
refused AS MATERIALIZED (
    SELECT call
    FROM input
    WHERE refusal IS NOT NULL
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM input
    WHERE call NOT IN (SELECT call FROM refused)
    LIMIT 1
),
stored AS (
    INSERT INTO broker.messages (
        queue_id, id, enqueued_at, visible_at, expires_at, body_bytes, lane, sender, headers, body
    )
    SELECT
        i.queue_id, nextval('broker.message_ids'), s.now,
        s.now + i.delay * interval '1 second',
        s.now + i.ttl * interval '1 second',
        i.body_bytes, 0, i.sender, i.headers::json, i.body::json
    FROM input i
    CROSS JOIN stamp s
    WHERE i.call NOT IN (SELECT call FROM refused)
    RETURNING id
)
SELECT
    (SELECT array_agg(id) FROM stored),
    (SELECT array_agg(delay ORDER BY n) FROM target),
    CASE
        WHEN EXISTS (SELECT FROM refused) THEN (
            SELECT json_agg(json_build_array(i.call, i.refusal, i.body_bytes, i.max_message_bytes, i.max_messages))
            FROM (
                SELECT
                    u.call, u.refusal, octet_length(u.body) AS body_bytes, t.max_message_bytes, t.max_messages
                FROM input u
                LEFT JOIN target t ON t.id = u.queue_id
                WHERE u.call IN (SELECT call FROM refused)
            ) AS i
        )
    END
""")


class EnqueueCall(msgspec.Struct, frozen=True):
    """Messages that are stored in one queue, all or none."""

    queue: str
    messages: Sequence[NewMessage]


class Stored(msgspec.Struct, frozen=True):
    """What a call has stored: the message ids in order, and the shortest delay among them in seconds."""

    ids: list[int]
    shortest_delay: float


async def enqueue(connection: Connection, calls: Sequence[EnqueueCall]) -> list[Stored | BrokerError]:
    """Store the messages of several calls; return for each call what it stored, or why it stored none.

    An error's `index` is the position of the message that caused it within its call.
    """
    targets: dict[str, int] = {}
    sizes: list[int] = []
    new: list[NewMessage] = []
    numbers: list[int] = []
    places: list[int] = []
    of_target: list[int] = []
    for number, call in enumerate(calls):
        target = targets.setdefault(call.queue, len(targets) + 1)
        if target > len(sizes):
            sizes.append(0)
        for message in call.messages:
            sizes[target - 1] += 1
            new.append(message)
            numbers.append(number)
            of_target.append(target)
            places.append(sizes[target - 1])
    cursor = await connection.execute(
        _ENQUEUE,
        {
            "queues": list(targets),
            "calls": Int4Array(numbers),
            "targets": Int4Array(of_target),
            "places": Int4Array(places),
            "bodies": TextArray([message.body.encode() for message in new]),
            "headers": _none_if_all_are([message.headers for message in new]),
            "senders": _none_if_all_are([message.sender for message in new]),
            "delays": _none_if_all_are([message.delay for message in new]),
            "ttls": _none_if_all_are([message.ttl for message in new]),
            "counted_max_messages": COUNTED_MAX_MESSAGES,
        },
        binary=True,
    )
    row = await cursor.fetchone()
    assert row is not None, "a select without FROM returns one row"
    # Numbers rise in the order of the input, in whatever order the rows come back.
    ids = iter(sorted(row[0] or ()))
    refusals = _refusals(calls, row[2])
    return [
        refusals.get(number)
        or Stored(list(islice(ids, len(call.messages))), _shortest_delay(call, row[1][targets[call.queue] - 1]))
        for number, call in enumerate(calls)
    ]


def _none_if_all_are(values: list[Any]) -> list[Any] | None:
    """Return what unnest fills up with NULLs by itself."""
    return None if all(value is None for value in values) else values


def _shortest_delay(call: EnqueueCall, of_queue: float) -> float:
    return min(of_queue if message.delay is None else message.delay for message in call.messages)


def _refusals(calls: Sequence[EnqueueCall], refused: msgspec.Raw | None) -> dict[int, BrokerError]:
    """Return for each call that was refused the error of its first message that is to blame."""
    errors: dict[int, BrokerError] = {}
    seen: Counter[int] = Counter()
    for number, refusal, body_bytes, max_message_bytes, max_messages in msgspec.json.decode(refused or b"[]"):
        index = seen[number]
        seen[number] += 1
        if number in errors:
            continue
        queue = calls[number].queue
        match refusal:
            case "queue_not_found":
                errors[number] = QueueNotFound(queue=queue, index=index)
            case "message_too_large":
                errors[number] = MessageTooLarge(queue=queue, limit=max_message_bytes, given=body_bytes, index=index)
            case "queue_full":
                errors[number] = QueueFull(queue=queue, limit=max_messages, retry_after=1, index=index)
    return errors


# Locks: the rows it picks, and it waits for none of them (SKIP LOCKED). Two at once: each row is locked by
# one of them and skipped by the other; a row that the other has already leased no longer lies in the past of
# its lane when the lock is taken, so it is not picked. The scans walk the index of the lane from the low-water
# hint on; what is delayed or leased lies behind the end of the scan. Each queue stands in the input once, so no
# row is picked twice.
_PICK = """
/* dequeue */
WITH wanted AS MATERIALIZED (
    SELECT
        w.n,
        q.id AS queue_id,
        q.id * 4::bigint + w.first_lane AS first_lane,
        q.id * 4::bigint + 1 - w.first_lane AS second_lane,
        coalesce(w.first_floor, '-infinity') AS first_floor,
        coalesce(w.second_floor, '-infinity') AS second_floor,
        CASE WHEN q.paused THEN 0 ELSE w.max_messages END AS max_messages,
        coalesce(w.visibility_timeout, q.visibility_timeout) AS visibility_timeout
    FROM unnest(
        %(queues)b::text[], %(max_messages)b::int[], %(visibility_timeouts)b::float8[], %(first_lanes)b::int[],
        %(first_floors)b::timestamptz[], %(second_floors)b::timestamptz[]
    ) WITH ORDINALITY AS w (queue, max_messages, visibility_timeout, first_lane, first_floor, second_floor, n)
    JOIN broker.queues q ON q.name = w.queue AND q.deleted_at IS NULL
),
first_lane AS MATERIALIZED (
    SELECT w.n, w.visibility_timeout, m.*
    FROM wanted w
    CROSS JOIN LATERAL (
        SELECT queue_id, id, visible_at, body_bytes
        FROM broker.messages
        WHERE (queue_id * 4::bigint + lane) = w.first_lane AND lane >= 0
            AND visible_at >= w.first_floor AND visible_at <= statement_timestamp()
            AND (expires_at IS NULL OR expires_at > statement_timestamp())
        ORDER BY visible_at, id
        LIMIT w.max_messages
        FOR UPDATE SKIP LOCKED
    ) m
),
second_lane AS MATERIALIZED (
    SELECT w.n, w.visibility_timeout, m.*
    FROM wanted w
    CROSS JOIN LATERAL (
        SELECT queue_id, id, visible_at, body_bytes
        FROM broker.messages
        WHERE (queue_id * 4::bigint + lane) = w.second_lane AND lane >= 0
            AND visible_at >= w.second_floor AND visible_at <= statement_timestamp()
            AND (expires_at IS NULL OR expires_at > statement_timestamp())
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
    SELECT n, visibility_timeout, queue_id, id, position
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

# The messages, numbered in hand-out order, and for each queue a row of number 0 that says how it was looked at. For
# the hint: the first ready message of each lane, whoever has locked it.
_ANSWER = """
)
SELECT
    position, n, id, token, body, headers, sender, receive_count, enqueued_at, first_received_at, expires_at, NULL
FROM taken
UNION ALL
SELECT
    0, w.n, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL,
    json_build_array(
        w.queue_id,
        w.visibility_timeout,
        (SELECT count(*) FROM picked) < (SELECT count(*) FROM lanes),
        (SELECT now FROM stamp),
        (SELECT now FROM stamp) + interval '1 second' * w.visibility_timeout,
        statement_timestamp(),
        pg_snapshot_xmin(pg_current_snapshot())::text::bigint,
        pg_snapshot_xmax(pg_current_snapshot())::text::bigint,
        (
            SELECT visible_at
            FROM broker.messages
            WHERE (queue_id * 4::bigint + lane) = w.first_lane AND lane >= 0
                AND visible_at >= w.first_floor AND visible_at <= statement_timestamp()
                AND (expires_at IS NULL OR expires_at > statement_timestamp())
            ORDER BY visible_at, id
            LIMIT 1
        ),
        (
            SELECT visible_at
            FROM broker.messages
            WHERE (queue_id * 4::bigint + lane) = w.second_lane AND lane >= 0
                AND visible_at >= w.second_floor AND visible_at <= statement_timestamp()
                AND (expires_at IS NULL OR expires_at > statement_timestamp())
            ORDER BY visible_at, id
            LIMIT 1
        )
    )
FROM wanted w
"""

# The tokens are made by the broker: gen_random_uuid() took a fifth of the statement where PostgreSQL is built
# without OpenSSL, and opens /dev/urandom for each.
_LEASE = one_line(
    _PICK
    + """
taken AS (
    UPDATE broker.messages m
    SET
        lane = 1,
        lease_token = (%(tokens)b::uuid[])[p.position],
        receive_count = m.receive_count + 1,
        first_received_at = coalesce(m.first_received_at, s.now),
        visible_at = s.now + interval '1 second' * p.visibility_timeout
    FROM picked p
    CROSS JOIN stamp s
    WHERE m.queue_id = ANY (ARRAY[p.queue_id]) AND m.id = p.id
    RETURNING
        p.position, p.n, m.id, uuid_send(m.lease_token) AS token, m.body, m.headers, m.sender, m.receive_count,
        timestamptz_send(m.enqueued_at) AS enqueued_at,
        timestamptz_send(m.first_received_at) AS first_received_at,
        timestamptz_send(m.expires_at) AS expires_at
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
        timestamptz_send(m.expires_at) AS expires_at
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

    `view` is None, and `first_ready` empty, where no queue exists.
    """

    deliveries: dict[str, Delivery]
    view: View | None
    first_ready: dict[str, Floors]


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
    handed_out = HandOut({}, None, {})
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
            _, n, number, token, body, headers, sender, receive_count, enqueued_at, first_received_at, expires_at, _
        ) = row  # fmt: skip
        for time in (enqueued_at, first_received_at, expires_at):
            if time not in times:
                times[time] = timestamp(moment_of(time))
        look, delivery, queue, visible_at = by_number[n]
        receipt = None
        if token is not None:
            lease = Lease(look.queue_id, number, token)
            delivery.leases.append(lease)
            receipt = receipt_of(lease)
        delivery.messages.append(
            Message(
                message_id_of(number), queue, receipt, body, headers or NO_HEADERS, sender, receive_count,
                times[enqueued_at], times[first_received_at], visible_at, times[expires_at],
            )
        )  # fmt: skip
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
            ORDER BY m.visible_at, m.id
            LIMIT 1
        ),
        (
            SELECT m.visible_at
            FROM broker.messages m
            WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
                AND m.visible_at >= coalesce(w.returned_floor, '-infinity')
                AND (m.expires_at IS NULL OR m.expires_at > greatest(m.visible_at, statement_timestamp()))
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
