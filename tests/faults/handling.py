"""A consumer with the client's own loop, a process of its own that can be killed and told to stop.

    python handling.py NAME URL QUEUE LEDGER LEASE_SECONDS CONCURRENCY SEED

LEDGER gets a line when a message is begun with, and one when its handler has ended: what, at (the system's monotonic
clock), name, value, message_id, receive_count. Standard error has what the loop logs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import sys
import time

from broker.client import Client, Message

# What a handler takes: of some it is seen that they are broken off.
SECONDS = (0.0, 0.005, 0.15)


async def main(name: str, url: str, queue: str, path: str, lease: float, concurrency: int, seed: str) -> None:
    ledger = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    rng = random.Random(f"{seed} {name}")

    def note(what: str, message: Message) -> None:
        about = {"value": message.body, "message_id": message.message_id, "receive_count": message.receive_count}
        line = {"what": what, "at": time.monotonic(), "name": name, **about}
        os.write(ledger, json.dumps(line).encode() + b"\n")

    async def handle(message: Message) -> None:
        note("begun", message)
        await asyncio.sleep(rng.choice(SECONDS))
        note("done", message)

    async with Client(url, deadline=120) as client:
        await client.consume(queue, handle, concurrency=concurrency, visibility_timeout=lease)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    name, url, queue, path, lease, concurrency, seed = sys.argv[1:]
    asyncio.run(main(name, url, queue, path, float(lease), int(concurrency), seed))
