"""The cells about what is refused: what tokens cost, and what clients that mean harm do to the others."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

import psycopg

from benchmarks.bench import Bench, create_queue, prepare, processes
from benchmarks.caller import SetTimes
from benchmarks.cells import RATE, SMALL, Plan, rounds
from benchmarks.hostile import Hostile, corpus
from benchmarks.load import Wrk, work
from benchmarks.processes import ROOT, Server, main_thread_seconds, running
from benchmarks.results import US, Cell, Check, Sample
from broker.storage import tokens
from broker.storage.tokens import Grant

SLOW_CLIENTS = 1_000
# Calls a second, of those who mean well, whose latency is taken.
STEADY_RATE = 200
MOST_MILLISECONDS = 50.0


def make_token(conninfo: str) -> str:
    """Return a token that permits everything in a broker's database."""

    async def make() -> str:
        async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as connection:
            return await tokens.create(connection, "bench", Grant(["*"], ["*"], ["*"], admin=True), None)

    return asyncio.run(make())


def tokens_on(bench: Bench, cell: Cell) -> None:
    """32 connections each enqueue, and let messages live, where tokens are asked for and where they are not.

    Two brokers on one database, at the same time: they want more than the machine has, so each has its share of it,
    and what a call costs more is what it gets done less. One after the other, the machine's own ups and downs were
    several times what a token costs. Both are started anew for each round, each first as often as the other.
    """
    case_of = {"enqueue": "single enqueue", "life": "whole life"}
    flags = {
        "tokens off": ("--auth", "off"),
        "tokens on": ("--auth", "required", "--max-call-rate-per-token", "1000000"),
    }
    for round_ in rounds(bench):
        order = list(flags) if round_ % 2 else list(flags)[::-1]
        with bench.cluster.database() as conninfo, ExitStack() as stack:
            prepare(conninfo, [f"{script}-{n}" for script in case_of for n in range(len(order))])
            brokers = {who: stack.enter_context(bench.broker_on(conninfo, *flags[who])) for who in order}
            given = {"tokens off": {}, "tokens on": {"token": make_token(conninfo)}}
            for script, case in case_of.items():
                loads = {
                    who: stack.enter_context(
                        Wrk(
                            script, brokers[who].url, 32, bench.options.seconds,
                            queue=f"{script}-{n}", queues=1, batch=1, bodies=bench.bodies(SMALL), **given[who],
                        )
                    )
                    for n, who in enumerate(order)
                }  # fmt: skip
                for who in order:
                    bench.measure(cell, case, who, round_, loads[who].wait, {}).cpu.clear()  # Both load the machine.
    for case in case_of.values():
        ratio = cell.ratio(RATE, (case, "tokens on"), (case, "tokens off"))
        cell.checks.append(Check(f"rate with tokens ÷ without, {case}", ratio, "×", at_least=0.95))


@contextmanager
def slow_clients(bench: Bench, broker: Server, number: int) -> Iterator[None]:
    """Let clients hold connections that hardly say anything."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "benchmarks.slow_clients", broker.url, str(number)]
    with (
        open(bench.new_log(), "wb") as said,
        running(command, environ, stdout=subprocess.PIPE, stderr=said.fileno()) as process,
    ):
        assert process.stdout is not None
        if not process.stdout.readline():
            raise RuntimeError("the slow clients could not connect")
        yield


def slow_connections(bench: Bench, cell: Cell) -> None:
    """Messages are sent and taken at a steady rate, beside 1,000 connections that hardly say anything, and alone."""
    number = SLOW_CLIENTS if not bench.options.smoke else 100
    case, beside = f"{STEADY_RATE} messages/s", f"beside {number:,} slow connections"
    seconds = max(bench.options.seconds, 10.0) if not bench.options.smoke else 1.0
    with bench.broker() as broker:
        bench.warm_up(broker)
        for round_ in rounds(bench):
            for who in ("alone", beside):
                queue = create_queue(broker, f"steady-{len(cell.samples)}")
                worker = SetTimes(broker.url, queue, STEADY_RATE, seconds, producers=8, consumers=8)
                with slow_clients(bench, broker, number) if who == beside else nullcontext():
                    sample = bench.measure(
                        cell, case, who, round_, partial(work, [worker]), processes(broker, bench.cluster)
                    )
                del sample.figures[RATE]  # the load sets it
    ratio = cell.ratio("p99_ms", (case, beside), (case, "alone"))
    cell.checks.append(Check("p99 beside slow connections ÷ alone", ratio, "×", at_most=2.0))
    cell.notes.append("a third each say nothing, a byte of a head each second, a byte of a body each second")


class Asked(NamedTuple):
    """What came of a hostile body: milliseconds to the answer's end, those of the event loop, status, error's code."""

    milliseconds: float
    loop_milliseconds: float
    status: int
    code: int | None


def ask(broker: Server, token: str, hostile: Hostile) -> Asked:
    """Send a hostile body, and read the answer to its end."""
    parts = urlsplit(broker.url)
    fields = {
        "Host": parts.netloc,
        "Content-Type": "application/json",
        "Content-Length": str(len(hostile.body)),
        "Authorization": f"Bearer {token}",
        "Connection": "close",
        **dict(hostile.headers),
    }
    head = "POST /rpc HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
    request = head.encode() + hostile.body
    assert parts.hostname is not None
    answer = bytearray()
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=60) as connection:
        loop_before, began_at = main_thread_seconds(broker.pid), time.perf_counter()
        connection.sendall(request)
        while more := connection.recv(65_536):
            answer += more
        seconds, loop_seconds = time.perf_counter() - began_at, main_thread_seconds(broker.pid) - loop_before
    code = re.search(rb'"code":\s*(-?\d+)', answer)
    return Asked(seconds * 1000, loop_seconds * 1000, int(answer[9:12]), int(code[1]) if code else None)


def hostile_bodies(bench: Bench, cell: Cell) -> None:
    """Every body of the hostile corpus is sent, beside a small call that is sent just before; tokens are on."""
    times = 1 if bench.options.smoke else 7
    slowest: dict[str, float] = {}
    longest: dict[str, float] = {}
    with bench.broker("--auth", "required") as broker:
        token = make_token(broker.conninfo)
        small = Hostile("a small call", b'{"jsonrpc":"2.0","id":1,"method":"list_queues"}', None)
        smalls = []
        for hostile in corpus():
            taken = []
            for _ in range(times):
                smalls.append(ask(broker, token, small).milliseconds)
                asked = ask(broker, token, hostile)
                taken.append(asked)
                if (asked.status, asked.code) != (hostile.status, hostile.code):
                    raise RuntimeError(f"{hostile.name} was answered {asked.status} {asked.code}")
            slowest[hostile.name] = statistics.median(asked.milliseconds for asked in taken)
            longest[hostile.name] = statistics.median(asked.loop_milliseconds for asked in taken)
            figures = {"p50_ms": slowest[hostile.name], "loop_ms": longest[hostile.name]}
            cell.samples.append(Sample(hostile.name, US, 1, figures))
            times_text = f"{slowest[hostile.name]:.1f} ms, of the event loop {longest[hostile.name]:.1f} ms"
            bench.progress(f"{cell.name}: {hostile.name}: {times_text}")
    worst, holder = max(slowest, key=lambda name: slowest[name]), max(longest, key=lambda name: longest[name])
    cell.checks.append(Check("the slowest answer", slowest[worst], "ms", at_most=MOST_MILLISECONDS))
    cell.checks.append(Check("the most of the event loop's time", longest[holder], "ms"))
    cell.notes.append(f"the slowest is {worst}; a small call beside them takes {statistics.median(smalls):.1f} ms")
    cell.notes.append(f"{holder} takes most of the event loop's time; the rest is transfer, and the client's own time")


DEFENCE_PLANS = (
    Plan("tokens", "single calls where tokens are asked for, and where they are not, at the same time", tokens_on),
    Plan("slow-connections", "a steady rate beside 1,000 connections that hardly say anything", slow_connections),
    Plan("hostile-bodies", "answers to bodies that are made to cost much, tokens on", hostile_bodies),
)
