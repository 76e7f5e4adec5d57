"""Brokers that are killed or told to stop while clients use them."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from typing import Any

import aiohttp
import pytest

from brokers import Deployment, answer, call, running_deployment
from history import Failed, check
from load import Load
from soak import QUEUE, drain

KILLS = 20
LEASE_SECONDS = 3.0
STOP_SECONDS = 10.0


@pytest.mark.timeout(900)
async def test_nothing_is_lost_when_one_of_two_brokers_is_killed_again_and_again(
    record_property: Callable[[str, object], None],
) -> None:
    async with running_deployment() as deployment:
        load = Load(deployment.folder, deployment.urls, seed=1, lease_seconds=LEASE_SECONDS, queue=QUEUE)
        try:
            for what in ("produce", "consume") * 3:
                load.start(what)
            for broker in itertools.islice(itertools.cycle(deployment.brokers), KILLS):
                await load.works()
                await broker.kill()
                await load.works()  # with the other one
                await broker.start()
            drain_seconds, left = await drain(deployment, load)
        finally:
            await load.close()
        events = load.events()
        verdict = check(events)
        slowest = max(event.seconds for event in events if isinstance(event, Failed))
        record_property(
            f"{KILLS} brokers killed",
            f"{verdict.acknowledged} acknowledged, {len(verdict.lost)} lost, the slowest enqueue took"
            f" {verdict.slowest_enqueue_seconds:.2f} s, the slowest failure {slowest:.2f} s, drained in"
            f" {drain_seconds:.1f} s",
        )
        assert verdict.violations == {}, json.dumps(verdict.summary(), indent=1)
        assert verdict.failures
        assert left == 0
        assert deployment.bad_signs() + load.accidents() == []


async def test_what_a_killed_broker_had_leased_for_somebody_comes_back_after_the_lease(
    record_property: Callable[[str, object], None],
) -> None:
    """The database has leased the message, and the answer has not reached the broker when that dies."""
    async with running_deployment() as deployment, aiohttp.ClientSession() as http:
        killed, other = deployment.brokers
        await call(http, other.url, "enqueue", body="x")
        to_primary = killed.proxies[deployment.pair.nodes.index(deployment.pair.primary)]
        cut = to_primary.cut("/* dequeue */", hangs=True)
        lease = {"visibility_timeout": LEASE_SECONDS}
        taking = asyncio.create_task(answer(http, killed.url, "dequeue", **lease))
        await asyncio.wait_for(cut.happened.wait(), 60)
        leased = "SELECT visible_at FROM broker.messages WHERE receive_count = 1"
        [(ended_at,)] = await deployment.pair.primary.query(leased)
        assert not taking.done()
        await killed.kill()
        with pytest.raises(aiohttp.ClientError):
            await taking
        [message] = (await call(http, other.url, "dequeue", wait=60, **lease))["messages"]
        late = (datetime.fromisoformat(message["visible_at"]) - ended_at).total_seconds() - LEASE_SECONDS
        record_property("leased by a broker that was killed", f"came back {late:.2f} s after the lease")
        assert (message["body"], message["receive_count"]) == ("x", 2)
        assert late >= 0


async def test_no_call_under_way_fails_when_a_broker_is_told_to_stop() -> None:
    """The database is slow to answer, so that there are calls of every kind under way."""
    async with running_deployment() as deployment:
        broker = deployment.brokers[0]
        for proxy in broker.proxies:
            proxy.delay(0.05)
        done: Counter[str] = Counter()
        clients = [asyncio.create_task(live(deployment, n, done)) for n in range(20)]
        async with asyncio.timeout(120):
            while min(done[method] for method in ("enqueue", "dequeue", "delete", "extend_visibility")) < 20:
                await asyncio.sleep(0.01)
        began_at = time.monotonic()
        broker.terminate()
        assert await broker.ended() == 0
        assert time.monotonic() - began_at < STOP_SECONDS
        assert set(await asyncio.gather(*clients)) <= {"refused", "could not connect"}
        assert deployment.bad_signs() == []


async def live(deployment: Deployment, number: int, done: Counter[str]) -> str:
    """Enqueue, dequeue, extend and delete until the broker is gone; return how it said so."""
    url = deployment.brokers[0].url
    async with aiohttp.ClientSession() as http:
        receipt = None
        for method in itertools.cycle(["enqueue", "dequeue", "extend_visibility", "delete"]):
            all_params: dict[str, dict[str, Any]] = {
                "enqueue": {"body": number},
                "dequeue": {"wait": 0.5},
                "extend_visibility": {"receipt": receipt, "visibility_timeout": 30},
                "delete": {"receipt": receipt},
            }
            params = all_params[method]
            if "receipt" in params and receipt is None:
                continue
            try:
                answered = await answer(http, url, method, **params)
            except aiohttp.ClientConnectorError:
                return "could not connect"
            if "error" in answered:
                assert answered["error"]["data"]["outcome"] == "none", answered
                assert answered["id"] is None, answered  # it was refused as an HTTP request
                return "refused"
            done[method] += 1
            if method == "dequeue":
                messages = answered["result"]["messages"]
                receipt = messages[0]["receipt"] if messages else None
    raise AssertionError("the methods never end")
