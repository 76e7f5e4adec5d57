"""Topics: create, list, delete.

A topic's row is read by every publish and written only by these functions. It carries an id from the same sequence as
the queues: what a topic stores, and its idempotency keys, are told from theirs by it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from broker.errors import BrokerError, TopicExists, TopicNotFound
from broker.model import Topic, timestamp
from broker.storage import queues, subscriptions
from broker.storage.database import Connection, Database, confirm

DEFAULT_DELIVERY = "immediate"

_SHOWN = """
    t.name, t.delivery, t.created_at
"""


def _topic(row: tuple[Any, ...]) -> Topic:
    return Topic(row[0], row[1], timestamp(row[2]))


# Two at once with one name: the unique index lets one insert, the other finds the row in the way.
_CREATE = f"""
INSERT INTO broker.topics AS t (name, delivery)
VALUES (%(topic)s, %(delivery)s)
ON CONFLICT (name) WHERE deleted_at IS NULL DO NOTHING
RETURNING {_SHOWN}
"""

_GET = f"""
SELECT {_SHOWN}
FROM broker.topics t
WHERE t.name = %(topic)s AND t.deleted_at IS NULL
"""


async def create(connection: Connection, topic: str, delivery: str | None) -> Topic:
    """Create a topic, or return it where it exists; `delivery` is None where nobody says: then any will do.

    Raises TopicExists where it exists and delivers otherwise.
    """
    params = {"topic": topic, "delivery": delivery or DEFAULT_DELIVERY}
    # A topic that is deleted between the two statements is created in the next round.
    while True:
        row = await (await connection.execute(_CREATE, params)).fetchone()
        if row is not None:
            return _topic(row)
        row = await (await connection.execute(_GET, params)).fetchone()
        if row is not None:
            break
    existing = _topic(row)
    if delivery not in (None, existing.delivery):
        raise TopicExists(topic=topic, delivery=existing.delivery)
    await confirm(connection)
    return existing


# What a topic stores is counted up to 10,000.
_LIST = f"""
SELECT
    {_SHOWN},
    CASE WHEN %(counts)s THEN (SELECT count(*) FROM broker.subscriptions s WHERE s.topic_id = t.id) END,
    CASE WHEN %(counts)s THEN (
        SELECT count(*)
        FROM (
            SELECT
            FROM broker.messages m
            WHERE m.queue_id = t.id AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())
            LIMIT 10000
        ) AS c
    ) END
FROM broker.topics t
WHERE t.deleted_at IS NULL
    AND t.name > %(after)s
    AND starts_with(t.name, %(prefix)s)
    AND t.name >= %(prefix)s
    AND (%(like)s::text[] IS NULL OR t.name LIKE ANY (%(like)s::text[]))
ORDER BY t.name
LIMIT %(limit)s
"""


async def list_by_name(
    connection: Connection,
    prefix: str,
    limit: int,
    after: str | None,
    *,
    counts: bool,
    like: Sequence[str] | None = None,
) -> tuple[list[Topic], str | None]:
    """Return a page of topics, and the name to continue after, None on the last page.

    Only those that are `like` one of these patterns of LIKE, where there are any.
    """
    params = {"prefix": prefix, "limit": limit + 1, "after": after or "", "counts": counts, "like": like}
    found = []
    for *shown, subscribed, messages in await (await connection.execute(_LIST, params)).fetchall():
        topic = _topic(tuple(shown))
        if counts:
            topic.subscriptions, topic.messages = subscribed, messages
        found.append(topic)
    page = found[:limit]
    return page, page[-1].topic if len(found) > limit else None


_DELETE = """
UPDATE broker.topics
SET deleted_at = statement_timestamp()
WHERE name = %(topic)s AND deleted_at IS NULL
RETURNING id
"""

# What was deleted by an earlier, incomplete call, as long as there still are messages.
_DELETED = """
SELECT t.id
FROM broker.topics t
WHERE t.name = %(topic)s AND t.deleted_at IS NOT NULL
    AND EXISTS (SELECT FROM broker.messages m WHERE m.queue_id = t.id)
ORDER BY t.id DESC
LIMIT 1
"""


async def delete(database: Database, topic: str) -> tuple[int, bool]:
    """Delete a topic and its subscriptions: gone for everybody with one commit, then their messages, bit by bit.

    What lies in queues that others made stays. Returns how many messages were removed, and whether all are. Raises
    TopicNotFound, and QueueInUse where somebody sends to the queue of one of the subscriptions.
    """
    deadline = time.monotonic() + database.request_timeout
    ids = await database.write(lambda connection: _delete(connection, topic))
    is_deleted = ids is not None
    if ids is None:
        row = await database.read(lambda connection: _first_row(connection, _DELETED, topic))
        if row is None:
            raise TopicNotFound(topic=topic)
        ids = [row[0]]
    removed = 0
    try:
        for queue_id in ids:
            more, complete = await queues.purge_until(database, queue_id, 2**63 - 1, deadline)
            removed += more
            if not complete:
                return removed, False
    except BrokerError:
        if is_deleted or removed:
            return removed, False  # the topic is gone, whatever became of the messages
        raise
    return removed, True


async def _delete(connection: Connection, topic: str) -> list[int] | None:
    """Delete the rows; return under which ids there may be messages, None where there is no such topic."""
    async with connection.transaction():
        await connection.execute(queues.LOCK_QUEUES)
        row = await _first_row(connection, _DELETE, topic)
        return None if row is None else [row[0], *await subscriptions.delete_of_topic(connection, row[0])]


async def _first_row(connection: Connection, statement: str, topic: str) -> tuple[Any, ...] | None:
    return await (await connection.execute(statement, {"topic": topic})).fetchone()
