"""Take messages from a queue, print them, delete them; until --max, SIGTERM or Ctrl-C.

python examples/consumer.py --queue default
"""

import argparse
import asyncio
import json
import os
import sys

from broker.client import BrokerError, Client, Message


async def show(message: Message) -> None:
    # When this returns, the message is deleted: had this process died before, another would get it. When it raises,
    # the message comes again after a pause.
    print(message.sender, json.dumps(message.body), message.receive_count, sep="\t", flush=True)


async def consume(url: str, queue: str, maximum: int | None, deadline: float) -> None:
    async with Client(url, os.environ.get("BROKER_TOKEN"), deadline=deadline) as client:
        await client.consume(queue, show, max_messages=maximum)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take messages, print sender, body and receive_count.")
    parser.add_argument("--url", default=os.environ.get("BROKER_URL", "http://127.0.0.1:8080"))
    parser.add_argument("--queue", default="default")
    parser.add_argument("--max", type=int, help="stop after so many messages")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds to wait for a broker that is not there")
    arguments = parser.parse_args()
    try:
        asyncio.run(consume(arguments.url, arguments.queue, arguments.max, arguments.deadline))
    except BrokerError as error:
        sys.exit(str(error))
