"""Subscriptions: who gets copies of what is published to a topic, and how endpoints fare.

A subscription names a queue that somebody made, or a url: then it has a queue of its own, from which every broker
pushes. That queue is one like any other, with a name, and can be looked into, paused and redriven to; only deleting it
is left to `unsubscribe`.

Who makes or ends subscriptions holds the lock of the table of queues, as those do who delete queues or name a
dead-letter queue: nobody else does any of this meanwhile, and readers are not held up. What brokers note of an endpoint
needs no more than the lock of its row.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from psycopg.types.json import Jsonb

from broker.errors import (
    BrokerError,
    InvalidParams,
    Overloaded,
    QueueNotFound,
    SubscriptionExists,
    SubscriptionNotFound,
    TopicNotFound,
)
from broker.model import Subscription, message_id_of, message_number_of
from broker.storage import queues
from broker.storage.database import Connection, Database, confirm

# Subscriptions of one topic: a publish to as many takes some tenths of a second.
MAX_SUBSCRIPTIONS = 10_000
SECRET_BYTES = 32
# How many secrets of one subscription may count at the same time.
MAX_SECRETS = 10
# The queue of a url takes what any queue could.
QUEUE_OF_A_URL: Mapping[str, Any] = {"max_receives": 10, "max_message_bytes": 2**20}
QUEUE_PREFIX = "push."
MAX_NAME = 128

_SHOWN = """
    s.id, t.name, s.name, q.name, s.url, s.filter, s.state
"""

_FROM = """
FROM broker.subscriptions s
JOIN broker.topics t ON t.id = ANY (ARRAY[s.topic_id])
JOIN broker.queues q ON q.id = ANY (ARRAY[s.queue_id])
"""


def _subscription(row: tuple[Any, ...]) -> Subscription:
    number, *shown = row
    return Subscription(message_id_of(number), *shown)


_TOPIC = """
SELECT t.id, (SELECT count(*) FROM broker.subscriptions s WHERE s.topic_id = t.id)
FROM broker.topics t
WHERE t.name = %(topic)s AND t.deleted_at IS NULL
"""

_EXISTING = f"""
SELECT {_SHOWN}, q.max_receives, (SELECT d.name FROM broker.queues d WHERE d.id = q.dead_letter_queue_id)
{_FROM}
WHERE s.topic_id = %(topic_id)s AND s.name = %(name)s
"""

_SUBSCRIBE = """
INSERT INTO broker.subscriptions (topic_id, queue_id, name, url, filter)
SELECT %(topic_id)s, q.id, %(name)s, %(url)s, %(filter)s
FROM broker.queues q
WHERE q.name = %(queue)s AND q.deleted_at IS NULL
RETURNING id
"""

_NEW_SECRET_ROW = """
INSERT INTO broker.subscription_secrets (subscription_id, secret)
VALUES (%(id)s, %(secret)s)
"""


async def subscribe(
    connection: Connection,
    topic: str,
    name: str,
    *,
    queue: str | None,
    url: str | None,
    filter: Mapping[str, list[str]] | None,  # noqa: A002 - the contract's word
    attributes: Mapping[str, Any],
) -> tuple[Subscription, bytes | None]:
    """Let copies of what is published to a topic go to a queue, or to a url; return the subscription and its secret.

    `attributes` are max_receives and dead_letter_queue, those that are named, for the queue of a url. Where there is a
    subscription of this name it is returned if all that is named is so now; its secret is told once only.

    Raises TopicNotFound, QueueNotFound, SubscriptionExists where something differs, Overloaded where the topic has too
    many, and InvalidParams where dead letters would come back.
    """
    named: dict[str, Any] = {}
    if url is not None:  # a queue that somebody made has its own, whatever null is named here
        named = queues.stored_values({each: value for each, value in attributes.items() if value is not None})
        if attributes.get("dead_letter_queue", ...) is None:
            named["dead_letter_queue"] = None
    async with connection.transaction():
        await connection.execute(queues.LOCK_QUEUES)
        found = await _first_row(connection, _TOPIC, topic=topic)
        if found is None:
            raise TopicNotFound(topic=topic)
        topic_id, count = found
        existing = await _first_row(connection, _EXISTING, topic_id=topic_id, name=name)
        if existing is None:
            if count >= MAX_SUBSCRIPTIONS:
                raise Overloaded(
                    limit=MAX_SUBSCRIPTIONS, what="subscriptions of a topic", retry_after=60, counted_as="subscriptions"
                )
            if url is not None:
                queue = await _create_queue(connection, topic, name, named)
            params = {"topic_id": topic_id, "name": name, "queue": queue, "url": url}
            row = await _first_row(connection, _SUBSCRIBE, **params, filter=None if filter is None else Jsonb(filter))
            if row is None:
                raise QueueNotFound(queue=queue)
            secret = None
            if url is not None:
                secret = os.urandom(SECRET_BYTES)
                await connection.execute(_NEW_SECRET_ROW, {"id": row[0], "secret": secret})
            existing = await _first_row(connection, _EXISTING, topic_id=topic_id, name=name)
            assert existing is not None, "it was inserted"
            return _subscription(existing[:-2]), secret
        *shown, max_receives, dead_letter_queue = existing
    subscription = _subscription(tuple(shown))
    is_now = {
        "queue": None if subscription.url else subscription.queue,
        "url": subscription.url,
        "filter": subscription.filter,
        "max_receives": max_receives,
        "dead_letter_queue": dead_letter_queue,
    }
    asked = {"queue": queue, "url": url, "filter": filter, **named}
    differs = [each for each, value in asked.items() if is_now[each] != value]
    if differs:
        raise SubscriptionExists(topic=topic, name=name, differs=differs[0])
    await confirm(connection)
    return subscription, None


async def _create_queue(connection: Connection, topic: str, name: str, attributes: Mapping[str, Any]) -> str:
    """Create the queue of a url under a name that tells whose it is; return that name."""
    wished = f"{QUEUE_PREFIX}{topic}.{name}"[:MAX_NAME]
    for number in range(1, MAX_SUBSCRIPTIONS + 2):
        queue = wished if number == 1 else f"{wished[: MAX_NAME - 6]}.{number}"
        if await queues.create_row(connection, queue, {**QUEUE_OF_A_URL, **attributes}) is not None:
            return queue
    raise Overloaded(
        limit=MAX_SUBSCRIPTIONS, what=f"queues called {wished}", retry_after=60, counted_as="subscriptions"
    )


_LIST = f"""
SELECT {_SHOWN}
{_FROM}
WHERE s.id > %(after)s AND (%(topic_id)s::int IS NULL OR s.topic_id = %(topic_id)s::int)
    AND (%(like)s::text[] IS NULL OR t.name LIKE ANY (%(like)s::text[]))
ORDER BY s.id
LIMIT %(limit)s
"""


async def list_by_id(
    connection: Connection, topic: str | None, limit: int, after: int, *, like: Sequence[str] | None = None
) -> tuple[list[Subscription], str | None]:
    """Return a page of subscriptions, of all topics where none is named, and the id to continue after, None at the end.

    Only of topics that are `like` one of these patterns of LIKE, where there are any. Raises TopicNotFound.
    """
    topic_id = None
    if topic is not None:
        found = await _first_row(connection, _TOPIC, topic=topic)
        if found is None:
            raise TopicNotFound(topic=topic)
        topic_id = found[0]
    params = {"topic_id": topic_id, "limit": limit + 1, "after": after, "like": like}
    cursor = await connection.execute(_LIST, params)
    listed = [_subscription(row) for row in await cursor.fetchall()]
    page = listed[:limit]
    return page, page[-1].subscription_id if len(listed) > limit else None


_TOPIC_OF = f"""
SELECT t.name
{_FROM}
WHERE s.id = %(id)s
"""


async def topic_of(connection: Connection, subscription_id: str) -> str | None:
    """Return the topic of a subscription, None where there is no such subscription."""
    row = await _first_row(connection, _TOPIC_OF, id=message_number_of(subscription_id))
    return None if row is None else str(row[0])


_UNSUBSCRIBE = """
DELETE FROM broker.subscriptions
WHERE id = %(id)s
RETURNING queue_id, url IS NOT NULL
"""

_UNSUBSCRIBE_ALL = """
DELETE FROM broker.subscriptions
WHERE topic_id = %(topic_id)s
RETURNING queue_id, url IS NOT NULL
"""


async def unsubscribe(database: Database, subscription_id: str) -> int:
    """End a subscription; return how many messages were removed with the queue of its url.

    What is left of them when the time is over is removed in the background. Copies in a queue that somebody made stay
    there. Raises SubscriptionNotFound, and QueueInUse where others send to the queue of the url.
    """
    deadline = time.monotonic() + database.request_timeout
    number = _number_of(subscription_id)

    async def end(connection: Connection) -> list[int]:
        async with connection.transaction():
            await connection.execute(queues.LOCK_QUEUES)
            rows = await (await connection.execute(_UNSUBSCRIBE, {"id": number})).fetchall()
            if not rows:
                raise SubscriptionNotFound(subscription_id=subscription_id)
            return await _delete_queues(connection, rows)

    ids = await database.write(end)
    try:
        return sum([(await queues.purge_until(database, queue_id, 2**63 - 1, deadline))[0] for queue_id in ids])
    except BrokerError:
        return 0  # the subscription is gone, whatever became of its messages


async def delete_of_topic(connection: Connection, topic_id: int) -> list[int]:
    """End all subscriptions of a topic, in the transaction of who deletes it; return the ids of the urls' queues.

    Raises QueueInUse.
    """
    rows = await (await connection.execute(_UNSUBSCRIBE_ALL, {"topic_id": topic_id})).fetchall()
    return await _delete_queues(connection, rows)


async def _delete_queues(connection: Connection, rows: list[tuple[Any, ...]]) -> list[int]:
    ids = [queue_id for queue_id, has_url in rows if has_url]
    if ids:
        await queues.delete_rows(connection, ids)
    return ids


def _number_of(subscription_id: str) -> int:
    number = message_number_of(subscription_id)
    if number is None:
        raise SubscriptionNotFound(subscription_id=subscription_id)
    return number


# Locks: the row of the subscription, so that two at once replace one secret after the other.
_LOCK = """
SELECT
    url IS NOT NULL,
    (SELECT count(*) FROM broker.subscription_secrets c WHERE c.subscription_id = s.id AND c.ends_at > now())
FROM broker.subscriptions s
WHERE id = %(id)s
FOR UPDATE OF s
"""

_RETIRE_SECRETS = """
UPDATE broker.subscription_secrets
SET ends_at = now() + interval '24 hours'
WHERE subscription_id = %(id)s AND ends_at = 'infinity'
"""

_FORGET_SECRETS = """
DELETE FROM broker.subscription_secrets
WHERE subscription_id = %(id)s AND ends_at <= now()
"""


async def rotate_secret(connection: Connection, subscription_id: str) -> bytes:
    """Make a new secret and return it; the one before counts for 24 hours more.

    Raises SubscriptionNotFound, InvalidParams where there is no url, Overloaded where too many count still.
    """
    params = {"id": _number_of(subscription_id)}
    secret = os.urandom(SECRET_BYTES)
    async with connection.transaction():
        row = await _first_row(connection, _LOCK, **params)
        if row is None:
            raise SubscriptionNotFound(subscription_id=subscription_id)
        has_url, secrets = row
        if not has_url:
            raise InvalidParams(
                reason="Only a subscription with a url has a secret; this one sends to a queue.",
                param="subscription_id",
                given=subscription_id,
            )
        if secrets >= MAX_SECRETS:
            raise Overloaded(
                limit=MAX_SECRETS, what="secrets that count at one time", retry_after=3600, counted_as="secrets"
            )
        await connection.execute(_FORGET_SECRETS, params)
        await connection.execute(_RETIRE_SECRETS, params)
        await connection.execute(_NEW_SECRET_ROW, {**params, "secret": secret})
    return secret


class PushTarget(NamedTuple):
    """A url that is pushed to, and the queue from which.

    `paused_for` in seconds, 0 where it is not paused. `secrets` are those that count now, the newest first.
    """

    id: int
    topic: str
    name: str
    queue: str
    url: str
    is_failing: bool
    paused_for: float
    max_receives: int | None
    secrets: list[bytes]


_PUSH_TARGETS = f"""
SELECT
    s.id, t.name, s.name, q.name, s.url, s.state = 'failing',
    coalesce(least(43200, greatest(0, extract(epoch FROM s.paused_until - statement_timestamp()))), 0)::float8,
    q.max_receives,
    ARRAY(
        SELECT c.secret
        FROM broker.subscription_secrets c
        WHERE c.subscription_id = s.id AND c.ends_at > statement_timestamp()
        ORDER BY c.id DESC
    )
{_FROM}
WHERE s.url IS NOT NULL AND s.state <> 'ended'
ORDER BY s.id
"""


async def push_targets(connection: Connection) -> list[PushTarget]:
    """Return every url that is to be pushed to."""
    return [PushTarget(*row) for row in await (await connection.execute(_PUSH_TARGETS)).fetchall()]


# Locks: the rows of the endpoints that it finds due, waiting for none. Two at once: each endpoint is found by one, and
# who comes second sees the new time. A time too far away is from before the clock was set back.
_CLAIM_PROBES = """
WITH due AS MATERIALIZED (
    SELECT s.id
    FROM broker.subscriptions s
    WHERE s.url IS NOT NULL AND s.state <> 'ended' AND s.state = 'failing'
        AND s.probe_at NOT BETWEEN statement_timestamp()
            AND statement_timestamp() + 2 * %(every_seconds)s::float8 * interval '1 second'
        AND coalesce(s.paused_until, '-infinity') <= statement_timestamp()
        AND EXISTS (
            SELECT
            FROM unnest(ARRAY[0, 1]) AS l (number)
            CROSS JOIN LATERAL (
                SELECT
                FROM broker.messages m
                WHERE (m.queue_id * 4::bigint + m.lane) = s.queue_id * 4::bigint + l.number AND m.lane >= 0
                    AND m.visible_at <= statement_timestamp()
                    AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())
                ORDER BY m.visible_at, m.id
                LIMIT 1
            ) AS ready
        )
    FOR UPDATE OF s SKIP LOCKED
)
UPDATE broker.subscriptions s
SET probe_at = statement_timestamp() + %(every_seconds)s::float8 * interval '1 second'
FROM due d
WHERE s.id = d.id
RETURNING s.id
"""


async def claim_probes(connection: Connection, every_seconds: float) -> list[int]:
    """Return the ids of failing endpoints that are to be tried now, by this broker alone.

    Each of them has a message that is ready, is not paused, and is found due once in so many seconds.
    """
    cursor = await connection.execute(_CLAIM_PROBES, {"every_seconds": every_seconds})
    return [number for (number,) in await cursor.fetchall()]


_NOTE_FAILING = """
UPDATE broker.subscriptions
SET state = 'failing', probe_at = statement_timestamp() + %(seconds)s::float8 * interval '1 second'
WHERE id = %(id)s AND state = 'active' AND url IS NOT NULL
"""

_NOTE_ACTIVE = """
UPDATE broker.subscriptions
SET state = 'active', probe_at = NULL
WHERE id = %(id)s AND state = 'failing'
"""

_PAUSE = """
UPDATE broker.subscriptions
SET paused_until = greatest(paused_until, statement_timestamp() + %(seconds)s::float8 * interval '1 second')
WHERE id = %(id)s AND url IS NOT NULL
"""

_END = """
UPDATE broker.subscriptions
SET state = 'ended', probe_at = NULL
WHERE id = %(id)s AND url IS NOT NULL
"""


async def note_failing(connection: Connection, subscription_id: int, probe_in_seconds: float) -> None:
    """An endpoint has failed too often: from now on it is only probed."""
    await connection.execute(_NOTE_FAILING, {"id": subscription_id, "seconds": probe_in_seconds})


async def note_active(connection: Connection, subscription_id: int) -> None:
    """An endpoint that was failing has taken a message."""
    await connection.execute(_NOTE_ACTIVE, {"id": subscription_id})


async def pause(connection: Connection, subscription_id: int, seconds: float) -> None:
    """An endpoint wants to be left alone for so long; a longer pause that it has asked for before stays."""
    await connection.execute(_PAUSE, {"id": subscription_id, "seconds": seconds})


async def end(connection: Connection, subscription_id: int) -> None:
    """An endpoint wants no more: no copies are made for it, and the sweeper takes what lies in its queue."""
    await connection.execute(_END, {"id": subscription_id})


_STATES = """
SELECT state, count(*)
FROM broker.subscriptions
WHERE id > 0
GROUP BY state
"""


async def count_states(connection: Connection) -> dict[str, int]:
    """Return how many subscriptions are in each state."""
    return dict(await (await connection.execute(_STATES)).fetchall())


async def _first_row(connection: Connection, statement: str, **params: Any) -> tuple[Any, ...] | None:
    return await (await connection.execute(statement, params)).fetchone()
