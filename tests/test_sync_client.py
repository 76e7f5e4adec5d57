"""The synchronous face: the same methods, blocking, from any thread; consuming until it is told to stop."""

from __future__ import annotations

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from broker.client import BrokerError, Client, Message, QueueNotFound, SyncClient
from broker.server import Server
from conftest import PATIENCE

# What has a meaning of its own in a program that is not asynchronous, or none.
NOT_THE_SAME = {"consume", "with_deadline", "deadline", "call_json"}


@pytest.fixture
def client(standing_server: Server) -> Iterator[SyncClient]:
    with SyncClient(standing_server.url) as client:
        yield client


@pytest.fixture
def queue(client: SyncClient) -> str:
    name = f"sync-{uuid.uuid4().hex}"
    client.create_queue(name)
    return name


def test_a_message_lives_from_enqueue_to_delete(client: SyncClient, queue: str) -> None:
    message_id = client.enqueue(queue, {"any": "JSON"}, headers={"kind": "greeting"})
    [listed] = client.list_messages(queue)
    [message] = client.dequeue(queue, wait=20)

    assert (listed.message_id, listed.status) == (message_id, "ready")
    assert (message.message_id, message.body, message.headers) == (message_id, {"any": "JSON"}, {"kind": "greeting"})
    client.extend_visibility(message.receipt, 60)
    assert client.delete(message.receipt) is True
    assert client.count_messages(queue)["total"] == 0
    assert client.call("get_queue", queue=queue)["queue"] == queue
    assert queue in [each["queue"] for each in client.list_queues("sync-")]


def test_what_goes_wrong_is_raised_as_it_is(client: SyncClient) -> None:
    with pytest.raises(QueueNotFound):
        client.get_queue("no-such-queue")
    with pytest.raises(QueueNotFound):
        list(client.list_messages("no-such-queue"))


def test_every_method_is_made_from_the_one_of_the_asynchronous_client() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert public(Client) - public(SyncClient) == NOT_THE_SAME - {"consume"}
    assert public(SyncClient) - public(Client) == set()
    for name in public(SyncClient) - {"consume", "from_environment"}:
        method: Any = getattr(SyncClient, name)
        assert method.__wrapped__ is getattr(Client, name)
        assert inspect.signature(method) == inspect.signature(getattr(Client, name))


def test_several_threads_share_a_client(client: SyncClient, queue: str) -> None:
    def live(n: int) -> str:
        client.enqueue(queue, n)
        [message] = client.dequeue(queue, wait=20)
        assert client.delete(message.receipt)
        return message.message_id

    with ThreadPoolExecutor(16) as threads:
        ids = list(threads.map(live, range(64)))

    assert len(set(ids)) == 64
    assert client.count_messages(queue)["total"] == 0


async def test_it_works_in_a_thread_whose_own_event_loop_runs(standing_server: Server) -> None:
    asyncio.get_running_loop()
    with SyncClient(standing_server.url) as client:
        assert client.count_messages("default")["exact"] is True


def test_a_client_that_is_not_open_says_so(standing_server: Server) -> None:
    client = SyncClient(standing_server.url)
    with pytest.raises(RuntimeError, match="with SyncClient"):
        client.count_messages()
    with client:
        client.count_messages()
    with pytest.raises(RuntimeError, match="with SyncClient"):
        client.count_messages()


def test_its_own_loop_is_not_made_to_wait_for_itself(client: SyncClient, queue: str) -> None:
    client.enqueue(queue, 1)
    told: list[str] = []

    async def handle(message: Message) -> None:
        try:
            client.count_messages(queue)
        except RuntimeError as error:
            told.append(str(error))

    client.consume(queue, handle, max_messages=1)

    assert "use Client there" in told[0]


def test_handlers_run_in_threads_and_may_use_the_client(client: SyncClient, queue: str) -> None:
    client.enqueue_batch(queue, [{"body": n} for n in range(20)])
    barrier = threading.Barrier(20, timeout=PATIENCE)
    totals: list[int] = []

    def handle(message: Message) -> None:
        barrier.wait()
        totals.append(client.count_messages(queue)["total"])

    client.consume(queue, handle, concurrency=20, max_messages=20)

    assert len(totals) == 20
    assert client.count_messages(queue)["total"] == 0


def test_consuming_from_a_queue_that_is_not_there_is_an_error(client: SyncClient) -> None:
    with pytest.raises(BrokerError, match="queue_not_found"):
        client.consume("no-such-queue", print)


CONSUMER = """
import sys, time
from broker.client import SyncClient
def handle(message):
    print("begun", flush=True)
    if message.body == "wait":
        time.sleep(600)
    sys.stdin.readline()
    print("done", flush=True)
with SyncClient(sys.argv[1]) as client:
    client.consume(sys.argv[2], handle, concurrency=1, visibility_timeout=600)
print("ended")
"""
CALLER = """
import sys
from broker.client import SyncClient
with SyncClient(sys.argv[1]) as client:
    print("begun", flush=True)
    client.dequeue(sys.argv[2], wait=60)
"""


@contextmanager
def program(text: str, url: str, queue: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program until it says that it has begun."""
    with subprocess.Popen(
        [sys.executable, "-c", text, url, queue],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_it_finish_what_it_holds(
    client: SyncClient, standing_server: Server, queue: str, number: signal.Signals
) -> None:
    client.enqueue_batch(queue, [{"body": 1}, {"body": 2}])
    with program(CONSUMER, standing_server.url, queue) as process:
        process.send_signal(number)
        output, errors = process.communicate("go\n", timeout=PATIENCE)

    assert (process.returncode, output, errors) == (0, "done\nended\n", "")
    assert client.count_messages(queue) == {"ready": 1, "delayed": 0, "leased": 0, "total": 1, "exact": True}


INTERRUPTED = """
import asyncio, random, signal, sys
from broker.client import SyncClient

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts = 0
with SyncClient(sys.argv[1]) as client:
    while interrupts < 20_000:
        try:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 4e-4))
            client._run(lambda: asyncio.sleep(0.002))  # A call would spend nearly all of its time with waiting.
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Interrupt:
            interrupts += 1
    assert client.count_messages(sys.argv[2])["total"] == 0
"""


def test_an_interrupt_at_any_moment_leaves_a_client_that_works(standing_server: Server, queue: str) -> None:
    """A signal may come between any two steps of Python; a lock that is held just then would be held for ever."""
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, standing_server.url, queue],
        capture_output=True,
        timeout=PATIENCE * 4,
        check=False,
    )
    assert (done.returncode, done.stderr.decode()[-2000:]) == (0, "")


def test_ctrl_c_ends_a_call_that_waits(client: SyncClient, standing_server: Server, queue: str) -> None:
    with program(CALLER, standing_server.url, queue) as process:
        # The call may not have begun when it says so; Ctrl-C before it does the same.
        began_at = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)

    assert time.monotonic() - began_at < PATIENCE
    assert process.returncode != 0
    assert errors.strip().endswith("KeyboardInterrupt")
