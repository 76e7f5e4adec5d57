"""A publish, a broadcast, and whoever comes or goes at the same time: in every order, as in `test_isolation.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

import pytest

from broker.errors import BrokerError
from broker.model import Lease, NewMessage
from broker.storage import broadcasting, publishing, queues, subscriptions, sweeps, topics
from broker.storage.database import Connection
from broker.storage.group_commit import AGAIN
from broker.storage.publishing import PublishCall, Published
from steps import Case
from test_isolation import (
    BATCH,
    TABLES,
    Call,
    Scene,
    check_every_order,
    connections,
    delete_queue,
    enumerate_sorted,
    on,
    said,
    send,
    taken,
    told,
)

__all__ = ["connections"]  # a fixture


def topic_scene(
    *, delivery: str = "immediate", messages: int = 0, is_subscribed: bool = True
) -> Callable[[Connection], Awaitable[Scene]]:
    """Return what sets a scene: a topic `topic` and a queue `work`, subscribed or not; the topic stores messages."""

    async def setup(connection: Connection) -> Scene:
        for table in TABLES:
            await connection.execute(f"DELETE FROM broker.{table}")
        await queues.create(connection, "work", {})
        await topics.create(connection, "topic", delivery)
        subscription = await subscribed(connection) if is_subscribed else ""
        for n in range(messages):
            await published(connection, str(n))
        return Scene([], Lease(0, 0, b""), subscription)

    return setup


async def published(connection: Connection, body: str, key: str | None = None) -> Published:
    call = PublishCall("topic", NewMessage(body, None, None, None, None, key))
    while True:
        (result,) = await publishing.publish(connection, [call])
        if result is not AGAIN:
            break
    if isinstance(result, BrokerError):
        raise result
    assert isinstance(result, Published)
    return result


def publish(body: str, key: str | None = None) -> Call:
    async def call(connection: Connection, scene: Scene) -> str:
        try:
            result = await published(connection, body, key)
        except BrokerError as error:
            return error.type
        return f"{'again' if result.is_duplicate else 'published'}, copies: {result.deliveries}"

    return call


async def broadcast(connection: Connection, scene: Scene) -> str:
    """In one transaction, and without the broadcast's own word that it is complete."""
    try:
        given = await broadcasting.broadcast(on(connection), "topic")
    except BrokerError as error:
        return error.type
    return f"gave out {given.messages} in {given.deliveries}"


async def subscribed(connection: Connection) -> str:
    subscription, _ = await subscriptions.subscribe(
        connection, "topic", "s", queue="work", url=None, filter=None, attributes={}
    )
    return subscription.subscription_id


async def subscribe(connection: Connection, scene: Scene) -> str:
    return await said(subscribed(connection), "subscribed")


async def unsubscribe(connection: Connection, scene: Scene) -> str:
    return await said(subscriptions.unsubscribe(on(connection), scene.subscription), "unsubscribed")


async def create_topic(connection: Connection, scene: Scene) -> str:
    return await said(topics.create(connection, "topic", None), "created")


async def delete_topic(connection: Connection, scene: Scene) -> str:
    return await said(topics.delete(on(connection), "topic"), "deleted the topic")


async def swept(connection: Connection, scene: Scene, results: Mapping[str, str]) -> str:
    """Say what each was told, then what lies anywhere, also in the topic, when the sweeper has been there."""
    await sweeps.remove_deleted(connection, BATCH)
    cursor = await connection.execute(
        "SELECT coalesce(q.name, t.name), count(*) FROM broker.messages m"
        " LEFT JOIN broker.queues q ON q.id = m.queue_id LEFT JOIN broker.topics t ON t.id = m.queue_id"
        " GROUP BY 1 ORDER BY 1"
    )
    left = [f"{count} in {name}" for name, count in await cursor.fetchall()]
    return "; ".join([*results.values(), ", ".join(left) or "nothing left"])


CASES: dict[str, Case[Scene]] = {
    "publish / publish with the same key": Case(
        topic_scene(),
        {"one": publish("1", "k"), "two": publish("1", "k"), "three": publish("1", "k")},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"again, copies: 1; again, copies: 1; published, copies: 1; 1 in work": "one message, whoever comes first"},
    ),
    "publish / publish with the same key and another body": Case(
        topic_scene(),
        {"one": publish("1", "k"), "two": publish("2", "k")},
        lambda connection, scene, results: told(connection, scene, dict(enumerate_sorted(results))),
        {"idempotency_conflict; published, copies: 1; 1 in work": "the key is the first one's"},
    ),
    "publish / publish with the same key, stored until a broadcast": Case(
        topic_scene(delivery="on_broadcast"),
        {"one": publish("1", "k"), "two": publish("1", "k")},
        lambda connection, scene, results: swept(connection, scene, dict(enumerate_sorted(results))),
        {"again, copies: 0; published, copies: 0; 1 in topic": "one message, whoever comes first"},
    ),
    "publish / enqueue with the same key": Case(
        topic_scene(),
        {"publish": publish("1", "k"), "enqueue": send("2", key="k")},
        told,
        {"published, copies: 1; stored; 2 in work": "a topic's keys are its own"},
    ),
    "publish / unsubscribe": Case(
        topic_scene(),
        {"publish": publish("1"), "unsubscribe": unsubscribe},
        swept,
        {
            "published, copies: 1; unsubscribed; 1 in work": "published while it was there, and copies stay",
            "published, copies: 0; unsubscribed; nothing left": "nobody was there any more",
        },
    ),
    "publish / subscribe": Case(
        topic_scene(is_subscribed=False),
        {"publish": publish("1"), "subscribe": subscribe},
        swept,
        {
            "published, copies: 1; subscribed; 1 in work": "it was there already",
            "published, copies: 0; subscribed; nothing left": "it gets what is published from then on",
        },
    ),
    "publish / delete the topic": Case(
        topic_scene(),
        {"publish": publish("1", "k"), "delete": delete_topic},
        swept,
        {
            "published, copies: 1; deleted the topic; 1 in work": "published before, and copies stay",
            "topic_not_found; deleted the topic; nothing left": "there was no topic any more",
        },
    ),
    "publish / delete the topic, stored until a broadcast": Case(
        topic_scene(delivery="on_broadcast"),
        {"publish": publish("1", "k"), "delete": delete_topic},
        swept,
        {
            "published, copies: 0; deleted the topic; nothing left": "stored before, and gone with it",
            "topic_not_found; deleted the topic; nothing left": "there was no topic any more",
        },
    ),
    "publish / unsubscribe / delete the queue": Case(
        topic_scene(),
        {"publish": publish("1"), "unsubscribe": unsubscribe, "delete": delete_queue("work")},
        swept,
        {
            "published, copies: 1; unsubscribed; deleted the queue; nothing left": "published, and gone with the queue",
            "published, copies: 1; unsubscribed; queue_in_use; 1 in work": "the queue was subscribed still",
            "published, copies: 0; unsubscribed; deleted the queue; nothing left": "nobody was there any more",
            "published, copies: 0; unsubscribed; queue_in_use; nothing left": "so too; the queue was subscribed still",
        },
    ),
    "broadcast / broadcast": Case(
        topic_scene(delivery="on_broadcast", messages=2),
        {"one": broadcast, "two": broadcast},
        lambda connection, scene, results: swept(connection, scene, dict(enumerate_sorted(results))),
        {"gave out 0 in 0; gave out 2 in 2; 2 in work": "each message is given out once"},
    ),
    "broadcast / publish": Case(
        topic_scene(delivery="on_broadcast", messages=1),
        {"broadcast": broadcast, "publish": publish("1")},
        swept,
        {
            "gave out 2 in 2; published, copies: 0; 2 in work": "it was stored by then",
            "gave out 1 in 1; published, copies: 0; 1 in topic, 1 in work": "it is for the next broadcast",
        },
    ),
    "broadcast / unsubscribe": Case(
        topic_scene(delivery="on_broadcast", messages=2),
        {"broadcast": broadcast, "unsubscribe": unsubscribe},
        swept,
        {
            "gave out 2 in 2; unsubscribed; 2 in work": "it was there still, and copies stay",
            "gave out 2 in 0; unsubscribed; nothing left": "given to nobody, and gone",
        },
    ),
    "broadcast / unsubscribe / delete the queue": Case(
        topic_scene(delivery="on_broadcast", messages=1),
        {"broadcast": broadcast, "unsubscribe": unsubscribe, "delete": delete_queue("work")},
        swept,
        {
            "gave out 1 in 1; unsubscribed; deleted the queue; nothing left": "given out, and gone with the queue",
            "gave out 1 in 1; unsubscribed; queue_in_use; 1 in work": "the queue was subscribed still",
            "gave out 1 in 0; unsubscribed; deleted the queue; nothing left": "given to nobody, and gone",
            "gave out 1 in 0; unsubscribed; queue_in_use; nothing left": "so too; the queue was subscribed still",
        },
    ),
    "broadcast / subscribe": Case(
        topic_scene(delivery="on_broadcast", messages=1, is_subscribed=False),
        {"broadcast": broadcast, "subscribe": subscribe},
        swept,
        {
            "gave out 1 in 1; subscribed; 1 in work": "it gets also what was stored before",
            "gave out 1 in 0; subscribed; nothing left": "it was not there yet",
        },
    ),
    "broadcast / delete the topic": Case(
        topic_scene(delivery="on_broadcast", messages=2),
        {"broadcast": broadcast, "delete": delete_topic},
        swept,
        {
            "gave out 0 in 0; deleted the topic; nothing left": "they were about to go with the topic",
            "gave out 2 in 2; deleted the topic; 2 in work": "given out before, and copies stay",
            "topic_not_found; deleted the topic; nothing left": "there was no topic any more",
        },
    ),
    "subscribe / delete the queue": Case(
        topic_scene(is_subscribed=False),
        {"subscribe": subscribe, "delete": delete_queue("work")},
        told,
        {
            "subscribed; queue_in_use; nothing left": "a subscription sends to it",
            "queue_not_found; deleted the queue; nothing left": "it is no more",
        },
    ),
    "subscribe / delete the topic": Case(
        topic_scene(is_subscribed=False),
        {"subscribe": subscribe, "delete": delete_topic},
        told,
        {
            "subscribed; deleted the topic; nothing left": "it went with the topic",
            "topic_not_found; deleted the topic; nothing left": "there was no topic any more",
        },
    ),
    "unsubscribe / unsubscribe": Case(
        topic_scene(),
        {"one": unsubscribe, "two": unsubscribe},
        taken,
        {"subscription_not_found, unsubscribed": "for the second it is gone"},
    ),
    "create a topic / the same": Case(
        topic_scene(),
        {"one": create_topic, "two": create_topic},
        taken,
        {"created, created": "both get the same"},
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_every_order_of_calls_at_once_comes_to_something_that_the_contract_permits(
    connections: list[Connection], name: str
) -> None:
    await check_every_order(connections, CASES[name])
