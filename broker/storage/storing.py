"""Messages come: enqueue.

Why the statement is written as it is stands in `messages.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import msgspec

from broker.errors import BrokerError, IdempotencyConflict, MessageTooLarge, QueueFull, QueueNotFound
from broker.model import NewMessage
from broker.storage.binary import Int4Array, TextArray
from broker.storage.database import Connection, one_line

# Up to this many messages a queue's max_messages is checked by counting; beyond, by what the sweeper counted.
COUNTED_MAX_MESSAGES = 10_000

# About how many messages the queue q holds, where its max_messages asks for it.
SIZE = """
CASE
    WHEN q.max_messages <= %(counted_max_messages)s THEN (
        SELECT count(*)
        FROM (
            SELECT
            FROM broker.messages m
            WHERE m.queue_id = q.id
                AND (
                    m.expires_at IS NULL OR m.expires_at > statement_timestamp()
                    OR (m.lane > 0 AND m.visible_at > statement_timestamp())
                )
            LIMIT q.max_messages
        ) AS c
    )
    WHEN q.max_messages IS NOT NULL THEN (
        SELECT s.messages FROM broker.queue_sizes s WHERE s.queue_id = q.id
    )
END
"""

# The queues that are stored into, in the order of the input.
TARGET = f"""
target AS MATERIALIZED (
    SELECT
        w.n, q.id, q.delay, q.message_ttl, q.max_message_bytes, q.max_messages,
        {SIZE} AS size
    FROM unnest(%(queues)b::text[]) WITH ORDINALITY AS w (name, n)
    LEFT JOIN broker.queues q ON q.name = w.name AND q.deleted_at IS NULL
),
"""

# Locks: none but those of the rows it inserts. Two at once: each stores its own messages; ids are given in
# the order of the statements, and within a statement in the order of the input. A call is stored whole or
# not at all: one refused message keeps back the others of its call, and none of any other call. What is
# stored is stamped after the transaction has its id, as low_water.py asks for.
_ENQUEUE = one_line(
    """
/* enqueue */
WITH
"""
    + TARGET
    + """
input AS MATERIALIZED (
    SELECT
        i.call, i.body, i.headers, i.sender,
        t.id AS queue_id,
        octet_length(i.body) AS body_bytes,
        coalesce(i.delay, t.delay) AS delay,
        coalesce(i.ttl, t.message_ttl) AS ttl,
        CASE
            WHEN t.id IS NULL THEN 'queue_not_found'
            WHEN octet_length(i.body) NOT BETWEEN 1 AND t.max_message_bytes THEN 'message_too_large'
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
"""
)


class EnqueueCall(msgspec.Struct, frozen=True):
    """Messages that are stored in one queue, all or none."""

    queue: str
    messages: Sequence[NewMessage]
    has_keys: bool = False


class Stored(msgspec.Struct, frozen=True):
    """What a call has stored: the message ids in order, and the shortest delay among them in seconds.

    `duplicates` are the places of the messages that had been stored before, under the same key.
    """

    ids: list[int]
    shortest_delay: float
    duplicates: frozenset[int] = frozenset()


async def enqueue(connection: Connection, calls: Sequence[EnqueueCall]) -> list[Stored | BrokerError]:
    """Store the messages of several calls; return for each call what it stored, or why it stored none.

    An error's `index` is the position of the message that caused it within its call. Does not look at idempotency
    keys: where a message has one, `idempotency.enqueue` is to be used.
    """
    row = await fetch(connection, _ENQUEUE, params_of(calls))
    # Numbers rise in the order of the input, in whatever order the rows come back.
    ids = iter(sorted(row[0] or ()))
    delays = delays_of(calls, row[1])
    refusals = refusals_of(calls, row[2])
    return [
        refusals.get(number) or Stored(list(islice(ids, len(call.messages))), shortest_delay(call, delays))
        for number, call in enumerate(calls)
    ]


def params_of(calls: Sequence[EnqueueCall]) -> dict[str, Any]:
    """Return what a statement that stores these calls' messages is sent."""
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
    return {
        "queues": list(targets),
        "calls": Int4Array(numbers),
        "targets": Int4Array(of_target),
        "places": Int4Array(places),
        "bodies": TextArray([message.body.encode() for message in new]),
        "headers": none_if_all_are([message.headers for message in new]),
        "senders": senders_of(new),
        "delays": none_if_all_are([message.delay for message in new]),
        "ttls": none_if_all_are([message.ttl for message in new]),
        "counted_max_messages": COUNTED_MAX_MESSAGES,
    }


async def fetch(connection: Connection, statement: str, params: dict[str, Any]) -> tuple[Any, ...]:
    """Run a statement that returns one row."""
    row = await (await connection.execute(statement, params, binary=True)).fetchone()
    assert row is not None, "a select without FROM returns one row"
    return row


def none_if_all_are(values: list[Any]) -> list[Any] | None:
    """Return what unnest fills up with NULLs by itself."""
    return None if all(value is None for value in values) else values


def senders_of(new: Sequence[NewMessage]) -> TextArray | list[str | None] | None:
    """Return the senders as they are sent to PostgreSQL: quickest where all have one, as with tokens, or none has."""
    senders = [message.sender for message in new]
    known = [sender.encode() for sender in senders if sender is not None]
    return TextArray(known) if len(known) == len(senders) else none_if_all_are(senders)


def delays_of(calls: Sequence[EnqueueCall], delays: Sequence[float]) -> dict[str, float]:
    """Return each queue's delay; they came in the order in which `calls` name the queues."""
    return dict(zip(dict.fromkeys([call.queue for call in calls]), delays, strict=True))


def shortest_delay(call: EnqueueCall, of_queues: Mapping[str, float]) -> float:
    """Return in how many seconds the first of a call's messages becomes visible."""
    of_queue = of_queues[call.queue]
    return min([of_queue if message.delay is None else message.delay for message in call.messages])


def refusals_of(calls: Sequence[EnqueueCall], refused: msgspec.Raw | None) -> dict[int, BrokerError]:
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
            case "idempotency_conflict":
                errors[number] = IdempotencyConflict(key=calls[number].messages[index].idempotency_key, index=index)
            case "message_too_large":
                errors[number] = MessageTooLarge(queue=queue, limit=max_message_bytes, given=body_bytes, index=index)
            case "queue_full":
                errors[number] = QueueFull(queue=queue, limit=max_messages, retry_after=1, index=index)
    return errors
