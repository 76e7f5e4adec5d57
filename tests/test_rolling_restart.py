"""Two brokers on one database, each of which is stopped and replaced while a producer and a consumer go on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from broker.client import BrokerError, Client
from broker.server import Server
from broker.settings import Settings

DEADLINE = 120
PATIENCE_OF_CLIENTS = 60  # only catches a hang


class Pair:
    """Two brokers, by whose places clients know them."""

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._stacks = [AsyncExitStack(), AsyncExitStack()]
        self.urls = ["", ""]

    async def start(self, place: int) -> None:
        """Start a broker anew; it migrates the database where there is something to do, as a newer one would."""
        server = await self._stacks[place].enter_async_context(
            Server(self._conninfo, Settings(host="127.0.0.1", port=0))
        )
        self.urls[place] = server.url

    async def stop(self, place: int) -> None:
        """Drain a broker and stop it."""
        await self._stacks[place].aclose()


async def call(pair: Pair, method: str, **params: object) -> dict[str, object]:
    """Call whichever broker answers, as a client behind a load balancer; repeat what is safe to repeat."""
    async with asyncio.timeout(PATIENCE_OF_CLIENTS):
        for attempt in range(10**6):
            try:
                async with Client(pair.urls[attempt % 2], deadline=0) as client:  # one attempt
                    answer: dict[str, object] = await client.call(method, **params)
                    return answer
            except BrokerError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.05)
    raise AssertionError


async def test_brokers_are_replaced_one_by_one_and_no_producer_has_an_error(database_url: str) -> None:
    pair = Pair(database_url)
    await pair.start(0)
    await pair.start(1)
    over = asyncio.Event()

    async def produce(name: str) -> int:
        sent = 0
        while not over.is_set():
            await call(pair, "enqueue", body=sent, idempotency_key=f"{name}-{sent}")
            sent += 1
        return sent

    producers = [asyncio.create_task(produce(f"producer {n}")) for n in range(4)]
    async with asyncio.timeout(DEADLINE):
        for place in (0, 1, 0, 1):
            before = await call(pair, "count_messages", queue="default")
            await pair.stop(place)
            # The other one alone carries them on.
            while (await call(pair, "count_messages", queue="default"))["total"] == before["total"]:
                await asyncio.sleep(0.01)
                _ = [each.result() for each in producers if each.done()]  # raises what a producer had
            await pair.start(place)
        over.set()
        sent = sum(await asyncio.gather(*producers))
        counted = await call(pair, "count_messages", queue="default")
    await pair.stop(0)
    await pair.stop(1)
    assert (counted["total"], counted["exact"]) == (sent, True)
