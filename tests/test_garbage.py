"""A request leaves no circles behind: what it was made of is freed at once, and nobody waits for the collector.

The collector runs when so and so many objects are there that might be in circles, and stops everything meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import pytest

from conftest import PATIENCE, StartBroker
from outside import request, send

TIMES = 20


def call(method: str, **params: Any) -> bytes:
    """Return a request that calls a method."""
    return request(body=json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode())


REQUESTS = {
    "a result": call("enqueue", body=1),
    "a batch": request(
        body=b"[" + b",".join([b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":1}}'] * 2) + b"]"
    ),
    "a notification": request(body=b'{"jsonrpc":"2.0","method":"enqueue","params":{"body":1}}'),
    "a message that is taken": call("dequeue"),
    "an error of a method": call("dequeue", queue="none"),
    "an error of a body": call("enqueue", body="x" * 5000),
    "params that are wrong": call("enqueue", body=1, delay=-1),
    "an unknown param": call("enqueue", body=1, x=1),
    "an unknown method": call("none"),
    "no call": request(body=b"1"),
    "no JSON": request(body=b"{"),
    "a deep one": request(body=b"[" * 2000),
    "no address": request("GET", "/none"),
    "another method": request("PUT", "/rpc"),
    "a page": request("GET", "/healthz"),
    "metrics": request("GET", "/metrics"),
    "the dashboard": request("GET", "/"),
    "another Host": request(host="example.org"),
    "another type": request(content_type="text/plain"),
    "compressed": request("POST", "/rpc", b"", "Content-Encoding: gzip"),
    "a long body": request("POST", "/rpc", None, "Content-Length: 100000000"),
    "no HTTP": b"x\r\n\r\n",
    "chunks": request("POST", "/rpc", None, "Transfer-Encoding: chunked") + b"2\r\n{}\r\n0\r\n\r\n",
    "broken chunks": request("POST", "/rpc", None, "Transfer-Encoding: chunked") + b"z\r\n",
    "an upgrade": request("GET", "/healthz", b"", "Connection: upgrade", "Upgrade: websocket"),
}


# aiohttp's route for what has no route is a circle with its error.
OF_AIOHTTP = {"no address": 7, "another method": 7}
# Those who begin a request and do not end it.
UNFINISHED = {
    "nothing": b"",
    "half a head": b"POST /rpc HT",
    "half a body": request("POST", "/rpc", None, "Content-Length: 9") + b"{",
    "a call that waits": call("dequeue", wait=0.3).replace(b"Connection: close\r\n", b""),
}


@pytest.fixture(autouse=True)
def _no_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("kind", REQUESTS)
async def test_a_request_leaves_nothing_to_the_garbage_collector(start_broker: StartBroker, kind: str) -> None:
    broker = await start_broker()
    await send(broker.url, REQUESTS[kind])
    gc.collect()
    for _ in range(TIMES):
        await send(broker.url, REQUESTS[kind])
    assert gc.collect() < TIMES * (1 + OF_AIOHTTP.get(kind, 0))


@pytest.mark.parametrize("kind", UNFINISHED)
@pytest.mark.parametrize("hangs_up", [False, True])
async def test_a_client_that_does_not_go_on_leaves_nothing_to_the_garbage_collector(
    start_broker: StartBroker, kind: str, hangs_up: bool
) -> None:
    broker = await start_broker(header_timeout=0.3, body_timeout=0.3, body_stall_timeout=0.3, keepalive_timeout=0.5)
    parts = urlsplit(broker.url)

    async def begin() -> None:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        writer.write(UNFINISHED[kind])
        await asyncio.sleep(0.1)
        if not hangs_up:
            await asyncio.wait_for(reader.read(), PATIENCE)
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()

    async def collected_after_some() -> int:
        await asyncio.gather(*(begin() for _ in range(TIMES)))
        async with asyncio.timeout(PATIENCE):
            while broker.server.runner.connections:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # What they had begun ends now.
        return gc.collect()

    await collected_after_some()
    assert await collected_after_some() < TIMES
