"""Brokers with producers and consumers at work, and what their histories come to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

from brokers import Broker, running_brokers
from history import Acknowledged, Verdict, check
from load import Load
from pair import Node
from parts import Result

QUEUE = "default"
LEASE_SECONDS = 4.0
PRODUCERS = 4
# The queue should be empty so long after the load has ended; many times that is given up.
DRAIN_PATIENCE = 120.0
UNMOUNT_ATTEMPTS = 50


@contextlib.asynccontextmanager
async def at_work(
    folder: Path, nodes: Sequence[Node], seed: int, *flags: str, brokers: int = 1, consumers: int = 2
) -> AsyncIterator[tuple[list[Broker], Load]]:
    """Yield brokers on servers that run, and clients that are at work."""
    async with running_brokers(folder, nodes, brokers, *flags) as made:
        load = Load(folder, [each.url for each in made], seed=seed, lease_seconds=LEASE_SECONDS, queue=QUEUE)
        try:
            for _ in range(PRODUCERS):
                load.start("produce")
            for _ in range(consumers):
                load.start("consume")
            await load.works()
            yield made, load
        finally:
            await load.close()


async def judge(result: Result, node: Node, brokers: Sequence[Broker], load: Load) -> Verdict:
    """Let the load end, drain the queue and note what was found; consumers must be at work."""
    await load.works()
    await load.finish("produce")
    counting = "SELECT count(*) FROM broker.messages m JOIN broker.queues q ON q.id = m.queue_id WHERE q.name = %s"
    left = -1
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_PATIENCE):
            while left:
                await asyncio.sleep(0.1)
                [(left,)] = await node.query(counting, [QUEUE])
    await load.finish("consume")
    verdict = check(load.events())
    note(result, verdict)
    result.expect(not left, f"{left} messages are left in the queue")
    for sign in [sign for broker in brokers for sign in broker.bad_signs()] + load.accidents():
        result.violations.append(sign)
    result.expect(all(broker.is_running for broker in brokers), "a broker has ended")
    return verdict


def note(result: Result, verdict: Verdict) -> None:
    """Add to a result what a history came to."""
    result.figures |= {
        "acknowledged": verdict.acknowledged,
        "lost": len(verdict.lost),
        "recovered": verdict.recovered,
        "duplicated": verdict.duplicated.total(),
        "failures": dict(verdict.failures.most_common()),
    }
    for name, values in verdict.violations.items():
        result.violations.append(f"{name}: {len(values)}, as {values[:3]}")


def acknowledged(load: Load) -> set[str]:
    """Return what producers were told is stored."""
    return {value for event in load.events() if isinstance(event, Acknowledged) for value in event.values}


def what_mounting_needs() -> str:
    """Say why no file system can be mounted here; nothing where it can."""
    return "" if os.geteuid() == 0 else "only root may mount file systems"


@contextlib.contextmanager
def mounted(words: Sequence[object], at: Path) -> Iterator[None]:
    """Mount something while the block lasts, if it is still mounted at its end."""
    command("mount", *words, at)
    try:
        yield
    finally:
        unmount(at)


def unmount(at: Path) -> None:
    """Unmount what is mounted there; processes that have just been killed may hold it for a moment."""
    for _ in range(UNMOUNT_ATTEMPTS):
        if not os.path.ismount(at):
            return
        with contextlib.suppress(subprocess.CalledProcessError):
            command("umount", "-q", at)
            return
        time.sleep(0.1)
    command("umount", "-l", at)


def command(*words: object) -> None:
    """Run a program of the system; raise where it fails."""
    subprocess.run([str(word) for word in words], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
