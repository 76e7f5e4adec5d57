"""A thousand clients that take their time are sent away at their deadlines, and nobody else notices: nor is anybody
sent away for whom the broker itself had no time.

What that does to the latency of others is a cell of `make bench`: slow-connections.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
from collections import Counter

import aiohttp
import pytest

from benchmarks import slow_clients
from broker_process import DEADLINE, Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a thousand connections need a system that allows them")

CLIENTS = 1_000
# Enough for a thousand connections to be made one after the other on a slow machine, and soon over on a fast one.
FLAGS = ("--header-timeout", "6", "--body-timeout", "10", "--body-stall-timeout", "8", "--keepalive-timeout", "75")


async def test_a_thousand_slow_clients_are_sent_away_while_calls_are_answered(start: Start, database_url: str) -> None:
    broker = await (await start("--database-url", database_url, *FLAGS)).ready()
    connected = 0
    all_connected = asyncio.Event()

    def count() -> None:
        nonlocal connected
        connected += 1
        if connected == CLIENTS:
            all_connected.set()

    kinds = [slow_clients.KINDS[number % len(slow_clients.KINDS)] for number in range(CLIENTS)]
    slow = [
        asyncio.create_task(slow_clients.client("127.0.0.1", broker.port, kind, count), name=kind.__name__)
        for kind in kinds
    ]
    answered = 0
    async with aiohttp.ClientSession() as http, asyncio.timeout(3 * DEADLINE):
        await all_connected.wait()
        while any(not each.done() for each in slow):
            call = {"jsonrpc": "2.0", "id": answered, "method": "enqueue", "params": {"body": answered}}
            async with http.post(f"{broker.url}/rpc", json=call) as response:
                assert "result" in await response.json()
            answered += 1
            await asyncio.sleep(0.01)  # a steady rate, not all that goes
        async with http.get(f"{broker.url}/metrics") as response:
            metrics = await response.text()
    assert answered > 0
    said = Counter((each.get_name(), each.result()[9:12].decode()) for each in slow)
    assert set(said) == {("nothing", ""), ("head", "408"), ("body", "408")}
    counted = dict(re.findall(r'^wonderq_refused_total\{limit="(\w+_time)"\} (\d+)', metrics, re.M))
    assert {name: int(number) for name, number in counted.items()} == {
        "header_time": said["nothing", ""] + said["head", "408"],
        "body_time": said["body", "408"],
    }
    open_connections = re.search(r"^wonderq_client_connections (\d+)", metrics, re.M)
    assert open_connections is not None
    assert int(open_connections[1]) < 10


async def test_a_broker_that_stood_still_blames_nobody_whose_request_has_come_meanwhile(
    start: Start, database_url: str
) -> None:
    seconds = 4.0
    flags = ("--header-timeout", str(seconds), "--body-timeout", str(seconds), "--body-stall-timeout", str(seconds))
    broker = await (await start("--database-url", database_url, *flags)).ready()
    call = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "enqueue", "params": {"body": "here in time"}}).encode()
    length = f"Content-Length: {len(call)}\r\n\r\n".encode()

    clients = [await asyncio.open_connection("127.0.0.1", broker.port) for _ in range(4)]
    (_, whole), (_, in_head), (_, in_body), _ = clients
    in_head.write(slow_clients.HEAD)
    in_body.write(slow_clients.HEAD + length + call[:9])
    async with aiohttp.ClientSession() as http:
        await until_connected(http, broker.url, len(clients) + 1)
    broker.signal_all(signal.SIGSTOP)
    whole.write(slow_clients.HEAD + length + call)
    in_head.write(length + call)
    in_body.write(call[9:])
    await asyncio.sleep(seconds + 1)
    broker.signal_all(signal.SIGCONT)

    async with asyncio.timeout(DEADLINE):
        answers = [await reader.read(12) for reader, _ in clients]
    for _, writer in clients:
        writer.close()
    assert answers == [*[b"HTTP/1.1 200"] * 3, b""], "the last has said nothing"


async def until_connected(http: aiohttp.ClientSession, url: str, number: int) -> None:
    """Wait until the broker has so many connections."""
    async with asyncio.timeout(DEADLINE):
        while True:
            async with http.get(f"{url}/metrics") as response:
                counted = re.search(r"^wonderq_client_connections (\d+)", await response.text(), re.M)
            if counted is not None and int(counted[1]) >= number:
                return
            await asyncio.sleep(0.01)
