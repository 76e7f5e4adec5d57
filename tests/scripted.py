"""A server that answers each request as a test says, which may be what no broker or proxy should say."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any


@asynccontextmanager
async def server(answer: Callable[[bytes], bytes | None]) -> AsyncIterator[str]:
    """Serve HTTP requests with the bytes that `answer` makes of them; None breaks the connection."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        reply = answer(head + await reader.readexactly(length))
        if reply is not None:
            writer.write(reply)
            await writer.drain()
        writer.close()
        await writer.wait_closed()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listener:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def http(status: str, body: str, head: str = "") -> bytes:
    """Return an answer; `head` has more header lines, each with its end."""
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{head}Connection: close\r\n\r\n{body}".encode()


def result(value: Any) -> bytes:
    """Return the answer of a broker with this result."""
    return http("200 OK", json.dumps({"jsonrpc": "2.0", "id": 1, "result": value}))


def error(kind: str, code: int = -32001, *, status: str = "200 OK", head: str = "", **data: Any) -> bytes:
    """Return the answer of a broker with an error of this type; certainly nothing was done unless `data` says so."""
    about = {"type": kind, "retryable": False, "outcome": "none", **data}
    return http(
        status, json.dumps({"jsonrpc": "2.0", "id": 1, "error": {"code": code, "message": kind, "data": about}}), head
    )


def call_in(request: bytes) -> dict[str, Any]:
    """Return what a request calls, with its params."""
    call: dict[str, Any] = json.loads(request.split(b"\r\n\r\n", 1)[1])
    return call
