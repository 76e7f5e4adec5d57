"""What the holder of a lease can do: delete the message, extend the lease, give the message back.

How statements lock, and why they are written as they are, stands at the head of `messages.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from broker.errors import BrokerError, LeaseLost
from broker.model import Lease
from broker.storage.database import Connection

# Locks: the rows of the receipts, in the order of the primary key, waiting for each. Two at once with the
# same receipt: the second waits, then finds the row gone. With a dequeue that has just leased the row anew:
# the token is read after the lock is taken, so the old receipt has lost. The queue is read without a lock:
# deleting a queue makes its messages gone at once, whether their rows are removed yet or not.
_DELETE = """
WITH wanted AS MATERIALIZED (
    SELECT n, queue_id, id, token
    FROM unnest(%(queue_ids)s::int[], %(ids)s::bigint[], %(tokens)s::uuid[])
        WITH ORDINALITY AS w (queue_id, id, token, n)
),
locked AS MATERIALIZED (
    SELECT
        w.n, m.queue_id, m.id,
        m.lease_token IS NOT DISTINCT FROM w.token AS is_newest,
        coalesce(greatest(m.expires_at, m.visible_at) <= statement_timestamp(), false)
            AND m.expires_at IS NOT NULL AS is_expired
    FROM wanted w
    JOIN broker.queues q ON q.id = ANY (ARRAY[w.queue_id]) AND q.deleted_at IS NULL
    JOIN broker.messages m ON m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
    ORDER BY w.queue_id, w.id
    FOR UPDATE OF m
),
deleted AS (
    DELETE FROM broker.messages m
    USING locked l
    WHERE m.queue_id = ANY (ARRAY[l.queue_id]) AND m.id = l.id AND l.is_newest
)
SELECT n, is_newest, is_expired
FROM locked
"""


async def delete(connection: Connection, leases: Sequence[Lease]) -> list[bool | BrokerError]:
    """Delete the messages of these leases; return True, False where it is already gone, or LeaseLost.

    A lease that stands in the list again is False there: its first mention has deleted the message.
    """
    first_mention = {lease: n for n, lease in reversed(list(enumerate(leases)))}
    results: list[bool | BrokerError] = [False] * len(leases)
    for lease, is_newest, is_expired in await _for_leases(connection, _DELETE, list(first_mention)):
        if is_newest or is_expired:
            results[first_mention[lease]] = not is_expired
        else:
            results[first_mention[lease]] = LeaseLost()
    return results


# Locks and two at once: as delete. A lease that has ended is not extended, even when nobody has taken the
# message yet: somebody may be about to.
_EXTEND = """
WITH wanted AS MATERIALIZED (
    SELECT n, queue_id, id, token
    FROM unnest(%(queue_ids)s::int[], %(ids)s::bigint[], %(tokens)s::uuid[])
        WITH ORDINALITY AS w (queue_id, id, token, n)
),
locked AS MATERIALIZED (
    SELECT w.n, m.queue_id, m.id, q.name
    FROM wanted w
    JOIN broker.queues q ON q.id = ANY (ARRAY[w.queue_id]) AND q.deleted_at IS NULL
    JOIN broker.messages m ON m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
    WHERE m.lease_token = w.token AND m.visible_at > statement_timestamp()
    ORDER BY w.queue_id, w.id
    FOR UPDATE OF m
),
extended AS (
    UPDATE broker.messages m
    SET visible_at = statement_timestamp() + %(visibility_timeout)s::float8 * interval '1 second'
    FROM locked l
    WHERE m.queue_id = ANY (ARRAY[l.queue_id]) AND m.id = l.id
    RETURNING l.n, m.visible_at, l.name
)
SELECT n, visible_at, name
FROM extended
"""


@dataclass(frozen=True)
class Extended:
    """The new end of a lease, and the queue that its message lies in."""

    visible_at: datetime
    queue: str


async def extend(
    connection: Connection, leases: Sequence[Lease], visibility_timeout: float
) -> list[Extended | BrokerError]:
    """Let these leases end `visibility_timeout` seconds from now; 0 gives the messages back at once."""
    extended = {
        lease: Extended(visible_at, queue)
        for lease, visible_at, queue in await _for_leases(
            connection, _EXTEND, list(dict.fromkeys(leases)), visibility_timeout=visibility_timeout
        )
    }
    return [extended.get(lease) or LeaseLost() for lease in leases]


# Locks: as delete. A lease that was taken anew meanwhile is left alone. The message stays in the lane of the
# returned ones, stamped with the present, so that it is among the next to be handed out.
_GIVE_BACK = """
WITH wanted AS MATERIALIZED (
    SELECT n, queue_id, id, token
    FROM unnest(%(queue_ids)s::int[], %(ids)s::bigint[], %(tokens)s::uuid[])
        WITH ORDINALITY AS w (queue_id, id, token, n)
),
locked AS MATERIALIZED (
    SELECT w.n, m.queue_id, m.id
    FROM wanted w
    JOIN broker.messages m ON m.queue_id = ANY (ARRAY[w.queue_id]) AND m.id = w.id
    WHERE m.lease_token = w.token
    ORDER BY w.queue_id, w.id
    FOR UPDATE OF m
)
UPDATE broker.messages m
SET
    visible_at = statement_timestamp(),
    lease_token = NULL,
    receive_count = m.receive_count - 1,
    first_received_at = CASE WHEN m.receive_count > 1 THEN m.first_received_at END
FROM locked l
WHERE m.queue_id = ANY (ARRAY[l.queue_id]) AND m.id = l.id
RETURNING l.n
"""


async def give_back(connection: Connection, leases: Sequence[Lease]) -> int:
    """Undo deliveries that nobody heard of, `receive_count` included; return how many were undone."""
    return len(await _for_leases(connection, _GIVE_BACK, leases))


async def _for_leases(
    connection: Connection, statement: str, leases: Sequence[Lease], **params: Any
) -> list[tuple[Any, ...]]:
    """Run a statement over distinct leases; return its rows with the lease in place of its number."""
    if not leases:
        return []
    tokens: list[UUID] = [lease.token for lease in leases]
    cursor = await connection.execute(
        statement,
        {
            "queue_ids": [lease.queue_id for lease in leases],
            "ids": [lease.id for lease in leases],
            "tokens": tokens,
            **params,
        },
    )
    return [(leases[n - 1], *row) for n, *row in await cursor.fetchall()]
