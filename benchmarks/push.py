"""The cells about push: how fast a process pushes, and what endpoints that are not well do to the others."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from benchmarks.bench import Bench, processes, rpc
from benchmarks.caller import Caller
from benchmarks.cells import RATE, SMALL, Plan, rounds, size_name, sizes
from benchmarks.load import Tally, read_bodies
from benchmarks.processes import Server, server
from benchmarks.receiver import BAD
from benchmarks.results import US, Cell, Check

ALLOW = ("--webhook-allow", "127.0.0.0/8")
MESSAGES = 6_000
# Messages a second to a subscriber whose latency is taken.
TIMED_RATE = 20
PATIENCE_SECONDS = 120.0
POLL_SECONDS = 0.005


@contextmanager
def receiver(bench: Bench) -> Iterator[Server]:
    """Run the endpoints."""
    with server(["-m", "benchmarks.receiver"], bench.new_log()) as one:
        yield one


def told(endpoints: Server) -> dict[str, Any]:
    """Return what the endpoints have counted."""
    with urllib.request.urlopen(endpoints.url, timeout=60) as answer:
        counted: dict[str, Any] = json.load(answer)
    return counted


def push(bench: Bench, cell: Cell) -> None:
    """A backlog is pushed to one endpoint that answers at once."""
    count = bench.rows(MESSAGES)
    with bench.broker(*ALLOW) as broker, receiver(bench) as endpoints:
        rpc(broker, "create_topic", topic="push")
        for size in sizes(bench):
            case = size_name(size)
            for round_ in rounds(bench):
                path = f"/taken/{size}/{round_}"
                subscription = rpc(broker, "subscribe", topic="push", name="one", url=endpoints.url + path)
                fill(bench, broker, subscription["queue"], size, count)
                load = partial(push_all, broker, endpoints, subscription["queue"], path, count)
                bench.measure(
                    cell, case, US, round_, load, {**processes(broker, bench.cluster), "receiver": endpoints.pid}
                )
                rpc(broker, "unsubscribe", subscription_id=subscription["subscription_id"])
    for size in sizes(bench):
        case = size_name(size)
        at_least = 1_000 if size == SMALL else None
        cell.checks.append(Check(f"rate, {case}", cell.median(case, US, RATE), "messages/s", at_least=at_least))


def fill(bench: Bench, broker: Server, queue: str, size: int, count: int) -> None:
    """Put messages into the queue of a url, which is paused, in the order of the pool."""
    rpc(broker, "update_queue", queue=queue, paused=True)
    pool = read_bodies(bench.bodies(size))
    with Caller(broker.url) as caller:
        for start in range(0, count, 500):
            bodies = [json.loads(pool[n % len(pool)]) for n in range(start, min(start + 500, count))]
            caller.call("enqueue_batch", queue=queue, messages=[{"body": body} for body in bodies])


def push_all(broker: Server, endpoints: Server, queue: str, path: str, count: int) -> Tally:
    """Let the messages go; return when all have been taken and deleted."""
    rpc(broker, "update_queue", queue=queue, paused=False)
    began_at = time.perf_counter()
    while told(endpoints)["taken"].get(path, 0) < count and time.perf_counter() < began_at + PATIENCE_SECONDS:
        time.sleep(POLL_SECONDS)
    while rpc(broker, "count_messages", queue=queue)["total"] and time.perf_counter() < began_at + PATIENCE_SECONDS:
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - began_at
    taken, left = told(endpoints)["taken"].get(path, 0), rpc(broker, "count_messages", queue=queue)["total"]
    errors = {"not deleted": left, "pushed twice": max(0, taken - count)}
    return Tally(
        messages=count - left, seconds=seconds, errors={kind: number for kind, number in errors.items() if number}
    )


def push_beside(bench: Bench, cell: Cell) -> None:
    """One subscriber of a topic gets messages at a steady rate, beside others that are well, or that are not."""
    seconds = max(bench.options.seconds, 10.0) if not bench.options.smoke else 1.0
    case = f"{TIMED_RATE} messages/s"
    others = {"others that are well": [f"/taken/{n}" for n in range(len(BAD))], "others that are not": list(BAD)}
    with bench.broker(*ALLOW) as broker, receiver(bench) as endpoints:
        for round_ in rounds(bench):
            for who, paths in others.items():
                topic = f"beside-{len(cell.samples)}"
                rpc(broker, "create_topic", topic=topic)
                for number, path in enumerate((f"/timed/{topic}", *paths)):
                    rpc(broker, "subscribe", topic=topic, name=str(number), url=endpoints.url + path)
                load = partial(publish_at_set_times, broker, endpoints, topic, seconds)
                sample = bench.measure(
                    cell, case, who, round_, load, {**processes(broker, bench.cluster), "receiver": endpoints.pid}
                )
                del sample.figures[RATE]  # the load sets it
                while not rpc(broker, "delete_topic", topic=topic)["complete"]:
                    pass
    ratio = cell.ratio("p99_ms", (case, "others that are not"), (case, "others that are well"))
    cell.checks.append(Check("p99 beside those that are not well ÷ beside those that are", ratio, "×", at_most=2.0))
    cell.notes.append(f"the others that are not well: {', '.join(path[1:] for path in BAD)}")


def publish_at_set_times(broker: Server, endpoints: Server, topic: str, seconds: float) -> Tally:
    """Publish messages that say when they should have been sent; return how long they took to the endpoint."""
    count = round(TIMED_RATE * seconds)
    told(endpoints)  # what came before is none of this
    latencies: Sequence[float] = []
    with Caller(broker.url) as caller:
        began_at = time.perf_counter() + 0.1
        for number in range(count):
            due_at = began_at + number / TIMED_RATE
            time.sleep(max(0.0, due_at - time.perf_counter()))
            caller.call("publish", topic=topic, body=due_at)
    until = time.perf_counter() + PATIENCE_SECONDS
    while len(latencies) < count and time.perf_counter() < until:
        latencies = [*latencies, *told(endpoints)["latencies_ms"]]
        time.sleep(POLL_SECONDS)
    missing = count - len(latencies)
    return Tally(
        messages=len(latencies),
        seconds=seconds,
        errors={"not delivered": missing} if missing > 0 else {},
        latencies_ms=list(latencies),
    )


PUSH_PLANS = (
    Plan("push", "push to an endpoint that answers at once, one process", push),
    Plan("push-beside", "push to one endpoint beside others that are not well", push_beside),
)
