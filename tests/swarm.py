"""One producer or consumer of `test_processes.py`, a process of its own that needs little but the standard library.

    python swarm.py URL QUEUE produce FIRST COUNT
    python swarm.py URL QUEUE consume STOP_FILE

A producer sends COUNT messages with the bodies FIRST, FIRST + 1, …, in batches and one by one. A consumer takes
and deletes until STOP_FILE exists and nothing comes any more, and prints for each message a line: its body,
message_id, receive_count, visible_at, and from when until when it was held. Whatever goes wrong ends the process
with a traceback.
"""

import http.client
import json
import os
import random
import sys
import time
from typing import Any

BATCH = 100
LEASE_SECONDS = 600


class Broker:
    """One kept-alive connection."""

    def __init__(self, url: str) -> None:
        self._connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)

    def call(self, method: str, **params: Any) -> Any:
        request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        self._connection.request("POST", "/rpc", request, {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200 or "error" in answer:
            raise RuntimeError(f"{method}: {response.status} {answer}")
        return answer["result"]


def produce(broker: Broker, queue: str, first: int, count: int) -> None:
    sent = 0
    while sent < count:
        size = min(count - sent, BATCH)
        bodies = range(first + sent, first + sent + size)
        if sent % (20 * BATCH) == 0:
            for body in bodies:
                broker.call("enqueue", queue=queue, body=body)
        else:
            broker.call("enqueue_batch", queue=queue, messages=[{"body": body} for body in bodies])
        sent += size


def consume(broker: Broker, queue: str, stop_file: str) -> None:
    while True:
        may_end = os.path.exists(stop_file)
        size = random.choice([1, BATCH, BATCH, BATCH])
        messages = broker.call("dequeue", queue=queue, max_messages=size, visibility_timeout=LEASE_SECONDS, wait=1)[
            "messages"
        ]
        held_from = time.time()
        if not messages and may_end:
            return
        if not messages:
            continue
        held_until = time.time()
        receipts = [message["receipt"] for message in messages]
        if len(receipts) == 1:
            results = [broker.call("delete", receipt=receipts[0])]
        else:
            results = broker.call("delete_batch", receipts=receipts)["results"]
        if any(result != {"deleted": True} for result in results):
            raise RuntimeError(f"not all were deleted: {results}")
        for message in messages:
            kept = [message[name] for name in ("body", "message_id", "receive_count", "visible_at")]
            print(*kept, held_from, held_until)


if __name__ == "__main__":
    url, queue, what, *rest = sys.argv[1:]
    if what == "produce":
        produce(Broker(url), queue, int(rest[0]), int(rest[1]))
    else:
        consume(Broker(url), queue, rest[0])
