"""Bodies of requests: read whole, within limits of bytes and of time.

Handlers read them with `read_body`, nothing else, because only that sends the "100 Continue" some clients wait for.
"""

import asyncio
import random
from dataclasses import dataclass

from aiohttp import web

EXPECTS_CONTINUE = web.RequestKey("expects_continue", bool)

# A timer that fires so many seconds too late says that this process, or its machine, stood still.
STOOD_STILL_SECONDS = 0.5
# By up to which part of itself a time for something is longer, for each who takes it.
SPREAD = 0.1


@dataclass(frozen=True)
class ConnectionLimits:
    """How much time, in seconds, and how many bytes a client gets."""

    header_timeout: float = 15.0
    body_timeout: float = 60.0
    body_stall_timeout: float = 15.0
    keepalive_timeout: float = 75.0
    max_body_bytes: int = 8 * 2**20
    max_connections: int = 10_000
    lingering_time: float = 10.0
    max_lingering_bytes: int = 64 * 2**20


class BodyTooLarge(Exception):
    """The request's body is over the limit; send less in one request."""


class BodyTooSlow(Exception):
    """The request's body did not arrive in time; send it again."""


def spread(seconds: float) -> float:
    """Return how long one client has where clients have so many seconds.

    Those who came at one moment are not all sent away at one moment, while everybody else would have to wait.
    """
    return seconds * random.uniform(1, 1 + SPREAD)  # noqa: S311 - nobody has to be kept from guessing it


async def read_body(request: web.Request, limits: ConnectionLimits) -> bytes:
    """Read the whole body, and ask for it where the client waits for that.

    A handler may let both errors pass: the connection then answers 413 or 408.

    Raises BodyTooLarge (by Content-Length before a byte is read) and BodyTooSlow.
    """
    if (request.content_length or 0) > limits.max_body_bytes:
        raise BodyTooLarge
    payload = request.content
    if payload.is_eof():  # Small requests arrive whole: no timer for them.
        if payload.total_bytes > limits.max_body_bytes:
            raise BodyTooLarge
        return payload.read_nowait()
    if request.get(EXPECTS_CONTINUE):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # The answer itself has not begun.
    body = bytearray()  # Not a list: a client may send chunks of one byte.
    loop = asyncio.get_running_loop()
    deadline = loop.time() + spread(limits.body_timeout)
    stall_timeout = spread(limits.body_stall_timeout)
    while True:
        until = min(deadline, loop.time() + stall_timeout)
        try:
            async with asyncio.timeout_at(until):
                chunk = await payload.readany()
        except TimeoutError:
            late = loop.time() - until
            if late < STOOD_STILL_SECONDS:
                raise BodyTooSlow from None
            # What the client has sent meanwhile is not read yet: timers are looked at before.
            deadline += late + STOOD_STILL_SECONDS
            continue
        if not chunk:
            return bytes(body)
        body += chunk
        if len(body) > limits.max_body_bytes:
            raise BodyTooLarge
