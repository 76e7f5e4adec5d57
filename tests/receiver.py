"""An endpoint that messages are pushed to, and that does what a test tells it: also what no HTTP server would."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import msgspec

# Only catches a hang.
PATIENCE = 30.0


@dataclass(frozen=True)
class Pushed:
    """A request as it came. `at` is monotonic."""

    line: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def message_id(self) -> str:
        """The id of the message."""
        return self.headers["webhook-id"]

    @property
    def json(self) -> Any:
        """The body, read."""
        return msgspec.json.decode(self.body)


Behaviour = Callable[[Pushed, asyncio.StreamWriter], Awaitable[None]]


def answering(status: int, body: bytes = b"", **headers: str) -> Behaviour:
    """Answer properly; `headers` have _ for -."""
    fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return saying(f"HTTP/1.1 {status} Any\r\n{fields}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def saying(text: bytes, *, then_close: bool = False) -> Behaviour:
    """Answer with these bytes, whatever they are."""

    async def behave(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        writer.write(text)
        await writer.drain()
        if then_close:
            writer.close()

    return behave


def resetting(text: bytes = b"") -> Behaviour:
    """Answer with these bytes and reset the connection."""

    async def behave(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        if text:
            writer.write(text)
            await writer.drain()
            await asyncio.sleep(0.02)  # or the reset overtakes the bytes
        connection: socket.socket = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    return behave


async def silent(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
    """Answer nothing, and keep the connection."""
    await asyncio.Event().wait()


def endless(head: bytes, chunk: bytes = b"x" * 65_536) -> Behaviour:
    """Answer with a head, and then without end."""

    async def behave(pushed: Pushed, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(chunk)
            await writer.drain()

    return behave


class Receiver:
    """A server on 127.0.0.1. What it does is `behave`, for each request; who waits for requests is told of them."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave = behave or answering(204)
        self.requests: list[Pushed] = []
        self.connections = 0
        self.answering = 0
        self.most_at_once = 0
        self.port = 0
        self._news = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it takes messages."""
        return f"http://127.0.0.1:{self.port}/hook"

    async def received(self, count: int) -> list[Pushed]:
        """Wait until so many requests have come; return all that have."""
        async with asyncio.timeout(PATIENCE), self._news:
            await self._news.wait_for(lambda: len(self.requests) >= count)
        return self.requests

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while not writer.is_closing():
                pushed = await read_request(reader)
                self.answering += 1
                self.most_at_once = max(self.most_at_once, self.answering)
                async with self._news:
                    self.requests.append(pushed)
                    self._news.notify_all()
                try:
                    await self.behave(pushed, writer)
                finally:
                    self.answering -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    def hang_up(self) -> None:
        """End every connection."""
        for task in self._tasks:
            task.cancel()


async def read_request(reader: asyncio.StreamReader) -> Pushed:
    """Read a request. Raises IncompleteReadError where none comes."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    line, *fields = head.split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (field.split(": ", 1) for field in fields)}
    assert len(headers) == len(fields), "no header comes twice"
    return Pushed(line, headers, await reader.readexactly(int(headers["content-length"])), time.monotonic())


@contextlib.asynccontextmanager
async def receiving(behave: Behaviour | None = None) -> AsyncIterator[Receiver]:
    """Run a receiver."""
    receiver = Receiver(behave)
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        receiver.hang_up()
        await server.wait_closed()
