"""A publisher of the demo: publishes what stands on its standard input, a message a line; prints how many copies."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator

from broker.client import Client

from . import FAULTS

# Calls that are under way at the same time: the broker commits them together.
CONCURRENT = 16


async def publish(url: str, sender: str, texts: list[str]) -> int:
    """Publish every message; return how many copies were made."""
    left = iter(texts)
    async with Client(url, os.environ.get("BROKER_TOKEN")) as client:
        return sum(await asyncio.gather(*(publish_some(client, sender, left) for _ in range(CONCURRENT))))


async def publish_some(client: Client, sender: str, left: Iterator[str]) -> int:
    """Publish one message after the other, of those that are left."""
    copies = 0
    for text in left:
        message = json.loads(text)
        # When this returns a copy for each subscriber is committed, or there would have been an error and none.
        published = await client.publish(message["topic"], message["body"], headers=message["headers"], sender=sender)
        copies += published.deliveries
    return copies


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sender", required=True)
    parser.add_argument("--fault", choices=FAULTS, action="append", default=[])
    arguments = parser.parse_args()
    texts = sys.stdin.read().splitlines()
    if "twice" in arguments.fault:
        texts.append(texts[len(texts) // 2])
    print(asyncio.run(publish(arguments.url, arguments.sender, texts)), flush=True)
