"""The cell about the client's consumer loop: what it costs beside the bare calls, with the same batches and clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from benchmarks.bench import Bench, create_queue, processes, rpc
from benchmarks.caller import Caller
from benchmarks.cells import RATE, SMALL, Plan, rounds
from benchmarks.load import Tally, read_bodies, run_loop, work
from benchmarks.processes import Server
from benchmarks.results import US, Cell, Check
from broker.client import Client, Consumer, Message

MESSAGES = 10_000
LEASE_SECONDS = 60.0
BARE = "bare calls"
# How many clients, and how many messages each may have at a time.
LOADS = ((1, 100), (8, 100), (4, 10))


@dataclass(frozen=True)
class Consuming:
    """A worker that takes and deletes `count` messages: by bare calls, or by loops whose handlers do nothing.

    All clients are in one process, on one event loop. A message counts when its deletion was confirmed.
    """

    url: str
    queue: str
    clients: int
    batch: int
    count: int
    by_loop: bool

    def run(self, ready: Callable[[], None]) -> Tally:
        return run_loop(self._run(ready))

    async def _run(self, ready: Callable[[], None]) -> Tally:
        clients = [
            await Client(self.url, deadline=30.0 if self.by_loop else 0).__aenter__() for _ in range(self.clients)
        ]
        try:
            await asyncio.gather(*(client.get_queue(self.queue) for client in clients))  # they are connected
            ready()
            handled = await (self._loops(clients) if self.by_loop else self._calls(clients))
        finally:
            for client in clients:
                await client.__aexit__()
        errors = {} if handled == self.count else {"not handled, or twice": abs(self.count - handled)}
        return Tally(messages=handled, errors=errors)

    async def _calls(self, clients: list[Client]) -> int:
        deleted, is_over = 0, asyncio.Event()

        async def live(client: Client) -> None:
            nonlocal deleted
            while deleted < self.count:
                messages = await client.dequeue(
                    self.queue, max_messages=self.batch, visibility_timeout=LEASE_SECONDS, wait=20
                )
                if messages:
                    results = await client.delete_batch([message.receipt for message in messages])
                    deleted += results.count(True)
            is_over.set()

        lives = [asyncio.create_task(live(client)) for client in clients]
        await asyncio.wait([*lives, over := asyncio.create_task(is_over.wait())], return_when=asyncio.FIRST_COMPLETED)
        for task in (*lives, over):
            task.cancel()
        for outcome in await asyncio.gather(*lives, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        return deleted

    async def _loops(self, clients: list[Client]) -> int:
        handled = 0

        async def handle(message: Message) -> None:
            nonlocal handled
            handled += 1
            if handled == self.count:
                for consumer in consumers:
                    consumer.stop()

        consumers = [
            Consumer(client, self.queue, handle, concurrency=self.batch, visibility_timeout=LEASE_SECONDS)
            for client in clients
        ]
        # They return when all that they handled is deleted.
        await asyncio.gather(*(consumer.run(handle_signals=False) for consumer in consumers))
        return handled


def fill(bench: Bench, broker: Server, queue: str, count: int) -> None:
    """Put messages into a queue."""
    pool = read_bodies(bench.bodies(SMALL))
    with Caller(broker.url) as caller:
        for start in range(0, count, 500):
            bodies = [json.loads(pool[n % len(pool)]) for n in range(start, min(start + 500, count))]
            caller.call("enqueue_batch", queue=queue, messages=[{"body": body} for body in bodies])


def consumer_loop(bench: Bench, cell: Cell) -> None:
    """10,000 messages that lie there are taken and deleted, by bare calls and by the loop, in turn."""
    count = bench.rows(MESSAGES)
    loads = LOADS[:1] if bench.options.smoke else LOADS
    with bench.broker() as broker:
        bench.warm_up(broker)
        for clients, batch in loads:
            case = f"{clients} clients × {batch}" if clients > 1 else f"1 client × {batch}"
            for round_ in rounds(bench):
                for who, by_loop in ((BARE, False), (US, True)):
                    queue = create_queue(broker, f"consuming-{len(cell.samples)}")
                    fill(bench, broker, queue, count)
                    worker = Consuming(broker.url, queue, clients, batch, count, by_loop)
                    sample = bench.measure(
                        cell, case, who, round_, partial(work, [worker]), processes(broker, bench.cluster)
                    )
                    if left := rpc(broker, "count_messages", queue=queue)["total"]:
                        sample.errors["not deleted"] = left
            ratio = cell.ratio(RATE, (case, US), (case, BARE))
            cell.checks.append(Check(f"rate of the loop ÷ bare calls, {case}", ratio, "×", at_least=0.7))
    cell.notes.append("the clients share one process and one event loop; handlers do nothing")


CONSUMING_PLANS = (Plan("consumer-loop", "10,000 messages through the client's consumer loop", consumer_loop),)
