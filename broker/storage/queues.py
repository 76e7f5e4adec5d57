"""Queues: create, change, show, empty, delete.

A queue's row is read by every enqueue and dequeue and written only by these functions: nothing on the way
of a message updates it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from psycopg import sql

from broker.errors import BrokerError, InvalidParams, QueueExists, QueueInUse, QueueNotFound
from broker.model import Queue, number, timestamp
from broker.storage import statistics
from broker.storage.database import Connection, Database, confirm, time_left

# Messages that one transaction of a purge removes: some hundred milliseconds on a slow disk.
PURGE_BATCH = 5_000

# What an attribute is when nobody says; null in a call means this.
DEFAULTS: Mapping[str, Any] = {
    "visibility_timeout": 30.0,
    "message_ttl": None,
    "delay": 0.0,
    "max_message_bytes": 4096,
    "max_receives": None,
    "dead_letter_queue": None,
    "idempotency_window": 300.0,
    "max_messages": None,
    "paused": False,
}

_SHOWN = """
    q.name, q.visibility_timeout, q.message_ttl, q.delay, q.max_message_bytes, q.max_receives,
    (SELECT t.name FROM broker.queues t WHERE t.id = q.dead_letter_queue_id),
    q.idempotency_window, q.max_messages, q.paused, q.created_at, q.updated_at
"""


def _queue(row: tuple[Any, ...]) -> Queue:
    (
        name, visibility_timeout, ttl, delay, max_bytes, max_receives, dead_letter_queue, window, max_messages, paused,
        created, updated,
    ) = row  # fmt: skip
    return Queue(
        queue=name,
        visibility_timeout=number(visibility_timeout),
        message_ttl=None if ttl is None else number(ttl),
        delay=number(delay),
        max_message_bytes=max_bytes,
        max_receives=max_receives,
        dead_letter_queue=dead_letter_queue,
        idempotency_window=number(window),
        max_messages=max_messages,
        paused=paused,
        created_at=timestamp(created),
        updated_at=timestamp(updated),
    )


# Two at once with one name: the unique index lets one insert, the other finds the row in the way.
_CREATE = f"""
INSERT INTO broker.queues AS q (
    name, visibility_timeout, message_ttl, delay, max_message_bytes, max_receives, dead_letter_queue_id,
    idempotency_window, max_messages, paused
)
VALUES (
    %(queue)s, %(visibility_timeout)s, %(message_ttl)s, %(delay)s, %(max_message_bytes)s, %(max_receives)s,
    %(dead_letter_queue_id)s, %(idempotency_window)s, %(max_messages)s, %(paused)s
)
ON CONFLICT (name) WHERE deleted_at IS NULL DO NOTHING
RETURNING {_SHOWN}
"""

_GET = f"""
SELECT {_SHOWN}
FROM broker.queues q
WHERE q.name = %(queue)s AND q.deleted_at IS NULL
"""

# Who names a target, and who deletes a queue, does it alone: no other queue is created, changed or deleted meanwhile,
# so the target lives, nobody comes to name a queue that is being deleted, and no two changes close a circle together.
# Readers are not held up, and nothing on the way of a message does more than read.
LOCK_QUEUES = """
LOCK TABLE broker.queues IN SHARE ROW EXCLUSIVE MODE
"""

# The queues that a queue's dead letters can come to, one after the other, it being the first.
_TARGETS = """
WITH RECURSIVE target AS (
    SELECT id, name, dead_letter_queue_id
    FROM broker.queues
    WHERE name = %(queue)s AND deleted_at IS NULL
    UNION
    SELECT q.id, q.name, q.dead_letter_queue_id
    FROM target t
    JOIN broker.queues q ON q.id = t.dead_letter_queue_id AND q.deleted_at IS NULL
)
SELECT id, name
FROM target
"""


async def create(connection: Connection, queue: str, attributes: Mapping[str, Any]) -> Queue:
    """Create a queue, or return it where it exists and the named attributes have these values.

    Raises QueueExists where one of them differs, QueueNotFound where there is no such `dead_letter_queue`, and
    InvalidParams where that is the queue itself.
    """
    named = stored_values(attributes)
    # A queue that is deleted between the two statements is created in the next round.
    while True:
        async with connection.transaction():
            created = await create_row(connection, queue, named)
        if created is not None:
            return created
        row = await (await connection.execute(_GET, {"queue": queue})).fetchone()
        if row is not None:
            break
    existing = _queue(row)
    differs = [name for name, value in named.items() if getattr(existing, name) != value]
    if differs:
        raise QueueExists(queue=queue, differs=differs[0])
    await confirm(connection)
    return existing


async def create_row(connection: Connection, queue: str, named: Mapping[str, Any]) -> Queue | None:
    """Create a queue, in the transaction of the caller; return None where there is one of this name."""
    values = {**DEFAULTS, **named}
    values["dead_letter_queue_id"] = await _lock_target(connection, queue, values)
    row = await (await connection.execute(_CREATE, {"queue": queue, **values})).fetchone()
    return None if row is None else _queue(row)


async def _lock_target(connection: Connection, queue: str, values: Mapping[str, Any]) -> int | None:
    """Return the id of the dead-letter queue that is named, if one is; let nobody change queues meanwhile.

    Raises QueueNotFound, and InvalidParams where its dead letters would come back to `queue`.
    """
    target = values.get("dead_letter_queue")
    if target is None:
        return None
    await connection.execute(LOCK_QUEUES)
    targets = await (await connection.execute(_TARGETS, {"queue": target})).fetchall()
    names = [name for _, name in targets]
    if queue in [target, *names]:
        raise InvalidParams(
            reason=f"`dead_letter_queue` must not lead back to {queue}: {' → '.join([queue, *(names or [target])])}.",
            param="dead_letter_queue",
            given=target,
        )
    if not targets:
        raise QueueNotFound(queue=target)
    target_id: int = targets[0][0]
    return target_id


def stored_values(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is written for these attributes: null stands for the default."""
    return {
        name: DEFAULTS[name] if value is None else value
        for name, value in attributes.items()
        if value is not msgspec.UNSET
    }


_UPDATE = f"""
UPDATE broker.queues q
SET {{changes}}, updated_at = statement_timestamp()
WHERE q.name = %(queue)s AND q.deleted_at IS NULL
RETURNING {_SHOWN}
"""

# Where fewer deliveries are permitted than before: see dead_letters.py.
_LOWERED = """
    max_receives_lowered_at = CASE
        WHEN %(max_receives)s::int < coalesce(q.max_receives, 2147483647) THEN statement_timestamp()
        ELSE q.max_receives_lowered_at
    END
"""


async def update(connection: Connection, queue: str, attributes: Mapping[str, Any]) -> Queue:
    """Change the named attributes; return the queue.

    Raises QueueNotFound, also where there is no such `dead_letter_queue`, and InvalidParams where the queue's dead
    letters would come back to it.
    """
    named = stored_values(attributes)
    if not named:
        return await get(connection, queue)
    async with connection.transaction():
        if "dead_letter_queue" in named:
            named["dead_letter_queue_id"] = await _lock_target(connection, queue, named)
            del named["dead_letter_queue"]
        changes: list[sql.Composable] = [
            sql.SQL("{} = {}").format(sql.Identifier(name), sql.Placeholder(name)) for name in named
        ]
        if "max_receives" in named:
            changes.append(sql.SQL(_LOWERED))
        statement = sql.SQL(_UPDATE).format(changes=sql.SQL(", ").join(changes))
        row = await (await connection.execute(statement, {"queue": queue, **named})).fetchone()
    if row is None:
        raise QueueNotFound(queue=queue)
    return _queue(row)


async def get(connection: Connection, queue: str) -> Queue:
    """Return a queue without its counts. Raises QueueNotFound."""
    row = await (await connection.execute(_GET, {"queue": queue})).fetchone()
    if row is None:
        raise QueueNotFound(queue=queue)
    return _queue(row)


# The names of a prefix are a range of the index: COLLATE "C" orders them by their bytes.
def _list(more: str = "") -> str:
    return f"""
SELECT {_SHOWN}
FROM broker.queues q
WHERE q.deleted_at IS NULL
    AND q.name > %(after)s
    AND starts_with(q.name, %(prefix)s)
    AND q.name >= %(prefix)s
    AND (%(like)s::text[] IS NULL OR q.name LIKE ANY (%(like)s::text[])){more}
ORDER BY q.name
LIMIT %(limit)s
"""


_LIST = _list()

# The targets first, from the index of those who name them: to look for each queue whether somebody names it takes a
# look into that index for every queue that there is.
_LIST_DEAD_LETTER_QUEUES = _list(
    """
    AND q.id = ANY (ARRAY(
        SELECT DISTINCT o.dead_letter_queue_id
        FROM broker.queues o
        WHERE o.deleted_at IS NULL AND o.dead_letter_queue_id IS NOT NULL
    ))"""
)


async def list_by_name(
    connection: Connection,
    prefix: str,
    limit: int,
    after: str | None,
    *,
    like: Sequence[str] | None = None,
    are_targets: bool = False,
) -> tuple[list[Queue], str | None]:
    """Return a page of queues, and the name to continue after, None on the last page.

    Only those that are `like` one of these patterns of LIKE, where there are any, and, with `are_targets`, that
    another queue has as its dead_letter_queue.
    """
    params = {"prefix": prefix, "limit": limit + 1, "after": after or "", "like": like}
    cursor = await connection.execute(_LIST_DEAD_LETTER_QUEUES if are_targets else _LIST, params)
    queues = [_queue(row) for row in await cursor.fetchall()]
    page = queues[:limit]
    return page, page[-1].queue if len(queues) > limit else None


_COUNT = """
SELECT count(*) FROM broker.queues WHERE deleted_at IS NULL
"""


async def count(connection: Connection) -> int:
    """Return how many queues there are."""
    row = await (await connection.execute(_COUNT)).fetchone()
    assert row is not None, "an aggregate returns one row"
    return int(row[0])


_NAMES = """
SELECT id, name FROM broker.queues WHERE id = ANY (%(ids)s::int[])
"""


async def names_of(connection: Connection, ids: Sequence[int]) -> dict[int, str]:
    """Return the names of queues, also of those that were deleted and are not forgotten yet."""
    return dict(await (await connection.execute(_NAMES, {"ids": ids})).fetchall())


_NEWEST_MESSAGE = """
SELECT q.id, (SELECT max(m.id) FROM broker.messages m WHERE m.queue_id = q.id)
FROM broker.queues q
WHERE q.name = %(queue)s AND q.deleted_at IS NULL
"""

# Locks: the rows of a batch in the order of the primary key, waiting for each, as delete does.
_PURGE = """
WITH batch AS MATERIALIZED (
    SELECT queue_id, id
    FROM broker.messages
    WHERE queue_id = %(queue_id)s AND id <= %(newest)s
    ORDER BY queue_id, id
    LIMIT %(batch)s
    FOR UPDATE
)
DELETE FROM broker.messages m
USING batch b
WHERE m.queue_id = ANY (ARRAY[b.queue_id]) AND m.id = b.id
"""


# What the sweeper counted before is not so any more; until it counts anew the queue is taken for empty.
_FORGET_SIZE = """
DELETE FROM broker.queue_sizes
WHERE queue_id = %(queue_id)s
"""


async def purge(database: Database, queue: str) -> tuple[int, bool]:
    """Remove the messages that a queue holds now, leased and delayed ones too.

    Works in transactions of 5,000 until it is done or its time is over; returns how many were removed, and
    whether it is done. Raises QueueNotFound.
    """
    deadline = time.monotonic() + database.request_timeout
    row = await database.read(lambda connection: _first_row(connection, _NEWEST_MESSAGE, queue))
    if row is None:
        raise QueueNotFound(queue=queue)
    queue_id, newest = row
    if newest is None:
        await database.write(confirm)
        return 0, True
    purged, complete = await purge_until(database, queue_id, newest, deadline)
    try:
        await database.write(
            lambda connection: connection.execute(_FORGET_SIZE, {"queue_id": queue_id}), timeout=time_left(deadline)
        )
    except BrokerError:
        if not purged:
            raise
        return purged, False  # what was purged is, whatever became of this
    return purged, complete


async def purge_until(database: Database, queue_id: int, newest: int, deadline: float) -> tuple[int, bool]:
    """Remove a queue's messages up to an id, in transactions of 5,000; return how many, and whether that is all.

    Leaves a share of the request's time for the answer.
    """
    stop_at = deadline - database.request_timeout * 0.4
    purged = 0
    while True:
        try:
            removed = await database.write(
                lambda connection: purge_batch(connection, queue_id, newest), timeout=time_left(deadline)
            )
        except BrokerError as error:
            # What is committed is counted, or a repeated call would not say how many there were.
            if purged and error.retryable:
                return purged, False
            raise
        purged += removed
        if removed < PURGE_BATCH:
            return purged, True
        if time.monotonic() > stop_at:
            return purged, False


async def purge_batch(connection: Connection, queue_id: int, newest: int = 2**63 - 1, batch: int = PURGE_BATCH) -> int:
    """Remove up to `batch` messages of a queue; return how many."""
    cursor = await connection.execute(_PURGE, {"queue_id": queue_id, "newest": newest, "batch": batch})
    return cursor.rowcount


async def _first_row(connection: Connection, statement: str, queue: str) -> tuple[Any, ...] | None:
    return await (await connection.execute(statement, {"queue": queue})).fetchone()


_ID = """
SELECT id FROM broker.queues WHERE name = %(queue)s AND deleted_at IS NULL
"""

_DELETE = """
UPDATE broker.queues
SET deleted_at = statement_timestamp(), updated_at = statement_timestamp(), dead_letter_queue_id = NULL
WHERE id = ANY (%(ids)s::int[])
"""

# Who sends to these queues, and is none of them.
_SENDERS = """
SELECT q.name, o.name, NULL
FROM broker.queues q
JOIN broker.queues o ON o.dead_letter_queue_id = q.id AND o.deleted_at IS NULL
WHERE q.id = ANY (%(ids)s::int[]) AND o.id <> ALL (%(ids)s::int[])
UNION ALL
SELECT q.name, s.name, t.name
FROM broker.queues q
JOIN broker.subscriptions s ON s.queue_id = q.id
JOIN broker.topics t ON t.id = s.topic_id
WHERE q.id = ANY (%(ids)s::int[])
ORDER BY 1, 2
LIMIT 1
"""

# A queue that was deleted by an earlier, incomplete call, as long as it still has messages.
_DELETED = """
SELECT q.id
FROM broker.queues q
WHERE q.name = %(queue)s AND q.deleted_at IS NOT NULL
    AND EXISTS (SELECT FROM broker.messages m WHERE m.queue_id = q.id)
ORDER BY q.id DESC
LIMIT 1
"""


async def delete(database: Database, queue: str) -> tuple[int, bool]:
    """Delete a queue: gone for everybody with one update, then its messages in bounded transactions.

    Returns how many messages were removed, and whether all are. Raises QueueNotFound, and QueueInUse for
    the queue `default` and for one that is another's dead_letter_queue.
    """
    if queue == "default":
        raise QueueInUse(queue=queue, reason="it always exists; empty it with purge_queue")
    deadline = time.monotonic() + database.request_timeout
    row = await database.write(lambda connection: _delete(connection, queue))
    is_deleted = row is not None
    if row is None:
        row = await database.read(lambda connection: _first_row(connection, _DELETED, queue))
    if row is None:
        raise QueueNotFound(queue=queue)
    try:
        return await purge_until(database, row[0], 2**63 - 1, deadline)
    except BrokerError:
        if is_deleted:
            return 0, False  # the queue is gone, whatever became of its messages
        raise


async def _delete(connection: Connection, queue: str) -> tuple[int] | None:
    async with connection.transaction():
        await connection.execute(LOCK_QUEUES)
        row = await _first_row(connection, _ID, queue)
        if row is None:
            return None
        await delete_rows(connection, [row[0]])
        return (row[0],)


async def delete_rows(connection: Connection, ids: Sequence[int]) -> None:
    """Let queues be gone, in the transaction of a caller who has locked the table. Raises QueueInUse."""
    row = await (await connection.execute(_SENDERS, {"ids": ids})).fetchone()
    if row is not None:
        queue, sender, topic = row
        reason = f"it is the dead_letter_queue of {sender}; name another one there with update_queue"
        if topic is not None:
            reason = f"the subscription {sender} of the topic {topic} sends to it; unsubscribe that first"
        raise QueueInUse(queue=queue, reason=reason, senders=[sender if topic is None else topic])
    await connection.execute(_DELETE, {"ids": ids})
    await statistics.forget_queues(connection, ids)
