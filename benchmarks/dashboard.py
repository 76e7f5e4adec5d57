"""The cell `dashboard`: what an open page of the dashboard costs, with 10,000 queues and a million messages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.bench import Bench, prepare, processes
from benchmarks.caller import Caller
from benchmarks.cells import Plan, rounds
from benchmarks.flat import fill, settle
from benchmarks.processes import Meter, Server
from benchmarks.results import US, Cell, Check, Sample, percentile

# How often a page asks, and what its first page asks for then: see dashboard/poll.js and dashboard/overview.js.
SECONDS_BETWEEN_POLLS = 5.0
POLL: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("get_caller", {}),
    ("list_queues", {"counts": True, "limit": 50, "prefix": "", "after": None, "dead_letter_queues": False}),
    ("list_queues", {"counts": True, "limit": 50, "dead_letter_queues": True}),
    ("get_stats", {"minutes": 15}),
)
# At first, and with many queues then in one poll out of three.
SELDOM: tuple[str, Mapping[str, Any]] = ("count_messages", {})
POLLS_BETWEEN = 3
# From a first page to what it shows, with the files; and of one core, for each page that is open.
FIRST_PAGE_MS = 1_000.0
SHARE_PERCENT = 1.0


def dashboard(bench: Bench, cell: Cell) -> None:
    """Ask for what the first page asks for, on tables that were analysed and on some that never were."""
    million, queues = bench.rows(1_000_000), bench.rows(10_000)
    for case, is_analysed in (("analysed", True), ("never analysed", False)):
        with bench.cluster.database() as conninfo:
            prepare(conninfo, [f"other{n}" for n in range(queues)])
            fill(bench, conninfo, million, queue=f"'other' || mod(n, {queues})")
            if is_analysed:
                settle(conninfo)
            with bench.broker_on(conninfo) as broker:
                poll(bench, cell, case, broker)
        polls = cell.of(case, US)
        cell.checks.append(
            Check(f"first page, {case}", polls[0].figures["first_ms"], "ms", at_most=FIRST_PAGE_MS),
        )
        for name in ("broker_percent", "postgresql_percent"):
            who = name.removesuffix("_percent").replace("postgresql", "PostgreSQL").replace("broker", "the broker")
            limit = SHARE_PERCENT if name == "broker_percent" else None
            cell.checks.append(
                Check(f"of a core of {who}, {case}", cell.median(case, US, name), "%", at_most=limit),
            )


def poll(bench: Bench, cell: Cell, case: str, broker: Server) -> None:
    """Ask again and again; append a sample for each round."""
    with Caller(broker.url) as caller:
        everything, most = batch(caller, *POLL, SELDOM), batch(caller, *POLL)
        first_ms = timed(caller, everything)
        for _ in range(10):
            timed(caller, everything)
        for round_ in rounds(bench):
            polls = POLLS_BETWEEN * (2 if bench.options.smoke else 40)
            with Meter(processes(broker, bench.cluster)) as meter:
                taken = [timed(caller, most if n % POLLS_BETWEEN else everything) for n in range(polls)]
            share = 100 / polls / SECONDS_BETWEEN_POLLS
            figures = {
                "first_ms": first_ms,
                "p50_ms": percentile(taken, 0.5),
                "max_ms": max(taken),
                "broker_percent": meter.used[US] * share,
                "postgresql_percent": meter.used["PostgreSQL"] * share,
            }
            cell.samples.append(Sample(case, US, round_, figures))
            bench.progress(f"{cell.name}: {case}: {figures}")


def batch(caller: Caller, *asked: tuple[str, Mapping[str, Any]]) -> bytes:
    """Return the bytes of a batch of calls."""
    calls = [
        {"jsonrpc": "2.0", "id": n, "method": method, "params": params} for n, (method, params) in enumerate(asked)
    ]
    return caller.post(json.dumps(calls, separators=(",", ":")))


def timed(caller: Caller, request: bytes) -> float:
    """Ask once; return how many milliseconds it took. Raises RuntimeError where one of the calls was refused."""
    answers, milliseconds = caller.timed_batch(request)
    refused = [answer["error"] for answer in answers if "error" in answer]
    if refused:
        raise RuntimeError(f"refused: {refused}")
    return milliseconds


DASHBOARD_PLANS = (
    Plan("dashboard", "an open page of the dashboard, with 10,000 queues and 1 M messages", dashboard, True),
)
