"""A client with one task, a process of its own that can be killed and paused; needs little but the standard library.

    python actors.py produce NAME URLS QUEUE SEED HISTORY
    python actors.py consume NAME URLS QUEUE SEED HISTORY LEASE_SECONDS
    python actors.py publish NAME URLS TOPIC SEED HISTORY [MESSAGES]
    python actors.py broadcast NAME URLS TOPIC SEED HISTORY
    python actors.py receive NAME URLS QUEUE SEED HISTORY PORT

It calls one of the brokers at URLS (separated by commas), goes to the next one when that fails, and repeats a call
until it has a definite answer: producers and publishers with idempotency keys. Now and then a producer gives up what it
was told was certainly not stored, and a consumer forgets a message, gives it back or extends its lease. A publisher of
so many MESSAGES gives none up, takes no rest, and ends. Who broadcasts repeats it until it is complete. A receiver
calls nobody: at PORT it is pushed what lies in QUEUE, and answers badly now and then. HISTORY gets a line for each
event of `history.py`, written before a call is made and after its answer came. SIGTERM: it finishes what it has begun,
and ends; who broadcasts does so once more.
"""

import http.client
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

# Longer than a broker takes to give a call up, and than a consumer waits.
ANSWER_SECONDS = 6.0
PAUSE_SECONDS = (0.02, 0.1)
WAIT_SECONDS = 0.5
# Between two calls of a producer, on average. Consumers are faster, also on a slow machine: little waits for them when
# the faults are over, and what a drain takes then is the time of leases.
THINK_SECONDS = 0.05
MOST_MESSAGES = 10
# Between two broadcasts, on average.
BROADCAST_SECONDS = 0.5
# A published value ends with one, which is a header too, so that subscriptions can ask for it.
COLOURS = ("red", "blue")
# What a receiver answers, and how often; None: it closes the connection.
ANSWERS: dict[int | None, float] = {204: 0.85, 500: 0.05, 429: 0.02, 503: 0.02, 307: 0.03, None: 0.03}
TAKEN = 204

is_ending = False


def end(number: int, frame: FrameType | None) -> None:
    global is_ending
    is_ending = True


class AttemptFailed(Exception):
    """No definite answer; `outcome` says whether anything may have been done."""

    def __init__(self, outcome: str, kind: str) -> None:
        super().__init__(outcome, kind)
        self.outcome = outcome
        self.kind = kind


class LeaseLost(Exception):
    """The broker's answer of that name."""


class History:
    """A file that has every line as soon as it is written, also when the process is killed."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(self, what: str, **about: Any) -> None:
        os.write(self._file, json.dumps({"what": what, "at": time.monotonic(), **about}).encode() + b"\n")


class Brokers:
    """One kept-alive connection to one of several brokers."""

    def __init__(self, urls: list[str], rng: random.Random, history: History) -> None:
        self._addresses = [urlsplit(url).netloc for url in urls]
        self._turn = rng.randrange(len(urls))
        self._connection: http.client.HTTPConnection | None = None
        self._rng = rng
        self._history = history

    def call(self, method: str, *, gives_up: bool = False, **params: Any) -> Any:
        """Repeat a call until it has a definite answer; return its result.

        Raises LeaseLost; and AttemptFailed where it `gives_up` after a first attempt with the outcome "none".
        """
        is_first = True
        while True:
            began_at = time.monotonic()
            try:
                return self._attempt(method, params)
            except AttemptFailed as error:
                seconds = time.monotonic() - began_at
                self._history.add("failed", method=method, outcome=error.outcome, type=error.kind, seconds=seconds)
                if gives_up and is_first and error.outcome == "none":
                    raise
                is_first = False
                self._go_to_the_next()
                time.sleep(self._rng.uniform(*PAUSE_SECONDS))

    def _attempt(self, method: str, params: dict[str, Any]) -> Any:
        request = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params})
        if self._connection is None:
            connection = http.client.HTTPConnection(self._addresses[self._turn], timeout=ANSWER_SECONDS)
            try:
                connection.connect()
            except OSError as error:
                raise AttemptFailed("none", type(error).__name__) from error
            self._connection = connection
        try:
            self._connection.request("POST", "/rpc", request, {"Content-Type": "application/json"})
            answer = json.loads(self._connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise AttemptFailed("unknown", type(error).__name__) from error
        if "error" not in answer:
            return answer["result"]
        data = answer["error"]["data"]
        if data["type"] == "lease_lost":
            raise LeaseLost
        if data["type"] == "invalid_params":
            raise RuntimeError(answer["error"]["message"])  # a mistake of this program
        raise AttemptFailed(data["outcome"], data["type"])

    def _go_to_the_next(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._turn = (self._turn + 1) % len(self._addresses)


def produce(name: str, brokers: Brokers, queue: str, rng: random.Random, history: History) -> None:
    number = 0
    while not is_ending:
        size = rng.choice([1, 1, rng.randint(2, 10)])
        values = [f"{name}-{n}" for n in range(number, number + size)]
        number += size
        messages = [{"body": value, "idempotency_key": value} for value in values]
        gives_up = rng.random() < 0.2
        history.add("attempted", values=values)
        try:
            if size == 1:
                stored = [brokers.call("enqueue", gives_up=gives_up, queue=queue, **messages[0])]
            else:
                stored = brokers.call("enqueue_batch", gives_up=gives_up, queue=queue, messages=messages)["messages"]
        except AttemptFailed:
            history.add("refused", values=values)
            continue
        history.add("acknowledged", values=values, message_ids=[one["message_id"] for one in stored])
        time.sleep(rng.expovariate(1 / THINK_SECONDS))


def publish(name: str, brokers: Brokers, topic: str, rng: random.Random, history: History, messages: float) -> None:
    number = 0
    while not is_ending and number < messages:
        colour = rng.choice(COLOURS)
        value = f"{name}-{number}-{colour}"
        number += 1
        message = {"body": value, "headers": {"colour": colour}, "idempotency_key": value}
        gives_up = messages == math.inf and rng.random() < 0.2
        history.add("attempted", values=[value])
        try:
            published = brokers.call("publish", gives_up=gives_up, topic=topic, **message)
        except AttemptFailed:
            history.add("refused", values=[value])
            continue
        ids = [published["message_id"]]
        history.add("acknowledged", values=[value], message_ids=ids, deliveries=published["deliveries"])
        if messages == math.inf:
            time.sleep(rng.expovariate(1 / THINK_SECONDS))


def broadcast(brokers: Brokers, topic: str, rng: random.Random, history: History) -> None:
    while True:
        is_last = is_ending
        answer = brokers.call("broadcast", topic=topic)
        history.add("broadcast", messages=answer["messages"], complete=answer["complete"])
        if answer["complete"]:
            if is_last:
                break
            time.sleep(rng.expovariate(1 / BROADCAST_SECONDS))


def consume(brokers: Brokers, queue: str, rng: random.Random, history: History, lease: float) -> None:
    while not is_ending:
        asked_at = time.monotonic()
        size = rng.randint(1, MOST_MESSAGES)
        delivery = brokers.call("dequeue", queue=queue, max_messages=size, visibility_timeout=lease, wait=WAIT_SECONDS)
        kept = []
        for message in delivery["messages"]:
            history.add(
                "delivered",
                asked_at=asked_at,
                value=message["body"],
                message_id=message["message_id"],
                published_id=message.get("published_id"),
                receipt=message["receipt"],
                visible_at=message["visible_at"],
                visibility_timeout=lease,
            )
            chance = rng.random()
            if chance < 0.002:
                continue  # forgotten
            if chance < 0.02:
                extend(brokers, history, message["receipt"], 0)
                continue
            if chance < 0.06:
                extend(brokers, history, message["receipt"], lease)
            kept.append(message["receipt"])
        if len(kept) == 1 or rng.random() < 0.15:
            for receipt in kept:
                delete(brokers, history, receipt)
        elif kept:
            delete_batch(brokers, history, kept)


def receive(name: str, port: int, rng: random.Random, history: History) -> None:
    pushes = itertools.count()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            push = f"{name}-{next(pushes)}"
            history.add("pushed", push=push, value=body, message_id=self.headers["webhook-id"])
            (status,) = rng.choices(list(ANSWERS), list(ANSWERS.values()))
            if status is None:
                self.close_connection = True
                return
            history.add("answering", push=push, is_taken=status == TAKEN)
            self.send_response(status)
            if status in (429, 503):
                self.send_header("Retry-After", "1")
            if status == 307:
                self.send_header("Location", "http://127.0.0.1:1/")
            if status != TAKEN:
                self.send_header("Content-Length", "0")
            self.end_headers()
            history.add("answered", push=push)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # the broker has gone meanwhile

    server = Server(("127.0.0.1", port), Handler)
    server.timeout = 0.1
    while not is_ending:
        server.handle_request()


def extend(brokers: Brokers, history: History, receipt: str, seconds: float) -> None:
    history.add("extending", receipt=receipt, visibility_timeout=seconds)
    try:
        answer = brokers.call("extend_visibility", receipt=receipt, visibility_timeout=seconds)
    except LeaseLost:
        answer = {"visible_at": None}
    history.add("extended", receipt=receipt, visible_at=answer["visible_at"])


def delete(brokers: Brokers, history: History, receipt: str) -> None:
    history.add("deleting", receipt=receipt)
    try:
        answer = brokers.call("delete", receipt=receipt)
    except LeaseLost:
        history.add("deleted", receipt=receipt, result="lease_lost")
    else:
        history.add("deleted", receipt=receipt, result="deleted" if answer["deleted"] else "gone")


def delete_batch(brokers: Brokers, history: History, receipts: list[str]) -> None:
    for receipt in receipts:
        history.add("deleting", receipt=receipt)
    results = brokers.call("delete_batch", receipts=receipts)["results"]
    for receipt, result in zip(receipts, results, strict=True):
        if "error" not in result:
            history.add("deleted", receipt=receipt, result="deleted" if result["deleted"] else "gone")
        elif result["error"]["data"]["type"] == "lease_lost":
            history.add("deleted", receipt=receipt, result="lease_lost")
        else:
            delete(brokers, history, receipt)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    what, name, urls, target, seed, path, *rest = sys.argv[1:]
    rng = random.Random(f"{seed} {name}")
    history = History(path)
    brokers = Brokers(urls.split(","), rng, history)
    if what == "produce":
        produce(name, brokers, target, rng, history)
    elif what == "publish":
        publish(name, brokers, target, rng, history, float(rest[0]) if rest else math.inf)
    elif what == "broadcast":
        broadcast(brokers, target, rng, history)
    elif what == "receive":
        receive(name, int(rest[0]), rng, history)
    else:
        consume(brokers, target, rng, history, float(rest[0]))
