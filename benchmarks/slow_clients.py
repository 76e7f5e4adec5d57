"""Clients that take their time: they hold connections open, say as little as they can, and come again when closed.

    python -m benchmarks.slow_clients URL NUMBER

One third says nothing, one third sends a byte of a request's head each second, one third a byte of its body. Prints a
line when all are connected, and runs until it is ended.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from urllib.parse import urlsplit

HEAD = b"POST /rpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY_BYTES = 1_000_000
SECONDS = 1.0


async def nothing() -> AsyncIterator[bytes]:
    """Say nothing."""
    silence: tuple[bytes, ...] = ()
    for piece in silence:
        yield piece


async def head() -> AsyncIterator[bytes]:
    """Say a head, a byte a second, that has no end."""
    for byte in HEAD + b"X-More: " + b"x" * 7_000:
        yield bytes([byte])
        await asyncio.sleep(SECONDS)


async def body() -> AsyncIterator[bytes]:
    """Say a head, and a body, a byte a second, that is longer than anybody waits."""
    yield HEAD + b"Content-Length: %d\r\n\r\n" % BODY_BYTES
    for _ in range(BODY_BYTES):
        yield b"["
        await asyncio.sleep(SECONDS)


Kind = Callable[[], AsyncIterator[bytes]]
KINDS: tuple[Kind, ...] = (nothing, head, body)


async def client(host: str, port: int, kind: Kind, connected: Callable[[], None]) -> bytes:
    """Speak to a server until it closes; return what it answered."""
    reader, writer = await asyncio.open_connection(host, port)
    connected()
    saying = asyncio.create_task(say(writer, kind()))
    try:
        return await reader.read()
    finally:
        saying.cancel()
        writer.close()


async def say(writer: asyncio.StreamWriter, pieces: AsyncIterator[bytes]) -> None:
    with suppress(ConnectionError):
        async for piece in pieces:
            writer.write(piece)
            await writer.drain()


async def main(url: str, number: int) -> None:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    missing = number
    all_connected = asyncio.Event()

    def connected() -> None:
        nonlocal missing
        missing -= 1
        if missing <= 0:
            all_connected.set()

    async def again_and_again(kind: Kind) -> None:
        while True:
            with suppress(OSError):
                await client(str(parts.hostname), int(parts.port or 80), kind, connected)

    clients = [asyncio.create_task(again_and_again(KINDS[n % len(KINDS)])) for n in range(number)]
    await all_connected.wait()
    print(f"{number} slow clients of {url}", flush=True)
    await asyncio.gather(*clients)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main(sys.argv[1], int(sys.argv[2])))
