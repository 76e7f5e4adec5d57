"""Peers that are servers of their own: beanstalkd, Redis, RabbitMQ, each with everything on disk that it can.

They are driven by their protocols, written and read here with as little work as can be, because the load has to be
cheaper than the server: each client is a small state machine on a connection of its own.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from benchmarks.load import Tally, Work, read_bodies, run_loop, work
from benchmarks.processes import running

START_SECONDS = 60.0


class Peer(ABC):
    """A server that runs: where it listens on loopback, and its process."""

    name: str
    program: str
    how: str  # it was made durable

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid
        self._queues = 0

    @classmethod
    def is_installed(cls) -> bool:
        return shutil.which(cls.program) is not None

    @classmethod
    @abstractmethod
    def start(cls, folder: Path) -> AbstractContextManager[Peer]:
        """Run the server, with its files in this folder; yield it when it answers; stop it."""

    @abstractmethod
    def client(self, queue: str) -> Callable[[Shared, Iterator[list[bytes]]], Client]:
        """Return what makes a client of a queue; it can be pickled."""

    def lives(self, clients: int, batch: int, bodies: Path, seconds: float) -> Tally:
        """Let messages live on a fresh queue; return how many did."""
        self._queues += 1
        queue = f"q{self._queues}"
        workers: list[Work] = [Lives(self, queue, clients, batch, bodies, seconds)]
        return work(workers)


@dataclass
class Shared:
    """What the clients of a worker share: when to end, how much is in a batch, what was done."""

    until: float
    batch: int
    done: int = 0
    refused: int = 0
    refusal: str = ""


@dataclass(frozen=True)
class Lives:
    """A worker that lets messages live in a peer by so many clients."""

    peer: Peer
    queue: str
    clients: int
    batch: int
    bodies: Path
    seconds: float

    def run(self, ready: Callable[[], None]) -> Tally:
        return run_loop(self._run(ready))

    async def _run(self, ready: Callable[[], None]) -> Tally:
        bodies = [body.encode() for body in read_bodies(self.bodies)]
        shared = Shared(0.0, self.batch)
        make = self.peer.client(self.queue)
        loop = asyncio.get_running_loop()
        clients = []
        for n in range(self.clients):
            client = make(shared, _batches(bodies, n * 997, self.batch))
            await loop.create_connection(partial(_itself, client), "127.0.0.1", self.peer.port)
            await asyncio.wait_for(client.opened, START_SECONDS)
            clients.append(client)
        ready()
        shared.until = time.perf_counter() + self.seconds
        for client in clients:
            client.begin()
        await asyncio.sleep(self.seconds)
        for client in clients:
            client.expire()
        await asyncio.wait([client.ended for client in clients], timeout=30)
        lost = sum(not client.ended.done() for client in clients)
        errors = {f"refused ({shared.refusal})": shared.refused, "no answer in time": lost}
        return Tally(messages=shared.done, errors={kind: count for kind, count in errors.items() if count})


def _itself(client: Client) -> Client:
    return client


def _batches(bodies: Sequence[bytes], at: int, batch: int) -> Iterator[list[bytes]]:
    while True:
        yield [bodies[(at + i) % len(bodies)] for i in range(batch)]
        at += batch


class Client(asyncio.Protocol, ABC):
    """A connection that lets one batch live after the other. `received` is what was not understood yet."""

    def __init__(self, shared: Shared, bodies: Iterator[list[bytes]]) -> None:
        loop = asyncio.get_running_loop()
        self.shared = shared
        self.bodies = bodies
        self.received = b""
        self.opened: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self.transport: asyncio.WriteTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)
        self.open()

    def open(self) -> None:
        """Do what comes before the first message."""
        self.opened.set_result(None)

    @abstractmethod
    def begin(self) -> None:
        """Send the first batch."""

    @abstractmethod
    def understand(self) -> None:
        """Look at what was received, and go on where it is all that was waited for."""

    def data_received(self, data: bytes) -> None:
        self.received += data
        self.understand()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(exc or ConnectionError("the connection was closed"))
        elif not self.ended.done():
            self.refuse(b"the connection was closed")
            self.end()

    def refuse(self, answer: bytes) -> None:
        """Count an answer that is not what was asked for."""
        self.shared.refused += 1
        self.shared.refusal = self.shared.refusal or answer[:100].decode("utf-8", "replace")

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self.shared.until

    def expire(self) -> None:
        """Take notice that time is over. (Those who ask for each answer notice with the next.)"""

    def end(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


class BeanstalkdClient(Client):
    """put, reserve, delete; a batch is sent at once, as that many commands."""

    def __init__(self, queue: str, shared: Shared, bodies: Iterator[list[bytes]]) -> None:
        super().__init__(shared, bodies)
        self.queue = queue.encode()
        self.state = self.opening

    def open(self) -> None:
        self.transport.write(b"use %b\r\nwatch %b\r\nignore default\r\n" % (self.queue, self.queue))

    def understand(self) -> None:
        self.state()

    def opening(self) -> None:
        if self.received.count(b"\r\n") == 3:
            self.received = b""
            self.opened.set_result(None)

    def begin(self) -> None:
        if self.is_over:
            self.end()
            return
        self.transport.write(b"".join(b"put 0 0 60 %d\r\n%b\r\n" % (len(body), body) for body in next(self.bodies)))
        self.state = self.putting

    def putting(self) -> None:
        if self.received.count(b"\r\n") >= self.shared.batch:
            if self.received.count(b"INSERTED ") != self.shared.batch:
                self.refuse(self.received)
            self.received = b""
            self.transport.write(b"reserve-with-timeout 0\r\n" * self.shared.batch)
            self.state = self.reserving

    def reserving(self) -> None:
        reserved, empty = self.received.count(b"RESERVED "), self.received.count(b"TIMED_OUT\r\n")
        complete = reserved + empty >= self.shared.batch and self.received.count(b"\r\n") >= 2 * reserved + empty
        if complete:
            jobs = re.findall(rb"RESERVED (\d+) \d+\r\n", self.received)
            self.received = b""
            self.deleting_now = len(jobs)
            self.state = self.deleting
            if jobs:
                self.transport.write(b"".join(b"delete %b\r\n" % job for job in jobs))
            else:
                self.begin()

    def deleting(self) -> None:
        if self.received.count(b"\r\n") >= self.deleting_now:
            deleted = self.received.count(b"DELETED\r\n")
            self.shared.done += deleted
            if deleted != self.deleting_now:
                self.refuse(self.received)
            self.received = b""
            self.begin()


class Beanstalkd(Peer):
    name = "beanstalkd"
    program = "beanstalkd"
    how = "-b -f0: every write is synced to disk"

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Peer]:
        port = free_port()
        command = [cls.program, "-l", "127.0.0.1", "-p", str(port), "-b", str(folder), "-f0"]
        with running(command, dict(os.environ)) as process:
            wait_for(port)
            yield cls(port, process.pid)

    def client(self, queue: str) -> Callable[[Shared, Iterator[list[bytes]]], Client]:
        return lambda shared, bodies: BeanstalkdClient(queue, shared, bodies)


class RedisClient(Client):
    """A stream with a group of consumers: XADD, XREADGROUP, then XACK and XDEL together; batches as pipelines."""

    def __init__(self, queue: str, shared: Shared, bodies: Iterator[list[bytes]]) -> None:
        super().__init__(shared, bodies)
        self.queue = queue.encode()
        self.state = self.adding

    def understand(self) -> None:
        if self.received.startswith(b"-") and self.received.endswith(b"\r\n"):
            self.refuse(self.received)
            self.received = b""
            self.begin()
        else:
            self.state()

    def begin(self) -> None:
        if self.is_over:
            self.end()
            return
        self.transport.write(b"".join(_resp(b"XADD", self.queue, b"*", b"b", body) for body in next(self.bodies)))
        self.state = self.adding

    def adding(self) -> None:
        if self.received.count(b"\r\n") >= 2 * self.shared.batch:
            if self.received.count(b"$") != self.shared.batch:
                self.refuse(self.received)
            self.received = b""
            count = b"%d" % self.shared.batch
            self.transport.write(
                _resp(b"XREADGROUP", b"GROUP", b"g", b"c", b"COUNT", count, b"STREAMS", self.queue, b">")
            )
            self.state = self.reading

    def reading(self) -> None:
        if self.received == b"*-1\r\n":  # another was faster
            self.received = b""
            self.begin()
            return
        head = re.match(rb"\*1\r\n\*2\r\n\$\d+\r\n\w+\r\n\*(\d+)\r\n", self.received)
        # Five lines before the entries, and eight for each: the array, id, array of fields, name and value.
        if head and self.received.count(b"\r\n") >= 5 + 8 * int(head[1]):
            ids = re.findall(rb"\r\n(\d+-\d+)\r\n", self.received)
            self.received = b""
            self.deleting_now = len(ids)
            self.transport.write(_resp(b"XACK", self.queue, b"g", *ids) + _resp(b"XDEL", self.queue, *ids))
            self.state = self.deleting

    def deleting(self) -> None:
        if self.received.count(b"\r\n") >= 2:
            expected = b":%d\r\n" % self.deleting_now
            if self.received == expected * 2:
                self.shared.done += self.deleting_now
            else:
                self.refuse(self.received)
            self.received = b""
            self.begin()


def _resp(*words: bytes) -> bytes:
    """Return a command in Redis's protocol."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Redis(Peer):
    name = "Redis"
    program = "redis-server"
    how = "streams, --appendonly yes --appendfsync always"

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Peer]:
        port = free_port()
        command = [cls.program, "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
        command += ["--appendonly", "yes", "--appendfsync", "always", "--logfile", str(folder / "log")]
        with running(command, dict(os.environ)) as process:
            wait_for(port)
            yield cls(port, process.pid)

    def lives(self, clients: int, batch: int, bodies: Path, seconds: float) -> Tally:
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            queue = f"q{self._queues + 1}".encode()
            connection.sendall(_resp(b"XGROUP", b"CREATE", queue, b"g", b"$", b"MKSTREAM"))
            assert connection.recv(100) == b"+OK\r\n"
        return super().lives(clients, batch, bodies, seconds)

    def client(self, queue: str) -> Callable[[Shared, Iterator[list[bytes]]], Client]:
        return lambda shared, bodies: RedisClient(queue, shared, bodies)


FRAME_BYTES = 131_072
_METHOD_FRAME, _BODY_FRAME = 1, 3
# Methods of AMQP: the first four bytes of a payload. Refusals are nack, and the closing of channel or connection.
_BASIC_ACK, _BASIC_DELIVER = b"\x00\x3c\x00\x50", b"\x00\x3c\x00\x3c"
_REFUSALS = (b"\x00\x3c\x00\x78", b"\x00\x14\x00\x28", b"\x00\x0a\x00\x32")


class RabbitmqClient(Client):
    """Publishes with confirms, consumes by push, acknowledges all that came at once.

    The next batch is published when the last is confirmed and as many messages were consumed as published here.
    RabbitMQ does not answer acknowledgements, so, unlike everywhere else, a message counts when its end was asked for.
    """

    def __init__(self, queue: str, shared: Shared, bodies: Iterator[list[bytes]]) -> None:
        super().__init__(shared, bodies)
        from pamqp import commands

        self.queue = queue
        self.unconfirmed: set[int] = set()
        self.published = self.acknowledged = self.delivered = 0
        start_ok = commands.Connection.StartOk({}, "PLAIN", "\0guest\0guest", "en_US")
        # What is said in turn, each after an answer to the one before; (channel, method).
        self.handshake: Iterator[list[tuple[int, Any]]] = iter(
            [
                [(0, start_ok)],
                [(0, commands.Connection.TuneOk(1, FRAME_BYTES, 0)), (0, commands.Connection.Open("/"))],
                [(1, commands.Channel.Open())],
                [(1, commands.Confirm.Select())],
                [(1, commands.Queue.Declare(queue=queue, durable=True))],
                [(1, commands.Basic.Qos(prefetch_count=shared.batch))],
                [(1, commands.Basic.Consume(queue=queue, consumer_tag="c"))],
            ]
        )

    def open(self) -> None:
        self.transport.write(b"AMQP\x00\x00\x09\x01")

    def understand(self) -> None:
        at, newest = 0, 0
        while len(self.received) >= at + 7:
            end = at + 7 + int.from_bytes(self.received[at + 3 : at + 7], "big") + 1
            if len(self.received) < end:
                break
            if self.received[at] == _METHOD_FRAME:
                self.take_method(self.received[at + 7 : end - 1])
            elif self.received[at] == _BODY_FRAME:  # the last frame of a message
                newest = self.delivered
            at = end
        self.received = self.received[at:]
        if newest:
            self.transport.write(_frame(_METHOD_FRAME, _BASIC_ACK + newest.to_bytes(8, "big") + b"\x01"))
            if not self.is_over:
                self.shared.done += newest - self.acknowledged
            self.acknowledged = newest
        if self.published and not self.unconfirmed and (self.is_over or self.published <= self.acknowledged):
            self.begin()

    def expire(self) -> None:
        if not self.unconfirmed:
            self.end()  # other clients may have consumed what it waits for

    def take_method(self, payload: bytes) -> None:
        method = payload[:4]
        if method == _BASIC_DELIVER:
            tag = 5 + payload[4]  # behind the name of the consumer
            self.delivered = int.from_bytes(payload[tag : tag + 8], "big")
        elif method == _BASIC_ACK:
            newest = int.from_bytes(payload[4:12], "big")
            if payload[12] & 1:
                self.unconfirmed = {tag for tag in self.unconfirmed if tag > newest}
            else:
                self.unconfirmed.discard(newest)
        elif method in _REFUSALS:
            self.refuse(payload[4:])
            self.end()
        elif (said := next(self.handshake, None)) is not None:
            from pamqp import frame

            self.transport.write(b"".join(frame.marshal(words, channel) for channel, words in said))
        else:
            self.opened.set_result(None)

    def begin(self) -> None:
        from pamqp import commands, frame, header

        if self.is_over:
            self.end()
            return
        bodies = next(self.bodies)
        publish = frame.marshal(commands.Basic.Publish(exchange="", routing_key=self.queue), 1)
        durable = commands.Basic.Properties(delivery_mode=2)
        head = publish + frame.marshal(header.ContentHeader(0, len(bodies[0]), durable), 1)
        self.transport.write(b"".join(head + _frame(_BODY_FRAME, body) for body in bodies))
        self.unconfirmed = set(range(self.published + 1, self.published + 1 + len(bodies)))
        self.published += len(bodies)


def _frame(kind: int, payload: bytes) -> bytes:
    """Return a frame of AMQP on channel 1."""
    return kind.to_bytes(1, "big") + b"\x00\x01" + len(payload).to_bytes(4, "big") + payload + b"\xce"


class Rabbitmq(Peer):
    name = "RabbitMQ"
    program = "rabbitmq-server"
    how = "durable classic queue, persistent messages, publisher confirms; acknowledgements are not answered"

    @classmethod
    def is_installed(cls) -> bool:
        return super().is_installed() and importlib.util.find_spec("pamqp") is not None

    @classmethod
    @contextmanager
    def start(cls, folder: Path) -> Iterator[Peer]:
        port, epmd_port = free_port(), free_port()
        environ = {
            **os.environ,
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": "wonderq-bench@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "none"),
            "RABBITMQ_CONFIG_FILE": str(folder / "none"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        }
        # The system's wrapper changes the account; the real program stands in a folder of the package.
        program = next(Path("/usr/lib/rabbitmq").glob("lib/*/sbin/rabbitmq-server"), Path(cls.program))
        quiet = subprocess.DEVNULL
        with (
            running(["epmd", "-port", str(epmd_port), "-address", "127.0.0.1"], environ, quiet, quiet),
            running([program], environ, quiet, quiet) as process,
        ):
            wait_for(port)
            yield cls(port, process.pid)

    def client(self, queue: str) -> Callable[[Shared, Iterator[list[bytes]]], Client]:
        return lambda shared, bodies: RabbitmqClient(queue, shared, bodies)


PEERS: tuple[type[Peer], ...] = (Beanstalkd, Redis, Rabbitmq)


def free_port() -> int:
    """Return a port of loopback that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(port: int) -> None:
    """Wait until somebody listens on this port of loopback."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
