"""The client's consumer loop while consumers, the broker and the database are killed, or told to stop.

What must hold: every message that was acknowledged is handled to the end. It is handled a second time only with a
cause: the process that had it before was killed, or its lease had ended, which cannot be before half of its time. The
producer is the same client, in this process; what it does not know it repeats.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.client import Client
from brokers import Broker, running_brokers
from pair import DIES_WITH_US, PATIENCE, Node, folder_for_servers

QUEUE = "default"
PROGRAM = Path(__file__).with_name("handling.py")
CONSUMERS = 3
CONCURRENCY = 10
LEASE_SECONDS = 8.0
FAULTS = 4
BATCH = 20


@dataclass(frozen=True)
class Line:
    """A line of a ledger."""

    what: str
    at: float
    name: str
    value: int
    message_id: str
    receive_count: int


class Consumers:
    """The processes, and what they have noted."""

    def __init__(self, folder: Path, url: str) -> None:
        self._folder = folder
        self._url = url
        self._names = itertools.count(1)
        self._all: dict[str, subprocess.Popen[bytes]] = {}
        self.killed: set[str] = set()

    def start(self) -> None:
        name = f"handling-{next(self._names)}"
        words = (name, self._url, QUEUE, self._folder / f"{name}.ledger", LEASE_SECONDS, CONCURRENCY, 1)
        with (self._folder / f"{name}.err").open("wb") as errors:
            self._all[name] = subprocess.Popen(
                [*DIES_WITH_US, sys.executable, str(PROGRAM), *map(str, words)],
                stdin=subprocess.DEVNULL,
                stderr=errors,
            )

    def living(self) -> list[str]:
        return [name for name, process in self._all.items() if process.poll() is None]

    async def kill(self, name: str) -> None:
        self.killed.add(name)
        self._all[name].kill()
        await self.ended(name)

    async def stop(self, name: str) -> None:
        """Tell it to stop; it ends by itself, and well."""
        self._all[name].send_signal(signal.SIGTERM)
        await self.ended(name)
        assert self._all[name].returncode == 0, self.said(name)[-3000:]

    async def ended(self, name: str) -> None:
        async with asyncio.timeout(PATIENCE):
            while self._all[name].poll() is None:
                await asyncio.sleep(0.01)

    def said(self, name: str) -> str:
        return (self._folder / f"{name}.err").read_text()

    def lines(self) -> list[Line]:
        """Return what was noted, in the order of time; the last line of one that was killed may not be whole."""
        found = []
        for path in self._folder.glob("*.ledger"):
            for text in path.read_bytes().splitlines():
                with suppress(ValueError):
                    found.append(Line(**json.loads(text)))
        return sorted(found, key=lambda line: line.at)

    async def handle(self, messages: int) -> None:
        """Return when so many more messages have been handled: there is work, and it is done."""
        before = self._done()
        async with asyncio.timeout(PATIENCE):
            while self._done() < before + messages:
                assert len(self.living()) > 0, [self.said(name)[-2000:] for name in self._all]
                await asyncio.sleep(0.02)

    async def close(self) -> None:
        for name in self.living():
            await self.kill(name)

    def _done(self) -> int:
        return sum(path.read_bytes().count(b'"done"') for path in self._folder.glob("*.ledger"))


@dataclass
class Scene:
    """What there is to strike."""

    node: Node
    broker: Broker
    consumers: Consumers


async def kill_a_consumer(scene: Scene) -> None:
    await scene.consumers.kill(scene.consumers.living()[0])
    scene.consumers.start()


async def stop_a_consumer(scene: Scene) -> None:
    await scene.consumers.stop(scene.consumers.living()[0])
    scene.consumers.start()


async def kill_the_broker(scene: Scene) -> None:
    await scene.broker.kill()
    await scene.broker.start()


async def restart_the_broker(scene: Scene) -> None:
    scene.broker.terminate()
    assert await scene.broker.ended() == 0
    await scene.broker.start()


async def kill_the_database(scene: Scene) -> None:
    await scene.node.kill()
    await scene.node.start()


Fault = Callable[[Scene], Awaitable[None]]
KINDS: dict[str, Fault] = {
    "a consumer is killed": kill_a_consumer,
    "a consumer is told to stop": stop_a_consumer,
    "the broker is killed": kill_the_broker,
    "the broker is restarted": restart_the_broker,
    "the database is killed": kill_the_database,
}


async def produce(url: str, is_over: asyncio.Event) -> dict[int, str]:
    """Send until it is over; return the ids of what was acknowledged, by value."""
    stored: dict[int, str] = {}
    async with Client(url, deadline=PATIENCE) as client:
        while not is_over.is_set():
            values = range(len(stored), len(stored) + BATCH)
            ids = await client.enqueue_batch(QUEUE, [{"body": value} for value in values])
            stored |= dict(zip(values, ids, strict=True))
            with suppress(TimeoutError):
                await asyncio.wait_for(is_over.wait(), 0.02)
    return stored


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_message_is_handled_and_none_twice_without_a_cause_while(
    kind: str, record_property: Callable[[str, object], None]
) -> None:
    with folder_for_servers() as folder:
        node = Node(folder, "single")
        try:
            await node.make()
            await node.start()
            async with running_brokers(folder, [node], 1) as [broker]:
                consumers = Consumers(folder, broker.url)
                try:
                    stored = await strike(Scene(node, broker, consumers), KINDS[kind])
                finally:
                    await consumers.close()
                assert broker.bad_signs() == []
        finally:
            await node.close()
        lines, killed = consumers.lines(), consumers.killed
    begun: dict[int, list[Line]] = defaultdict(list)
    for line in lines:
        if line.what == "begun":
            begun[line.value].append(line)
    done = {line.value for line in lines if line.what == "done"}
    again = {value: some for value, some in begun.items() if len(some) > 1}
    record_property(
        f"{FAULTS} times {kind}",
        f"{len(stored)} messages, {len(stored.keys() - done)} not handled, {len(again)} handled more than once",
    )
    assert stored.keys() - done == set()
    assert begun.keys() - stored.keys() == set()
    assert [some for value, some in begun.items() if {line.message_id for line in some} != {stored[value]}] == []
    assert without_a_cause(again, killed) == []
    if "consumer is told" in kind:
        assert again == {}
    if "consumer is killed" in kind:
        assert again, "no kill has struck anybody who held anything"


def without_a_cause(again: dict[int, list[Line]], killed: set[str]) -> list[Any]:
    """Return the pairs of lines that nothing explains: the first holder lived, and its lease cannot have ended."""
    return [
        (first, second)
        for some in again.values()
        for first, second in itertools.pairwise(some)
        if first.name not in killed and second.at - first.at < LEASE_SECONDS / 2
    ]


async def strike(scene: Scene, fault: Fault) -> dict[int, str]:
    """Let a fault happen again and again under load, then let everything be handled; return what was stored."""
    is_over = asyncio.Event()
    consumers = scene.consumers
    for _ in range(CONSUMERS):
        consumers.start()
    producing = asyncio.create_task(produce(scene.broker.url, is_over))
    try:
        for _ in range(FAULTS):
            await consumers.handle(100)
            await fault(scene)
        await consumers.handle(100)
    finally:
        is_over.set()
        stored = await producing
    async with Client(scene.broker.url) as client, asyncio.timeout(PATIENCE):
        began_at = time.monotonic()
        while (await client.count_messages(QUEUE))["total"] and time.monotonic() < began_at + PATIENCE:
            await asyncio.sleep(0.05)
        for name in consumers.living():
            await consumers.stop(name)
        assert (await client.count_messages(QUEUE))["total"] == 0
    return stored
