"""PostgreSQL servers made by hand, to be killed, hung and promoted: a primary and its synchronous standby.

A server is a child of this process and dies with it. Its settings are words of its command line: pg_rewind and
pg_basebackup bring the other server's files along, and a port or a name in them would be the wrong one. A server
that was promoted runs alone, and its commits wait for nobody, until `Pair.rejoin` has made the other one its standby.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg

PG_BIN = Path(os.environ.get("PG_BIN", "/usr/lib/postgresql/15/bin"))
# Only catches a hang.
PATIENCE = 120.0
# PostgreSQL refuses to run as root.
ACCOUNT = "postgres"
# Words before a command: it is killed when this process ends, however that ends.
DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "64MB",
    "max_connections": "100",
    "hot_standby": "on",
    "wal_keep_size": "256MB",
    "wal_receiver_timeout": "5s",
    "wal_sender_timeout": "5s",
    "wal_retrieve_retry_interval": "100ms",
    "lc_messages": "C",
    "log_min_messages": "warning",
}


class Node:
    """One PostgreSQL server, with the account `postgres` and no password, in `folder / name`."""

    def __init__(self, folder: Path, name: str, address: str = "127.0.0.1") -> None:
        self.name = name
        self.address = address
        self.port = free_port()
        self.log = folder / f"{name}.log"
        # More settings, and environment variables of PostgreSQL alone; both count from the next start on.
        self.settings: dict[str, str] = {}
        self.variables: dict[str, str] = {}
        self._data = folder / name
        self._follows: Node | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def conninfo(self) -> str:
        return f"host={self.address} port={self.port} user=postgres dbname=postgres sslmode=disable connect_timeout=5"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def make(self) -> None:
        """Make an empty database cluster."""
        await _run("initdb", "-D", self._data, "-U", "postgres", "-A", "trust", "--data-checksums", "--no-sync",
                   "--encoding=UTF8", "--locale=C.UTF-8")  # fmt: skip

    async def copy(self, primary: Node) -> None:
        """Become a copy of a running server, in place of whatever this one was; then it is its standby."""
        shutil.rmtree(self._data, ignore_errors=True)
        await _run("pg_basebackup", "-D", self._data, "-d", primary.conninfo, "-X", "stream", "-c", "fast", "--no-sync")
        self._follow(primary)

    async def rewind(self, primary: Node) -> None:
        """Undo what this server, which was killed, has and the other one has not; then it is its standby."""
        await primary.query("CHECKPOINT")  # pg_rewind finds the new timeline in the control file
        await _run("pg_rewind", "-D", self._data, "--source-server", primary.conninfo, "--no-sync")
        self._follow(primary)

    async def start(self) -> None:
        """Start it and wait until it answers, after recovery from a crash too."""
        settings = _SETTINGS | {"port": str(self.port), "cluster_name": self.name} | self.settings
        if self._follows is not None:
            settings["primary_conninfo"] = f"{self._follows.conninfo} application_name={self.name}"
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*as_account(), "env", *variables, str(PG_BIN / "postgres"), "-D", str(self._data), *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        await until(self._answers)

    async def promote(self) -> None:
        """Make a standby the primary; its commits wait for nobody then."""
        # Not by a statement: what is replayed meanwhile may be in conflict with it, and then it is cancelled.
        await _run("pg_ctl", "promote", "-D", self._data, "--wait", "--timeout", int(PATIENCE))
        self._follows = None

    async def kill(self) -> None:
        """Kill all its processes at once, so that none lives to do any more; return when they are gone."""
        process = self._process
        assert process is not None
        process.send_signal(signal.SIGSTOP)  # or it would see its children die, and act
        _signal(self._pids(), signal.SIGKILL)
        process.kill()
        process.wait()
        while pids := self._pids():  # what was being forked at that moment
            _signal(pids, signal.SIGKILL)
            await asyncio.sleep(0.001)

    def pause(self) -> None:
        """Stop all its processes. What was sent to them already waits in the system's buffers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        stopped: set[int] = set()
        while pids := set(self._pids()) - stopped:
            _signal(pids, signal.SIGSTOP)
            stopped |= pids

    def resume(self) -> None:
        """Let them go on."""
        _signal(self._pids(), signal.SIGCONT)

    async def close(self) -> None:
        if self.is_running:
            await self.kill()

    async def query(self, statement: str, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run one statement on a connection of its own; return its rows, if it has any."""
        async with await psycopg.AsyncConnection.connect(self.conninfo, autocommit=True) as connection:
            cursor = await connection.execute(statement.encode(), params or None)
            return await cursor.fetchall() if cursor.description else []

    async def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(f"PostgreSQL has ended:\n{self.log.read_text()[-2000:]}")
        try:
            await self.query("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _follow(self, primary: Node) -> None:
        # What ALTER SYSTEM has set there would make this server, once promoted, wait for itself.
        (self._data / "postgresql.auto.conf").write_text("")
        mark = self._data / "standby.signal"
        mark.touch()
        if os.geteuid() == 0:
            shutil.chown(mark, ACCOUNT)
        self._follows = primary

    def _pids(self) -> list[int]:
        """Return its processes; those that are dead and not yet reaped have no folder any more."""
        pids = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "cwd") == str(self._data):
                    pids.append(int(entry.name))
        return pids


class Pair:
    """A primary and a standby. Every commit waits until the standby has it, unless the primary runs alone."""

    def __init__(self, folder: Path) -> None:
        self.nodes = (Node(folder, "a"), Node(folder, "b"))
        self.primary, self.standby = self.nodes

    async def start(self) -> None:
        await self.primary.make()
        await self.primary.start()
        await self.standby.copy(self.primary)
        await self.standby.start()
        await self.synchronise()

    async def synchronise(self) -> None:
        """Let commits wait for the standby; return when it has all that was ever committed.

        It has to be there, or come by itself.
        """
        primary = self.primary
        await primary.query(f"ALTER SYSTEM SET synchronous_standby_names = '{self.standby.name}'")
        await primary.query("SELECT pg_reload_conf()")
        streaming = "SELECT 1 FROM pg_stat_replication WHERE state = 'streaming' AND sync_state = 'sync'"
        await until(lambda: primary.query(streaming))
        # It is the checkpointer that tells commits to wait; this one does, and so has all before it replicated.
        await primary.query("CHECKPOINT")
        await primary.query("SELECT pg_logical_emit_message(true, 'pair', 'synchronised')")

    async def run_asynchronously(self) -> None:
        """Let no commit wait for the standby any more: what is acknowledged then can be lost."""
        await self.primary.query("ALTER SYSTEM RESET synchronous_standby_names")
        await self.primary.query("SELECT pg_reload_conf()")
        await until(lambda: self.primary.query("SELECT 1 WHERE current_setting('synchronous_standby_names') = ''"))
        await self.primary.query("CHECKPOINT")

    async def fail_over(self) -> None:
        """Make the standby the primary; the old one must be dead."""
        assert not self.primary.is_running
        await self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    async def rejoin(self) -> None:
        """Make the old primary, which was killed, the new one's synchronous standby."""
        try:
            await self.standby.rewind(self.primary)
        except ToolFailed:
            await self.standby.copy(self.primary)
        await self.standby.start()
        await self.synchronise()

    async def close(self) -> None:
        for node in self.nodes:
            await node.close()


class ToolFailed(Exception):
    """A program of PostgreSQL has failed; says what it said."""


@contextlib.contextmanager
def folder_for_servers() -> Iterator[Path]:
    """Yield a folder in which PostgreSQL's account may make others; it goes away at the end."""
    with tempfile.TemporaryDirectory(prefix="wonderq-faults-", ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)
        if os.geteuid() == 0:
            shutil.chown(name, ACCOUNT)
        yield Path(name)


@contextlib.asynccontextmanager
async def running_node() -> AsyncIterator[Node]:
    """Yield one server that is running, with nothing in it."""
    with folder_for_servers() as folder:
        node = Node(folder, "single")
        try:
            await node.make()
            await node.start()
            yield node
        finally:
            await node.close()


@contextlib.asynccontextmanager
async def running_pair() -> AsyncIterator[Pair]:
    """Yield a primary and its synchronous standby, with nothing in them."""
    with folder_for_servers() as folder:
        pair = Pair(folder)
        try:
            await pair.start()
            yield pair
        finally:
            await pair.close()


def free_port() -> int:
    """Return a port that stays free while its server is dead.

    It is below those that the system hands out: an outgoing connection could be given a dead server's port, or,
    when it is made to that very port, be connected to itself.
    """
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, lowest)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


async def until(fact: Callable[[], Any]) -> None:
    """Ask until the answer is true."""
    async with asyncio.timeout(PATIENCE):
        while not await fact():
            await asyncio.sleep(0.01)


def as_account() -> list[str]:
    """Return the words that start a program as PostgreSQL's account, and let it die with this process.

    runuser and su stay as parents, and stop themselves when their child is stopped.
    """
    if os.geteuid() != 0:
        return [*DIES_WITH_US]
    account = pwd.getpwnam(ACCOUNT)
    return [*DIES_WITH_US, "--reuid", str(account.pw_uid), "--regid", str(account.pw_gid), "--init-groups"]


async def _run(program: str, *words: object) -> None:
    process = await asyncio.create_subprocess_exec(
        *(*as_account(), str(PG_BIN / program), *map(str, words)),
        cwd="/",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    if process.returncode:
        raise ToolFailed(f"{program}: {said.decode()}")


def _signal(pids: Sequence[int] | set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
