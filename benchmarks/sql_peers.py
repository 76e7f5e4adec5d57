"""Peers that work inside PostgreSQL: PGMQ, whose SQL the `pgmq` package carries, and Procrastinate.

They get what is best for them: prepared statements, autocommit, bodies that Python does not parse, a fresh queue
for each round, and no HTTP.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.load import Tally, Work, read_bodies, run_loop, work

SEND = "SELECT pgmq.send(%s, %s::jsonb)"
SEND_BATCH = "SELECT pgmq.send_batch(%s, %s::jsonb[])"
READ = "SELECT msg_id, message::text FROM pgmq.read(%s, 30, %s)"
DELETE = "SELECT pgmq.delete(%s, %s::bigint)"
DELETE_BATCH = "SELECT pgmq.delete(%s, %s::bigint[])"


@dataclass(frozen=True)
class Job:
    """Whole lives of messages: so many clients, messages in a batch, seconds, and a pool of bodies."""

    conninfo: str
    queue: str
    clients: int
    batch: int
    bodies: Path
    seconds: float

    def next_bodies(self, client: int) -> Iterator[list[str]]:
        """Yield the bodies of one batch after the other, forever."""
        bodies = read_bodies(self.bodies)
        at = client * 997
        while True:
            yield [bodies[(at + i) % len(bodies)] for i in range(self.batch)]
            at += self.batch


class PgmqThreads(Job):
    """PGMQ driven by threads, each with a connection of its own."""

    def run(self, ready: Callable[[], None]) -> Tally:
        connections = [
            psycopg.connect(self.conninfo, autocommit=True, prepare_threshold=0) for _ in range(self.clients)
        ]
        bodies = [self.next_bodies(client) for client in range(self.clients)]

        def live(client: int) -> tuple[int, int]:
            """Let one batch live; return how many messages were taken, and how many deleted."""
            connection, queue, batch = connections[client], self.queue, next(bodies[client])
            if self.batch == 1:
                connection.execute(SEND, (queue, batch[0]))
                rows = connection.execute(READ, (queue, 1)).fetchall()
                answers = [connection.execute(DELETE, (queue, row[0])).fetchone() for row in rows]
                return len(rows), sum(answer is not None and answer[0] for answer in answers)
            connection.execute(SEND_BATCH, (queue, batch))
            rows = connection.execute(READ, (queue, self.batch)).fetchall()
            return len(rows), len(connection.execute(DELETE_BATCH, (queue, [row[0] for row in rows])).fetchall())

        def live_until(client: int) -> tuple[int, int]:
            taken = deleted = 0
            while time.perf_counter() < until:
                now_taken, now_deleted = live(client)
                taken, deleted = taken + now_taken, deleted + now_deleted
            return taken, deleted

        def warm_up(connection: psycopg.Connection) -> None:
            """Prepare what finds no messages, and so writes nothing that would be counted."""
            connection.execute(READ, (self.queue, self.batch))
            connection.execute(DELETE, (self.queue, -1))
            connection.execute(DELETE_BATCH, (self.queue, [-1]))

        with ThreadPoolExecutor(self.clients) as pool:
            list(pool.map(warm_up, connections))
            ready()
            until = time.perf_counter() + self.seconds
            return tally(list(pool.map(live_until, range(self.clients))))


class PgmqTasks(Job):
    """PGMQ driven by tasks of one event loop, each with a connection of its own."""

    def run(self, ready: Callable[[], None]) -> Tally:
        return run_loop(self._run(ready))

    async def _run(self, ready: Callable[[], None]) -> Tally:
        connections = [
            await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True, prepare_threshold=0)
            for _ in range(self.clients)
        ]
        bodies = [self.next_bodies(client) for client in range(self.clients)]

        async def live(client: int) -> tuple[int, int]:
            connection, queue, batch = connections[client], self.queue, next(bodies[client])
            if self.batch == 1:
                await connection.execute(SEND, (queue, batch[0]))
                rows = await (await connection.execute(READ, (queue, 1))).fetchall()
                answers = [await (await connection.execute(DELETE, (queue, row[0]))).fetchone() for row in rows]
                return len(rows), sum(answer is not None and answer[0] for answer in answers)
            await connection.execute(SEND_BATCH, (queue, batch))
            rows = await (await connection.execute(READ, (queue, self.batch))).fetchall()
            deleted = await connection.execute(DELETE_BATCH, (queue, [row[0] for row in rows]))
            return len(rows), len(await deleted.fetchall())

        async def live_until(client: int) -> tuple[int, int]:
            taken = deleted = 0
            while time.perf_counter() < until:
                now_taken, now_deleted = await live(client)
                taken, deleted = taken + now_taken, deleted + now_deleted
            return taken, deleted

        for connection in connections:
            await connection.execute(READ, (self.queue, self.batch))
            await connection.execute(DELETE, (self.queue, -1))
            await connection.execute(DELETE_BATCH, (self.queue, [-1]))
        ready()
        until = time.perf_counter() + self.seconds
        counts = await asyncio.gather(*(live_until(client) for client in range(self.clients)))
        for connection in connections:
            await connection.close()
        return tally(counts)


def tally(counts: Sequence[tuple[int, int]]) -> Tally:
    """Add up what clients have taken and deleted; what they took and could not delete is an error."""
    taken, deleted = (sum(count[n] for count in counts) for n in (0, 1))
    return Tally(messages=deleted, errors={"not deleted": taken - deleted} if taken != deleted else {})


# Ways to drive PGMQ: the name, the kind of worker, and among how many processes the clients are divided.
WAYS: dict[str, tuple[type[PgmqThreads] | type[PgmqTasks], int]] = {
    "threads in 1 process": (PgmqThreads, 1),
    "threads in 2 processes": (PgmqThreads, 2),
    "threads in 4 processes": (PgmqThreads, 4),
    "tasks in 1 process": (PgmqTasks, 1),
}


class Pgmq:
    """PGMQ in a database."""

    name = "PGMQ"

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self._queues = 0

    @staticmethod
    def version() -> str | None:
        """Return the version of PGMQ's SQL, or None where it is not installed."""
        if (folder := pgmq_folder()) is None:
            return None
        return (folder / "VERSION").read_text().strip().splitlines()[-1]

    def install(self) -> None:
        """Install PGMQ in the database."""
        folder = pgmq_folder()
        assert folder is not None
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute((folder / "pgmq.sql").read_bytes())

    @contextmanager
    def queue(self) -> Iterator[str]:
        """Make a fresh queue; yield its name; drop it."""
        self._queues += 1
        queue = f"q{self._queues}"
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("SELECT pgmq.create(%s)", (queue,))
        yield queue
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("SELECT pgmq.drop_queue(%s)", (queue,))

    def lives(self, queue: str, way: str, clients: int, batch: int, bodies: Path, seconds: float) -> Tally:
        """Let messages live on a queue; return how many did."""
        kind, processes = WAYS[way]
        processes = min(processes, clients)
        workers: list[Work] = [
            kind(self.conninfo, queue, clients // processes, batch, bodies, seconds) for _ in range(processes)
        ]
        return work(workers)


def pgmq_folder() -> Path | None:
    """Find the SQL in the installed package, whose Python code is not needed."""
    spec = importlib.util.find_spec("pgmq")
    folders = spec.submodule_search_locations if spec else None
    folder = Path(folders[0]) / "sql" if folders else None
    return folder if folder is not None and (folder / "pgmq.sql").exists() else None


WORKERS = 2


@dataclass(frozen=True)
class ProcrastinateJob(Job):
    """Procrastinate: jobs that do nothing are deferred and worked off in the same process."""

    def run(self, ready: Callable[[], None]) -> Tally:
        logging.disable(logging.CRITICAL)
        return run_loop(self._run(ready))

    async def _run(self, ready: Callable[[], None]) -> Tally:
        import procrastinate

        app = procrastinate.App(
            connector=procrastinate.PsycopgConnector(
                conninfo=self.conninfo, min_size=self.clients, max_size=self.clients + 2
            )
        )
        done = deferred = 0

        async def nothing(body: str) -> None:
            nonlocal done
            done += 1

        task: Any = app.task(name="nothing", queue=self.queue)(nothing)
        async with app.open_async():
            # One worker fetches one job at a time, so several get more done.
            working = [
                asyncio.create_task(
                    app.run_worker_async(
                        queues=[self.queue],
                        concurrency=max(1, self.clients // WORKERS),
                        delete_jobs="always",
                        install_signal_handlers=False,
                    )
                )
                for _ in range(WORKERS)
            ]
            await asyncio.sleep(0.2)  # until it works
            ready()
            until = time.perf_counter() + self.seconds

            async def defer(client: int) -> None:
                nonlocal deferred
                for bodies in self.next_bodies(client):
                    # Never more under way than clients times the batch, as with everybody else.
                    while deferred - done > self.clients * self.batch and time.perf_counter() < until:
                        await asyncio.sleep(0.001)
                    if time.perf_counter() >= until:
                        return
                    deferred += self.batch
                    if self.batch == 1:
                        await task.defer_async(body=bodies[0])
                    else:
                        await task.batch_defer_async(*({"body": body} for body in bodies))

            await asyncio.gather(*(defer(client) for client in range(self.clients)))
            counted = done
            for worker in working:
                worker.cancel()
            await asyncio.gather(*working, return_exceptions=True)
        return Tally(messages=counted)


class Procrastinate:
    """Procrastinate in a database."""

    name = "Procrastinate"

    def __init__(self, conninfo: str) -> None:
        self.conninfo = conninfo
        self._queues = 0

    @staticmethod
    def version() -> str | None:
        """Return its version, or None where it is not installed."""
        try:
            return importlib.metadata.version("procrastinate")
        except importlib.metadata.PackageNotFoundError:
            return None

    def install(self) -> None:
        """Install its tables in the database."""
        from procrastinate.schema import SchemaManager

        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(SchemaManager.get_schema().encode())

    def lives(self, clients: int, batch: int, bodies: Path, seconds: float) -> Tally:
        """Let jobs live on a fresh queue; return how many did."""
        self._queues += 1
        return work([ProcrastinateJob(self.conninfo, f"q{self._queues}", clients, batch, bodies, seconds)])
