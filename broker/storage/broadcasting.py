"""A topic gives out what it has stored: broadcast.

What was published to a topic that delivers on broadcast lies under the topic's own id. Each message is given out in one
transaction: the stored row goes where its copies come.

Why the statements are written as they are stands in `messages.py`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from broker.errors import BrokerError, InvalidParams, TopicNotFound
from broker.storage.database import Connection, Database, confirm, one_line, time_left
from broker.storage.notifications import News
from broker.storage.publishing import COPIES, MATCHING, news_of, refusal_of_queue
from broker.storage.storing import COUNTED_MAX_MESSAGES, SIZE, fetch

# Copies that one transaction makes, unless a single message has more; and messages that it takes.
COPIES_IN_A_BATCH = 5_000
MESSAGES_IN_A_BATCH = 500

_BOUNDS = """
SELECT
    t.id, t.delivery,
    coalesce((SELECT max(m.id) FROM broker.messages m WHERE m.queue_id = t.id), 0),
    (SELECT count(*) FROM broker.subscriptions s WHERE s.topic_id = t.id AND s.state <> 'ended')
FROM broker.topics t
WHERE t.name = %(topic)s AND t.deleted_at IS NULL
"""

_STORED = """
FROM broker.messages m
WHERE m.queue_id = %(topic_id)s::int AND m.id > %(after)s::bigint AND m.id <= %(newest)s::bigint
    AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())
"""

# Locks: the rows it picks, waiting for none; then none but those of the copies that it inserts. Two at once: each
# message is taken by one. A message goes where its copies come, in one transaction, so it is there either before or
# after, whatever breaks off in between; and a message that a queue does not take stays, with all that come after it.
_BROADCAST = one_line(
    f"""
/* broadcast */
WITH picked AS MATERIALIZED (
    SELECT m.queue_id AS topic_id, m.id, m.body_bytes, m.headers::text::jsonb AS header_values
    {_STORED}
    ORDER BY m.id
    LIMIT %(batch)s
    FOR UPDATE SKIP LOCKED
),
limited AS MATERIALIZED (
    SELECT i.id AS message_id, i.body_bytes, m.*
    FROM picked i
    CROSS JOIN LATERAL (SELECT q.id, q.name, q.max_messages, q.max_message_bytes {MATCHING}) AS m
    WHERE m.max_messages IS NOT NULL OR i.body_bytes > m.max_message_bytes
),
sizes AS MATERIALIZED (
    SELECT q.id, coalesce({SIZE}, 0) AS size
    FROM (SELECT DISTINCT id, max_messages FROM limited WHERE max_messages IS NOT NULL) AS q
),
refused AS MATERIALIZED (
    SELECT *
    FROM (
        SELECT message_id, 'message_too_large' AS refusal, name, max_message_bytes::bigint AS at_most, body_bytes
        FROM limited
        WHERE body_bytes > max_message_bytes
        UNION ALL
        SELECT l.message_id, 'queue_full', l.name, l.max_messages, 0
        FROM (SELECT *, row_number() OVER (PARTITION BY id ORDER BY message_id) AS place FROM limited) AS l
        JOIN sizes z ON z.id = l.id
        WHERE z.size + l.place > l.max_messages
    ) AS r
    ORDER BY message_id
    LIMIT 1
),
stamp AS MATERIALIZED (
    SELECT CASE WHEN pg_current_xact_id() IS NOT NULL THEN clock_timestamp() END AS now
    FROM picked
    LIMIT 1
),
taken AS (
    DELETE FROM broker.messages m
    USING picked p
    WHERE m.queue_id = ANY (ARRAY[p.topic_id]) AND m.id = p.id
        AND p.id < coalesce((SELECT message_id FROM refused), 9223372036854775807)
    RETURNING
        p.topic_id, p.header_values, m.id, m.enqueued_at, m.visible_at, m.expires_at, m.body_bytes, m.sender, m.headers,
        m.body
),
stored AS (
    INSERT INTO broker.messages (
        queue_id, id, enqueued_at, visible_at, expires_at, body_bytes, lane, sender, headers, body, topic, published_id
    )
    SELECT
        c.queue_id, nextval('broker.message_ids'), n.now,
        CASE
            WHEN i.visible_at > i.enqueued_at THEN greatest(i.visible_at, n.now)
            ELSE n.now + c.delay * interval '1 second'
        END,
        coalesce(i.expires_at, n.now + c.message_ttl * interval '1 second'),
        i.body_bytes, 0, i.sender, i.headers, i.body, %(topic)s::text, i.id
    FROM (SELECT * FROM taken ORDER BY id) AS i
    CROSS JOIN stamp n
    CROSS JOIN LATERAL (SELECT s.queue_id, q.delay, q.message_ttl {MATCHING}) AS c
    RETURNING queue_id, visible_at
)
SELECT
    (SELECT count(*) FROM taken),
    (SELECT max(id) FROM taken),
    (SELECT json_build_array(refusal, name, at_most, body_bytes) FROM refused),
    (
        {COPIES}
    )
"""
)

_HAS_MORE = f"""
SELECT EXISTS (SELECT {_STORED})
"""


@dataclass(frozen=True)
class Broadcast:
    """How many stored messages were given out, and what for those who wait for the copies; whether none is left."""

    messages: int
    news: Sequence[News]
    complete: bool

    @property
    def deliveries(self) -> int:
        return sum(each.messages for each in self.news)


async def broadcast(database: Database, topic: str) -> Broadcast:
    """Give every message that a topic has stored by now to each subscription that wants it, oldest first.

    Works in transactions until it is done or its time is over. Raises TopicNotFound; InvalidParams where the topic
    stores nothing; and QueueFull or MessageTooLarge where a queue does not take the first message that is left.
    """
    deadline = time.monotonic() + database.request_timeout
    stop_at = deadline - database.request_timeout * 0.4
    row = await database.read(lambda connection: _first_row(connection, _BOUNDS, {"topic": topic}))
    if row is None:
        raise TopicNotFound(topic=topic)
    topic_id, delivery, newest, subscriptions = row
    if delivery != "on_broadcast":
        raise InvalidParams(
            reason=f"The topic {topic} delivers at once, so nothing is stored to broadcast; only topics that were"
            " created with `delivery` on_broadcast store.",
            param="topic",
            given=topic,
        )
    batch = max(1, min(MESSAGES_IN_A_BATCH, COPIES_IN_A_BATCH // max(1, subscriptions)))
    messages = 0
    news: list[News] = []
    after = -1
    while time.monotonic() < stop_at:
        work = partial(broadcast_batch, topic_id=topic_id, topic=topic, batch=batch, after=after, newest=newest)
        try:
            taken, last, told, refusal = await database.write(work, timeout=time_left(deadline))
        except BrokerError as error:
            # What is committed is counted, or a repeated call would not say how much there was.
            if messages and error.retryable:
                break
            raise
        messages += taken
        news += told
        if refusal is not None and not messages:
            raise refusal
        if refusal is not None or not taken:
            break
        after = last
    try:
        if not messages:
            await database.write(confirm, timeout=time_left(deadline))
        params = {"topic_id": topic_id, "after": -1, "newest": newest}  # from -1: what was locked for a moment
        more = await database.read(
            lambda connection: _first_row(connection, _HAS_MORE, params), timeout=time_left(deadline)
        )
    except BrokerError:
        if not messages:
            raise
        return Broadcast(messages, news, complete=False)  # what was given out is, whatever became of the question
    return Broadcast(messages, news, complete=more == (False,))


async def broadcast_batch(
    connection: Connection, topic_id: int, topic: str, batch: int, after: int = -1, newest: int = 2**63 - 1
) -> tuple[int, int, list[News], BrokerError | None]:
    """Give out up to `batch` stored messages.

    Returns how many, the last one's id, news of the copies, and why the next one could not be, if it could not.
    """
    params = {
        "topic_id": topic_id,
        "topic": topic,
        "batch": batch,
        "after": after,
        "newest": newest,
        "counted_max_messages": COUNTED_MAX_MESSAGES,
    }
    taken, last, refused, news = await fetch(connection, _BROADCAST, params)
    refusal = None if refused is None else refusal_of_queue(*msgspec.json.decode(refused))
    return taken, after if last is None else last, news_of(news), refusal


async def _first_row(connection: Connection, statement: str, params: dict[str, Any]) -> tuple[Any, ...] | None:
    return await (await connection.execute(statement, params)).fetchone()
