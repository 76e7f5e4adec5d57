"""Random faults under load, then a drain, then the check of all that clients did and saw, for each queue.

Some send to a queue, some publish to topics, of which one delivers at once and one when it is broadcast. Consumers take
from queues, and a receiver is pushed to.

    make soak ARGS='--seed 7 --faults 50'
    make soak ARGS='--seconds 3600'

A seed decides which faults come in which order, for how long, and what clients do; how these fall together it does not.
Exit code 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvloop

from brokers import Deployment, call, running_deployment
from history import Acknowledged, Attempted, Failed, Verdict, check, check_pushes, together, wanted
from load import Load
from nemesis import Nemesis
from pair import free_port

QUEUE = "default"
LEASE_SECONDS = 4.0
PRODUCERS = 2
CONSUMERS = 3
# By topic, which has a publisher: the queues that subscribe to it, each with a consumer, and how values end that it
# gets.
TOPICS = {
    "news": {"news.all": "", "news.red": "red"},
    "parcels": {"parcels.all": "", "parcels.blue": "blue"},
}
ON_BROADCAST = "parcels"
# A receiver subscribes to one as well, under this name. What a broker leases to push it leases for so long.
PUSHED_TOPIC = "news"
RECEIVER = "receiver"
PUSH_QUEUE = f"push.{PUSHED_TOPIC}.{RECEIVER}"
PUSH_LEASE_SECONDS = 45.0
# Between two faults.
QUIET_SECONDS = (0.2, 1.0)
# The queue should be empty so long after the last fault; ten times that is given up.
DRAIN_SECONDS = LEASE_SECONDS + 5
# Messages that may come again: this share of all deliveries. A fault brings some whatever the load, so a machine that
# is too slow for much load is allowed so many for each.
DUPLICATED_SHARE = 0.02
DUPLICATED_PER_FAULT = 10

END_LEASES = """
UPDATE broker.messages m
SET visible_at = clock_timestamp() + interval '2 seconds'
FROM broker.queues q
WHERE q.id = m.queue_id AND q.name = %s AND m.lane > 0 AND m.visible_at > clock_timestamp() + interval '3 seconds'
RETURNING m.id
"""

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What a soak came to."""

    seed: int
    faults: Counter[str]
    # Of each queue, and together: messages count once there, and what became of them as often as it happened.
    verdicts: dict[str, Verdict]
    verdict: Verdict
    drain_seconds: float
    left: int
    signs: list[str]
    seconds: float

    @property
    def violations(self) -> dict[str, Any]:
        """Return everything that must not be."""
        found: dict[str, Any] = dict(self.verdict.violations)
        allowed = max(DUPLICATED_SHARE * self.verdict.deliveries, DUPLICATED_PER_FAULT * self.faults.total())
        if self.verdict.duplicated.total() > allowed:
            found["duplicated"] = dict(self.verdict.duplicated)
        if self.left:
            found["left in the queue"] = self.left
        if self.signs:
            found["logs"] = self.signs
        return found

    def summary(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "seconds": round(self.seconds, 1),
            "faults": dict(self.faults),
            **self.verdict.summary(),
            "queues": {
                name: {"acknowledged": verdict.acknowledged, "deliveries": verdict.deliveries}
                for name, verdict in self.verdicts.items()
            },
            "drain_seconds": round(self.drain_seconds, 1),
            "violations": self.violations,
        }


async def soak(seed: int, *, faults: int | None = None, seconds: float | None = None, say: Say) -> Outcome:
    """Let so many faults happen, or faults for so long, under load; return what was found after a drain."""
    began_at = time.monotonic()
    async with running_deployment() as deployment:
        load = Load(deployment.folder, deployment.urls, seed=seed, lease_seconds=LEASE_SECONDS, queue=QUEUE)
        port = free_port()
        await _subscribe(deployment, port)
        try:
            for _ in range(PRODUCERS):
                load.start("produce")
            for _ in range(CONSUMERS):
                load.start("consume")
            for topic, queues in TOPICS.items():
                load.start("publish", topic)
                for queue in queues:
                    load.start("consume", queue)
            load.start("broadcast", ON_BROADCAST)
            load.start("receive", PUSH_QUEUE, port)
            struck = await _strike(deployment, load, seed, faults=faults, seconds=seconds, say=say)
            ended_at = time.monotonic()
            queues_ = [QUEUE, PUSH_QUEUE, *itertools.chain(*TOPICS.values())]
            drain_seconds, left = await drain(deployment, load, queues_)
            say(f"drained in {drain_seconds:.1f} s")
        finally:
            await load.close()
        signs = deployment.bad_signs() + load.accidents()
        verdicts = judge(load, ended_at)
        total = together(verdicts)
        for name, kind in (("attempted", Attempted), ("acknowledged", Acknowledged)):
            values = {value for event in load.events() if isinstance(event, kind) for value in event.values}
            setattr(total, name, len(values))
        return Outcome(seed, struck, verdicts, total, drain_seconds, left, signs, time.monotonic() - began_at)


async def _subscribe(deployment: Deployment, port: int) -> None:
    """Let there be topics, and queues and a receiver that subscribe to them."""
    async with aiohttp.ClientSession() as http:
        url = deployment.urls[0]
        for topic, queues in TOPICS.items():
            delivery = "on_broadcast" if topic == ON_BROADCAST else "immediate"
            await call(http, url, "create_topic", topic=topic, delivery=delivery)
            for queue, colour in queues.items():
                await call(http, url, "create_queue", queue=queue)
                wants = {"colour": [colour]} if colour else None
                await call(http, url, "subscribe", topic=topic, name=queue, queue=queue, filter=wants)
        receiver = f"http://127.0.0.1:{port}/"
        await call(http, url, "subscribe", topic=PUSHED_TOPIC, name=RECEIVER, url=receiver, max_receives=1000)


def judge(load: Load, ended_at: float) -> dict[str, Verdict]:
    """Return what the history of each queue comes to; all that failed counts to that of the first.

    The faults have ended at that time.
    """
    failed = [event for event in load.events(*TOPICS) if isinstance(event, Failed)]
    verdicts = {QUEUE: check([*load.events(QUEUE), *failed])}
    for topic, queues in TOPICS.items():
        published = load.events(topic)
        for queue, colour in queues.items():
            verdicts[queue] = check([*wanted(published, colour), *load.events(queue)])
    published = wanted(load.events(PUSHED_TOPIC), "")
    verdicts[PUSH_QUEUE] = check_pushes([*published, *load.events(PUSH_QUEUE)], PUSH_LEASE_SECONDS, ended_at)
    return verdicts


async def _strike(
    deployment: Deployment, load: Load, seed: int, *, faults: int | None, seconds: float | None, say: Say
) -> Counter[str]:
    nemesis = Nemesis(deployment, load, seed)
    quiet = random.Random(seed)
    struck: Counter[str] = Counter()
    began_at = time.monotonic()

    def goes_on() -> bool:
        return struck.total() < faults if faults is not None else time.monotonic() - began_at < (seconds or 0)

    while goes_on():
        await asyncio.sleep(quiet.uniform(*QUIET_SECONDS))
        kind, about = await nemesis.strike()
        struck[kind] += 1
        of = f"/{faults}" if faults is not None else ""
        say(f"{time.monotonic() - began_at:7.1f} s  {struck.total()}{of}  {kind} {about}")
    return struck


async def drain(deployment: Deployment, load: Load, queues: Sequence[str] = (QUEUE,)) -> tuple[float, int]:
    """Let producers finish and consumers take all there is; return how many seconds that took, and what is left.

    That is in these queues, and what topics store. A push that a broker has not noted before it was killed is tried
    again after a long time; as nothing fails any more, it is made to end soon.
    """
    began_at = time.monotonic()
    await load.finish("produce", "publish")
    await load.finish("broadcast")
    counting = (
        "SELECT count(*) FROM broker.messages m LEFT JOIN broker.queues q ON q.id = m.queue_id"
        " WHERE q.name = ANY (%s) OR q.id IS NULL"
    )
    left = -1
    while left and time.monotonic() - began_at < 10 * DRAIN_SECONDS:
        await asyncio.sleep(0.05)
        await deployment.pair.primary.query(END_LEASES, [PUSH_QUEUE])
        [(left,)] = await deployment.pair.primary.query(counting, [list(queues)])
    drain_seconds = time.monotonic() - began_at
    await load.finish("consume", "receive")
    return drain_seconds, left


def main() -> int:
    parser = argparse.ArgumentParser(description="Let random faults happen to brokers, clients and PostgreSQL.")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: any")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--faults", type=int, help="how many; default: 25")
    length.add_argument("--seconds", type=float, help="for how long")
    chosen = parser.parse_args()
    if chosen.seconds is None and chosen.faults is None:
        chosen.faults = 25
    length_flag = f"--faults {chosen.faults}" if chosen.seconds is None else f"--seconds {chosen.seconds:g}"
    print(f"seed {chosen.seed}; to repeat: make soak ARGS='--seed {chosen.seed} {length_flag}'", flush=True)

    def say(line: str) -> None:
        print(line, flush=True)

    outcome = uvloop.run(soak(chosen.seed, faults=chosen.faults, seconds=chosen.seconds, say=say))
    print(json.dumps(outcome.summary(), indent=1))
    return 1 if outcome.violations else 0


if __name__ == "__main__":
    sys.exit(main())
