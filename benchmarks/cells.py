"""The cells of `make bench`: each function measures one row of the table of targets, as hard as the table says."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import psycopg

from benchmarks.bench import Bench, create_queue, prepare, processes
from benchmarks.caller import Caller, SetTimes
from benchmarks.daemon_peers import PEERS
from benchmarks.load import Tally, Wrk, work, wrk
from benchmarks.processes import Meter, Server, StartFailed, Wal, one, resident_bytes, sessions
from benchmarks.results import US, Cell, Check, Sample, figure, percentile
from benchmarks.sql_peers import WAYS, Pgmq

SMALL, LARGE = 200, 4096
RATE = "messages_per_second"


@dataclass(frozen=True)
class Plan:
    """A cell that can be measured."""

    name: str
    title: str
    run: Callable[[Bench, Cell], None]
    is_flat: bool = False


def size_name(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size // 1024} KiB"


def sizes(bench: Bench) -> tuple[int, ...]:
    """Return the sizes of bodies, in characters."""
    return (SMALL,) if bench.options.smoke else (SMALL, LARGE)


def rounds(bench: Bench) -> range:
    return range(1, bench.options.rounds + 1)


def single_enqueue(bench: Bench, cell: Cell) -> None:
    """64 connections enqueue, beside the same aiohttp answering a constant."""
    with bench.broker() as broker, bench.constant_server(uvloop=broker.loads("uvloop")) as constant:
        bench.warm_up(broker)
        cell.notes.append(f"both servers run on {'uvloop' if broker.loads('uvloop') else 'the event loop of asyncio'}")
        for size in sizes(bench):
            case = size_name(size)
            before = stored(broker.conninfo)
            for round_ in rounds(bench):
                queue = create_queue(broker, f"enqueue-{size}-{round_}")
                for who, server in ((US, broker), ("constant answer", constant)):
                    load = partial(
                        wrk, "enqueue", server.url, 64, bench.options.seconds,
                        queue=queue, queues=1, batch=1, bodies=bench.bodies(size),
                    )  # fmt: skip
                    bench.measure(cell, case, who, round_, load, {who: server.pid, "PostgreSQL": bench.cluster.pid})
            messages, size_on_disk = (now - then for now, then in zip(stored(broker.conninfo), before, strict=True))
            figures = {"bytes_on_disk": size_on_disk / max(1, messages)}
            cell.samples.append(Sample(case, "a stored message", 1, figures))
            ratio = cell.ratio(RATE, (case, US), (case, "constant answer"))
            cell.checks.append(Check(f"rate ÷ constant answer, {case}", ratio, "×", at_least=0.5))


def stored(conninfo: str) -> tuple[int, int]:
    """Return how many messages are stored, and their bytes on disk with all indexes."""
    with psycopg.connect(conninfo) as connection:
        count = one(connection, "SELECT count(*)::text FROM broker.messages")
        return int(count), int(one(connection, "SELECT pg_total_relation_size('broker.messages')::text"))


def single_life(bench: Bench, cell: Cell) -> None:
    """64 connections let messages live by single calls, beside PGMQ with 4, 16 and 64 connections and others."""
    lives(bench, cell, clients=64, batch=1, pgmq_clients=(16,) if bench.options.smoke else (4, 16, 64))
    for size in sizes(bench):
        best = best_of(cell, size_name(size), "PGMQ")
        check_ratio(cell, size_name(size), best, "PGMQ's best", at_least=1.5)
    for kind in PEERS:
        check_ratio(cell, size_name(SMALL), kind.name, kind.name)


def batch_life(bench: Bench, cell: Cell) -> None:
    """8 clients let messages live in batches of 100, beside PGMQ called directly and others."""
    lives(bench, cell, clients=8, batch=100, pgmq_clients=(8,))
    for size in sizes(bench):
        check_ratio(cell, size_name(size), best_of(cell, size_name(size), "PGMQ"), "PGMQ", at_least=1.0)
    for who in ("Procrastinate", *(kind.name for kind in PEERS)):
        check_ratio(cell, size_name(SMALL), who, who, at_least=1.0)


def lives(bench: Bench, cell: Cell, *, clients: int, batch: int, pgmq_clients: tuple[int, ...]) -> None:
    """Let messages live here and in every peer, in turn; those that are no PGMQ with small bodies only."""
    postgres = {"PostgreSQL": bench.cluster.pid}
    seconds = bench.options.seconds
    with ExitStack() as stack:
        broker = stack.enter_context(bench.broker())
        procrastinate = stack.enter_context(bench.procrastinate())
        # RabbitMQ takes seconds to start: in a smoke run once is enough.
        daemons = stack.enter_context(bench.daemons()) if batch > 1 or not bench.options.smoke else []
        pgmq = bench.pgmq()
        here = {US, *(peer.name for peer in (pgmq, procrastinate, *daemons) if peer)}
        missing = [name for name in ("PGMQ", "Procrastinate", *(kind.name for kind in PEERS)) if name not in here]
        cell.notes += [f"{name} is not installed" for name in missing if not bench.options.smoke]
        cell.notes += [f"{peer.name}: {peer.how}" for peer in daemons]
        bench.warm_up(broker)
        way = best_way(bench, pgmq, pgmq_clients[-1] if batch > 1 else 16, batch) if pgmq else ""
        cell.notes += [f"PGMQ is driven by {way}"] if pgmq else []
        for size in sizes(bench):
            case, bodies = size_name(size), bench.bodies(size)
            for round_ in rounds(bench):
                our_lives(bench, cell, broker, case, round_, clients, batch)
                for connections in pgmq_clients if pgmq else ():
                    assert pgmq is not None
                    with pgmq.queue() as queue:
                        load = partial(pgmq.lives, queue, way, connections, batch, bodies, seconds)
                        bench.measure(cell, case, f"PGMQ, {connections} connections", round_, load, postgres)
                if size == SMALL:
                    if procrastinate:
                        load = partial(procrastinate.lives, 16 if batch == 1 else clients, batch, bodies, seconds)
                        bench.measure(cell, case, procrastinate.name, round_, load, postgres)
                    for peer in daemons:
                        load = partial(peer.lives, clients, batch, bodies, seconds)
                        bench.measure(cell, case, peer.name, round_, load, {peer.name: peer.pid})


def our_lives(
    bench: Bench, cell: Cell, broker: Server, case: str, round_: int, clients: int, batch: int,
    who: str = US, size: int = 0,
) -> Sample:  # fmt: skip
    """Let messages live in a broker for a round."""
    bodies = bench.bodies(size or (SMALL if case == size_name(SMALL) else LARGE))
    queue = create_queue(broker, f"life-{len(cell.samples)}")
    load = partial(wrk, "life", broker.url, clients, bench.options.seconds, queue=queue, batch=batch, bodies=bodies)
    return bench.measure(cell, case, who, round_, load, processes(broker, bench.cluster, who))


def best_way(bench: Bench, pgmq: Pgmq, clients: int, batch: int) -> str:
    """Return the way to drive PGMQ that gets most done here, after trying each for a short time."""
    if bench.options.smoke:
        return "threads in 2 processes"
    rates = {}
    for way in WAYS:
        with pgmq.queue() as queue:
            rates[way] = pgmq.lives(queue, way, clients, batch, bench.bodies(SMALL), 1.0).messages_per_second
    best = max(rates, key=lambda way: rates[way])
    bench.progress("PGMQ by " + ", ".join(f"{way} {figure(rate)}/s" for way, rate in rates.items()))
    return best


def best_of(cell: Cell, case: str, prefix: str) -> str:
    """Return the contestant of this case with the highest median rate among those whose name begins so."""
    rates = {
        who: cell.median(case, who, RATE) or 0.0
        for each, who in cell.contestants()
        if each == case and who.startswith(prefix)
    }
    return max(rates, key=lambda who: rates[who]) if rates else ""


def check_ratio(cell: Cell, case: str, who: str, name: str, at_least: float | None = None) -> None:
    """Check our rate by that of a contestant; where it did not take part, there is nothing to check but PGMQ."""
    if (case, who) in cell.contestants() or name.startswith("PGMQ"):
        ratio = cell.ratio(RATE, (case, US), (case, who))
        cell.checks.append(Check(f"rate ÷ {name}, {case}", ratio, "×", at_least=at_least))


def waiting_consumers(bench: Bench, cell: Cell) -> None:
    """256 consumers wait on one queue, or 16: once with plenty on its way, once with 16 messages in circulation."""
    with bench.broker() as broker:
        bench.warm_up(broker)
        for case, in_system in (("plenty on its way", 1_000), ("16 in circulation", 16)):
            for round_ in rounds(bench):
                for consumers in (16, 256):
                    queue = create_queue(broker, f"waiting-{in_system}-{consumers}-{round_}")
                    load = partial(
                        wrk, "consumers", broker.url, consumers + 16, bench.options.seconds,
                        queue=queue, producers=16, in_system=in_system, bodies=bench.bodies(SMALL),
                    )  # fmt: skip
                    who = f"{consumers} consumers"
                    sample = bench.measure(cell, case, who, round_, load, processes(broker, bench.cluster))
                    del sample.figures["p50_ms"], sample.figures["p99_ms"]  # waiting is most of them
            ratio = cell.ratio(RATE, (case, "256 consumers"), (case, "16 consumers"))
            cell.checks.append(Check(f"rate of 256 consumers ÷ 16, {case}", ratio, "×", at_least=0.9))


def commit_milliseconds(conninfo: str, times: int) -> list[float]:
    """Return how long the smallest transactions took that have to reach the disk, one after the other."""
    taken = []
    with psycopg.connect(conninfo, autocommit=True, prepare_threshold=0) as connection:
        for _ in range(times):
            began_at = time.perf_counter()
            connection.execute("SELECT pg_logical_emit_message(true, 'benchmark', '')")
            taken.append((time.perf_counter() - began_at) * 1000)
    return taken


def add_commits(bench: Bench, cell: Cell, case: str, round_: int, conninfo: str) -> None:
    """Append how long a durable commit takes now."""
    taken = commit_milliseconds(conninfo, 50 if bench.options.smoke else 500)
    figures = {"p50_ms": statistics.median(taken), "p99_ms": percentile(taken, 0.99)}
    cell.samples.append(Sample(case, "durable commit", round_, figures))


def one_caller(bench: Bench, cell: Cell) -> None:
    """One connection enqueues, beside the smallest durable commit."""
    case = size_name(SMALL)
    with bench.broker() as broker:
        bench.warm_up(broker)
        queue = create_queue(broker, "one-caller")
        for round_ in rounds(bench):
            add_commits(bench, cell, case, round_, broker.conninfo)
            load = partial(
                wrk, "enqueue", broker.url, 1, bench.options.seconds,
                queue=queue, queues=1, batch=1, bodies=bench.bodies(SMALL),
            )  # fmt: skip
            bench.measure(cell, case, US, round_, load, processes(broker, bench.cluster))
    beyond = median_difference(cell, case, 1)
    cell.checks.append(Check("p50 beyond one durable commit", beyond, "ms", at_most=1.0))
    cell.checks.append(Check("p99", cell.median(case, US, "p99_ms"), "ms"))


def median_difference(cell: Cell, case: str, commits: int) -> float | None:
    """Return by how many milliseconds our median latency exceeds so many durable commits of the same round."""
    commit = {sample.round: sample.figures["p50_ms"] for sample in cell.of(case, "durable commit")}
    differences = [
        sample.figures["p50_ms"] - commits * commit[sample.round]
        for sample in cell.of(case, US)
        if "p50_ms" in sample.figures
    ]
    return statistics.median(differences) if differences else None


def end_to_end(bench: Bench, cell: Cell) -> None:
    """From the time at which a message should be sent to its arrival at a consumer that waits."""
    seconds = bench.options.seconds
    with bench.broker() as broker:
        bench.warm_up(broker)
        for case, rate, threads in (("20 messages/s", 20, 1), ("1,000 messages/s", 1_000, 32)):
            for round_ in rounds(bench):
                add_commits(bench, cell, case, round_, broker.conninfo)
                queue = create_queue(broker, f"parked-{rate}-{round_}")
                worker = SetTimes(broker.url, queue, rate, seconds, producers=threads, consumers=threads)
                sample = bench.measure(
                    cell, case, US, round_, partial(work, [worker]), processes(broker, bench.cluster)
                )
                del sample.figures[RATE]  # the load sets it
    beyond = median_difference(cell, "20 messages/s", 2)
    cell.checks.append(Check("p50 beyond two durable commits", beyond, "ms", at_most=2.0))
    cell.checks.append(
        Check("p99 at 1,000 messages/s", cell.median("1,000 messages/s", US, "p99_ms"), "ms", at_most=20.0)
    )


def fairness(bench: Bench, cell: Cell) -> None:
    """24 connections flood one queue, or 24 queues; a 25th lets messages live on another."""
    with bench.broker() as broker:
        bench.warm_up(broker)
        queues = [create_queue(broker, f"flood{n}") for n in range(24)]
        for batch in (1,) if bench.options.smoke else (1, 100):
            case = "flood of single calls" if batch == 1 else f"flood of batches of {batch}"
            for round_ in rounds(bench):
                for who, count in (("24 on 24 queues", len(queues)), ("24 on one queue", 1)):
                    queue = create_queue(broker, f"other-{batch}-{round_}-{count}")
                    load = partial(wrk, "life", broker.url, 1, bench.options.seconds, queue=queue, batch=1,
                                   bodies=bench.bodies(SMALL))  # fmt: skip
                    flood = Wrk(
                        "enqueue", broker.url, 24, bench.options.seconds + 60,
                        queue="flood" if count > 1 else queues[0], queues=count, batch=batch,
                        bodies=bench.bodies(SMALL),
                    )  # fmt: skip
                    with flood:
                        time.sleep(0.5)
                        sample = bench.measure(cell, case, who, round_, load, processes(broker, bench.cluster))
                        flooded = flood.stop()
                    sample.figures["flood_per_second"] = flooded.messages_per_second
                    sample.errors |= {f"flood: {kind}": number for kind, number in flooded.errors.items()}
            ratio = cell.ratio("p99_ms", (case, "24 on one queue"), (case, "24 on 24 queues"))
            cell.checks.append(Check(f"the 25th's p99, one queue ÷ 24, {case}", ratio, "×", at_most=2.0))


def parked(bench: Bench, cell: Cell) -> None:
    """1,000 consumers wait for what never comes. Each asks again once in the time, as `wait` is 60 at most."""
    count, seconds = (1_000, 60.0) if not bench.options.smoke else (100, 1.0)
    with bench.broker() as broker, ExitStack() as stack:
        bench.warm_up(broker)
        queue = create_queue(broker, "parked")
        before = resident_bytes(broker.pid)
        callers = [stack.enter_context(Caller(broker.url)) for _ in range(count)]
        request = callers[0].request("dequeue", queue=queue, wait=seconds)
        for caller in callers:
            caller.send(request)
            time.sleep(0.001)
        time.sleep(1)
        with (
            psycopg.connect(broker.conninfo, autocommit=True) as connection,
            Meter(processes(broker, bench.cluster)) as meter,
        ):
            resident = resident_bytes(broker.pid)
            connections = sessions(connection, connection.info.dbname) - 1
            # They are answered one after the other, and ask again at once.
            until = time.monotonic() + seconds
            for caller in callers:
                caller.receive()
                caller.send(request)
            time.sleep(max(0.0, until - time.monotonic()))
            connections = max(connections, sessions(connection, connection.info.dbname) - 1)
    shares = meter.shares()
    figures = {
        "cpu_percent_of_one_core": sum(shares[name] for name in (US, "PostgreSQL")) * 100,
        "database_connections": float(connections),
        "kilobytes_each": (resident - before) / count / 1000,
    }
    case = f"{count:,} for {seconds:.0f} s"
    cell.samples.append(Sample(case, US, 1, figures, shares))
    cell.checks += [
        Check("CPU of broker and PostgreSQL", figures["cpu_percent_of_one_core"], "% of one core", at_most=2.0),
        Check("database connections", figures["database_connections"], "", at_most=6),
        Check("memory of each", figures["kilobytes_each"], "KB", at_most=50.0),
    ]


def commits_and_wal(bench: Bench, cell: Cell) -> None:
    """Commits and WAL of a message over its life, by single calls at 1 and 64 connections and in batches."""
    pgmq = bench.pgmq()
    seconds, bodies = bench.options.seconds, bench.bodies(SMALL)
    for clients, batch in ((64, 1),) if bench.options.smoke else ((1, 1), (64, 1), (8, 100)):
        case = f"batches of {batch}" if batch > 1 else "1 connection" if clients == 1 else f"{clients} connections"
        for round_ in rounds(bench)[:1]:  # what is counted hardly varies
            with bench.cluster.database() as conninfo:
                prepare(conninfo, ["life"])
                with bench.cluster.wal(conninfo) as found, bench.broker_on(conninfo) as broker:
                    tally = wrk("life", broker.url, clients, seconds, queue="life", batch=batch, bodies=bodies)
            add_wal(bench, cell, case, US, round_, tally, found[0])
            if pgmq:
                with pgmq.queue() as queue:
                    with bench.cluster.wal(pgmq.conninfo) as found:
                        tally = pgmq.lives(queue, "threads in 2 processes", clients, batch, bodies, seconds)
                    add_wal(bench, cell, case, "PGMQ", round_, tally, found[0])
        commits = cell.median(case, US, "commits_per_message")
        limit = 0.1 if (clients, batch) == (64, 1) else None
        cell.checks.append(Check(f"durable commits, {case}", commits, "a message", at_most=limit))
        ratio = cell.ratio("wal_bytes_per_message", (case, US), (case, "PGMQ"))
        cell.checks.append(Check(f"WAL ÷ PGMQ's, {case}", ratio, "×", at_most=1.0))
    cell.notes.append("commits and bytes of WAL are those that pg_waldump finds, bytes without full-page images")


def add_wal(bench: Bench, cell: Cell, case: str, who: str, round_: int, tally: Tally, wal: Wal) -> None:
    """Append what was written to the log, by message."""
    messages = max(1, tally.messages)
    figures = {
        "commits_per_message": wal.commits / messages,
        "wal_bytes_per_message": wal.record_bytes / messages,
        "wal_syncs_per_message": wal.syncs / messages,
        "transactions_per_message": wal.transactions / messages,
        "messages": float(tally.messages),
    }
    cell.samples.append(Sample(case, who, round_, figures, errors=tally.errors))
    bench.progress(
        f"{cell.name}: {case}, {who}, round {round_}: {figure(figures['commits_per_message'])} commits, "
        f"{figure(figures['wal_bytes_per_message'])} bytes of WAL a message"
    )


def two_processes(bench: Bench, cell: Cell) -> None:
    """Two processes on one port against one, with the load on the same cores."""
    names = ("one process", "two processes")
    with bench.broker() as first:
        try:
            with bench.broker("--processes", "2") as second:
                bench.warm_up(first)
                bench.warm_up(second)
                for case, clients, batch in (("single calls", 64, 1), ("batches of 100", 8, 100)):
                    for round_ in rounds(bench):
                        for who, broker in zip(names, (first, second), strict=True):
                            our_lives(bench, cell, broker, case, round_, clients, batch, who, SMALL)
        except StartFailed as error:
            cell.notes.append(f"not available: {error}")
    for case in dict.fromkeys(case for case, _ in cell.contestants()):
        ratio = cell.ratio(RATE, (case, names[1]), (case, names[0]))
        cell.checks.append(Check(f"rate of two ÷ one, {case}", ratio, "×"))
    cell.notes.append(f"load, brokers and PostgreSQL share {os.cpu_count()} cores")


PLANS = (
    Plan("single-enqueue", "single enqueue calls, 64 connections, one process", single_enqueue),
    Plan("single-life", "whole life (enqueue, dequeue, delete), single calls, 64 connections", single_life),
    Plan("batch-life", "whole life in batches of 100, 8 clients", batch_life),
    Plan("waiting-consumers", "256 waiting consumers on one queue against 16", waiting_consumers),
    Plan("one-caller", "one caller, enqueue", one_caller),
    Plan("end-to-end", "enqueue to a parked consumer, end to end", end_to_end),
    Plan("fairness", "24 connections flood one queue, a 25th uses another", fairness),
    Plan("parked", "1,000 parked consumers, nothing to do, for 60 s", parked),
    Plan("commits-and-wal", "durable commits and bytes of WAL a message", commits_and_wal),
    Plan("two-processes", "two processes against one, with the load on the same cores", two_processes),
)
