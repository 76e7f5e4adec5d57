"""What a cell works with: the private PostgreSQL, brokers, peers, bodies, and how long to measure."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.daemon_peers import PEERS, Peer
from benchmarks.load import Tally, write_bodies, wrk
from benchmarks.processes import MACHINE, Cluster, Meter, Server, server
from benchmarks.results import US, Cell, Sample, figure, percentile
from benchmarks.sql_peers import Pgmq, Procrastinate
from broker.storage.migrate import migrate

# Room for a body of 4 KiB with its quotes, beyond the default for queues.
MAX_MESSAGE_BYTES = 65_536


@dataclass(frozen=True)
class Options:
    """How long and how often to measure. A smoke run does everything once, for about a second, with few rows."""

    seconds: float = 3.0
    rounds: int = 3
    smoke: bool = False


class Bench:
    """Everything that cells share. What it starts, it stops with the stack that it was given."""

    def __init__(self, options: Options, folder: Path, cluster: Cluster, stack: ExitStack) -> None:
        self.options = options
        self.folder = folder
        self.cluster = cluster
        self._stack = stack
        self._pgmq: Pgmq | None = None
        self._logs = 0

    def rows(self, count: int) -> int:
        """Return how many rows to use where a full run uses `count`."""
        return min(count, 2_000) if self.options.smoke else count

    def bodies(self, size: int) -> Path:
        """Return a pool of bodies of `size` characters."""
        path = self.folder / f"bodies_{size}"
        return path if path.exists() else write_bodies(path, size)

    @contextmanager
    def broker(self, *flags: str) -> Iterator[Server]:
        """Run a broker on a database of its own."""
        with self.cluster.database() as conninfo, self.broker_on(conninfo, *flags) as broker:
            yield broker

    @contextmanager
    def broker_on(self, conninfo: str, *flags: str) -> Iterator[Server]:
        """Run a broker on this database."""
        command = ["-m", "broker", "serve", "--port", "0", "--database-url", conninfo, *flags]
        with server(command, self.new_log(), conninfo) as broker:
            yield broker

    def new_log(self) -> Path:
        """Return a file for what a process says."""
        self._logs += 1
        return self.folder / f"log_{self._logs}"

    @contextmanager
    def constant_server(self, *, uvloop: bool) -> Iterator[Server]:
        """Run the server that answers a constant."""
        with server(["-m", "benchmarks.constant_server", *(["--uvloop"] if uvloop else [])], self.new_log()) as one:
            yield one

    def pgmq(self) -> Pgmq | None:
        """Return PGMQ in a database of its own, or None where it is not installed."""
        if self._pgmq is None and Pgmq.version() is not None:
            self._pgmq = Pgmq(self._stack.enter_context(self.cluster.database()))
            self._pgmq.install()
        return self._pgmq

    @contextmanager
    def procrastinate(self) -> Iterator[Procrastinate | None]:
        """Yield Procrastinate in a database of its own, or None where it is not installed."""
        if Procrastinate.version() is None:
            yield None
            return
        with self.cluster.database() as conninfo:
            peer = Procrastinate(conninfo)
            peer.install()
            yield peer

    @contextmanager
    def daemons(self) -> Iterator[list[Peer]]:
        """Run the peers that are servers of their own; yield those that are installed."""
        with ExitStack() as stack:
            peers = []
            for kind in PEERS:
                if kind.is_installed():
                    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=self.folder, prefix=kind.name)))
                    peers.append(stack.enter_context(kind.start(folder)))
            yield peers

    def measure(
        self, cell: Cell, case: str, who: str, round_: int, load: Callable[[], Tally], pids: Mapping[str, int]
    ) -> Sample:
        """Apply a load; append a sample with its rate, and with the CPU of the load and of these processes."""
        with Meter(pids) as meter:
            tally = load()
        used = {"load": tally.cpu_seconds, **meter.used}
        # Starting the load takes time as well, which is none of the servers'.
        cpu = {name: cpu_seconds / tally.seconds for name, cpu_seconds in used.items()}
        cpu[MACHINE] = meter.used[MACHINE] / meter.seconds
        figures = {"messages_per_second": tally.messages_per_second}
        if tally.latencies_ms:
            tally.p50_ms, tally.p99_ms = (percentile(tally.latencies_ms, share) for share in (0.5, 0.99))
        figures |= {name: value for name in ("p50_ms", "p99_ms") if (value := getattr(tally, name)) is not None}
        sample = Sample(case, who, round_, figures, cpu, errors=tally.errors)
        cell.samples.append(sample)
        self.progress(f"{cell.name}: {case}, {who}, round {round_}: {figure(tally.messages_per_second)} messages/s")
        for kind, count in tally.errors.items():
            self.progress(f"    {count} × {kind}")
        return sample

    def warm_up(self, broker: Server, size: int = 200) -> None:
        """Let a broker prepare what it prepares: statements, connections, code."""
        if not self.options.smoke:
            create_queue(broker, "warm")
            wrk("life", broker.url, 16, 1, queue="warm", batch=1, bodies=self.bodies(size))

    def progress(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)


def rpc(broker: Server, method: str, **params: Any) -> Any:
    """Call a method of a broker; return its result. Raises RuntimeError where it is refused."""
    request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{broker.url}/rpc", request, headers), timeout=60) as response:
        answer = json.load(response)
    if "error" in answer:
        raise RuntimeError(f"{method} was refused: {answer['error']['message']}")
    return answer["result"]


def create_queue(broker: Server, name: str) -> str:
    """Create a queue that takes every body used here; return its name."""
    rpc(broker, "create_queue", queue=name, max_message_bytes=MAX_MESSAGE_BYTES)
    return name


def prepare(conninfo: str, queues: Sequence[str]) -> None:
    """Make the tables of a broker, where they are not there yet, and these queues, while no broker runs."""
    asyncio.run(migrate(conninfo))
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO broker.queues (name, max_message_bytes) SELECT unnest(%s::text[]), %s",
            (list(queues), MAX_MESSAGE_BYTES),
        )


def processes(broker: Server, cluster: Cluster, name: str = US) -> dict[str, int]:
    """Return whose CPU to report while a broker works."""
    return {name: broker.pid, "PostgreSQL": cluster.pid}
