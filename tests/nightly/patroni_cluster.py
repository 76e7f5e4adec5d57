"""Three PostgreSQL servers under Patroni, and the etcd that decides which of them leads."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from network import NETWORKS, Host
from packages import install, unpack
from pair import PG_BIN, Node, as_account, free_port

PYTHON = Path("/usr/bin/python3")  # one that PostgreSQL's account may run
PACKAGES = ("patroni[etcd3]", "psycopg[binary]")
DEBIAN_PACKAGES = ("etcd-server",)
# Patroni takes no less.
TTL_SECONDS = 20
MEMBERS = 3
# All of them on this machine, as it is.
TOGETHER = [Host((), "127.0.0.1", "")] * (MEMBERS + 1)
# Only catches a hang: Patroni needs half a minute for much of what it does.
PATIENCE = 240.0
PR_SET_CHILD_SUBREAPER = 36


def fetch_programs(folder: Path) -> None:
    """Fetch Patroni and etcd into this folder. Raises CannotInstall."""
    install(folder / "env", PYTHON, *PACKAGES)
    unpack(folder / "debian", *DEBIAN_PACKAGES)


@contextlib.asynccontextmanager
async def running_cluster(folder: Path, programs: Path, hosts: Sequence[Host] = TOGETHER) -> AsyncIterator[Cluster]:
    """Yield a cluster that is complete, with its files in `folder`: etcd on the last of the hosts."""
    cluster = Cluster(folder, programs, hosts)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.close()


class Member(Node):
    """A PostgreSQL server that Patroni, in a process beside it, starts, watches and promotes."""

    def __init__(self, folder: Path, programs: Path, name: str, host: Host, etcd: str) -> None:
        super().__init__(folder, name, host.address)
        self.host = host
        self.rest = f"{host.address}:{free_port()}"
        self._folder = folder
        self._program = programs / "env/bin/patroni"
        self._configuration = folder / f"{name}.yml"
        self._configuration.write_text(json.dumps(self._settings_of_patroni(folder, etcd)))  # JSON is YAML
        self._agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        with (self._folder / f"{self.name}.patroni.log").open("ab") as log:
            self._agent = subprocess.Popen(
                [*self.host.words, *as_account(), str(self._program), str(self._configuration)],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def kill_agent(self) -> None:
        if self._agent is not None:
            self._agent.kill()
            self._agent.wait()

    async def kill(self) -> None:
        postmaster = self._postmaster()
        send([postmaster], signal.SIGSTOP)
        while pids := set(self._pids()) - {postmaster}:
            send(pids, signal.SIGKILL)
            await asyncio.sleep(0.001)
        send([postmaster], signal.SIGKILL)

    def pause_agent(self) -> None:
        assert self._agent is not None
        self._agent.send_signal(signal.SIGSTOP)

    def resume_agent(self) -> None:
        assert self._agent is not None
        self._agent.send_signal(signal.SIGCONT)

    def pause(self) -> None:
        self.pause_agent()
        send([self._postmaster()], signal.SIGSTOP)
        send(self._pids(), signal.SIGSTOP)

    def resume(self) -> None:
        super().resume()
        self.resume_agent()

    async def close(self) -> None:
        self.kill_agent()
        if self._pids():
            await self.kill()

    def _postmaster(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _settings_of_patroni(self, folder: Path, etcd: str) -> dict[str, Any]:
        password = {"password": "none"}
        return {
            "scope": "wonderq",
            "name": self.name,
            "restapi": {"listen": self.rest, "connect_address": self.rest},
            "etcd3": {"host": etcd},
            "bootstrap": {
                "dcs": {
                    "ttl": TTL_SECONDS,
                    "loop_wait": 1,
                    "retry_timeout": 3,
                    # A primary that has crashed is not started again in its place.
                    "primary_start_timeout": 0,
                    "synchronous_mode": True,
                    "synchronous_mode_strict": True,
                    "failsafe_mode": True,
                    "postgresql": {
                        "use_pg_rewind": True,
                        "parameters": {
                            "wal_log_hints": "on",
                            "wal_keep_size": "256MB",
                            "wal_receiver_timeout": "5s",
                            "wal_sender_timeout": "5s",
                            "shared_buffers": "64MB",
                        },
                    },
                },
                "initdb": [{"encoding": "UTF8"}, "data-checksums", {"locale": "C.UTF-8"}],
            },
            "postgresql": {
                "listen": f"{self.address}:{self.port}",
                "connect_address": f"{self.address}:{self.port}",
                "data_dir": str(self._data),
                "bin_dir": str(PG_BIN),
                "pgpass": str(folder / f"{self.name}.pgpass"),
                # Or a network that fails makes Patroni's own look at its server hang.
                "use_unix_socket": True,
                "use_unix_socket_repl": True,
                "authentication": {
                    "superuser": {"username": "postgres", **password},
                    "replication": {"username": "replicator", **password},
                    "rewind": {"username": "rewinder", **password},
                },
                "parameters": {"unix_socket_directories": str(folder)},
                "pg_hba": [
                    f"{how} {what} all {whence} trust"
                    for what in ("all", "replication")
                    for how, whence in (("host", "127.0.0.1/32"), ("host", NETWORKS), ("local", ""))
                ],
            },
        }


class Cluster:
    """Three members and the etcd that decides which of them leads."""

    def __init__(self, folder: Path, programs: Path, hosts: Sequence[Host]) -> None:
        self._folder = folder
        self._programs = programs
        *members, self._etcd_host = hosts
        self._etcd = f"{self._etcd_host.address}:{free_port()}"
        self.members = [Member(folder, programs, f"p{n}", host, self._etcd) for n, host in enumerate(members, 1)]
        self.etcd: subprocess.Popen[bytes]
        self._roles = {"leader", "sync_standby"}

    async def start(self) -> None:
        client, peer = f"http://{self._etcd}", f"http://{self._etcd_host.address}:{free_port()}"
        words = {
            "--name": "etcd",
            "--data-dir": str(self._folder / "etcd"),
            "--listen-client-urls": client,
            "--advertise-client-urls": client,
            "--listen-peer-urls": peer,
            "--initial-advertise-peer-urls": peer,
            "--initial-cluster": f"etcd={peer}",
        }
        flags = [word for flag in words.items() for word in flag]
        with (self._folder / "etcd.log").open("wb") as log:
            self.etcd = subprocess.Popen(
                [*self._etcd_host.words, *as_account(), str(self._programs / "debian/usr/bin/etcd"), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for member in self.members:
            member.start_agent()
        await self.is_healthy()

    async def is_healthy(self, *, but: Member | None = None) -> None:
        """Return when one leads and all others follow; one is its synchronous standby, unless none has to be.

        Ask none but the others where one may not know yet.
        """
        async with asyncio.timeout(PATIENCE):
            while True:
                found = await self._found(but)
                # One that has just come back runs, but still has to be rewound, or to find the new leader.
                well = {"leader": "running"}
                roles = [one["role"] for one in found if one["state"] == well.get(one["role"], "streaming")]
                if len(roles) == len(self.members) and self._roles <= set(roles):
                    return
                await asyncio.sleep(0.1)

    async def leader(self, *, but: Member | None = None) -> Member:
        """Return the one that leads, as one of the members says; ask none but the others where one may not know yet."""
        async with asyncio.timeout(PATIENCE):
            while True:
                leaders = {one["name"] for one in await self._found(but) if one["role"] == "leader"}
                for member in self.members:
                    if member.name in leaders:
                        return member
                await asyncio.sleep(0.1)

    async def run_asynchronously(self) -> None:
        """Let no commit wait for a standby any more: what is acknowledged then can be lost."""
        leader = await self.leader()
        change = {"synchronous_mode": False, "synchronous_mode_strict": False}
        async with aiohttp.ClientSession() as http, http.patch(f"http://{leader.rest}/config", json=change) as response:
            response.raise_for_status()
        async with asyncio.timeout(PATIENCE):
            while await leader.query("SELECT 1 WHERE current_setting('synchronous_standby_names') <> ''"):
                await asyncio.sleep(0.1)
        await leader.query("CHECKPOINT")  # it is the checkpointer that tells commits to wait
        self._roles = {"leader", "replica"}

    async def close(self) -> None:
        for member in self.members:
            await member.close()
        self.etcd.kill()
        self.etcd.wait()

    async def _found(self, but: Member | None) -> list[dict[str, Any]]:
        """Return what one of the agents says of the members."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            for member in self.members:
                if member is but:
                    continue
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(f"http://{member.rest}/cluster") as response:
                        response.raise_for_status()
                        found: list[dict[str, Any]] = (await response.json())["members"]
                        return found
        return []


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


@contextlib.asynccontextmanager
async def adopting_orphans() -> AsyncIterator[None]:
    """Be the parent of servers, which their agents leave, and bury them soon.

    Not every init does that at once, and Patroni waits until a server that has ended cannot be seen any more.
    """
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    burying = asyncio.create_task(bury_servers())
    try:
        yield
    finally:
        burying.cancel()
        bury_dead_servers()
        prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


async def bury_servers() -> None:
    while True:
        bury_dead_servers()
        await asyncio.sleep(0.1)


def bury_dead_servers() -> None:
    """Reap what has ended, is a child of ours, and is called postgres; other children are waited for elsewhere."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                state, parent = rest.split()[:2]
                if (state, int(parent)) == ("Z", os.getpid()) and name.endswith("(postgres"):
                    os.waitpid(int(entry.name), os.WNOHANG)
