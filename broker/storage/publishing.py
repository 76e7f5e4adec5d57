"""Messages are published: a copy for each subscription that wants them.

A copy is a row of its own, with an id of its own, in the queue of the subscription; what happens to it there is no
business of the topic. A topic that delivers on broadcast stores what is published under its own id, where no dequeue
looks, until `broadcasting.py` gives it out.

Why the statements are written as they are stands in `messages.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import msgspec

from broker.errors import BrokerError, IdempotencyConflict, MessageTooLarge, QueueFull, TopicNotFound
from broker.model import NewMessage
from broker.storage.binary import Int4Array, TextArray
from broker.storage.database import Connection, one_line
from broker.storage.group_commit import AGAIN, Again
from broker.storage.notifications import News
from broker.storage.storing import COUNTED_MAX_MESSAGES, SIZE, fetch, none_if_all_are, senders_of

# For how many seconds an idempotency key of a topic is remembered: as long as one of a queue that does not say.
IDEMPOTENCY_WINDOW = 300.0
# The longest body, whatever the queues of the subscriptions take: what a queue may take at most.
MAX_MESSAGE_BYTES = 2**20

# The subscriptions that want a message, and their queues. Asks for `i`, with topic_id and header_values. A queue lives
# as long as its subscription; to ask for that would bring an index into play that has all queues that live.
MATCHING = """
FROM broker.subscriptions s
JOIN broker.queues q ON q.id = ANY (ARRAY[s.queue_id])
WHERE s.topic_id = ANY (ARRAY[i.topic_id]) AND s.state <> 'ended'
    AND (
        s.filter IS NULL
        OR NOT EXISTS (
            SELECT
            FROM jsonb_each(s.filter) f
            WHERE NOT coalesce(f.value ? (i.header_values ->> f.key), false)
        )
    )
"""

# What was stored, for those who wait: queue, in how many seconds the first copy becomes visible, how many there are.
COPIES = """
SELECT json_agg(json_build_array(q.name, c.seconds, c.copies))
FROM (
    SELECT queue_id, count(*) AS copies, extract(epoch FROM min(visible_at) - min(stamp.now))::float8 AS seconds
    FROM stored
    CROSS JOIN stamp
    GROUP BY queue_id
) AS c
JOIN broker.queues q ON q.id = ANY (ARRAY[c.queue_id])
"""

# Locks: the rows of its keys, in the order of the primary key, each when it comes to it; then none but those of the
# messages that it inserts. Two at once with one key: the second waits for the first to commit, then finds its row, and
# makes no copies. Subscriptions are read without a lock: one that ends meanwhile may get a copy still, in a queue that
# is deleted with it, where the sweeper finds it.
#
# Who wants a message is found out twice: to see whether all queues take it, and to store the copies. Both look at the
# same snapshot. To hand on in between who wants what would join thousands of rows with each other.
#
# The row of a key is written in any case, and where nothing else is written, a message of the log: an answer may only
# leave when the standby has what it rests on.
_PUBLISH = one_line(
    f"""
/* publish */
WITH target AS MATERIALIZED (
    SELECT w.n, t.id, t.name, t.delivery
    FROM unnest(%(topics)b::text[]) WITH ORDINALITY AS w (name, n)
    LEFT JOIN broker.topics t ON t.name = w.name AND t.deleted_at IS NULL
),
input AS MATERIALIZED (
    SELECT
        i.n, i.body, i.headers, i.sender, i.delay, i.ttl, i.key, i.body_hash,
        t.id AS topic_id, t.name AS topic, t.delivery,
        octet_length(i.body) AS body_bytes, i.headers::jsonb AS header_values, k.body_hash AS known
    FROM unnest(
        %(targets)b::int[], %(bodies)b::text[], %(headers)b::text[], %(senders)b::text[], %(delays)b::float8[],
        %(ttls)b::float8[], %(keys)b::text[], %(hashes)b::bytea[]
    ) WITH ORDINALITY AS i (target, body, headers, sender, delay, ttl, key, body_hash, n)
    JOIN target t ON t.n = i.target
    LEFT JOIN LATERAL (
        SELECT e.body_hash
        FROM broker.idempotency_keys e
        WHERE e.queue_id = ANY (ARRAY[t.id]) AND e.key = i.key AND e.expires_at > statement_timestamp()
        LIMIT 1
    ) AS k ON true
),
wanted AS MATERIALIZED (
    SELECT i.*, m.*
    FROM input i
    CROSS JOIN LATERAL (
        SELECT
            count(*)::int AS deliveries,
            min(q.max_message_bytes) AS smallest,
            (array_agg(q.name ORDER BY q.max_message_bytes))[1] AS smallest_queue,
            bool_or(q.max_messages IS NOT NULL) AS is_limited
        {MATCHING} AND i.delivery = 'immediate'
    ) AS m
),
limited AS MATERIALIZED (
    SELECT i.n, m.*
    FROM wanted i
    CROSS JOIN LATERAL (SELECT q.id, q.name, q.max_messages {MATCHING}) AS m
    WHERE i.is_limited AND i.known IS NULL AND m.max_messages IS NOT NULL
),
sizes AS MATERIALIZED (
    SELECT q.id, coalesce({SIZE}, 0) AS size
    FROM (SELECT DISTINCT id, max_messages FROM limited) AS q
),
refused AS MATERIALIZED (
    SELECT n, 'topic_not_found' AS refusal, NULL AS queue, NULL::bigint AS at_most, 0 AS given
    FROM wanted
    WHERE topic_id IS NULL
    UNION ALL
    SELECT n, 'idempotency_conflict', NULL, NULL, 0
    FROM wanted
    WHERE known <> body_hash
    UNION ALL
    SELECT n, 'message_too_large', smallest_queue, least(smallest, %(max_message_bytes)s::int), body_bytes
    FROM wanted
    WHERE known IS NULL AND body_bytes NOT BETWEEN 1 AND least(smallest, %(max_message_bytes)s::int)
    UNION ALL
    SELECT l.n, 'queue_full', l.name, l.max_messages, 0
    FROM (SELECT *, row_number() OVER (PARTITION BY id ORDER BY n) AS place FROM limited) AS l
    JOIN sizes z ON z.id = l.id
    WHERE z.size + l.place > l.max_messages
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM wanted
    LIMIT 1
),
new AS MATERIALIZED (
    SELECT w.*, s.now, nextval('broker.message_ids') AS id
    FROM wanted w
    CROSS JOIN stamp s
    WHERE w.n NOT IN (SELECT n FROM refused)
    ORDER BY w.n
),
claimed AS (
    INSERT INTO broker.idempotency_keys AS k (
        queue_id, key, message_id, body_hash, first_used_at, expires_at, deliveries
    )
    SELECT topic_id, key, id, body_hash, now, now + %(window)s::float8 * interval '1 second', deliveries
    FROM new
    WHERE key IS NOT NULL
    ORDER BY topic_id, key COLLATE "C"
    ON CONFLICT (queue_id, key) DO UPDATE SET
        (message_id, body_hash, first_used_at, expires_at, deliveries) = (
            SELECT a, b, c, d, e
            FROM (VALUES
                (true, k.message_id, k.body_hash, k.first_used_at, k.expires_at, k.deliveries),
                (
                    false, excluded.message_id, excluded.body_hash, excluded.first_used_at, excluded.expires_at,
                    excluded.deliveries
                )
            ) AS r (is_old, a, b, c, d, e)
            WHERE is_old = (k.expires_at > excluded.first_used_at)
        )
    RETURNING queue_id, key, message_id, body_hash, deliveries
),
decided AS MATERIALIZED (
    SELECT
        n.*, coalesce(c.message_id, n.id) AS published_id,
        coalesce(c.message_id <> n.id, false) AS repeats,
        coalesce(c.body_hash <> n.body_hash, false) AS conflicts,
        coalesce(c.deliveries, n.deliveries) AS delivered
    FROM new n
    LEFT JOIN claimed c ON c.queue_id = n.topic_id AND c.key = n.key
),
stored AS (
    INSERT INTO broker.messages (
        queue_id, id, enqueued_at, visible_at, expires_at, body_bytes, lane, sender, headers, body, topic, published_id
    )
    SELECT
        c.queue_id, coalesce(c.id, nextval('broker.message_ids')), i.now,
        i.now + coalesce(i.delay, c.delay) * interval '1 second',
        i.now + coalesce(i.ttl, c.message_ttl) * interval '1 second',
        i.body_bytes, 0, i.sender, i.headers::json, i.body::json, c.topic, i.published_id
    FROM (SELECT * FROM decided WHERE NOT repeats ORDER BY n) AS i
    CROSS JOIN LATERAL (
        SELECT s.queue_id, NULL::bigint AS id, q.delay, q.message_ttl, i.topic
        {MATCHING} AND i.delivery = 'immediate'
        UNION ALL
        SELECT i.topic_id, i.published_id, 0, NULL, NULL WHERE i.delivery = 'on_broadcast'
    ) AS c
    RETURNING queue_id, visible_at
)
SELECT
    CASE
        WHEN EXISTS (SELECT FROM refused) THEN (
            SELECT json_agg(json_build_array(n, refusal, queue, at_most, given)) FROM refused
        )
    END,
    (SELECT array_agg(n::int ORDER BY n) FROM decided),
    (SELECT array_agg(published_id ORDER BY n) FROM decided),
    (SELECT array_agg(repeats ORDER BY n) FROM decided),
    (SELECT array_agg(conflicts ORDER BY n) FROM decided),
    (SELECT array_agg(delivered ORDER BY n) FROM decided),
    (
        {COPIES}
    ),
    CASE
        WHEN NOT EXISTS (SELECT FROM stored) AND NOT EXISTS (SELECT FROM claimed)
        THEN pg_logical_emit_message(true, 'wonderq', '')
    END
"""
)


class PublishCall(msgspec.Struct, frozen=True):
    """A message for a topic."""

    topic: str
    message: NewMessage


class Published(msgspec.Struct, frozen=True):
    """What became of a message: its id, and how many copies were made of it (of a duplicate, the first time).

    `news` are for those who wait for the copies; one call of a statement has them for all of it.
    """

    id: int
    is_duplicate: bool
    deliveries: int
    news: Sequence[News] = ()


async def publish(connection: Connection, calls: Sequence[PublishCall]) -> list[Published | BrokerError | Again]:
    """Publish the messages of several calls; return for each what became of it, or why nothing did.

    Equal messages under one key are merged; another one under the same key is to be run again, when that is decided.
    """
    results: list[Published | BrokerError | Again] = [AGAIN] * len(calls)
    leaders: dict[tuple[str, str], int] = {}
    followers: list[tuple[int, int]] = []
    sent: list[int] = []
    for number, call in enumerate(calls):
        key = call.message.idempotency_key
        leader = number if key is None else leaders.setdefault((call.topic, key), number)
        if leader == number:
            sent.append(number)
        elif calls[leader].message.body == call.message.body:
            followers.append((number, leader))
    for number, result in zip(sent, await _send(connection, [calls[number] for number in sent]), strict=True):
        results[number] = result
    for number, leader in followers:
        result = results[leader]
        if isinstance(result, Published):
            results[number] = Published(result.id, is_duplicate=True, deliveries=result.deliveries)
        elif isinstance(result, BrokerError):
            results[number] = result.copy()
    return results


async def _send(connection: Connection, calls: Sequence[PublishCall]) -> list[Published | BrokerError | Again]:
    """Publish what is sent; return a result for each."""
    refused, numbers, ids, repeats, conflicts, deliveries, news, _ = await fetch(connection, _PUBLISH, _params(calls))
    results: list[Published | BrokerError | Again] = [AGAIN] * len(calls)
    for number, *refusal in reversed(msgspec.json.decode(refused or b"[]")):
        results[number - 1] = _refusal(calls[number - 1], *refusal)
    _put_off(results)
    told = news_of(news)
    decided = zip(*(values or () for values in (numbers, ids, repeats, conflicts, deliveries)), strict=True)
    for number, message_id, is_duplicate, is_conflict, copies in decided:
        if is_conflict:
            results[number - 1] = IdempotencyConflict(key=calls[number - 1].message.idempotency_key)
        else:
            results[number - 1] = Published(message_id, is_duplicate, copies, told)
            told = []
    return results


def _put_off(results: list[Published | BrokerError | Again]) -> None:
    """Let those be run again for which a queue was full only with the copies of a message that was refused."""
    is_refused = False
    for place, result in enumerate(results):
        if isinstance(result, QueueFull) and is_refused:
            results[place] = AGAIN
        is_refused = is_refused or isinstance(result, BrokerError)


def _refusal(call: PublishCall, refusal: str, queue: str | None, at_most: int | None, given: int) -> BrokerError:
    match refusal:
        case "topic_not_found":
            return TopicNotFound(topic=call.topic)
        case "idempotency_conflict":
            return IdempotencyConflict(key=call.message.idempotency_key)
        case _:
            return refusal_of_queue(refusal, queue or f"of any subscription to {call.topic}", at_most, given)


def refusal_of_queue(refusal: str, queue: str, at_most: int | None, given: int) -> BrokerError:
    """Return the error that says which queue does not take a copy, and why."""
    if refusal == "message_too_large":
        return MessageTooLarge(queue=queue, limit=at_most, given=given)
    return QueueFull(queue=queue, limit=at_most, retry_after=1)


def _params(calls: Sequence[PublishCall]) -> dict[str, Any]:
    topics: dict[str, int] = {}
    targets = [topics.setdefault(call.topic, len(topics) + 1) for call in calls]
    messages = [call.message for call in calls]
    bodies = [message.body.encode() for message in messages]
    hashes = [
        None if message.idempotency_key is None else sha256(body).digest()
        for message, body in zip(messages, bodies, strict=True)
    ]
    return {
        "topics": list(topics),
        "targets": Int4Array(targets),
        "bodies": TextArray(bodies),
        "headers": none_if_all_are([message.headers for message in messages]),
        "senders": senders_of(messages),
        "delays": none_if_all_are([message.delay for message in messages]),
        "ttls": none_if_all_are([message.ttl for message in messages]),
        "keys": none_if_all_are([message.idempotency_key for message in messages]),
        "hashes": none_if_all_are(hashes),
        "window": IDEMPOTENCY_WINDOW,
        "max_message_bytes": MAX_MESSAGE_BYTES,
        "counted_max_messages": COUNTED_MAX_MESSAGES,
    }


def news_of(copies: msgspec.Raw | None) -> list[News]:
    """Return for those who wait what a statement says of the copies that it made."""
    return [News(*each) for each in msgspec.json.decode(copies or b"[]")]
