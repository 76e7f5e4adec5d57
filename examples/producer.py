"""Send messages to a queue and print their ids.

python examples/producer.py --queue default --count 10 --sender alice
"""

import argparse
import asyncio
import os
import sys

from broker.client import BrokerError, Client


async def produce(url: str, queue: str, count: int, sender: str, deadline: float) -> None:
    async with Client(url, os.environ.get("BROKER_TOKEN"), deadline=deadline) as client:
        for number in range(1, count + 1):
            # When this returns the message is committed: it survives a crash of broker and database. Where an answer
            # is lost the client sends it again, with the same key, and it is stored once.
            message_id = await client.enqueue(queue, {"number": number}, sender=sender)
            print(message_id, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send messages to a queue and print their ids.")
    parser.add_argument("--url", default=os.environ.get("BROKER_URL", "http://127.0.0.1:8080"))
    parser.add_argument("--queue", default="default")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--sender", default=f"producer-{os.getpid()}")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds to wait for a broker that is not there")
    arguments = parser.parse_args()
    try:
        asyncio.run(produce(arguments.url, arguments.queue, arguments.count, arguments.sender, arguments.deadline))
    except BrokerError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
