"""Three servers under Patroni and etcd: their primary dies, their primary's machine dies or hangs, etcd hangs.

Patroni is installed into an environment of its own, and etcd is unpacked beside it, in a folder that goes away. Two
brokers, which are never started again, know all three servers and find the one that takes writes. What is left out: a
network that is parted, which needs a network namespace and packet filters.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import aiohttp

from brokers import Broker, answer, call
from load import Load
from packages import CannotInstall, install, unpack
from pair import PG_BIN, Node, as_account, folder_for_servers, free_port
from parts import Options, Result, Say
from under_load import at_work, judge

PYTHON = Path("/usr/bin/python3")  # one that PostgreSQL's account may run
PACKAGES = ("patroni[etcd3]", "psycopg[binary]")
DEBIAN_PACKAGES = ("etcd-server",)
KILLS = 10
QUICK_KILLS = 3
PROBES = "probes"
# Patroni takes no less.
TTL_SECONDS = 20
DCS_OUTAGE_SECONDS = 15
# Only catches a hang: Patroni needs half a minute for much of what it does.
PATIENCE = 240.0
PR_SET_CHILD_SUBREAPER = 36
# What is aimed at; a machine that does other things too is granted twice as much.
AIMS = {
    "primary killed": 5.0,
    "machine killed": TTL_SECONDS + 5.0,
    "machine hung": TTL_SECONDS + 10.0,
    "etcd hung": 1.0,
}


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    with folder_for_servers() as folder:
        try:
            await asyncio.to_thread(install, folder / "env", PYTHON, *PACKAGES)
            await asyncio.to_thread(unpack, folder / "debian", *DEBIAN_PACKAGES)
        except CannotInstall as error:
            yield Result("Patroni", skipped=str(error))
            return
        async with adopting_orphans(), running_cluster(folder) as cluster:
            say("three servers are up, one of them a synchronous standby")
            async with at_work(folder, cluster.members, options.seed, brokers=2) as (brokers, load):
                async with aiohttp.ClientSession() as http:
                    await call(http, brokers[0].url, "create_queue", queue=PROBES)
                    async for result in faults(cluster, brokers, load, http, options, say):
                        yield result
                everything = Result("all of these")
                leader = await cluster.leader()
                await judge(everything, leader, brokers, load)
                yield everything


@contextlib.asynccontextmanager
async def running_cluster(folder: Path) -> AsyncIterator[Cluster]:
    cluster = Cluster(folder)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.close()


async def faults(
    cluster: Cluster, brokers: list[Broker], load: Load, http: aiohttp.ClientSession, options: Options, say: Say
) -> AsyncIterator[Result]:
    kills = options.number(KILLS, QUICK_KILLS)
    for name, times in (("primary killed", kills), ("machine killed", 1), ("machine hung", 1), ("etcd hung", 1)):
        result = Result(f"{name}, {times} times")
        seconds = []
        for n in range(times):
            await cluster.is_healthy()
            await load.works()
            seconds.append(await HAPPENINGS[name](cluster, Probe(http, brokers, f"{name} {n}")))
            say(f"{name}: acknowledged again after {seconds[-1]:.2f} s")
        result.figures = {"first_acknowledged_after_seconds": [round(each, 2) for each in seconds], "aim": AIMS[name]}
        result.expect(max(seconds) <= 2 * AIMS[name] + 3, f"nothing was acknowledged for {max(seconds):.1f} s")
        yield result


class Probe:
    """Clients that send messages of their own until one is acknowledged, through every broker."""

    def __init__(self, http: aiohttp.ClientSession, brokers: list[Broker], name: str) -> None:
        self._http = http
        self._urls = [broker.url for broker in brokers] * 3
        self._name = name

    async def seconds(self) -> float:
        """Return after how long one of them is acknowledged."""
        began_at = time.monotonic()
        asking = [asyncio.create_task(self._ask(url, n)) for n, url in enumerate(self._urls)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        seconds = time.monotonic() - began_at
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        return seconds

    async def _ask(self, url: str, number: int) -> None:
        await asyncio.sleep(number * 0.1)
        message: dict[str, Any] = {"queue": PROBES, "body": self._name, "idempotency_key": f"{self._name} {number}"}
        while "error" in await answer(self._http, url, "enqueue", **message):
            await asyncio.sleep(0.02)


async def primary_killed(cluster: Cluster, probe: Probe) -> float:
    await (await cluster.leader()).kill()
    return await probe.seconds()


async def machine_killed(cluster: Cluster, probe: Probe) -> float:
    leader = await cluster.leader()
    leader.kill_agent()
    await leader.kill()
    seconds = await probe.seconds()
    leader.start_agent()
    return seconds


async def machine_hung(cluster: Cluster, probe: Probe) -> float:
    leader = await cluster.leader()
    leader.pause()
    seconds = await probe.seconds()
    leader.resume()
    return seconds


async def etcd_hung(cluster: Cluster, probe: Probe) -> float:
    """Return the longest time for which nothing was acknowledged while it hung."""
    cluster.etcd.send_signal(signal.SIGSTOP)
    until = time.monotonic() + DCS_OUTAGE_SECONDS
    longest = 0.0
    try:
        while time.monotonic() < until:
            longest = max(longest, await probe.seconds())
            await asyncio.sleep(0.05)
    finally:
        cluster.etcd.send_signal(signal.SIGCONT)
    return longest


HAPPENINGS = {
    "primary killed": primary_killed,
    "machine killed": machine_killed,
    "machine hung": machine_hung,
    "etcd hung": etcd_hung,
}


class Member(Node):
    """A PostgreSQL server that Patroni, in a process beside it, starts, watches and promotes."""

    def __init__(self, folder: Path, name: str, etcd_port: int) -> None:
        super().__init__(folder, name)
        self.rest_port = free_port()
        self._folder = folder
        self._configuration = folder / f"{name}.yml"
        self._configuration.write_text(json.dumps(self._settings_of_patroni(folder, etcd_port)))  # JSON is YAML
        self._agent: subprocess.Popen[bytes] | None = None

    def start_agent(self) -> None:
        with (self._folder / f"{self.name}.patroni.log").open("ab") as log:
            self._agent = subprocess.Popen(
                [*as_account(), str(self._folder / "env/bin/patroni"), str(self._configuration)],
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

    def pause(self) -> None:
        assert self._agent is not None
        self._agent.send_signal(signal.SIGSTOP)
        send([self._postmaster()], signal.SIGSTOP)
        send(self._pids(), signal.SIGSTOP)

    def resume(self) -> None:
        assert self._agent is not None
        super().resume()
        self._agent.send_signal(signal.SIGCONT)

    async def close(self) -> None:
        self.kill_agent()
        if self._pids():
            await self.kill()

    def _postmaster(self) -> int:
        return int((self._data / "postmaster.pid").read_text().split()[0])

    def _settings_of_patroni(self, folder: Path, etcd_port: int) -> dict[str, Any]:
        password = {"password": "none"}
        return {
            "scope": "wonderq",
            "name": self.name,
            "restapi": {"listen": f"127.0.0.1:{self.rest_port}", "connect_address": f"127.0.0.1:{self.rest_port}"},
            "etcd3": {"host": f"127.0.0.1:{etcd_port}"},
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
                "listen": f"127.0.0.1:{self.port}",
                "connect_address": f"127.0.0.1:{self.port}",
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
                    "host all all 127.0.0.1/32 trust",
                    "host replication all 127.0.0.1/32 trust",
                    "local all all trust",
                    "local replication all trust",
                ],
            },
        }


class Cluster:
    """Three members and the etcd that decides which of them leads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._etcd_port = free_port()
        self.members = [Member(folder, f"p{n}", self._etcd_port) for n in (1, 2, 3)]
        self.etcd: subprocess.Popen[bytes]

    async def start(self) -> None:
        client, peer = f"http://127.0.0.1:{self._etcd_port}", f"http://127.0.0.1:{free_port()}"
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
                [*as_account(), str(self._folder / "debian/usr/bin/etcd"), *flags],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        for member in self.members:
            member.start_agent()
        await self.is_healthy()

    async def is_healthy(self) -> None:
        """Return when all members are there, one leads and one is its synchronous standby."""
        async with asyncio.timeout(PATIENCE):
            while True:
                found = await self._found()
                roles = [one["role"] for one in found if one["state"] in ("running", "streaming")]
                if len(roles) == len(self.members) and {"leader", "sync_standby"} <= set(roles):
                    return
                await asyncio.sleep(0.1)

    async def leader(self) -> Member:
        async with asyncio.timeout(PATIENCE):
            while True:
                leaders = {one["name"] for one in await self._found() if one["role"] == "leader"}
                for member in self.members:
                    if member.name in leaders:
                        return member
                await asyncio.sleep(0.1)

    async def close(self) -> None:
        for member in self.members:
            await member.close()
        self.etcd.kill()
        self.etcd.wait()

    async def _found(self) -> list[dict[str, Any]]:
        """Return what one of the agents says of the members."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
            for member in self.members:
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with http.get(f"http://127.0.0.1:{member.rest_port}/cluster") as response:
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
