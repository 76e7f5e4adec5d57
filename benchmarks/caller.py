"""A client of a broker that takes as little time as Python can: one blocking connection, no library for HTTP.

And what is measured with it: how long a message takes to a consumer that waits for it.
"""

from __future__ import annotations

import json
import select
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.load import Tally


class Caller:
    """One connection to a broker, with a token where one is given. What is refused raises RuntimeError."""

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        if token is not None:
            self._head += f"Authorization: Bearer {token}\r\n"
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """The connection's number, for select."""
        return self._socket.fileno()

    def request(self, method: str, **params: Any) -> bytes:
        """Return the bytes of a call."""
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}, separators=(",", ":"))
        return self.post(body)

    def post(self, body: str) -> bytes:
        """Return the bytes of a request with this body, in ASCII."""
        return f"POST /rpc HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n{body}".encode()

    def send(self, request: bytes) -> None:
        self._socket.sendall(request)

    def receive(self) -> bytes:
        """Return the body of the next answer. Raises RuntimeError where its status is not 200."""
        data = b""
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more()
        head = data[:end].lower()
        length = int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        parts, missing = [data[end + 4 :]], length - (len(data) - end - 4)
        while missing > 0:
            parts.append(self._more())
            missing -= len(parts[-1])
        body = b"".join(parts)
        if b" 200 " not in head.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"refused: {body[:200]!r}")
        return body

    def call(self, method: str, **params: Any) -> Any:
        """Call a method; return its result."""
        return self.timed(self.request(method, **params))[0]

    def timed(self, request: bytes) -> tuple[Any, float]:
        """Send a call; return its result, and the milliseconds until the answer was there, not yet read as JSON."""
        body, milliseconds = self._timed(request)
        return result_of(body), milliseconds

    def timed_batch(self, request: bytes) -> tuple[Any, float]:
        """Send a batch of calls; return its answers, errors too, and the milliseconds until they were there."""
        body, milliseconds = self._timed(request)
        return json.loads(body), milliseconds

    def _timed(self, request: bytes) -> tuple[bytes, float]:
        began_at = time.perf_counter()
        self.send(request)
        body = self.receive()
        return body, (time.perf_counter() - began_at) * 1000

    def get(self, path: str) -> float:
        """GET a page; return the milliseconds that it took."""
        began_at = time.perf_counter()
        self.send(f"GET {path} HTTP/1.1\r\n{self._head}\r\n".encode())
        self.receive()
        return (time.perf_counter() - began_at) * 1000

    def _more(self) -> bytes:
        data = self._socket.recv(262_144)
        if not data:
            raise RuntimeError("the connection was closed")
        return data


def result_of(body: bytes) -> Any:
    """Return the result in an answer. Raises RuntimeError where it is an error."""
    answer = json.loads(body)
    if "error" in answer:
        raise RuntimeError(f"refused: {answer['error']}")
    return answer["result"]


@dataclass(frozen=True)
class SetTimes:
    """A worker that sends `rate` messages a second, each at a set time, to consumers that wait for them.

    A message's time begins when it should have been sent, so a broker that keeps producers waiting does not gain by
    it. One thread serves all the connections: many would wait for each other, and be measured as well. The
    latencies are the worker's `Tally.latencies_ms`.
    """

    url: str
    queue: str
    rate: float
    seconds: float
    producers: int
    consumers: int

    def run(self, ready: Callable[[], None]) -> Tally:
        count = max(1, round(self.rate * self.seconds))
        with ExitStack() as stack:
            free = [stack.enter_context(Caller(self.url)) for _ in range(self.producers)]
            consumers = [stack.enter_context(Caller(self.url)) for _ in range(self.consumers)]
            dequeue = consumers[0].request("dequeue", queue=self.queue, wait=60)
            ready()
            for consumer in consumers:
                consumer.send(dequeue)
            began_at = time.perf_counter() + 0.2  # until they wait
            until = began_at + self.seconds + 60
            busy_producers: set[Caller] = set()
            deleting: set[Caller] = set()
            latencies: list[float] = []
            sent = 0
            while len(latencies) < count and (now := time.perf_counter()) < until:
                due_in = began_at + sent / self.rate - now
                if sent < count and free and due_in <= 0:
                    producer = free.pop()
                    producer.send(producer.request("enqueue", queue=self.queue, body=sent))
                    busy_producers.add(producer)
                    sent += 1
                    continue
                # select, and not what is newer: its timeout is in microseconds.
                patience = due_in if sent < count and free else 1.0
                for caller in select.select([*busy_producers, *consumers], [], [], patience)[0]:
                    result = result_of(caller.receive())
                    arrived_at = time.perf_counter()
                    if caller in busy_producers:
                        busy_producers.remove(caller)
                        free.append(caller)
                    elif caller not in deleting and result["messages"]:
                        (message,) = result["messages"]
                        latencies.append((arrived_at - began_at - message["body"] / self.rate) * 1000)
                        caller.send(caller.request("delete", receipt=message["receipt"]))
                        deleting.add(caller)
                    else:
                        deleting.discard(caller)
                        caller.send(dequeue)
        errors = {} if len(latencies) == count else {"not delivered": count - len(latencies)}
        return Tally(messages=len(latencies), errors=errors, latencies_ms=latencies)
