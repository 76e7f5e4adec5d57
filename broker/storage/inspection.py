"""Looking inside: list, show, and change single messages. Nothing here leases anything.

A message that has expired and is held by nobody is invisible here too, swept or not.
"""

from __future__ import annotations

from typing import Any

import msgspec

from broker.errors import (
    BrokerError,
    LeaseLost,
    MessageLeased,
    MessageNotFound,
    MessageTooLarge,
    QueueNotFound,
)
from broker.model import (
    MAX_BODY_BYTES_PER_ANSWER,
    Lease,
    StoredMessage,
    message_id_of,
    message_number_of,
    timestamp,
    timestamp_or_null,
)
from broker.storage.database import Connection, confirm
from broker.storage.messages import IS_ALIVE

_SHOWN = """
    m.id, m.body, m.headers, m.sender, m.receive_count, m.enqueued_at, m.first_received_at, m.visible_at,
    m.expires_at, m.dead_letter, m.topic, m.published_id,
    CASE
        WHEN m.visible_at <= statement_timestamp() THEN 'ready'
        WHEN m.lane = 0 THEN 'delayed'
        ELSE 'leased'
    END AS status
"""

SHOWN_COLUMNS = 13

# By message id, which is the order of the primary key; a page ends after 8 MiB of bodies.
_LIST = (
    """
WITH queue AS MATERIALIZED (
    SELECT id FROM broker.queues WHERE name = %(queue)s AND deleted_at IS NULL
),
page AS MATERIALIZED (
    SELECT """
    + _SHOWN
    + """,
        sum(m.body_bytes) OVER (ORDER BY m.id) AS bytes_so_far,
        row_number() OVER (ORDER BY m.id) AS n,
        count(*) OVER () AS found
    FROM (
        SELECT m.*
        FROM broker.messages m
        WHERE m.queue_id = (SELECT id FROM queue)
            AND m.id > %(after)s
            AND """
    + IS_ALIVE
    + """
            AND (
                %(status)s::text IS NULL
                OR (%(status)s::text = 'ready' AND m.visible_at <= statement_timestamp())
                OR (%(status)s::text = 'delayed' AND m.visible_at > statement_timestamp() AND m.lane = 0)
                OR (%(status)s::text = 'leased' AND m.visible_at > statement_timestamp() AND m.lane > 0)
            )
        ORDER BY m.id
        LIMIT %(limit)s
    ) AS m
)
SELECT p.*
FROM queue q
LEFT JOIN page p ON p.n = 1 OR p.bytes_so_far <= %(max_bytes)s
ORDER BY p.id
"""
)


def _stored_message(queue: str, row: tuple[Any, ...]) -> StoredMessage:
    (
        number, body, headers, sender, receive_count, enqueued, first_received, visible, expires, dead_letter, topic,
        published_id, status,
    ) = row  # fmt: skip
    message = StoredMessage(
        message_id=message_id_of(number),
        queue=queue,
        status=status,
        body=body,
        headers=headers or msgspec.Raw(b"{}"),
        sender=sender,
        receive_count=receive_count,
        enqueued_at=timestamp(enqueued),
        first_received_at=timestamp_or_null(first_received),
        visible_at=timestamp(visible),
        expires_at=timestamp_or_null(expires),
        dead_letter=dead_letter,
    )
    if published_id is not None:
        message.topic, message.published_id = topic, message_id_of(published_id)
    return message


async def list_by_id(
    connection: Connection, queue: str, status: str | None, limit: int, after: int
) -> tuple[list[StoredMessage], str | None]:
    """Return a page of messages by id, and the id to continue after, None on the last page.

    Raises QueueNotFound.
    """
    cursor = await connection.execute(
        _LIST,
        {
            "queue": queue,
            "status": status,
            "limit": limit + 1,
            "after": after,
            "max_bytes": MAX_BODY_BYTES_PER_ANSWER,
        },
    )
    rows = await cursor.fetchall()
    if not rows:
        raise QueueNotFound(queue=queue)
    messages = [_stored_message(queue, row[:SHOWN_COLUMNS]) for row in rows if row[0] is not None]
    page = messages[:limit]
    # One row more than was asked for is looked up, and a page may end early by its bytes.
    has_more = bool(page) and rows[0][-1] > len(page)
    return page, page[-1].message_id if has_more else None


_GET = (
    """
WITH queue AS MATERIALIZED (
    SELECT id FROM broker.queues WHERE name = %(queue)s AND deleted_at IS NULL
)
SELECT """
    + _SHOWN
    + """
FROM queue q
LEFT JOIN broker.messages m ON m.queue_id = q.id AND m.id = %(id)s AND """
    + IS_ALIVE
    + """
"""
)


async def get(connection: Connection, queue: str, message_id: str) -> StoredMessage:
    """Return one message. Raises QueueNotFound and MessageNotFound."""
    params = {"queue": queue, "id": message_number_of(message_id)}
    row = await (await connection.execute(_GET, params)).fetchone()
    if row is None:
        raise QueueNotFound(queue=queue)
    if row[0] is None:
        raise MessageNotFound(queue=queue, message_id=message_id)
    return _stored_message(queue, row)


# Locks: the one row, waiting for it. Two at once, or with a dequeue: who comes second sees the lease that the
# first has taken, and is refused.
_LOCKED = (
    """
WITH queue AS MATERIALIZED (
    SELECT id, max_message_bytes FROM broker.queues WHERE name = %(queue)s AND deleted_at IS NULL
),
locked AS MATERIALIZED (
    SELECT
        m.queue_id, m.id,
        m.lane > 0 AND m.visible_at > statement_timestamp() AS is_held,
        (m.queue_id, m.id, uuid_send(m.lease_token))
            = (%(receipt_queue_id)s::int, %(receipt_id)s::bigint, %(token)s::bytea) AS is_holder
    FROM broker.messages m
    WHERE m.queue_id = (SELECT id FROM queue) AND m.id = %(id)s::bigint AND """
    + IS_ALIVE
    + """
    FOR UPDATE
),
"""
)

_MAY_CHANGE = "CASE WHEN %(token)s::bytea IS NULL THEN NOT l.is_held ELSE l.is_holder END"

_UPDATE = (
    _LOCKED
    + """
changed AS (
    UPDATE broker.messages m
    SET
        body = coalesce(%(body)s::json, m.body),
        body_bytes = coalesce(octet_length(%(body)s::text), m.body_bytes),
        headers = CASE WHEN %(changes_headers)s THEN %(headers)s::json ELSE m.headers END
    FROM locked l
    CROSS JOIN queue q
    WHERE m.queue_id = ANY (ARRAY[l.queue_id]) AND m.id = l.id
        AND """
    + _MAY_CHANGE
    + """
        AND coalesce(octet_length(%(body)s::text) BETWEEN 1 AND q.max_message_bytes, true)
    RETURNING """
    + _SHOWN
    + """
)
SELECT l.id IS NOT NULL, l.is_held, coalesce(l.is_holder, false), q.max_message_bytes, c.*
FROM queue q
LEFT JOIN locked l ON true
LEFT JOIN changed c ON true
"""
)


async def update(
    connection: Connection,
    queue: str,
    message_id: str,
    lease: Lease | None,
    body: str | None,
    headers: str | None,
    *,
    changes_headers: bool,
) -> StoredMessage:
    """Change a message's body (None: not) and, where `changes_headers`, its headers; return it.

    Raises QueueNotFound, MessageNotFound, MessageTooLarge, and MessageLeased or LeaseLost where somebody
    else holds it.
    """
    row = await _change(
        connection,
        _UPDATE,
        queue,
        message_id,
        lease,
        {"body": body, "headers": headers, "changes_headers": changes_headers},
    )
    exists, is_held, is_holder, max_message_bytes, *message = row
    if not exists:
        raise MessageNotFound(queue=queue, message_id=message_id)
    if message[0] is not None:
        return _stored_message(queue, tuple(message))
    refused = _refusal(message_id, lease, is_held=is_held, is_holder=is_holder)
    if refused:
        raise refused
    raise MessageTooLarge(queue=queue, limit=max_message_bytes, given=len((body or "").encode()))


_DELETE = (
    _LOCKED
    + """
deleted AS (
    DELETE FROM broker.messages m
    USING locked l
    WHERE m.queue_id = ANY (ARRAY[l.queue_id]) AND m.id = l.id
        AND """
    + _MAY_CHANGE
    + """
    RETURNING m.id
)
SELECT l.id IS NOT NULL, l.is_held, coalesce(l.is_holder, false), d.id
FROM queue q
LEFT JOIN locked l ON true
LEFT JOIN deleted d ON true
"""
)


async def delete(connection: Connection, queue: str, message_id: str, lease: Lease | None) -> bool:
    """Delete a message by its id; return False where it is already gone.

    Raises QueueNotFound, and MessageLeased or LeaseLost where somebody else holds it.
    """
    row = await _change(connection, _DELETE, queue, message_id, lease, {})
    exists, is_held, is_holder, deleted_id = row
    if exists and deleted_id is None:
        refused = _refusal(message_id, lease, is_held=is_held, is_holder=is_holder)
        if refused:
            raise refused
    if deleted_id is None:
        await confirm(connection)
    return deleted_id is not None


async def _change(
    connection: Connection,
    statement: str,
    queue: str,
    message_id: str,
    lease: Lease | None,
    params: dict[str, Any],
) -> tuple[Any, ...]:
    cursor = await connection.execute(
        statement,
        {
            "queue": queue,
            "id": message_number_of(message_id),
            "receipt_queue_id": lease and lease.queue_id,
            "receipt_id": lease and lease.id,
            "token": lease and lease.token,
            **params,
        },
    )
    row = await cursor.fetchone()
    if row is None:
        raise QueueNotFound(queue=queue)
    return row


def _refusal(message_id: str, lease: Lease | None, *, is_held: bool, is_holder: bool) -> BrokerError | None:
    """Return why the caller may not change the message, None where it may."""
    if lease is None:
        return MessageLeased(message_id=message_id) if is_held else None
    return None if is_holder else LeaseLost()
