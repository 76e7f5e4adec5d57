"""What is measured on: a private PostgreSQL, brokers and other servers as processes, and the CPU that each uses.

Everything listens on loopback or a socket, lives in one temporary directory, and ends with the benchmark.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from broker.embedded import EmbeddedPostgres
from broker.installation import find_installation

ROOT = Path(__file__).resolve().parent.parent
STOP_SECONDS = 15.0
MACHINE = "whole machine"

# Beyond what the broker's own embedded PostgreSQL has: room for the peers' connections, and no checkpoint that
# falls into the turn of one contestant and not of the other. Everything that makes a commit durable stays on.
SETTINGS = {
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "max_connections": "300",
    "shared_buffers": "1GB",
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
}
REPORTED_SETTINGS = (
    *SETTINGS,
    "wal_level",
    "wal_sync_method",
    "wal_compression",
    "data_checksums",
    "commit_delay",
    "autovacuum",
    "jit",
)


@dataclass(frozen=True)
class Wal:
    """What was written to the write-ahead log: bytes of records without full-page images, commits, syncs."""

    record_bytes: int
    image_bytes: int
    commits: int
    syncs: int
    transactions: int


class Cluster:
    """A private PostgreSQL with durable settings; contestants get a database of their own each."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._postgres = EmbeddedPostgres(folder, settings=SETTINGS)
        self._names = (f"bench_{n}" for n in itertools.count())
        self.conninfo = ""

    def __enter__(self) -> Cluster:
        self.conninfo = asyncio.run(self._postgres.start())
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run(self._postgres.stop())

    @property
    def pid(self) -> int:
        """The server's first process."""
        assert self._postgres.pid is not None, "PostgreSQL has ended"
        return self._postgres.pid

    @contextmanager
    def database(self) -> Iterator[str]:
        """Make a database; yield how to connect to it; drop it."""
        name = sql.Identifier(text := next(self._names))
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'").format(name))
            try:
                yield make_conninfo(self.conninfo, dbname=text)
            finally:
                connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(name))

    def version(self) -> str:
        """Return PostgreSQL's version, such as `18.4`."""
        with psycopg.connect(self.conninfo) as connection:
            return one(connection, "SHOW server_version").split()[0]

    def settings(self) -> dict[str, str]:
        """Return the settings that matter to what is measured."""
        with psycopg.connect(self.conninfo) as connection:
            return {name: one(connection, f"SHOW {name}") for name in REPORTED_SETTINGS}

    @contextmanager
    def wal(self, conninfo: str) -> Iterator[list[Wal]]:
        """Append to the yielded list what is written until the end of the block, which must end all sessions.

        A CHECKPOINT comes first, and no other database may be in use. Records and commits are read from the log
        itself by pg_waldump; syncs and transactions (those that only read included) from PostgreSQL's statistics,
        which a session hands in when it ends.
        """
        found: list[Wal] = []
        with psycopg.connect(self.conninfo, autocommit=True) as connection:
            connection.execute("CHECKPOINT")
            began = one(connection, "SELECT pg_current_wal_insert_lsn()::text")
            before = self._statistics(connection, conninfo)
            yield found
            ended = one(connection, "SELECT pg_current_wal_flush_lsn()::text")
            deadline = time.monotonic() + 5
            name = str(conninfo_to_dict(conninfo)["dbname"])
            while sessions(connection, name) and time.monotonic() < deadline:
                time.sleep(0.05)
            time.sleep(1.2)  # processes that go on hand their statistics in once a second
            after = self._statistics(connection, conninfo)
        records, images, commits = self._dump(began, ended)
        found.append(Wal(records, images, commits, after[0] - before[0], after[1] - before[1]))

    def _statistics(self, connection: psycopg.Connection, conninfo: str) -> tuple[int, int]:
        """Return the syncs of the log in the whole cluster, and the transactions of a database."""
        connection.execute("SELECT pg_stat_clear_snapshot()")
        syncs = "SELECT wal_sync::text FROM pg_stat_wal"
        if connection.info.server_version >= 180000:
            syncs = "SELECT coalesce(sum(fsyncs), 0)::bigint::text FROM pg_stat_io WHERE object = 'wal'"
        name = conninfo_to_dict(conninfo)["dbname"]
        commits = one(connection, f"SELECT xact_commit::text FROM pg_stat_database WHERE datname = '{name}'")
        return int(one(connection, syncs)), int(commits)

    def _dump(self, began: str, ended: str) -> tuple[int, int, int]:
        """Return the bytes of records, those of full-page images, and the commits between two positions."""
        program = str(find_installation().bin_dir / "pg_waldump")
        command = [program, "--path", str(self._folder / "postgres" / "pg_wal"), "--stats=record"]
        text = subprocess.run(
            [*command, "--start", began, "--end", ended], capture_output=True, text=True, check=True
        ).stdout
        total = re.search(r"^Total +\d+ +(\d+) \[[\d.]+%\] +(\d+)", text, re.MULTILINE)
        commits = re.search(r"^Transaction/COMMIT +(\d+)", text, re.MULTILINE)
        if total is None:
            raise RuntimeError(f"pg_waldump said something unknown: {text[-400:]}")
        return int(total[1]), int(total[2]), int(commits[1]) if commits else 0


def sessions(connection: psycopg.Connection, database: str) -> int:
    """Return how many clients are connected to a database."""
    where = f"datname = '{database}' AND backend_type = 'client backend'"
    return int(one(connection, f"SELECT count(*)::text FROM pg_stat_activity WHERE {where}"))


def one(connection: psycopg.Connection, statement: str) -> str:
    """Return the one value, text, that a statement returns."""
    row = connection.execute(statement.encode()).fetchone()
    assert row is not None, statement
    return str(row[0])


@dataclass(frozen=True)
class Server:
    """A server that runs: where it listens, and its process."""

    url: str
    pid: int
    conninfo: str = ""

    def loads(self, library: str) -> bool:
        """Whether the process has loaded a library of this name."""
        return library in Path(f"/proc/{self.pid}/maps").read_text()


class StartFailed(Exception):
    """A server did not start; the message has the last line that it said."""


@contextmanager
def server(command: Sequence[str], log: Path, conninfo: str = "") -> Iterator[Server]:
    """Run a program of this project that prints `listening on URL`; yield it; stop it."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "DATABASE_URL"))}
    environ["PYTHONPATH"] = str(ROOT)
    with (
        open(log, "wb") as said,
        running([sys.executable, *command], environ, stdout=subprocess.PIPE, stderr=said.fileno()) as process,
    ):
        assert process.stdout is not None
        line = process.stdout.readline().decode()
        if not line.startswith("listening on "):
            process.wait()
            raise StartFailed((log.read_text().strip() or "it said nothing").splitlines()[-1])
        yield Server(line.removeprefix("listening on ").strip(), process.pid, conninfo)


@contextmanager
def running(
    command: Sequence[str | Path], environ: Mapping[str, str], stdout: int | None = None, stderr: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until the end of the block, then stop it, and kill it where it does not stop."""
    process = subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class Meter:
    """The CPU time of processes, with all their children, and the time that passed: a context manager.

    All that runs on the machine is counted as well, so that it shows where somebody else was at work.
    """

    pids: Mapping[str, int]
    seconds: float = 0.0
    used: dict[str, float] = field(default_factory=dict)

    def _read(self) -> dict[str, float]:
        return {name: cpu_seconds(pid) for name, pid in self.pids.items()} | {MACHINE: machine_cpu_seconds()}

    def __enter__(self) -> Meter:
        self._before = self._read()
        self._began_at = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._began_at
        self.used = {name: used - self._before[name] for name, used in self._read().items()}

    def shares(self) -> dict[str, float]:
        """Return the share of one core that each process had."""
        return {name: used / self.seconds for name, used in self.used.items()}


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and of all its children, also of those that have ended."""
    ticks = 0
    for each in tree(pid):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, fields[11:15]))  # user and system, its own and of children that were waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def main_thread_seconds(pid: int) -> float:
    """Return the CPU time of a process's first thread, which is where a broker's event loop runs; to the nanosecond."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


def machine_cpu_seconds() -> float:
    """Return the CPU time that this machine has spent on anything."""
    fields = [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle = fields[3] + fields[4]
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def tree(pid: int) -> list[int]:
    """Return a process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            children.setdefault(parent, []).append(int(process.name))
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found


def resident_bytes(pid: int) -> int:
    """Return the memory of a process and its children that no other process shares."""
    total = 0
    for each in tree(pid):
        with suppress(OSError):
            rollup = Path(f"/proc/{each}/smaps_rollup").read_text()
            total += sum(int(kilobytes) for kilobytes in re.findall(r"^Private_\w+: +(\d+) kB", rollup, re.MULTILINE))
    return total * 1024


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder that every account may enter, since for root PostgreSQL runs as another; remove it."""
    with tempfile.TemporaryDirectory(prefix="wonderq-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def end_on_sigterm() -> None:
    """Let SIGTERM end this process as Ctrl-C does, so that nothing is left running."""

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
