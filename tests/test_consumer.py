"""The consumer loop, with a real broker; killed processes and restarts of the database are in tests/faults.

A handler waits for events, so that a test decides how long it runs. `Recording` is a client that notes what is called.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
import time
import uuid
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime
from typing import Any

import pytest

from broker.client import BrokerError, Client, ConnectionFailed, Consumer, Forbidden, Message, QueueNotFound
from broker.client import consumer as consumer_module
from broker.server import Server
from broker.settings import Settings
from conftest import PATIENCE
from scripted import call_in, error, http, result, server


class Recording(Client):
    """A client that notes the batches of its deletions and extensions, and how many messages were asked for."""

    def __init__(self, url: str, **options: Any) -> None:
        super().__init__(url, **options)
        self.deleted: list[int] = []
        self.extended: list[int] = []
        self.asked_for: list[int | None] = []
        self.on_delivery: Callable[[], object] = lambda: None

    async def delete_batch(self, receipts: Iterable[str | None]) -> list[bool | BrokerError]:
        all_receipts = list(receipts)
        self.deleted.append(len(all_receipts))
        return await super().delete_batch(all_receipts)

    async def extend_visibility_batch(
        self, receipts: Iterable[str | None], visibility_timeout: float
    ) -> list[datetime | BrokerError]:
        all_receipts = list(receipts)
        self.extended.append(len(all_receipts))
        return await super().extend_visibility_batch(all_receipts, visibility_timeout)

    async def dequeue(self, queue: str = "default", **options: Any) -> list[Message]:
        self.asked_for.append(options.get("max_messages"))
        messages = await super().dequeue(queue, **options)
        if messages:
            self.on_delivery()
        return messages


@pytest.fixture
async def client(broker_url: str) -> AsyncIterator[Recording]:
    async with Recording(broker_url) as client:
        yield client


@pytest.fixture
async def queue(client: Client) -> str:
    name = f"consumer-{uuid.uuid4().hex}"
    await client.create_queue(name)
    return name


class Handler:
    """Notes what it is given; each message waits until it is `released`, unless it was before."""

    def __init__(self) -> None:
        self.seen: list[Message] = []
        self.cancelled: list[Message] = []
        self.running = self.most = 0
        self.released = asyncio.Event()
        self.changed = asyncio.Condition()

    async def __call__(self, message: Message) -> None:
        self.seen.append(message)
        self.running += 1
        self.most = max(self.most, self.running)
        await self._tell()
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.append(message)
            raise
        finally:
            self.running -= 1
            await self._tell()

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, fact: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE), self.changed:
            await self.changed.wait_for(fact)


@asynccontextmanager
async def running(consumer: Consumer) -> AsyncIterator[asyncio.Task[None]]:
    """Run a consumer beside the block; at its end it must stop by itself."""
    task = asyncio.create_task(consumer.run(handle_signals=False))
    try:
        yield task
        consumer.stop()
        async with asyncio.timeout(PATIENCE):
            await task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def until(fact: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await fact():
            await asyncio.sleep(0.01)


async def counts(client: Client, queue: str) -> tuple[int, int, int]:
    """Return how many are ready, delayed and leased."""
    counted = await client.count_messages(queue)
    return counted["ready"], counted["delayed"], counted["leased"]


async def empty(client: Client, queue: str) -> bool:
    return bool((await client.count_messages(queue))["total"] == 0)


async def test_every_message_is_handled_once_and_deleted(client: Recording, queue: str) -> None:
    ids = await client.enqueue_batch(queue, [{"body": n} for n in range(500)])
    handler = Handler()
    handler.released.set()

    async with running(Consumer(client, queue, handler, concurrency=50)):
        await until(lambda: empty(client, queue))

    assert sorted(message.message_id for message in handler.seen) == sorted(ids)
    assert {message.receive_count for message in handler.seen} == {1}
    # Deletions that come together share a call.
    assert sum(client.deleted) == 500
    assert len(client.deleted) < 100


async def test_no_more_is_taken_than_there_are_free_places(client: Recording, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(10)])
    handler = Handler()

    async with running(Consumer(client, queue, handler, concurrency=3)):
        await handler.until(lambda: handler.running == 3)
        for _ in range(20):
            assert await counts(client, queue) == (7, 0, 3)
        handler.released.set()
        await until(lambda: empty(client, queue))

    assert handler.most == 3
    assert len(handler.seen) == 10
    assert max(asked for asked in client.asked_for if asked is not None) == 3


async def test_leases_are_extended_by_one_call_while_their_handlers_run(client: Recording, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(5)])
    handler = Handler()

    async def all_extended() -> bool:
        first = {message.message_id: message.visible_at for message in handler.seen}
        stored = [message async for message in client.list_messages(queue)]
        return all(message.visible_at > first[message.message_id] for message in stored)

    async with running(Consumer(client, queue, handler, concurrency=5, visibility_timeout=6)):
        await handler.until(lambda: handler.running == 5)
        await until(all_extended)
        # The leases that they began with are over, and nobody else gets the messages.
        assert await client.dequeue(queue, max_messages=5, wait=7) == []
        handler.released.set()
        await until(lambda: empty(client, queue))

    assert len(handler.seen) == 5
    assert max(client.extended) == 5


async def test_the_lease_is_the_queues_where_no_other_is_said(client: Client) -> None:
    queue = f"consumer-{uuid.uuid4().hex}"
    await client.create_queue(queue, visibility_timeout=600)
    await client.enqueue(queue, 1)
    handler = Handler()

    async with running(Consumer(client, queue, handler)):
        await handler.until(lambda: handler.running == 1)
        handler.released.set()

    [message] = handler.seen
    assert message.first_received_at is not None
    assert (message.visible_at - message.first_received_at).total_seconds() == 600


async def test_who_may_only_receive_gets_leases_of_thirty_seconds() -> None:
    asked: list[Any] = []

    def answer(request: bytes) -> bytes:
        call = call_in(request)
        if call["method"] == "get_queue":
            return error("forbidden", -32003)
        asked.append(call["params"])
        return error("queue_not_found", 1001)

    async with server(answer) as url, Client(url) as client:
        with pytest.raises(QueueNotFound):
            await client.consume("q", print, concurrency=7, wait=3)

    assert asked == [{"queue": "q", "max_messages": 7, "visibility_timeout": 30, "wait": 3}]


async def test_a_message_whose_handler_failed_comes_again_later_each_time(
    client: Client, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    message_id = await client.enqueue(queue, 1)
    seen: list[Message] = []
    told: list[tuple[Message, Exception]] = []

    async def handle(message: Message) -> None:
        seen.append(message)
        if len(seen) < 4:
            raise RuntimeError(f"failure {len(seen)}")

    async with running(Consumer(client, queue, handle, first_pause=0.4, on_error=lambda *about: told.append(about))):
        await until(lambda: empty(client, queue))

    assert [message.receive_count for message in seen] == [1, 2, 3, 4]
    assert [(message.message_id, str(failure)) for message, failure in told] == [
        (message_id, f"failure {n}") for n in (1, 2, 3)
    ]
    logged = [record.getMessage() for record in caplog.records if "the handler failed" in record.getMessage()]
    assert len(logged) == 3
    pauses = [float(text.split("comes again in ")[1].split(" s")[0]) for text in logged]
    for pause, doubled in zip(pauses, (0.4, 0.8, 1.6), strict=True):
        assert 0.5 * doubled - 0.1 <= pause <= 1.5 * doubled + 0.1


async def test_the_pause_before_a_message_comes_again_has_an_end(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    handled = asyncio.Event()

    async def handle(message: Message) -> None:
        handled.set()
        raise RuntimeError("no")

    async with running(Consumer(client, queue, handle, first_pause=10_000, longest_pause=100)):
        await handled.wait()

    [message] = [message async for message in client.list_messages(queue)]
    assert message.first_received_at is not None
    assert 49 < (message.visible_at - message.first_received_at).total_seconds() < 160 + PATIENCE


async def test_a_message_that_always_fails_is_dead_after_its_deliveries(client: Client, queue: str) -> None:
    poisoned = f"{queue}-poisoned"
    await client.create_queue(poisoned, max_receives=3, dead_letter_queue=queue)
    await client.enqueue(poisoned, 1)
    seen: list[int] = []

    def handle(message: Message) -> None:
        seen.append(message.receive_count)
        raise RuntimeError("always")

    async def is_dead() -> bool:
        return bool((await client.count_messages(queue))["total"] == 1)

    async with running(Consumer(client, poisoned, handle, first_pause=0.01)):
        await until(is_dead)

    assert seen == [1, 2, 3]


@pytest.mark.parametrize("hook", ["asynchronous", "failing"])
async def test_whatever_on_error_does_the_loop_goes_on(client: Client, queue: str, hook: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(3)])
    told: list[str] = []

    async def on_error(message: Message, failure: Exception) -> None:
        await asyncio.sleep(0)
        told.append(str(failure))
        if hook == "failing":
            raise ValueError("in the hook")

    async def handle(message: Message) -> None:
        if message.receive_count == 1:
            raise RuntimeError("first time")

    async with running(Consumer(client, queue, handle, first_pause=0.01, on_error=on_error)):
        await until(lambda: empty(client, queue))

    assert told == ["first time"] * 3


async def test_a_plain_function_runs_in_threads_as_many_as_there_are_places(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(40)])
    barrier = threading.Barrier(40, timeout=PATIENCE)
    threads: set[str] = set()

    def handle(message: Message) -> None:
        barrier.wait()  # passes only if all forty run at the same time
        threads.add(threading.current_thread().name)

    async with running(Consumer(client, queue, handle, concurrency=40)):
        await until(lambda: empty(client, queue))

    assert len(threads) == 40


async def test_what_a_plain_function_returns_is_awaited_if_it_can_be(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    handler = Handler()
    handler.released.set()

    async with running(Consumer(client, queue, lambda message: handler(message))):
        await until(lambda: empty(client, queue))

    assert len(handler.seen) == 1


async def take_away(client: Client, message: Message) -> Message:
    """End a lease before its time, and let somebody else have the message."""
    await client.extend_visibility(message.receipt, 0)
    [taken] = await client.dequeue(message.queue, wait=20, visibility_timeout=600)
    return taken


async def test_a_handler_whose_lease_is_lost_is_cancelled(
    client: Client, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await client.enqueue(queue, 1)
    handler = Handler()

    consumer = Consumer(client, queue, handler, concurrency=1, visibility_timeout=2)
    async with running(consumer):
        await handler.until(lambda: handler.running == 1)
        taken = await take_away(client, handler.seen[0])
        consumer.stop()
        await handler.until(lambda: handler.running == 0)

    assert handler.cancelled == handler.seen
    assert "has ended while it was handled" in caplog.text
    # It is left to who has it now.
    assert await client.delete(taken.receipt) is True


async def test_a_handler_whose_lease_is_lost_may_be_left_to_itself(
    client: Client, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    await client.enqueue(queue, 1)
    handler = Handler()
    consumer = Consumer(client, queue, handler, concurrency=1, visibility_timeout=2, cancel_on_lost_lease=False)

    async def is_lost() -> bool:
        return consumer.has_lost(handler.seen[0])

    async with running(consumer):
        await handler.until(lambda: handler.running == 1)
        assert not consumer.has_lost(handler.seen[0])
        taken = await take_away(client, handler.seen[0])
        await until(is_lost)
        consumer.stop()
        handler.released.set()

    assert handler.cancelled == []
    assert "1 messages were handled after their leases had ended" in caplog.text
    assert await client.delete(taken.receipt) is True


async def test_a_stop_finishes_what_is_held_and_takes_no_more(client: Recording, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(10)])
    handler = Handler()
    consumer = Consumer(client, queue, handler, concurrency=4)

    async with running(consumer) as task:
        await handler.until(lambda: handler.running == 4)
        consumer.stop()
        assert not task.done()
        handler.released.set()
        async with asyncio.timeout(PATIENCE):
            await task

    assert len(handler.seen) == 4
    assert await counts(client, queue) == (6, 0, 0)
    assert {message.receive_count async for message in client.list_messages(queue)} == {0}


async def test_a_stop_breaks_off_waiting(client: Recording, queue: str) -> None:
    consumer = Consumer(client, queue, Handler(), wait=60)
    async with running(consumer) as task:
        await until(lambda: has_asked(client, 1))
        await client.count_messages(queue)
        began_at = time.monotonic()
        consumer.stop()
        await task

    assert time.monotonic() - began_at < 30


async def has_asked(client: Recording, times: int) -> bool:
    return len(client.asked_for) >= times


async def test_what_comes_at_the_moment_of_a_stop_is_given_back(client: Recording, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(3)])
    handler = Handler()
    # Before the loop has seen what came, and too late to hang up.
    client.on_delivery = lambda: asyncio.get_running_loop().call_soon(consumer.stop)
    consumer = Consumer(client, queue, handler)

    async with asyncio.timeout(PATIENCE):
        await consumer.run(handle_signals=False)

    assert handler.seen == []
    assert await counts(client, queue) == (3, 0, 0)


async def test_an_abort_gives_everything_back_at_once(client: Recording, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(8)])
    handler = Handler()
    consumer = Consumer(client, queue, handler, concurrency=5, visibility_timeout=600)

    async with running(consumer):
        await handler.until(lambda: handler.running == 5)
        consumer.stop()
        consumer.abort()

    assert len(handler.cancelled) == 5
    assert await counts(client, queue) == (8, 0, 0)
    assert client.extended == [5]


async def test_an_abort_before_handlers_have_begun_gives_their_messages_back(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(5)])
    seen: list[Message] = []

    async def handle(message: Message) -> None:
        seen.append(message)
        consumer.abort()

    consumer = Consumer(client, queue, handle, concurrency=5, visibility_timeout=600)
    async with asyncio.timeout(PATIENCE):
        await consumer.run(handle_signals=False)

    # The first was handled to its end, which came at once.
    assert len(seen) == 1
    assert await counts(client, queue) == (4, 0, 0)


async def test_a_loop_that_is_cancelled_gives_everything_back(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(3)])
    handler = Handler()
    task = asyncio.create_task(client.consume(queue, handler, visibility_timeout=600))
    await handler.until(lambda: handler.running == 3)

    task.cancel()
    async with asyncio.timeout(PATIENCE):
        await asyncio.wait({task})

    assert task.cancelled()
    assert await counts(client, queue) == (3, 0, 0)


async def test_a_handler_that_cancels_itself_has_failed(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    told: list[str] = []

    async def handle(message: Message) -> None:
        if message.receive_count == 1:
            raise asyncio.CancelledError

    async with running(
        Consumer(client, queue, handle, first_pause=0.01, on_error=lambda _, failure: told.append(str(failure)))
    ):
        await until(lambda: empty(client, queue))

    assert told == ["the handler was cancelled, and not by this loop"]


async def test_it_may_stop_after_so_many(client: Client, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(20)])
    handler = Handler()
    handler.released.set()

    async with asyncio.timeout(PATIENCE):
        await client.consume(queue, handler, concurrency=5, max_messages=12)

    assert [message.body for message in handler.seen] == list(range(12))
    assert await counts(client, queue) == (8, 0, 0)


async def test_at_most_once_nothing_comes_twice_and_nothing_is_to_be_deleted(client: Recording, queue: str) -> None:
    await client.enqueue_batch(queue, [{"body": n} for n in range(10)])
    seen: list[Message] = []

    async def handle(message: Message) -> None:
        seen.append(message)
        raise RuntimeError("lost with it")

    await client.consume(queue, handle, at_most_once=True, max_messages=10)

    assert sorted(message.body for message in seen) == list(range(10))
    assert {message.receipt for message in seen} == {None}
    assert await counts(client, queue) == (0, 0, 0)
    assert (client.deleted, client.extended) == ([], [])


async def test_at_most_once_a_stop_waits_for_what_is_on_its_way(
    client: Recording, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To hang up would lose it: it may be gone from the queue already."""
    monkeypatch.setattr(consumer_module, "LONGEST_WAIT_AT_MOST_ONCE", 60.0)
    handler = Handler()
    handler.released.set()
    consumer = Consumer(client, queue, handler, at_most_once=True, wait=60)
    async with running(consumer) as task:
        await until(lambda: has_asked(client, 1))
        consumer.stop()
        await client.enqueue(queue, "late")
        async with asyncio.timeout(PATIENCE):
            await task

    assert [message.body for message in handler.seen] == ["late"]


async def test_an_outage_is_waited_out_and_said_once(
    database_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "broker.client")
    monkeypatch.setattr("broker.client.transport.LONGEST_PAUSE_SECONDS", 0.2)
    handler = Handler()
    async with AsyncExitStack() as serving:
        first = await serving.enter_async_context(Server(database_url, Settings(host="127.0.0.1", port=0)))
        port = int(first.url.rpartition(":")[2])
        client = Recording(first.url)
        consumer = Consumer(client, "default", handler, concurrency=2, visibility_timeout=60)
        async with client, running(consumer):
            await client.enqueue("default", 1)
            await handler.until(lambda: handler.running == 1)
            await serving.aclose()
            async with asyncio.timeout(PATIENCE):
                while "cannot serve" not in caplog.text:
                    await asyncio.sleep(0.01)
            asked = len(client.asked_for)
            await until(lambda: has_asked(client, asked + 4))
            handler.released.set()  # It is handled while there is nobody to delete it.
            async with Server(database_url, Settings(host="127.0.0.1", port=port)):
                await client.enqueue("default", 2)
                await handler.until(lambda: len(handler.seen) == 2)
                await until(lambda: empty(client, "default"))
                consumer.stop()

    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    about = Counter("cannot serve" in text or 2 * ("serves again" in text) for text in said if "default:" in text)
    assert about == {1: 1, 2: 1}, said
    assert [message.receive_count for message in handler.seen] == [1, 1]


async def test_a_broker_that_is_not_there_at_the_beginning_is_said() -> None:
    async with Client("http://127.0.0.1:1", deadline=0.2) as client, asyncio.timeout(PATIENCE):
        options: Any
        for options in ({}, {"visibility_timeout": 5}):
            with pytest.raises(ConnectionFailed, match=r"127\.0\.0\.1:1"):
                await client.consume("q", print, **options)


NO_BROKER = http("404 Not Found", "<html>somebody else</html>")
FAILED = error("internal_error", -32603, outcome="unknown")


async def test_a_broker_that_has_answered_before_is_waited_for_whatever_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.client.transport.FIRST_PAUSE_SECONDS", 0.001)
    busy = error("overloaded", -32002, retryable=True)
    nothing = result({"messages": []})
    answers = [nothing, NO_BROKER, FAILED, busy, None, nothing, error("forbidden", -32003)]
    async with server(lambda _: answers.pop(0)) as url, Client(url) as client, asyncio.timeout(PATIENCE):
        with pytest.raises(Forbidden):
            await client.consume("q", print, visibility_timeout=5)

    assert answers == []


@pytest.mark.parametrize("answer", [NO_BROKER, FAILED])
async def test_a_broker_that_has_never_worked_is_not_waited_for(answer: bytes) -> None:
    async with server(lambda _: answer) as url, Client(url) as client, asyncio.timeout(PATIENCE):
        with pytest.raises(BrokerError):
            await client.consume("q", print, visibility_timeout=5)


async def test_a_queue_that_is_deleted_ends_the_loop_when_what_is_held_is_done(client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)
    handler = Handler()
    task = asyncio.create_task(client.consume(queue, handler, concurrency=2, wait=1))
    await handler.until(lambda: handler.running == 1)
    await client.delete_queue(queue)
    await until(lambda: refused(client, queue))
    handler.released.set()

    with pytest.raises(QueueNotFound):
        async with asyncio.timeout(PATIENCE):
            await task
    assert handler.cancelled == []


async def refused(client: Client, queue: str) -> bool:
    try:
        await client.get_queue(queue)
    except QueueNotFound:
        return True
    return False


async def test_a_loop_whose_client_was_closed_says_so(broker_url: str) -> None:
    client = Client(broker_url)
    await client.__aenter__()
    await client.enqueue("default", 1)
    handler = Handler()
    task = asyncio.create_task(client.consume("default", handler))
    await handler.until(lambda: handler.running == 1)
    await client.__aexit__(None, None, None)
    handler.released.set()

    async with asyncio.timeout(PATIENCE):
        await asyncio.wait({task})
    assert task.exception() is not None


@pytest.mark.parametrize("options", [{"concurrency": 0}, {"wait": 0}])
def test_options_that_cannot_be_meant_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match="must be 1 or more"):
        Consumer(Client(), "q", print, **options)


def test_an_option_that_there_is_not_is_refused() -> None:
    wrong: Any = {"concurrence": 5}
    with pytest.raises(TypeError, match="no option concurrence"):
        Consumer(Client(), "q", print, **wrong)


PROGRAM = """
import asyncio, sys
from broker.client import Client
async def handle(message):
    print("begun", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    print("done", flush=True)
async def main():
    async with Client(sys.argv[1]) as client:
        both = [client.consume(queue, handle, concurrency=2, visibility_timeout=600) for queue in sys.argv[2:]]
        await asyncio.gather(*both)
    print("ended")
asyncio.run(main())
"""


@asynccontextmanager
async def program(url: str, *queues: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a program with a loop over each of these queues until each has begun with a message."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, url, *queues, stdin=PIPE, stdout=PIPE, stderr=PIPE
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            for _ in queues:
                assert await process.stdout.readline() == b"begun\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_every_loop_of_a_program_finish(
    broker_url: str, client: Client, queue: str, number: signal.Signals
) -> None:
    other = f"{queue}-other"
    await client.create_queue(other)
    for each in (queue, other):
        await client.enqueue(each, 1)

    async with program(broker_url, queue, other) as process:
        process.send_signal(number)
        async with asyncio.timeout(PATIENCE):
            output, errors = await process.communicate(b"go\ngo\n")

    assert (process.returncode, output, errors) == (0, b"done\ndone\nended\n", b"")
    assert await empty(client, queue)
    assert await empty(client, other)


async def test_a_second_signal_gives_everything_back_at_once(broker_url: str, client: Client, queue: str) -> None:
    await client.enqueue(queue, 1)

    async with program(broker_url, queue) as process:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        await until(lambda: is_ready(client, queue))
        async with asyncio.timeout(PATIENCE):
            output, _ = await process.communicate(b"go\n")

    assert output == b"ended\n"


async def is_ready(client: Client, queue: str) -> bool:
    return await counts(client, queue) == (1, 0, 0)
