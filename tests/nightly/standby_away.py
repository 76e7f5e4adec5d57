"""The only synchronous standby hangs for a minute.

Answers are quick, the broker does not use up the connections of PostgreSQL, and nothing is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from brokers import REQUEST_TIMEOUT, answer, call
from load import Load
from pair import PATIENCE, Pair, folder_for_servers
from parts import Options, Result, Say
from under_load import acknowledged, at_work, judge

PROBES = "probes"
AWAY_SECONDS = 60
QUICK_AWAY_SECONDS = 15
BROKERS = 2
# What `--database-connections` is by default, and what a broker may have beyond.
CONNECTIONS_EACH = 8 + 10
# A deadline, and what a busy machine may add to it.
LATE = 2.5
BACK_SECONDS = 5.0
BASELINE_SECONDS = 5.0
# Again at full rate: a second with so large a share of what there was in one before.
FULL_RATE = 0.9
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'wonderq'"


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    seconds = options.number(AWAY_SECONDS, QUICK_AWAY_SECONDS)
    result = Result(f"standby away for {seconds} s")
    with folder_for_servers() as folder:
        pair = Pair(folder)
        try:
            await pair.start()
            async with (
                at_work(folder, pair.nodes, options.seed, brokers=BROKERS) as (brokers, load),
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
            ):
                await call(http, brokers[0].url, "create_queue", queue=PROBES)
                before = len(acknowledged(load))
                await asyncio.sleep(BASELINE_SECONDS)
                rate = (len(acknowledged(load)) - before) / BASELINE_SECONDS
                prober = Prober(http, [broker.url for broker in brokers])
                async with prober.at_work():
                    pair.standby.pause()
                    away_at = time.monotonic()
                    sessions = 0
                    while time.monotonic() < away_at + seconds:
                        [(number,)] = await pair.primary.query(SESSIONS)
                        sessions = max(sessions, number)
                        await asyncio.sleep(0.2)
                    pair.standby.resume()
                    back_at = time.monotonic()
                    await prober.is_stored()
                    first_seconds = time.monotonic() - back_at
                full_seconds = await until_at_rate(load, FULL_RATE * rate, back_at)
                say(f"back: stored again after {first_seconds:.1f} s, at full rate after {full_seconds:.1f} s")
                await pair.synchronise()
                await pair.primary.kill()
                await pair.fail_over()
                await judge(result, pair.primary, brokers, load)
        finally:
            await pair.close()
    result.figures |= {
        "most_sessions": sessions,
        "slowest_answer_seconds": round(prober.slowest, 2),
        "slowest_refusal_seconds": round(prober.slowest_refusal, 2),
        "told": dict(prober.told),
        "messages_a_second_before": round(rate),
        "stored_again_after_seconds": round(first_seconds, 2),
        "full_rate_after_seconds": round(full_seconds, 2),
    }
    result.expect(sessions <= BROKERS * CONNECTIONS_EACH, f"{sessions} sessions of the server were used")
    result.expect(prober.slowest < REQUEST_TIMEOUT + LATE, f"an answer took {prober.slowest:.1f} s")
    result.expect(prober.slowest_refusal < LATE, f"a refusal took {prober.slowest_refusal:.1f} s")
    result.expect(prober.told["enqueue none"], "no write was refused at once")
    result.expect(prober.reads_failed == 0, f"{prober.reads_failed} reads failed")
    result.expect(first_seconds < BACK_SECONDS + LATE, f"nothing was stored for {first_seconds:.1f} s")
    yield result


class Prober:
    """Clients that write and read all the time, and note what they are told and how soon."""

    def __init__(self, http: aiohttp.ClientSession, urls: list[str]) -> None:
        self._http = http
        self._urls = urls
        self.told: Counter[str] = Counter()
        self.slowest = 0.0
        self.slowest_refusal = 0.0
        self.reads_failed = 0

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._write(url)) for url in self._urls for _ in range(8)]
        tasks += [asyncio.create_task(self._read(url)) for url in self._urls]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def is_stored(self) -> None:
        """Return when one more message has been stored."""
        before = self.told["stored"]
        async with asyncio.timeout(PATIENCE):
            while self.told["stored"] == before:
                await asyncio.sleep(0.01)

    async def _write(self, url: str) -> None:
        while True:
            error, seconds = await self._ask(url, "enqueue", queue=PROBES, body="probe", ttl=1)
            if error is None:
                self.told["stored"] += 1
            else:
                self.told[f"enqueue {error['outcome']}"] += 1
                if "retry_after" in error:
                    self.slowest_refusal = max(self.slowest_refusal, seconds)
            await asyncio.sleep(0.1)

    async def _read(self, url: str) -> None:
        while True:
            error, _ = await self._ask(url, "count_messages")
            self.reads_failed += error is not None
            await asyncio.sleep(0.1)

    async def _ask(self, url: str, method: str, **params: Any) -> tuple[dict[str, Any] | None, float]:
        began_at = time.monotonic()
        answered = await answer(self._http, url, method, **params)
        seconds = time.monotonic() - began_at
        self.slowest = max(self.slowest, seconds)
        return answered["error"]["data"] if "error" in answered else None, seconds


async def until_at_rate(load: Load, rate: float, since: float) -> float:
    """Return after how long producers were acknowledged so many messages within a second."""
    async with asyncio.timeout(PATIENCE):
        while True:
            before, began_at = len(acknowledged(load)), time.monotonic()
            await asyncio.sleep(1)
            if (len(acknowledged(load)) - before) / (time.monotonic() - began_at) >= rate:
                return began_at - since
