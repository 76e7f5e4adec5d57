"""The primary dies under load and its standby takes over; and controls, which must lose something."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from brokers import Deployment, answer, call, running_deployment
from history import Verdict, check
from load import Load
from soak import QUEUE, drain

FAILOVERS = 5
LEASE_SECONDS = 3.0
PROBES = "probes"


@pytest.mark.timeout(900)
async def test_nothing_is_lost_when_the_standby_takes_over(record_property: Callable[[str, object], None]) -> None:
    async with running_deployment() as deployment, aiohttp.ClientSession() as http:
        load = Load(deployment.folder, deployment.urls, seed=1, lease_seconds=LEASE_SECONDS, queue=QUEUE)
        await call(http, deployment.urls[0], "create_queue", queue=PROBES)
        seconds = []
        try:
            for what in ("produce", "consume") * 3:
                load.start(what)
            for turn in range(FAILOVERS):
                await load.works()
                await deployment.pair.primary.kill()
                began_at = time.monotonic()
                await deployment.pair.fail_over()
                await first_acknowledged(http, deployment, turn)
                seconds.append(round(time.monotonic() - began_at, 2))
                await load.works()
                await deployment.pair.rejoin()
            drain_seconds, left = await drain(deployment, load)
        finally:
            await load.close()
        verdict = check(load.events())
        record_property(
            f"{FAILOVERS} failovers",
            f"{verdict.acknowledged} acknowledged, {len(verdict.lost)} lost, first acknowledged after {seconds} s,"
            f" drained in {drain_seconds:.1f} s",
        )
        assert verdict.violations == {}, json.dumps(verdict.summary(), indent=1)
        assert verdict.failures
        assert left == 0
        assert deployment.bad_signs() + load.accidents() == []


async def first_acknowledged(http: aiohttp.ClientSession, deployment: Deployment, turn: int) -> None:
    """Return when a broker has acknowledged a message that was sent now."""
    probe: dict[str, Any] = {"queue": PROBES, "body": turn, "idempotency_key": str(turn)}
    async with asyncio.timeout(60):
        while "error" in await answer(http, deployment.urls[turn % 2], "enqueue", **probe):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("is_synchronous", [True, False])
async def test_what_only_the_dead_primary_had_was_acknowledged_only_where_nobody_waits_for_the_standby(
    is_synchronous: bool, record_property: Callable[[str, object], None]
) -> None:
    """The standby hangs, then the primary dies, then the standby takes over.

    The asynchronous one is the control: it shows that messages which are lost are missed.
    """
    verdict = await lose_the_primary_while_the_standby_hangs(is_synchronous=is_synchronous)
    name = "synchronous" if is_synchronous else "asynchronous"
    record_property(
        f"primary dies, standby is behind, {name}", f"{verdict.acknowledged} acknowledged, {len(verdict.lost)} lost"
    )
    assert list(verdict.violations) == ([] if is_synchronous else ["lost"])


async def lose_the_primary_while_the_standby_hangs(*, is_synchronous: bool) -> Verdict:
    async with running_deployment() as deployment:
        pair = deployment.pair
        load = Load(deployment.folder, deployment.urls, seed=1, lease_seconds=LEASE_SECONDS, queue=QUEUE)
        try:
            for _ in range(3):
                load.start("produce")
            await load.works()
            if not is_synchronous:
                await pair.run_asynchronously()
            pair.standby.pause()
            if is_synchronous:
                waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
                async with asyncio.timeout(60):
                    while not await pair.primary.query(waits):
                        await asyncio.sleep(0.01)
            else:
                await load.works()
            await pair.primary.kill()
            await pair.standby.kill()  # or it would read what its system has received
            await pair.standby.start()
            await pair.fail_over()
            await pair.rejoin()
            load.start("consume")
            await drain(deployment, load)
        finally:
            await load.close()
        assert load.accidents() == []
        return check(load.events())
