"""Draining: a server that is told to stop loses no request.

Promised, on Linux: each request that reaches the port before it closes is answered, if only with a refusal, and its
client is told not to use the connection again. Elsewhere, and where the time is over, the last connections of
newcomers may be reset.
"""

import asyncio
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from broker.connections import Connection, ConnectionRunner

# How long no request may have come before a draining server takes its clients to be gone.
QUIET_TIME = 0.3
POLL_INTERVAL = 0.02


async def nobody_else() -> None:
    """Wait for nobody: no other process has the port."""


async def drain(
    runner: ConnectionRunner, timeout: float, others_are_idle: Callable[[], Awaitable[object]] = nobody_else
) -> bool:
    """Stop within `timeout` seconds so that no request is lost; return whether that was reached.

    The port stays open while earlier requests are under way (newcomers reach the application, which
    refuses them), at others who serve the same port too. Then new handshakes are dropped by the kernel, while
    those it has completed are still accepted and answered; after QUIET_TIME without a request the port and idle
    connections are closed.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    runner.start_draining()
    await _wait_for([each for each in runner.connections if each.is_busy], deadline)
    with suppress(TimeoutError):
        async with asyncio.timeout_at(deadline):
            await others_are_idle()
    for site in runner.sites:
        listeners = getattr(site._server, "sockets", None) or ()
        if not all(_drop_new_handshakes(each.fileno()) for each in listeners):
            await site.stop()
    await _wait_for_quiet(runner, deadline)
    for site in runner.sites:
        await site.stop()
    runner.close_idle()
    await asyncio.sleep(POLL_INTERVAL)
    await _wait_for(runner.connections, deadline)
    return runner.requests_in_flight == 0


async def _wait_for(connections: list[Connection], deadline: float) -> None:
    while any(each.is_busy for each in connections) and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(POLL_INTERVAL)


async def _wait_for_quiet(runner: ConnectionRunner, deadline: float) -> None:
    loop = asyncio.get_running_loop()
    seen = (-1, -1)
    quiet_since = loop.time()
    while loop.time() < min(deadline, quiet_since + QUIET_TIME):
        counts = runner.traffic
        if counts != seen or runner.requests_in_flight:
            seen, quiet_since = counts, loop.time()
        await asyncio.sleep(POLL_INTERVAL)


# A socket filter of four steps: load the TCP flags (byte 13); where SYN is set keep nothing, else everything.
_DROP_SYN = struct.pack("=" + "HBBI" * 4, 0x30, 0, 0, 13, 0x45, 0, 1, 0x02, 0x06, 0, 0, 0, 0x06, 0, 0, 0xFFFFFFFF)
_SO_ATTACH_FILTER = 26


def _drop_new_handshakes(fileno: int) -> bool:
    """Make the kernel ignore SYNs to a listening socket; return False where it cannot.

    Closing a listening socket resets the connections that it has completed but nobody has accepted, and
    under load there is one at almost any moment. A client whose SYN is ignored sends it again a second
    later, and is then refused, or reaches another process on the same port.
    """
    if sys.platform != "linux":
        return False
    with socket.socket(fileno=os.dup(fileno)) as listener:
        if listener.family not in (socket.AF_INET, socket.AF_INET6):
            return False
        steps = ctypes.create_string_buffer(_DROP_SYN, len(_DROP_SYN))
        try:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("@HP", 4, ctypes.addressof(steps)))
        except OSError:
            return False
    return True
