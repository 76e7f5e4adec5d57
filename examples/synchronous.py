"""A program that is not asynchronous: it sends what it is given and, as a consumer, handles it in threads.

python examples/synchronous.py hello world
"""

import sys

from broker.client import Message, SyncClient


def handle(message: Message) -> None:
    # It may block: as many threads run it as `concurrency` says, and the lease is extended meanwhile.
    print(f"{message.body} was sent {message.enqueued_at:%H:%M:%S}", flush=True)


if __name__ == "__main__":
    words = sys.argv[1:] or ["hello"]
    with SyncClient.from_environment() as client:  # BROKER_URL, BROKER_TOKEN
        client.create_queue("words")
        client.enqueue_batch("words", [{"body": word} for word in words])
        # Without `max_messages` it goes on until Ctrl-C or SIGTERM, and finishes what it holds.
        client.consume("words", handle, concurrency=4, max_messages=len(words))
