"""A TCP proxy before a PostgreSQL server that does to connections what networks do.

It can delay, swallow, refuse and reset. It also reads along which statement a client executes, so it can cut a
connection at the moment that matters: after the server has carried a statement out and before its answer arrives
(the client cannot know that it was done), or before the statement has reached the server (it cannot know that it was
not). Connections must be unencrypted, and not in pipeline mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

Lost = Literal["reply", "request"]

_CHUNK = 65536
_READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"
_ENCRYPTION_REQUESTS = (80877103, 80877104)


@dataclass(eq=False)
class Cut:
    """Connections that will be cut when they execute a statement with `marker` in its text or its parameters."""

    marker: bytes
    lost: Lost
    left: int
    hangs: bool
    done: int = 0
    happened: asyncio.Event = field(default_factory=asyncio.Event)


class Proxy:
    """Forwards what comes to its `port` to a server; to be used as `async with Proxy(port) as proxy`."""

    def __init__(self, target_port: int, target_address: str = "127.0.0.1") -> None:
        self._target = (target_address, target_port)
        self._delay_seconds = 0.0
        self._is_refusing = False
        self._requests_flow = asyncio.Event()
        self._replies_flow = asyncio.Event()
        self._cuts: list[Cut] = []
        self._links: dict[asyncio.Task[None], _Link] = {}
        self._server: asyncio.Server | None = None
        self.heal()

    @property
    def port(self) -> int:
        assert self._server is not None
        return int(self._server.sockets[0].getsockname()[1])

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def heal(self) -> None:
        """Let everything pass again, what was held back too; connections that were cut stay so."""
        self._delay_seconds = 0.0
        self._is_refusing = False
        self._requests_flow.set()
        self._replies_flow.set()
        self._cuts.clear()

    def delay(self, seconds: float) -> None:
        """Hold back whatever passes, in either direction, for so long."""
        self._delay_seconds = seconds

    def swallow(self, *, requests: bool = True, replies: bool = True) -> None:
        """Be a black hole: nothing arrives and nobody is told, until the network is healed."""
        if requests:
            self._requests_flow.clear()
        if replies:
            self._replies_flow.clear()

    def refuse(self) -> None:
        """Reset connections as soon as they are made, until the network is healed."""
        self._is_refusing = True

    def reset(self) -> None:
        """Reset all connections there are."""
        for link in self._links.values():
            link.reset()

    def cut(self, marker: str, *, lost: Lost = "reply", times: int = 1, hangs: bool = False) -> Cut:
        """Reset the next connection that executes a statement with `marker` in its text or its parameters.

        With `lost` "reply" the statement was carried out, and committed if it commits by itself, when the connection
        is reset; with "request" it has not reached the server and never will. One that `hangs` is not reset: nothing
        comes back any more.
        """
        cut = Cut(marker.encode(), lost, times, hangs)
        self._cuts.append(cut)
        return cut

    def cut_for(self, request: bytes) -> Cut | None:
        """Take the cut that a request provokes, where there is one."""
        for cut in self._cuts:
            if cut.left > 0 and cut.marker in request:
                cut.left -= 1
                return cut
        return None

    async def let_pass(self, *, is_reply: bool) -> None:
        """Return when the network would have carried something."""
        if self._delay_seconds:
            await asyncio.sleep(self._delay_seconds)
        await (self._replies_flow if is_reply else self._requests_flow).wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        client = _End(reader, writer)
        if self._is_refusing:
            client.reset()
            return
        self._links[task] = link = _Link(self, client)
        try:
            await self.let_pass(is_reply=False)
            await link.carry(*self._target)
        except asyncio.CancelledError:
            pass  # at the end; a server's task that is cancelled would be reported
        finally:
            del self._links[task]
            link.reset()


class _End:
    """One end of a connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def reset(self) -> None:
        """Close it so that the other side is told of a reset, not of an orderly end."""
        if self.writer.transport.is_closing():
            return
        connection = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class _Link:
    """A client's connection and its continuation to the server."""

    def __init__(self, proxy: Proxy, client: _End) -> None:
        self._proxy = proxy
        self._client = client
        self._server: _End | None = None
        self._cut: Cut | None = None

    async def carry(self, target_address: str, target_port: int) -> None:
        """Forward both ways until either side ends."""
        try:
            server = self._server = _End(*await asyncio.open_connection(target_address, target_port))
        except OSError:
            return  # nobody listens there
        pumps = [asyncio.create_task(self._requests(server)), asyncio.create_task(self._replies(server))]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    def reset(self) -> None:
        for end in (self._client, self._server):
            if end is not None:
                end.reset()

    async def _requests(self, server: _End) -> None:
        statements = Statements()
        while data := await self._client.reader.read(_CHUNK):
            await self._proxy.let_pass(is_reply=False)
            for request in statements.feed(data):
                self._cut = self._cut or self._proxy.cut_for(request)
            if self._cut is not None and self._cut.lost == "request":
                await self._finish(self._cut)
                return
            server.writer.write(data)
            await server.writer.drain()

    async def _replies(self, server: _End) -> None:
        end = b""
        while data := await server.reader.read(_CHUNK):
            await self._proxy.let_pass(is_reply=True)
            if self._cut is None:
                self._client.writer.write(data)
                await self._client.writer.drain()
                continue
            # The server says that it is ready for the next statement after it has committed this one.
            end = (end + data)[-len(_READY_FOR_QUERY) :]
            if end == _READY_FOR_QUERY:
                await self._finish(self._cut)
                return
        if self._cut is not None:
            self._cut.left += 1  # the server has gone before

    async def _finish(self, cut: Cut) -> None:
        self._cut = None
        cut.done += 1
        cut.happened.set()
        if cut.hangs:
            await asyncio.Event().wait()  # until the other side goes
        self.reset()


class Statements:
    """Reads what a client sends to PostgreSQL: which statements it executes, with which parameters."""

    def __init__(self) -> None:
        self._unread = bytearray()
        self._is_started = False
        self._texts: dict[bytes, bytes] = {}

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what came; yield the text, and the parameters as they are sent, of each statement to be executed."""
        self._unread += data
        while True:
            # Until the session has begun, messages have no type.
            head = 1 if self._is_started else 0
            if len(self._unread) < head + 4:
                return
            length = int.from_bytes(self._unread[head : head + 4], "big")
            if len(self._unread) < head + length:
                return
            kind, body = bytes(self._unread[:head]), bytes(self._unread[head + 4 : head + length])
            del self._unread[: head + length]
            if not self._is_started:
                self._is_started = int.from_bytes(body[:4], "big") not in _ENCRYPTION_REQUESTS
            elif kind == b"P":
                name, text, _ = body.split(b"\0", 2)
                self._texts[name] = text
            elif kind == b"B":
                _, name, params = body.split(b"\0", 2)
                yield self._texts.get(name, b"") + b"\0" + params
            elif kind == b"Q":
                yield body
