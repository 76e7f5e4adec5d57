"""Take messages from a queue, print them, delete them; until --max, SIGTERM or Ctrl-C.

python examples/consumer.py --queue default
"""

import argparse
import asyncio
import json
import os
import signal
import sys

from broker.client import BrokerError, Client


async def consume(url: str, queue: str, maximum: int) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    stop = asyncio.create_task(stopped.wait())
    async with Client(url, os.environ.get("BROKER_TOKEN")) as client:
        while maximum > 0 and not stopped.is_set():
            # A message that is taken is this consumer's for the queue's visibility_timeout.
            poll = asyncio.create_task(client.dequeue(queue, max_messages=min(10, maximum), wait=20))
            await asyncio.wait({poll, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not poll.done():
                poll.cancel()  # This hangs up; what was leased meanwhile the broker takes back.
                await asyncio.wait({poll})
                break
            for message in poll.result():
                print(message.sender, json.dumps(message.body), message.receive_count, sep="\t", flush=True)
                # Only now, when the work is done: had this process died, another would get the message.
                await client.delete(message.receipt)
                maximum -= 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Take messages, print sender, body and receive_count.")
    parser.add_argument("--url", default=os.environ.get("BROKER_URL", "http://127.0.0.1:8080"))
    parser.add_argument("--queue", default="default")
    parser.add_argument("--max", type=int, default=sys.maxsize, help="stop after so many messages")
    arguments = parser.parse_args()
    try:
        asyncio.run(consume(arguments.url, arguments.queue, arguments.max))
    except BrokerError as error:
        sys.exit(str(error))
