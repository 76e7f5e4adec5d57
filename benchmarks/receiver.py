"""Endpoints that messages are pushed to, in one process that is cheaper than the broker that pushes.

    python -m benchmarks.receiver

Prints where it listens. A POST to /taken is answered at once, one to /timed as well: its body is the time, by the
clock that all processes of a machine share, at which the message should have been sent. BAD are paths whose endpoints
are not well. GET tells how many were taken by path, and how long the timed ones took since it was asked last.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import cast

import uvloop

TAKEN = b"HTTP/1.1 204 No Content\r\n\r\n"
# What answers say, and whether the connection ends then. Nothing at all is what one that answers a minute later looks
# like, too.
BAD: dict[str, tuple[bytes, bool]] = {
    "/failing": (b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n", False),
    "/silent": (b"", False),
    "/garbage": (b"\x16\x03\x01 garbage\r\n\r\n", True),
    "/half": (b"HTTP/1.1 200 OK\r\nContent-Le", True),
    "/redirect": (b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://10.0.0.1/\r\nContent-Length: 0\r\n\r\n", False),
}


class Counts:
    """What has come."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.latencies_ms: list[float] = []

    def tell(self) -> bytes:
        """Return all of it as JSON, and forget the latencies."""
        told = {"taken": self.taken, "latencies_ms": self.latencies_ms}
        self.latencies_ms = []
        return json.dumps(told).encode()


class Endpoint(asyncio.Protocol):
    """One connection."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            _, _, rest = head.partition(b"content-length:")
            length = int(rest.split(b"\r\n", 1)[0]) if rest else 0
            if len(self._data) < end + 4 + length:
                return
            body, self._data = self._data[end + 4 : end + 4 + length], self._data[end + 4 + length :]
            method, path = head.split(b" ", 2)[:2]
            self._answer(method == b"post", path.decode(), body)

    def _answer(self, is_push: bool, path: str, body: bytes) -> None:
        if not is_push:
            told = self._counts.tell()
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(told), told))
            return
        self._counts.taken[path] += 1
        if path.startswith("/timed"):
            self._counts.latencies_ms.append((time.perf_counter() - float(body)) * 1000)
        text, is_last = BAD.get(path, (TAKEN, False))
        self._transport.write(text)
        if is_last:
            self._transport.abort() if path == "/half" else self._transport.close()


async def serve() -> None:
    counts = Counts()
    server = await asyncio.get_running_loop().create_server(lambda: Endpoint(counts), "127.0.0.1", 0, backlog=1024)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve())
