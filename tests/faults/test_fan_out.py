"""One publisher, a hundred subscriptions, and a broker that is killed again and again: every copy comes, and no second.

The broker is alone, so whoever calls it meanwhile is refused or cut off; the publisher repeats what it does not know
the outcome of, with the same key.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable

import aiohttp
import pytest

from brokers import call, running_brokers
from history import Acknowledged, Attempted, Failed
from load import Load
from pair import Node, folder_for_servers

SUBSCRIPTIONS = 100
MESSAGES = 1_000
KILLS = 5
TOPIC = "topic"
COPIES = """
SELECT q.name, m.body #>> '{}', m.topic, to_hex(m.published_id)
FROM broker.messages m
JOIN broker.queues q ON q.id = m.queue_id
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [1])
async def test_a_hundred_subscriptions_get_every_message_once_while_the_broker_is_killed(
    seed: int, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(seed)
    with folder_for_servers() as folder:
        node = Node(folder, "single")
        try:
            await node.make()
            await node.start()
            async with running_brokers(folder, [node], 1) as [broker], aiohttp.ClientSession() as http:
                await call(http, broker.url, "create_topic", topic=TOPIC)
                for n in range(SUBSCRIPTIONS):
                    await call(http, broker.url, "create_queue", queue=f"q{n}")
                    await call(http, broker.url, "subscribe", topic=TOPIC, name=f"s{n}", queue=f"q{n}")
                load = Load(folder, [broker.url], seed=seed, lease_seconds=1, queue="default")
                began_at = time.monotonic()
                try:
                    load.start("publish", TOPIC, MESSAGES)
                    for at in sorted(chance.sample(range(MESSAGES), KILLS)):
                        await acknowledged(load, at)
                        await asyncio.sleep(chance.uniform(0, 0.05))
                        await broker.kill()
                        await broker.start()
                    await acknowledged(load, MESSAGES)
                    for publisher in load.living("publish"):
                        await publisher.ended()
                finally:
                    await load.close()
                seconds = time.monotonic() - began_at
                assert load.accidents() + broker.bad_signs() == []
            copies = await node.query(COPIES)
            events = load.events()
        finally:
            await node.close()
    ids = {event.values[0]: event.message_ids[0].lstrip("0") for event in events if isinstance(event, Acknowledged)}
    counted = Counter((queue, value) for queue, value, _, _ in copies)
    sent = [value for event in events if isinstance(event, Attempted) for value in event.values]
    expected = {(f"q{n}", value) for n in range(SUBSCRIPTIONS) for value in sent}
    missing, from_nowhere = expected - counted.keys(), counted.keys() - expected
    double = [copy for copy, times in counted.items() if times > 1]
    failures = Counter(f"{event.type} {event.outcome}" for event in events if isinstance(event, Failed))
    record_property(
        f"{MESSAGES} messages to {SUBSCRIPTIONS} subscriptions, {KILLS} kills of the broker",
        f"{len(copies)} copies, {len(missing)} missing, {len(double)} double, {len(from_nowhere)} from nowhere, in"
        f" {seconds:.1f} s; the publisher was told {dict(failures)}",
    )
    assert len(sent) == len(ids) == MESSAGES
    assert (missing, double, from_nowhere) == (set(), [], set())
    assert len(copies) == MESSAGES * SUBSCRIPTIONS
    assert {(topic, published_id == ids[value]) for _, value, topic, published_id in copies} == {(TOPIC, True)}
    assert {event.deliveries for event in events if isinstance(event, Acknowledged)} == {SUBSCRIPTIONS}
    assert failures, "it has noticed nothing of any kill"


async def acknowledged(load: Load, messages: int) -> None:
    """Return when the publisher has been told of so many."""
    while True:
        if sum(isinstance(event, Acknowledged) for event in load.events()) >= messages:
            return
        assert not load.accidents(), load.accidents()
        await asyncio.sleep(0.02)
