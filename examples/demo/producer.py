"""A producer of the demo: sends a message for each file name on its standard input."""

import argparse
import asyncio
import os
import sys

from broker.client import Client, NewMessage

from . import FAULTS, FILES

BATCH = 100


async def produce(url: str, sender: str, run: str, names: list[str]) -> None:
    """Send the names in batches; each batch is stored as a whole or not at all."""
    async with Client(url, os.environ.get("BROKER_TOKEN")) as client:
        messages = [NewMessage(body={"run": run, "name": name}, sender=sender) for name in names]
        for start in range(0, len(messages), BATCH):
            await client.enqueue_batch(FILES, messages[start : start + BATCH])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sender", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--fault", choices=FAULTS, default="")
    arguments = parser.parse_args()
    names = sys.stdin.read().split()
    if arguments.fault == "twice":
        names += names[:1]
    asyncio.run(produce(arguments.url, arguments.sender, arguments.run, names))
