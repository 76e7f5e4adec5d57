"""Batches of every kind at once, by eight workers who share few messages: no deadlock reaches a client."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from brokers import answer, call, running_brokers
from pair import Node, folder_for_servers
from parts import Options, Result, Say

MINUTES = 10
WORKERS = 8
BROKERS = 2
QUEUES = ("one", "two", "dead")
KEYS = 50
SAY_EVERY_SECONDS = 60.0
# What a call may be answered where others are quicker.
EXPECTED = {"lease_lost", "message_not_found", "message_leased", "idempotency_conflict", "queue_full"}


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    seconds = 60.0 * options.number(MINUTES, 1)
    result = Result(f"{WORKERS} workers for {seconds:.0f} s")
    with folder_for_servers() as folder:
        node = Node(folder, "single")
        # A deadlock is found, and counted, before anybody's patience ends.
        node.settings = {"deadlock_timeout": "100ms"}
        try:
            await node.make()
            await node.start()
            async with (
                running_brokers(folder, [node], BROKERS) as brokers,
                aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
            ):
                await call(http, brokers[0].url, "create_queue", queue="dead")
                for queue in QUEUES[:2]:
                    about = {"max_receives": 5, "dead_letter_queue": "dead", "max_messages": 5000}
                    await call(http, brokers[0].url, "create_queue", queue=queue, idempotency_window=1, **about)
                urls = [broker.url for broker in brokers]
                receipts: list[str] = []
                workers = [Worker(http, urls, random.Random(f"{options.seed} {n}"), receipts) for n in range(WORKERS)]
                until = time.monotonic() + seconds
                tasks = [asyncio.create_task(worker.work(until)) for worker in workers]
                while time.monotonic() < until:
                    await asyncio.wait(tasks, timeout=SAY_EVERY_SECONDS)
                    say(f"{sum(worker.calls.total() for worker in workers)} calls")
                await asyncio.gather(*tasks)
                signs = [sign for broker in brokers for sign in broker.bad_signs()]
            calls = sum((worker.calls for worker in workers), Counter[str]())
            errors = sum((worker.errors for worker in workers), Counter[str]())
            result.figures = {
                "calls": calls.total(),
                "deadlocks_in_postgresql": node.log.read_text().count("deadlock detected"),
                "by_method": dict(calls),
                "errors": dict(errors),
            }
            result.violations += signs
            # Three attempts hide most deadlocks from clients; but rows are locked in one order, so there are none.
            result.expect(not result.figures["deadlocks_in_postgresql"], "PostgreSQL has found deadlocks")
            result.violations += [f"{count} times {name}" for name, count in errors.items() if name not in EXPECTED]
        finally:
            await node.close()
    yield result


class Worker:
    """A client that does whatever comes to its mind, to messages that others hold too."""

    def __init__(self, http: aiohttp.ClientSession, urls: list[str], rng: random.Random, receipts: list[str]) -> None:
        self._http = http
        self._urls = urls
        self._random = rng
        # All workers share them.
        self._receipts = receipts
        self.calls: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()

    async def work(self, until: float) -> None:
        acts = (
            [self._enqueue] * 4
            + [self._dequeue] * 4
            + [self._delete] * 4
            + [self._extend] * 3
            + [self._purge, self._redrive, self._update]
        )
        while time.monotonic() < until:
            await self._random.choice(acts)()

    async def _enqueue(self) -> None:
        size = self._random.randint(1, 50)
        messages: list[dict[str, Any]] = [{"body": n} for n in range(size)]
        for message in messages[:: self._random.choice([1, 3])]:
            key = self._random.randrange(KEYS)
            message |= {"body": key, "idempotency_key": f"key {key}"}
        await self._call("enqueue_batch", queue=self._queue(), messages=messages)

    async def _dequeue(self) -> None:
        result = await self._call(
            "dequeue", queue=self._queue(), max_messages=self._random.randint(1, 100), visibility_timeout=2
        )
        self._receipts.extend(message["receipt"] for message in (result or {}).get("messages", []))
        del self._receipts[:-2000]

    async def _delete(self) -> None:
        if receipts := self._some_receipts():
            await self._each("delete_batch", receipts=receipts)

    async def _extend(self) -> None:
        if receipts := self._some_receipts():
            seconds = self._random.choice([0, 1, 3])
            await self._each("extend_visibility_batch", receipts=receipts, visibility_timeout=seconds)

    async def _purge(self) -> None:
        if self._random.random() < 0.1:
            await self._call("purge_queue", queue=self._queue())

    async def _redrive(self) -> None:
        await self._call("redrive", queue="dead", max_messages=100)

    async def _update(self) -> None:
        await self._call("update_queue", queue=self._random.choice(QUEUES[:2]), max_receives=self._random.randint(2, 6))

    async def _each(self, method: str, **params: Any) -> None:
        """Call a batch method; count the errors inside its answer too."""
        for one in (await self._call(method, **params) or {}).get("results", []):
            if "error" in one:
                self.errors[one["error"]["data"]["type"]] += 1

    async def _call(self, method: str, **params: Any) -> Any:
        answered = await answer(self._http, self._random.choice(self._urls), method, **params)
        self.calls[method] += 1
        if "error" in answered:
            self.errors[answered["error"]["data"]["type"]] += 1
        return answered.get("result")

    def _queue(self) -> str:
        return self._random.choice(QUEUES[:2]) if self._random.random() < 0.9 else "dead"

    def _some_receipts(self) -> list[str]:
        """Return some in any order, of which others have some too."""
        return self._random.sample(self._receipts, min(len(self._receipts), self._random.randint(1, 100)))
