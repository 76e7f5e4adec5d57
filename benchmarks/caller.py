"""A client of a broker that takes as little time as Python can: one blocking connection, no library for HTTP.

And what is measured with it: how long a message takes to a consumer that waits for it.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.load import Tally


class Caller:
    """One connection to a broker. What is refused raises RuntimeError."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        self._socket = socket.create_connection((parts.hostname, parts.port or 80), timeout=120)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def request(self, method: str, **params: Any) -> bytes:
        """Return the bytes of a call."""
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}, separators=(",", ":"))
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
        began_at = time.perf_counter()
        self.send(request)
        body = self.receive()
        milliseconds = (time.perf_counter() - began_at) * 1000
        return result_of(body), milliseconds

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
    it. Each producer and each consumer is a thread with a connection of its own. The latencies are the worker's
    `Tally.latencies_ms`.
    """

    url: str
    queue: str
    rate: float
    seconds: float
    producers: int
    consumers: int

    def run(self, ready: Callable[[], None]) -> Tally:
        count = max(1, round(self.rate * self.seconds))
        taken: list[float] = []
        problems: list[str] = []
        began_at = 0.0

        def produce(first: int) -> None:
            with Caller(self.url) as caller:
                start.wait()
                for n in range(first, count, self.producers):
                    request = caller.request("enqueue", queue=self.queue, body=n)
                    time.sleep(max(0.0, began_at + n / self.rate - time.perf_counter()))
                    caller.timed(request)

        def consume() -> None:
            with Caller(self.url) as caller:
                request = caller.request("dequeue", queue=self.queue, wait=1)
                start.wait()
                while len(taken) < count and not problems:
                    caller.send(request)
                    body = caller.receive()
                    arrived_at = time.perf_counter()
                    for message in result_of(body)["messages"]:
                        taken.append((arrived_at - began_at - message["body"] / self.rate) * 1000)
                        caller.call("delete", receipt=message["receipt"])

        def guarded(task: Callable[[], None]) -> None:
            try:
                task()
            except (OSError, RuntimeError) as error:
                problems.append(str(error))

        start = threading.Event()
        tasks: list[Callable[[], None]] = [lambda n=n: produce(n) for n in range(self.producers)]  # type: ignore[misc]
        tasks += [consume] * self.consumers
        threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        ready()
        began_at = time.perf_counter() + 0.2  # until the consumers wait
        start.set()
        for thread in threads:
            thread.join(self.seconds + 60)
        errors = {f"refused ({problems[0]})": len(problems)} if problems else {}
        if len(taken) != count and not problems:
            errors = {"not delivered exactly once": abs(count - len(taken))}
        return Tally(messages=len(taken), errors=errors, latencies_ms=taken)
