"""Brokers as processes, each with ways of its own to a pair of PostgreSQL servers, and calls to them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from pair import DIES_WITH_US, PATIENCE, Node, Pair, folder_for_servers, free_port, until
from proxy import Proxy

# A call that the database does not answer is given up after so many seconds.
REQUEST_TIMEOUT = 3.0
# They may push to receivers on this machine.
LOOPBACK = "127.0.0.0/8"
# What no log may have; a log that has it fails the test.
BAD_SIGNS = ("Traceback", "deadlock", "PANIC")


class Broker:
    """One `python -m broker serve`, which keeps its port over restarts, and the proxies between it and each server."""

    def __init__(self, name: str, folder: Path, proxies: Sequence[Proxy]) -> None:
        self.name = name
        self.proxies = proxies
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._said = folder / f"{name}.out"
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What it has said on standard error, over all its lives."""
        return self._log.read_text()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self, *flags: str) -> None:
        """Start it, or start it again; return when it listens."""
        hosts = ",".join("127.0.0.1" for _ in self.proxies)
        ports = ",".join(str(proxy.port) for proxy in self.proxies)
        url = f"postgresql:///postgres?host={hosts}&port={ports}&user=postgres&sslmode=disable"
        flags = ("--port", str(self.port), "--request-timeout", str(REQUEST_TIMEOUT), *flags)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "PG", "DATABASE"))}
        with self._said.open("wb") as said, self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*DIES_WITH_US, sys.executable, "-m", "broker", "serve", *flags],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=log,
                env=kept | {"DATABASE_URL": f"{url}&target_session_attrs=read-write", "BROKER_WEBHOOK_ALLOW": LOOPBACK},
            )
        await until(self._listens)

    async def kill(self) -> None:
        """End it with SIGKILL."""
        self._running().kill()
        await self.ended()

    def pause(self) -> None:
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running().send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """Tell it to stop."""
        self._running().send_signal(signal.SIGTERM)

    async def ended(self) -> int:
        """Wait until it has ended; return its exit code."""
        process = self._running()
        async with asyncio.timeout(PATIENCE):
            while process.poll() is None:
                await asyncio.sleep(0.005)
        return int(process.returncode)

    async def close(self) -> None:
        if self.is_running:
            await self.kill()

    def bad_signs(self) -> list[str]:
        """Return what its log should not have."""
        return [f"{self.name}: {sign}" for sign in BAD_SIGNS if sign in self.log]

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    async def _listens(self) -> bool:
        assert self.is_running, self.log[-2000:]
        return "listening on" in self._said.read_text()


class Deployment:
    """A pair of servers and the brokers on it."""

    def __init__(self, folder: Path, pair: Pair, brokers: list[Broker]) -> None:
        self.folder = folder
        self.pair = pair
        self.brokers = brokers

    @property
    def urls(self) -> list[str]:
        return [broker.url for broker in self.brokers]

    def bad_signs(self) -> list[str]:
        """Return what is in the logs of brokers and servers and should not be there."""
        found = [sign for broker in self.brokers for sign in broker.bad_signs()]
        for node in self.pair.nodes:
            found += [f"{node.name}: {sign}" for sign in BAD_SIGNS[1:] if sign in node.log.read_text()]
        return found


@contextlib.asynccontextmanager
async def running_brokers(folder: Path, nodes: Sequence[Node], number: int, *flags: str) -> AsyncIterator[list[Broker]]:
    """Yield so many brokers, each of which reaches each of the servers through a proxy of its own."""
    async with contextlib.AsyncExitStack() as stack:
        brokers = []
        for name in (f"broker-{n}" for n in range(1, number + 1)):
            proxies = [await stack.enter_async_context(Proxy(node.port, node.address)) for node in nodes]
            broker = Broker(name, folder, proxies)
            stack.push_async_callback(broker.close)
            await broker.start(*flags)
            brokers.append(broker)
        yield brokers


@contextlib.asynccontextmanager
async def running_deployment(number: int = 2) -> AsyncIterator[Deployment]:
    """Yield brokers on a primary and its synchronous standby."""
    with folder_for_servers() as folder:
        pair = Pair(folder)
        try:
            await pair.start()
            async with running_brokers(folder, pair.nodes, number) as brokers:
                yield Deployment(folder, pair, brokers)
        finally:
            await pair.close()


async def answer(http: aiohttp.ClientSession, url: str, method: str, /, **params: Any) -> dict[str, Any]:
    """Call a method; return the whole answer. Raises aiohttp.ClientError where none comes."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with http.post(f"{url}/rpc", json=request, timeout=aiohttp.ClientTimeout(total=PATIENCE)) as response:
        answered: dict[str, Any] = await response.json()
        return answered


async def call(http: aiohttp.ClientSession, url: str, method: str, /, **params: Any) -> Any:
    """Call a method; return its result."""
    answered = await answer(http, url, method, **params)
    assert "result" in answered, answered
    return answered["result"]
