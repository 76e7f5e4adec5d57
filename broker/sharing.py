"""One port for several processes: a listening socket that all of them inherit, and a fair share for each.

The supervisor listens; the workers accept. Against the other way, a socket of its own for each worker (SO_REUSEPORT),
there are three reasons. What waits to be accepted belongs to no worker, so none of it is lost or has to wait when one
dies or hangs. Nobody else can get hold of a part of the port: with SO_REUSEPORT any program of the same account can,
a second broker that was started by mistake too. And it works on macOS, where only one of such sockets is served.

What the kernel does not do for one socket is to share out: the first to look takes all, and of 64 connections that
come at once one worker in two may get every one. So a worker that has more connections than another looks away for a
moment, and takes one only if nobody else did: it is late by LOOK_AWAY_SECONDS at most, and nobody waits for a worker
that hangs.
"""

import asyncio
import logging
import mmap
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from aiohttp import web

from broker.tls import HANDSHAKE_SECONDS

log = logging.getLogger("broker.sharing")

BACKLOG = 1024
LOOK_AWAY_SECONDS = 0.005
# Where the process or the machine has no descriptor or memory left for one more connection.
EXHAUSTED_SECONDS = 1.0


class Scoreboard:
    """How many connections each worker has, in a file that is mapped into the memory of all."""

    def __init__(self, path: Path, workers: int) -> None:
        """Open the file, or make it; then nobody is there yet."""
        with path.open("a+b") as file:
            file.truncate(4 * workers)
            self._ones_more = memoryview(mmap.mmap(file.fileno(), 4 * workers)).cast("i")

    def enter(self, worker: int, connections: int) -> None:
        """Say how many connections a worker has."""
        self._ones_more[worker] = connections + 1

    def leave(self, worker: int) -> None:
        """Say that a worker is not there."""
        self._ones_more[worker] = 0

    def fewest(self) -> int:
        """Return the fewest connections that a worker has; 0 where nobody is there."""
        return min(filter(None, self._ones_more), default=1) - 1


@dataclass(frozen=True)
class Share:
    """What one worker has of the port, and of what is counted by all."""

    worker: int
    listeners: list[socket.socket]
    scoreboard: Scoreboard
    metrics_folder: Path
    # While the server drains: comes back when no worker has a request under way any more.
    all_are_idle: Callable[[], Awaitable[None]]


class SharedSite(web.BaseSite):
    """A site of aiohttp's that accepts where other processes accept as well. It closes the socket at its end."""

    __slots__ = ("_listener", "_share")

    def __init__(
        self, runner: web.AppRunner, listener: socket.socket, share: Share, tls: ssl.SSLContext | None = None
    ) -> None:
        super().__init__(runner, ssl_context=tls)
        self._listener = listener
        self._share = share

    @property
    def name(self) -> str:
        """Where it listens."""
        return str(self._listener.getsockname())

    async def start(self) -> None:
        """Begin to accept."""
        await super().start()
        assert self._runner.server is not None
        acceptor = Acceptor(self._runner.server, self._listener, self._share, self._ssl_context)
        self._server = cast(asyncio.AbstractServer, acceptor)  # As much of one as is used.


class Acceptor:
    """Accepts connections, one at a time, and as many as the other workers do."""

    def __init__(
        self, server: web.Server, listener: socket.socket, share: Share, tls: ssl.SSLContext | None = None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._tls = tls
        self._server = server
        self._listener = listener
        self._share = share
        self._arriving: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._say_how_many()
        self._look()

    @property
    def sockets(self) -> list[socket.socket]:
        """The listening socket, as the servers of asyncio show theirs."""
        return [self._listener]

    def close(self) -> None:
        """Accept no more."""
        self._share.scoreboard.leave(self._share.worker)
        self._loop.remove_reader(self._listener)
        if self._timer is not None:
            self._timer.cancel()
        self._listener.close()

    def _look(self) -> None:
        self._timer = None
        self._loop.add_reader(self._listener, self._somebody_knocks)

    def _look_away(self, seconds: float, then: Callable[[], None]) -> None:
        self._loop.remove_reader(self._listener)
        self._timer = self._loop.call_later(seconds, then)

    def _somebody_knocks(self) -> None:
        mine, fewest = self._say_how_many(), self._share.scoreboard.fewest()
        # Few are shared out to the last one; many come faster than one at a time.
        if mine > fewest + fewest // 8:
            self._look_away(LOOK_AWAY_SECONDS, self._take_what_nobody_took)
        else:
            self._accept()

    def _take_what_nobody_took(self) -> None:
        self._look()
        self._accept()

    def _accept(self) -> None:
        try:
            client, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):  # Another worker was faster, or the client left.
            return
        except OSError as error:
            log.error("cannot accept connections for a second error=%s", error.strerror)
            self._look_away(EXHAUSTED_SECONDS, self._look)
            return
        client.setblocking(False)
        task = self._loop.create_task(self._serve(client))
        self._arriving.add(task)
        task.add_done_callback(self._arriving.discard)
        self._say_how_many()

    async def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):  # It has gone again.
            await self._loop.connect_accepted_socket(
                self._server, client, ssl=self._tls, ssl_handshake_timeout=HANDSHAKE_SECONDS if self._tls else None
            )

    def _say_how_many(self) -> int:
        connections = len(self._server.connections) + len(self._arriving)
        self._share.scoreboard.enter(self._share.worker, connections)
        return connections
