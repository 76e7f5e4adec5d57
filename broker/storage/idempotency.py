"""Messages come under a key: enqueue that stores a message once, however often it is sent.

A producer that has heard nothing sends again, under the same key, and is told of the message that is stored already.
The keys are in a table of their own, because they outlive the messages.

Why the statement is written as it is stands in `messages.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from typing import NamedTuple

import psycopg

from broker.errors import BrokerError, IdempotencyConflict
from broker.model import NewMessage
from broker.storage.database import Connection, one_line
from broker.storage.group_commit import AGAIN, Again
from broker.storage.storing import (
    TARGET,
    EnqueueCall,
    Stored,
    delays_of,
    fetch,
    params_of,
    refusals_of,
    shortest_delay,
)

SOMEBODY_WAS_QUICKER = "somebody was quicker with a key"

# Locks: the rows of its keys, in the order of the primary key, each when it comes to it; then none but those of the
# messages that it inserts. Two at once with one key: the second waits for the first to commit, and then finds its row;
# so two statements with the same keys wait for each other in one order. No key stands in the input twice.
#
# What is known of a key as of the snapshot decides what is refused: a message that is stored already is not too large
# and does not make a queue full. What decides whether a message is stored is the row of the key under its lock: where
# it names the id that this statement has given the message, the key was free.
#
# The row is written in any case, also where nothing in it changes. A message that was stored by a transaction that is
# committed here, but not yet on the standby, may only be confirmed when that is; PostgreSQL lets a transaction wait for
# the standby only if it wrote something.
#
# Where the row of another transaction that has just committed says that a key was used for another body, the call is
# refused. Of a batch, keys and messages are written already: then the statement fails, and is as if it never was.
_ENQUEUE = one_line(
    """
/* enqueue */
WITH
"""
    + TARGET.replace("q.max_messages,\n", "q.max_messages, q.idempotency_window AS key_window,\n", 1)
    + """
input AS (
    SELECT
        i.n, i.call, i.place, i.body, i.headers, i.sender, i.key, i.body_hash,
        t.id AS queue_id, t.max_message_bytes, t.max_messages, t.size, t.key_window,
        octet_length(i.body) AS body_bytes,
        coalesce(i.delay, t.delay) AS delay,
        coalesce(i.ttl, t.message_ttl) AS ttl,
        k.body_hash AS known
    FROM unnest(
        %(calls)b::int[], %(targets)b::int[], %(places)b::int[], %(bodies)b::text[],
        %(headers)b::text[], %(senders)b::text[], %(delays)b::float8[], %(ttls)b::float8[],
        %(keys)b::text[], %(hashes)b::bytea[]
    ) WITH ORDINALITY AS i (call, target, place, body, headers, sender, delay, ttl, key, body_hash, n)
    JOIN target t ON t.n = i.target
    LEFT JOIN LATERAL (
        SELECT e.body_hash
        FROM broker.idempotency_keys e
        WHERE e.queue_id = ANY (ARRAY[t.id]) AND e.key = i.key
            AND e.expires_at > statement_timestamp()
            AND e.first_used_at + t.key_window * interval '1 second' > statement_timestamp()
        LIMIT 1
    ) AS k ON true
    ORDER BY i.n
),
judged AS (
    SELECT
        *,
        CASE
            WHEN queue_id IS NULL THEN 'queue_not_found'
            WHEN known <> body_hash THEN 'idempotency_conflict'
            WHEN known IS NOT NULL THEN NULL
            WHEN body_bytes NOT BETWEEN 1 AND max_message_bytes THEN 'message_too_large'
            WHEN coalesce(size, 0) + place - seen > max_messages THEN 'queue_full'
        END AS refusal
    FROM (
        SELECT *, count(known) OVER (PARTITION BY queue_id ORDER BY n) AS seen
        FROM input
    ) AS i
    ORDER BY n
),
refused AS (
    SELECT call
    FROM judged
    WHERE refusal IS NOT NULL
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM judged
    LIMIT 1
),
new AS (
    SELECT j.*, s.now, nextval('broker.message_ids') AS id
    FROM judged j
    CROSS JOIN stamp s
    WHERE j.call NOT IN (SELECT call FROM refused)
    ORDER BY j.n
),
claimed AS (
    INSERT INTO broker.idempotency_keys AS k (queue_id, key, message_id, body_hash, first_used_at, expires_at)
    SELECT queue_id, key, id, body_hash, now, now + key_window * interval '1 second'
    FROM new
    WHERE key IS NOT NULL
    ORDER BY queue_id, key COLLATE "C"
    ON CONFLICT (queue_id, key) DO UPDATE SET (message_id, body_hash, first_used_at, expires_at) = (
        SELECT a, b, c, d
        FROM (VALUES
            (true, k.message_id, k.body_hash, k.first_used_at, k.expires_at),
            (false, excluded.message_id, excluded.body_hash, excluded.first_used_at, excluded.expires_at)
        ) AS r (is_old, a, b, c, d)
        WHERE is_old = (
            least(k.expires_at, k.first_used_at + (excluded.expires_at - excluded.first_used_at))
            > excluded.first_used_at
        )
    )
    RETURNING queue_id, key, message_id, body_hash
),
decided AS (
    SELECT
        n.n, n.call, coalesce(c.message_id, n.id) AS id,
        coalesce(c.message_id <> n.id, false) AS repeats,
        coalesce(c.body_hash <> n.body_hash, false) AS differs
    FROM new n
    LEFT JOIN claimed c ON c.queue_id = n.queue_id AND c.key = n.key
),
stored AS (
    INSERT INTO broker.messages (
        queue_id, id, enqueued_at, visible_at, expires_at, body_bytes, lane, sender, headers, body
    )
    SELECT
        n.queue_id, n.id, n.now,
        n.now + n.delay * interval '1 second',
        n.now + n.ttl * interval '1 second',
        n.body_bytes, 0, n.sender, n.headers::json, n.body::json
    FROM new n
    JOIN decided d ON d.n = n.n
    WHERE NOT d.repeats
)
SELECT
    (SELECT array_agg(delay ORDER BY n) FROM target),
    CASE
        WHEN EXISTS (SELECT FROM refused) THEN (
            SELECT json_agg(
                json_build_array(call, refusal, body_bytes, max_message_bytes, max_messages) ORDER BY n
            )
            FROM judged
            WHERE call IN (SELECT call FROM refused)
        )
    END,
    (SELECT array_agg(id ORDER BY n) FROM decided),
    (SELECT array_agg(repeats ORDER BY n) FROM decided),
    (SELECT array_agg(differs ORDER BY n) FROM decided),
    (
        SELECT (%(somebody_was_quicker)s::text || min(d.n))::int
        FROM decided d
        WHERE d.differs AND EXISTS (SELECT FROM decided o WHERE o.call = d.call AND o.n <> d.n)
    )
"""
)


class _Distinct(NamedTuple):
    """A call without the messages that repeat an earlier key of the same call.

    `places` says for each message of the call which of these it is.
    """

    call: EnqueueCall
    hashes: list[bytes | None]
    places: list[int]

    def uses(self) -> list[tuple[str, str]]:
        return [(self.call.queue, m.idempotency_key) for m in self.call.messages if m.idempotency_key is not None]


async def enqueue(connection: Connection, calls: Sequence[EnqueueCall]) -> list[Stored | BrokerError | Again]:
    """As `storing.enqueue`, for messages of which some have keys.

    Calls that share a key are merged where each is one message, the same one. Any other that shares a key with an
    earlier one is to be run again, when that one is decided.
    """
    results: list[Stored | BrokerError | Again] = [AGAIN] * len(calls)
    sent: dict[int, _Distinct] = {}
    followers: list[tuple[int, int]] = []
    first_uses: dict[tuple[str, str], int] = {}
    for number, call in enumerate(calls):
        distinct = _distinct(call)
        if isinstance(distinct, BrokerError):
            results[number] = distinct
            continue
        leaders = {first_uses[key] for key in distinct.uses() if key in first_uses}
        if not leaders:
            first_uses.update(dict.fromkeys(distinct.uses(), number))
            sent[number] = distinct
        elif all(len(sent[leader].hashes) == 1 and sent[leader].hashes == distinct.hashes for leader in leaders):
            followers.append((number, leaders.pop()))
    for number, result in zip(sent, await _send(connection, list(sent.values())), strict=True):
        results[number] = result
    for number, leader in followers:
        result = results[leader]
        if isinstance(result, Stored):
            results[number] = Stored(
                result.ids * len(calls[number].messages),
                result.shortest_delay,
                frozenset(range(len(calls[number].messages))),
            )
        elif isinstance(result, BrokerError):
            results[number] = result.copy()
    return results


def _distinct(call: EnqueueCall) -> _Distinct | BrokerError:
    """Return a call with each key once. Its error, where one of its keys stands for two bodies."""
    messages: list[NewMessage] = []
    hashes: list[bytes | None] = []
    places: list[int] = []
    place_of_key: dict[str, int] = {}
    for index, message in enumerate(call.messages):
        key = message.idempotency_key
        body_hash = None if key is None else sha256(message.body.encode()).digest()
        place = len(messages) if key is None else place_of_key.setdefault(key, len(messages))
        places.append(place)
        if place == len(messages):
            messages.append(message)
            hashes.append(body_hash)
        elif hashes[place] != body_hash:
            return IdempotencyConflict(key=key, index=index)
    return _Distinct(EnqueueCall(call.queue, messages), hashes, places)


async def _send(connection: Connection, sent: Sequence[_Distinct]) -> list[Stored | BrokerError | Again]:
    """Store what is sent; return a result for each."""
    if not sent:
        return []
    calls = [distinct.call for distinct in sent]
    params = params_of(calls) | {
        "keys": [message.idempotency_key for call in calls for message in call.messages],
        "hashes": [body_hash for distinct in sent for body_hash in distinct.hashes],
        "somebody_was_quicker": SOMEBODY_WAS_QUICKER,
    }
    try:
        row = await fetch(connection, _ENQUEUE, params)
    except psycopg.errors.InvalidTextRepresentation as error:
        if SOMEBODY_WAS_QUICKER not in str(error):
            raise
        return [AGAIN] * len(sent)
    delays = delays_of(calls, row[0])
    refusals = refusals_of(calls, row[1])
    decided = zip(*(values or () for values in row[2:5]), strict=True)
    results: list[Stored | BrokerError | Again] = []
    for number, distinct in enumerate(sent):
        if number in refusals:
            refusal = refusals[number]
            assert refusal.index is not None, "a message is to blame"
            refusal.index = distinct.places.index(refusal.index)
            results.append(refusal)
        else:
            results.append(_result(distinct, list(islice(decided, len(distinct.hashes))), delays))
    return results


def _result(
    distinct: _Distinct, decided: Sequence[tuple[int, bool, bool]], delays: dict[str, float]
) -> Stored | BrokerError:
    for index, (_, _, is_conflict) in enumerate(decided):
        if is_conflict:
            return IdempotencyConflict(key=distinct.call.messages[index].idempotency_key, index=index)
    seen: set[int] = set()
    duplicates: set[int] = set()
    for index, place in enumerate(distinct.places):
        if decided[place][1] or place in seen:
            duplicates.add(index)
        seen.add(place)
    ids = [decided[place][0] for place in distinct.places]
    return Stored(ids, shortest_delay(distinct.call, delays), frozenset(duplicates))
