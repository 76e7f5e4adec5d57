"""Long polling, through the socket: what wakes a consumer, and what becomes of a message whose client hung up.

Where a test is about one cause of waking, the others are switched off: the look that is taken once a second
comes once a minute, and the sweeper once an hour. A consumer that is forgotten then hangs until the deadline.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import msgspec
import psycopg
import pytest

from broker import draining, waiting
from broker.model import NewMessage
from broker.server import Server
from broker.settings import Settings
from broker.storage import notifications
from broker.storage.database import Connection
from broker.storage.notifications import CHANNEL, News
from conftest import Broker, Connect, StartBroker

# The aim is 50 ms; this is what a busy machine is granted. It is well below every other way to be woken.
SOON = 0.5
DEADLINE = 20.0
NO_SWEEPS = 3600

INSERT = """
INSERT INTO broker.messages (queue_id, id, enqueued_at, visible_at, body_bytes, body)
SELECT q.id, nextval('broker.message_ids'), clock_timestamp(), clock_timestamp(), length(%(body)s), %(body)s::json
FROM broker.queues q, generate_series(1, %(count)s)
WHERE q.name = %(queue)s AND q.deleted_at IS NULL
"""


@pytest.fixture(autouse=True)
def impatient_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers stop without waiting for strangers' requests."""
    monkeypatch.setattr(draining, "QUIET_TIME", 0.02)


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the look once a second."""
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 60.0)


@pytest.fixture
async def pair(no_looks: None, start_broker: StartBroker) -> tuple[Broker, Broker]:
    """Two brokers on one database that hear of each other's news, and of nothing else."""
    first, second = [await start_broker(sweep_interval=NO_SWEEPS) for _ in range(2)]
    for broker, other in ((first, second), (second, first)):
        parked = await park(broker, "default")
        await other.call("enqueue", body=0)
        (message,) = await parked
        await broker.call("delete", receipt=message["receipt"])
    return first, second


@pytest.fixture
async def crowd() -> AsyncIterator[aiohttp.ClientSession]:
    """A session with as many connections as there are calls."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for what no event announces; fail where it does not come."""
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.005)
    assert condition(), what


async def park(broker: Broker, queue: str, **params: Any) -> asyncio.Task[list[dict[str, Any]]]:
    """Let one more consumer wait at a broker; return its task when it waits."""
    before = broker.server.waiting.waiting

    async def consume() -> list[dict[str, Any]]:
        delivery = await broker.call("dequeue", queue=queue, **{"wait": 30, **params})
        messages: list[dict[str, Any]] = delivery["messages"]
        return messages

    task = asyncio.create_task(consume())
    room, database = broker.server.waiting, broker.server.database
    await until(lambda: room.waiting > before or task.done(), "it waits")
    await until(lambda: not room._to_look_at and not database._under_way, "its queue was looked at")
    return task


async def seconds_until_done(task: asyncio.Task[Any]) -> float:
    """Wait for a task; return how long that took."""
    began_at = time.monotonic()
    async with asyncio.timeout(DEADLINE):
        await asyncio.wait({task})
    return time.monotonic() - began_at


async def lease(broker: Broker, queue: str, visibility_timeout: float) -> dict[str, Any]:
    """Store a message and lease it."""
    await broker.call("enqueue", queue=queue, body=1)
    (message,) = (await broker.call("dequeue", queue=queue, visibility_timeout=visibility_timeout))["messages"]
    taken: dict[str, Any] = message
    return taken


def request(*calls: dict[str, Any], batch: bool = False) -> bytes:
    """Return an HTTP request of dequeues with these params."""
    envelopes = [{"jsonrpc": "2.0", "id": n, "method": "dequeue", "params": params} for n, params in enumerate(calls)]
    body = json.dumps(envelopes if batch else envelopes[0]).encode()
    head = f"POST /rpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def connect_raw(broker: Broker) -> socket.socket:
    host, port = broker.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


async def park_raw(broker: Broker, *calls: dict[str, Any], batch: bool = False) -> socket.socket:
    """Let a client wait that can hang up at any moment."""
    before = broker.server.waiting.waiting
    client = connect_raw(broker)
    client.sendall(request(*calls, batch=batch))
    await until(lambda: broker.server.waiting.waiting > before, "it waits")
    return client


def reset(client: socket.socket) -> None:
    """Hang up with RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    client.close()


HANG_UPS: dict[str, Callable[[socket.socket], None]] = {
    "closes": socket.socket.close,
    "resets": reset,
    "closes its sending half": lambda client: client.shutdown(socket.SHUT_WR),
}


async def until_untouched(broker: Broker, queue: str, messages: int = 1) -> None:
    """Wait until a queue holds these messages as if none was ever handed out."""

    async def states() -> list[tuple[Any, ...]]:
        page = await broker.call("list_messages", queue=queue)
        return [(each["status"], each["receive_count"], each["first_received_at"]) for each in page["messages"]]

    wanted = [("ready", 0, None)] * messages
    async with asyncio.timeout(DEADLINE):
        while await states() != wanted:
            await asyncio.sleep(0.01)


async def activity(connection: Connection) -> list[tuple[str, str]]:
    """Return (state, query) of every connection of a broker to this database."""
    cursor = await connection.execute(
        "SELECT state, query FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'wonderq' AND pid <> pg_backend_pid()"
    )
    return await cursor.fetchall()


BLOCKED = """
SELECT count(*)
FROM pg_stat_activity
WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE '/* dequeue%'
"""


async def until_blocked(connection: Connection) -> None:
    """Wait until a dequeue waits for a lock."""
    async with asyncio.timeout(DEADLINE):
        while await (await connection.execute(BLOCKED)).fetchone() != (1,):
            await asyncio.sleep(0.01)


# ------------------------------------------------------------------------------------------- waiting costs nothing


async def test_a_parked_consumer_holds_no_database_connection(
    start_broker: StartBroker, crowd: aiohttp.ClientSession, connection: Connection
) -> None:
    broker = replace(await start_broker(database_connections=1), http=crowd)
    await broker.call("create_queue", queue="other")
    parked = [asyncio.create_task(broker.call("dequeue", wait=30)) for _ in range(50)]
    await until(lambda: broker.server.waiting.waiting == 50, "fifty wait")

    async with asyncio.timeout(DEADLINE):
        await broker.call("enqueue", queue="other", body=1)
        (message,) = (await broker.call("dequeue", queue="other"))["messages"]
        assert await broker.call("delete", receipt=message["receipt"]) == {"deleted": True}

    states = await activity(connection)
    assert len(states) <= 1 + 3  # the pool's one; those that listen, notify and sweep
    assert not [state for state, _ in states if state.startswith("idle in transaction")]
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(50)])
    deliveries = await asyncio.wait_for(asyncio.gather(*parked), DEADLINE)
    assert sorted(delivery["messages"][0]["body"] for delivery in deliveries) == list(range(50))


async def test_an_empty_answer_comes_when_the_wait_runs_out(broker: Broker) -> None:
    began_at = time.monotonic()
    assert await broker.call("dequeue", wait=0.3) == {"messages": []}
    assert 0.3 <= time.monotonic() - began_at < 0.3 + 10 * 0.05 + SOON


async def test_a_queue_that_nobody_waits_for_any_more_is_not_looked_at(
    monkeypatch: pytest.MonkeyPatch, start_broker: StartBroker
) -> None:
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.05)
    broker = await start_broker()
    for n in range(20):
        await broker.call("create_queue", queue=f"reply-{n}")
        parked = await park(broker, f"reply-{n}")
        await broker.call("enqueue", queue=f"reply-{n}", body=n)
        await parked
    await until(lambda: not broker.server.waiting._lines, "no line is left")


# --------------------------------------------------------------------------------------------------- what wakes them


@pytest.mark.parametrize("sender", [0, 1], ids=["this broker", "another broker"])
async def test_an_enqueue_wakes_a_consumer_at_once(pair: tuple[Broker, Broker], sender: int) -> None:
    for n in range(5):
        parked = await park(pair[0], "default")
        await pair[sender].call("enqueue", body=n)
        assert await seconds_until_done(parked) < SOON
        assert [message["body"] for message in parked.result()] == [n]


@pytest.mark.parametrize("sender", [0, 1], ids=["this broker", "another broker"])
async def test_a_delay_that_runs_out_wakes_a_consumer_at_once(pair: tuple[Broker, Broker], sender: int) -> None:
    parked = await park(pair[0], "default")
    await pair[sender].call("enqueue", body=1, delay=0.4)
    assert await seconds_until_done(parked) < 0.4 + SOON
    assert len(parked.result()) == 1


async def test_each_of_several_delays_wakes_a_consumer_at_once(pair: tuple[Broker, Broker]) -> None:
    # They take more than there is, so none of them wakes the next.
    parked = [await park(pair[0], "default", max_messages=10) for _ in range(3)]
    began_at = time.monotonic()
    delays = [0.2, 0.9, 1.6]
    await asyncio.gather(*(pair[n % 2].call("enqueue", body=n, delay=delay) for n, delay in enumerate(delays)))
    for delay, consumer in zip(delays, asyncio.as_completed(parked), strict=True):
        await asyncio.wait_for(consumer, DEADLINE)
        assert time.monotonic() - began_at < delay + SOON


async def test_news_of_a_delay_that_come_while_a_consumer_is_being_woken_are_taken_in(broker: Broker) -> None:
    """A look has found a message that is ready; before the consumer is told, an enqueue with a delay is answered."""
    room = broker.server.waiting
    parked = await park(broker, "default")
    assert room._lines["default"].wake_in(0)
    room.hear(News("default", 5.0, 1))
    await broker.call("enqueue", body=1)
    assert await seconds_until_done(parked) < SOON


async def test_a_delay_that_was_known_before_anybody_waited_wakes_a_consumer_at_once(
    pair: tuple[Broker, Broker],
) -> None:
    await pair[1].call("enqueue", body=1, delay=0.6)
    parked = await park(pair[0], "default")
    assert await seconds_until_done(parked) < 0.6 + SOON


@pytest.mark.parametrize("holder", [0, 1], ids=["this broker", "another broker"])
async def test_a_short_lease_that_ends_wakes_a_consumer_at_once(pair: tuple[Broker, Broker], holder: int) -> None:
    await lease(pair[holder], "default", 0.6)
    parked = await park(pair[0], "default")
    assert await seconds_until_done(parked) < 0.6 + SOON
    assert parked.result()[0]["receive_count"] == 2


@pytest.mark.parametrize("holder", [0, 1], ids=["this broker", "another broker"])
async def test_a_short_lease_that_is_taken_while_others_wait_wakes_one_when_it_ends(
    pair: tuple[Broker, Broker], connection: Connection, holder: int
) -> None:
    first = await park(pair[holder], "default", visibility_timeout=0.6)
    parked = await park(pair[0], "default")
    await connection.execute(INSERT, {"queue": "default", "count": 1, "body": "1"})
    pair[holder].server.waiting.hear(News("default", 0.0, 1))  # only the first one hears of it
    assert len(await asyncio.wait_for(first, DEADLINE)) == 1
    assert await seconds_until_done(parked) < 0.6 + SOON
    assert parked.result()[0]["receive_count"] == 2


async def test_a_long_lease_that_ends_wakes_a_consumer_at_once(pair: tuple[Broker, Broker]) -> None:
    await lease(pair[1], "default", waiting.SHORT_LEASE_SECONDS + 0.1)
    parked = await park(pair[0], "default")
    assert await seconds_until_done(parked) < waiting.SHORT_LEASE_SECONDS + 0.1 + SOON
    assert parked.result()[0]["receive_count"] == 2


@pytest.mark.parametrize("holder", [0, 1], ids=["this broker", "another broker"])
@pytest.mark.parametrize("seconds", [0, 0.4])
async def test_a_lease_that_is_shortened_wakes_a_consumer_at_once(
    pair: tuple[Broker, Broker], holder: int, seconds: float
) -> None:
    message = await lease(pair[holder], "default", 300)
    parked = await park(pair[0], "default")
    await pair[holder].call("extend_visibility", receipt=message["receipt"], visibility_timeout=seconds)
    assert await seconds_until_done(parked) < seconds + SOON
    assert parked.result()[0]["receive_count"] == 2


@pytest.mark.parametrize("caller", [0, 1], ids=["this broker", "another broker"])
async def test_a_queue_that_is_resumed_wakes_all_it_has_messages_for(pair: tuple[Broker, Broker], caller: int) -> None:
    await pair[0].call("create_queue", queue="q", paused=True)
    parked = [await park(pair[0], "q") for _ in range(5)]
    await pair[0].call("enqueue_batch", queue="q", messages=[{"body": n} for n in range(5)])
    assert not any(consumer.done() for consumer in parked)
    await pair[caller].call("update_queue", queue="q", paused=False)
    for consumer in parked:
        assert await seconds_until_done(consumer) < SOON
    assert sorted(consumer.result()[0]["body"] for consumer in parked) == list(range(5))


@pytest.mark.parametrize("caller", [0, 1], ids=["this broker", "another broker"])
async def test_a_queue_that_is_deleted_answers_all_who_wait_for_it(pair: tuple[Broker, Broker], caller: int) -> None:
    await pair[0].call("create_queue", queue="q")
    room = pair[0].server.waiting
    parked = [asyncio.create_task(pair[0].error("dequeue", queue="q", wait=30)) for _ in range(5)]
    await until(lambda: room.waiting == 5, "five wait")
    await pair[caller].call("delete_queue", queue="q")
    for consumer in parked:
        assert await seconds_until_done(consumer) < SOON
        assert (consumer.result()["code"], consumer.result()["data"]["type"]) == (1001, "queue_not_found")


async def test_rows_inserted_in_sql_are_seen_within_about_a_second(broker: Broker, connection: Connection) -> None:
    parked = await park(broker, "default")
    await connection.execute(INSERT, {"queue": "default", "count": 1, "body": "1"})
    assert await seconds_until_done(parked) < waiting.LOOK_SECONDS + SOON
    assert parked.result()[0]["body"] == 1


async def test_news_are_heard_again_after_the_listening_connection_was_cut(
    pair: tuple[Broker, Broker], connection: Connection
) -> None:
    parked = await park(pair[0], "default")
    cursor = await connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND query LIKE '/* listen%'"
    )
    assert await cursor.fetchall() == [(True,), (True,)]
    await pair[1].call("enqueue", body="while nobody listens")
    assert await seconds_until_done(parked) < 0.5 + 2 * SOON  # the pause before it connects again
    assert parked.result()[0]["body"] == "while nobody listens"

    listening = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '/* listen%'"
    async with asyncio.timeout(DEADLINE):
        while await (await connection.execute(listening)).fetchone() != (2,):
            await asyncio.sleep(0.01)
    parked = await park(pair[0], "default")
    await pair[1].call("enqueue", body="again")
    assert await seconds_until_done(parked) < SOON


async def test_a_notification_that_is_no_news_changes_nothing(
    pair: tuple[Broker, Broker], connection: Connection
) -> None:
    parked = await park(pair[0], "default")
    for payload in (
        "",
        "{",
        '["name", [["default"]]]',
        '["name", [["default", -1, -1]]]',
        '["name", [["q", 1e300, 1]]]',
    ):
        await connection.execute("SELECT pg_notify(%s, %s)", [CHANNEL, payload])
    await pair[1].call("enqueue", body=1)
    assert await seconds_until_done(parked) < SOON


async def test_a_message_that_was_locked_when_it_was_looked_for_is_not_forgotten(
    pair: tuple[Broker, Broker], connect: Connect
) -> None:
    holder, inserter = await connect(), await connect()
    await inserter.execute(INSERT, {"queue": "default", "count": 1, "body": "1"})
    async with holder.transaction():
        await holder.execute("SELECT FROM broker.messages FOR UPDATE")
        parked = await park(pair[0], "default")
        in_vain = pair[0].server.waiting._lines["default"]
        await until(lambda: in_vain.in_vain > 2, "it was tried again")
    assert await seconds_until_done(parked) < SOON


async def test_an_answer_that_is_full_wakes_the_next_consumer(
    pair: tuple[Broker, Broker], connection: Connection
) -> None:
    await pair[0].call("create_queue", queue="big", max_message_bytes=2**20)
    parked = [await park(pair[0], "big", max_messages=100) for _ in range(2)]
    await connection.execute(INSERT, {"queue": "big", "count": 10, "body": '"' + "x" * (2**20 - 2) + '"'})
    pair[0].server.waiting.hear(News("big", 0.0, 1))
    assert sorted([len(await asyncio.wait_for(consumer, DEADLINE)) for consumer in parked]) == [2, 8]


@pytest.mark.parametrize("batch_size", [1, 10, 200])
async def test_two_hundred_consumers_get_one_each_of_two_hundred_messages(
    pair: tuple[Broker, Broker], crowd: aiohttp.ClientSession, batch_size: int
) -> None:
    brokers = [replace(broker, http=crowd) for broker in pair]
    parked = [asyncio.create_task(brokers[n % 2].call("dequeue", wait=60)) for n in range(200)]
    await until(lambda: sum(broker.server.waiting.waiting for broker in brokers) == 200, "all wait")
    for first in range(0, 200, batch_size):
        new = [{"body": n} for n in range(first, first + batch_size)]
        await brokers[first % 2].call("enqueue_batch", messages=new)
    async with asyncio.timeout(2 * DEADLINE):
        deliveries = await asyncio.gather(*parked)
    assert [len(delivery["messages"]) for delivery in deliveries] == [1] * 200
    assert sorted(delivery["messages"][0]["body"] for delivery in deliveries) == list(range(200))
    assert await brokers[0].call("count_messages", queue="default", status="ready") == {"total": 0, "exact": True}


@pytest.mark.parametrize("consumers", [2, 8, 40])
async def test_no_message_is_forgotten_while_consumers_come_and_go(
    pair: tuple[Broker, Broker], crowd: aiohttp.ClientSession, consumers: int
) -> None:
    """Who comes when others wait does not look for himself: a wake-up too few, and a consumer waits until the deadline.

    Producers send bursts, so that now consumers wait for messages and now messages for consumers; consumers ask for
    one or for several; the brokers hear of each other's messages by their news only.
    """
    brokers = [replace(broker, http=crowd) for broker in pair]
    chance = random.Random(consumers)
    sent: list[int] = []
    taken: list[int] = []

    async def produce(broker: Broker, first: int) -> None:
        for n in range(first, first + 200, 5):
            burst = [{"body": n + k} for k in range(chance.choice((1, 1, 1, 5)))]
            await broker.call("enqueue_batch", messages=burst)
            sent.extend(each["body"] for each in burst)
            await asyncio.sleep(chance.choice((0, 0, 0.002, 0.02)))

    async def consume(broker: Broker) -> None:
        while True:
            delivery = await broker.call("dequeue", wait=60, max_messages=chance.choice((1, 1, 1, 4)))
            taken.extend(message["body"] for message in delivery["messages"])

    consuming = [asyncio.create_task(consume(brokers[n % 2])) for n in range(consumers)]
    await asyncio.gather(*(produce(brokers[n % 2], 1000 * n) for n in range(4)))
    await until(lambda: len(taken) >= len(sent), "all are taken")
    for task in consuming:
        task.cancel()
    await asyncio.gather(*consuming, return_exceptions=True)
    assert sorted(taken) == sorted(sent)


async def test_a_queue_that_is_resumed_wakes_everybody(pair: tuple[Broker, Broker]) -> None:
    """They have looked in vain when the messages came."""
    await pair[0].call("update_queue", queue="default", paused=True)
    parked = [await park(pair[n % 2], "default") for n in range(6)]
    await pair[0].call("enqueue_batch", messages=[{"body": n} for n in range(6)])
    await asyncio.sleep(0.1)
    assert not any(consumer.done() for consumer in parked)
    await pair[0].call("update_queue", queue="default", paused=False)
    async with asyncio.timeout(DEADLINE):
        deliveries = await asyncio.gather(*parked)
    assert sorted(message["body"] for delivery in deliveries for message in delivery) == list(range(6))


async def test_a_producer_that_hangs_up_has_woken_the_consumer_all_the_same(
    pair: tuple[Broker, Broker], connect: Connect
) -> None:
    parked = await park(pair[0], "default")
    locker, observer = await connect(), await connect()
    await locker.execute("BEGIN")
    await locker.execute("LOCK TABLE broker.messages IN SHARE MODE")
    storing = asyncio.create_task(pair[0].server.calls.enqueue("default", [NewMessage("7", None, None, None, None)]))
    async with asyncio.timeout(DEADLINE):
        blocked: tuple[int] | None = None
        while blocked is None or not blocked[0]:
            await asyncio.sleep(0.01)
            cursor = await observer.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
                " AND query LIKE '%/* enqueue */%' AND query_start < clock_timestamp() - interval '0.15 s'"
            )
            blocked = await cursor.fetchone()
    storing.cancel()
    await asyncio.gather(storing, return_exceptions=True)
    await locker.execute("COMMIT")
    (message,) = await asyncio.wait_for(parked, DEADLINE)
    assert message["body"] == 7


# ------------------------------------------------------------------------------------------------ clients that hang up


@pytest.mark.parametrize("how", HANG_UPS)
async def test_a_client_that_hangs_up_while_it_waits_leaves_the_line(pair: tuple[Broker, Broker], how: str) -> None:
    client = await park_raw(pair[0], {"wait": 60})
    parked = await park(pair[0], "default")
    HANG_UPS[how](client)
    await until(lambda: pair[0].server.waiting.waiting == 1, "it has left")
    await pair[1].call("enqueue", body=1)
    assert await seconds_until_done(parked) < SOON
    assert parked.result()[0]["receive_count"] == 1
    client.close()


@pytest.mark.parametrize(("how", "wait"), [("closes", 0), ("resets", 60), ("closes its sending half", 60)])
async def test_a_client_that_hangs_up_while_its_statement_runs_takes_nothing(
    pair: tuple[Broker, Broker], connect: Connect, how: str, wait: float
) -> None:
    """The statement is held up by a lock on the table, and let go when the server has seen the end."""
    holder, watcher = await connect(), await connect()
    await pair[0].call("create_queue", queue="q")
    await pair[0].call("enqueue", queue="q", body=1)
    before = len(pair[0].server.runner.connections)
    async with holder.transaction():
        await holder.execute("LOCK TABLE broker.messages")
        client = connect_raw(pair[0])
        client.sendall(request({"queue": "q", "wait": wait}))
        await until_blocked(watcher)
        HANG_UPS[how](client)
        await until(lambda: len(pair[0].server.runner.connections) == before, "the server has seen it")
    await until_untouched(pair[0], "q")
    client.close()


async def test_what_a_gone_client_leased_goes_to_the_next_at_once(
    pair: tuple[Broker, Broker], connect: Connect
) -> None:
    """The next one waits at the other broker, and so hears of it by the news of the give-back."""
    holder, watcher = await connect(), await connect()
    await pair[0].call("create_queue", queue="q")
    parked = await park(pair[1], "q")
    await watcher.execute(INSERT, {"queue": "q", "count": 1, "body": "1"})
    before = len(pair[0].server.runner.connections)
    async with holder.transaction():
        await holder.execute("LOCK TABLE broker.messages")
        client = connect_raw(pair[0])
        client.sendall(request({"queue": "q"}))
        await until_blocked(watcher)
        client.close()
        await until(lambda: len(pair[0].server.runner.connections) == before, "the server has seen it")
    assert await seconds_until_done(parked) < SOON
    assert (parked.result()[0]["receive_count"], parked.result()[0]["body"]) == (1, 1)


@pytest.mark.parametrize(("how", "batch"), [("closes", False), ("resets", True)])
async def test_a_client_that_hangs_up_between_lease_and_answer_takes_nothing(
    pair: tuple[Broker, Broker], database_url: str, how: str, batch: bool
) -> None:
    """The event loop stands still from before the lease is committed until the client has hung up.

    So it finds the end of the statement and the end of the client in the same moment.
    """
    await pair[0].call("create_queue", queue="q")
    await pair[0].call("enqueue", queue="q", body=1)
    with psycopg.connect(database_url) as holder, psycopg.connect(database_url, autocommit=True) as watcher:
        holder.execute("LOCK TABLE broker.messages")
        client = connect_raw(pair[0])
        client.sendall(request({"queue": "q"}, batch=batch))
        async with asyncio.timeout(DEADLINE):
            while watcher.execute(BLOCKED).fetchone() != (1,):
                await asyncio.sleep(0.01)
        holder.commit()
        give_up_at = time.monotonic() + DEADLINE
        while watcher.execute("SELECT receive_count FROM broker.messages").fetchone() != (1,):
            assert time.monotonic() < give_up_at
        HANG_UPS[how](client)
    await until_untouched(pair[0], "q")


async def test_a_client_that_hangs_up_before_the_event_loop_can_see_it_takes_nothing(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Broker, Broker]
) -> None:
    """It hangs up in the moment in which its call has been counted and is about to be answered."""
    await pair[0].call("create_queue", queue="q")
    await pair[0].call("enqueue", queue="q", body=1)
    client = connect_raw(pair[0])
    monkeypatch.setattr(pair[0].server.metrics, "call_ended", lambda *_: client.close())
    client.sendall(request({"queue": "q"}))
    await until(lambda: client.fileno() == -1, "it has hung up")
    await until_untouched(pair[0], "q")


async def test_a_client_that_hangs_up_in_the_middle_of_its_answer_takes_nothing(
    pair: tuple[Broker, Broker], connection: Connection
) -> None:
    await pair[0].call("create_queue", queue="big", max_message_bytes=2**20)
    await connection.execute(INSERT, {"queue": "big", "count": 8, "body": '"' + "x" * (2**20 - 2) + '"'})
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = pair[0].url.removeprefix("http://").split(":")
        client.connect((host, int(port)))
        client.sendall(request({"queue": "big", "max_messages": 8}))
        client.setblocking(False)
        await asyncio.wait_for(asyncio.get_running_loop().sock_recv(client, 100), DEADLINE)
    await until_untouched(pair[0], "big", 8)


async def test_a_client_that_hangs_up_in_a_batch_of_several_dequeues_takes_nothing(
    pair: tuple[Broker, Broker], connect: Connect
) -> None:
    """Of its dequeues one has leased, one runs (its row is read behind a lock on its queue), one waits."""
    for queue in ("leased", "running", "waiting"):
        await pair[0].call("create_queue", queue=queue)
    for queue in ("leased", "running"):
        await pair[0].call("enqueue", queue=queue, body=queue)
    client = await park_raw(
        pair[0], {"queue": "leased"}, {"queue": "waiting", "wait": 60}, {"queue": "running", "wait": 60}, batch=True
    )
    holder, watcher = await connect(), await connect()
    async with asyncio.timeout(DEADLINE):
        while (await pair[0].call("count_messages", status="leased"))["total"] != 2:
            await asyncio.sleep(0.01)
    parked = await park(pair[1], "leased")
    async with holder.transaction():
        await holder.execute("LOCK TABLE broker.messages")
        pair[0].server.waiting.hear(News("waiting", 0.0, 1))
        await until_blocked(watcher)
        client.close()
        await until(lambda: pair[0].server.waiting.waiting == 0, "it has left")
    assert await seconds_until_done(parked) < SOON
    assert parked.result()[0]["receive_count"] == 1
    await until_untouched(pair[0], "running")


@pytest.mark.parametrize("next_one", [0, 1])
async def test_a_consumer_that_hangs_up_when_it_is_woken_passes_the_wake_up_on(
    pair: tuple[Broker, Broker], next_one: int, database_url: str
) -> None:
    """It hangs up some turns of the event loop before it is woken or after, each time one more."""
    with psycopg.connect(database_url, autocommit=True) as inserter:
        for turns in range(-6, 10):
            client = await park_raw(pair[0], {"wait": 60})
            parked = await park(pair[next_one], "default")
            inserter.execute(INSERT, {"queue": "default", "count": 1, "body": str(turns)})
            steps: list[Callable[[], object]] = [
                client.close,
                lambda: pair[0].server.waiting.tell(News("default", 0.0, 1)),
            ]
            first, second = steps if turns < 0 else reversed(steps)
            first()
            for _ in range(abs(turns)):
                await asyncio.sleep(0)
            second()
            assert await seconds_until_done(parked) < SOON
            (message,) = parked.result()
            assert (message["body"], message["receive_count"]) == (turns, 1)
            await pair[next_one].call("delete", receipt=message["receipt"])


async def test_others_are_told_only_of_what_nobody_waits_for_here(
    pair: tuple[Broker, Broker], connect: Connect
) -> None:
    broker, _ = pair
    await broker.call("create_queue", queue="waited-for")
    await broker.call("create_queue", queue="told")
    listener = await connect()
    await listener.execute(f"LISTEN {CHANNEL}")
    parked = [await park(broker, "waited-for") for _ in range(2)]
    await broker.call("enqueue", queue="waited-for", body=1)
    await asyncio.wait(parked, return_when=asyncio.FIRST_COMPLETED)
    await broker.call("enqueue_batch", queue="waited-for", messages=[{"body": n} for n in range(5)])
    await asyncio.wait(parked)
    await broker.call("enqueue", queue="told", body=1)
    heard: list[News] = []
    async with asyncio.timeout(DEADLINE):
        async for notification in listener.notifies():
            heard += msgspec.json.decode(notification.payload, type=tuple[str, list[News]])[1]
            if heard[-1].queue == "told":
                break
    assert [(news.queue, news.messages) for news in heard] == [("waited-for", 4), ("told", 1)]


async def test_a_broker_that_is_alone_notifies_nobody(
    no_looks: None, database_url: str, start_broker: StartBroker, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifications, "LOOK_FOR_OTHERS_SECONDS", 0.1)
    first = await start_broker(sweep_interval=NO_SWEEPS)
    await until(lambda: first.server.notifications._is_alone, "it has found nobody")
    listener = await connect()
    await listener.execute(f"LISTEN {CHANNEL}")
    await first.call("enqueue", body=1)
    await first.call("purge_queue", queue="default")
    async with Server(database_url, Settings(port=0, sweep_interval=NO_SWEEPS)) as server:
        second = Broker(server.url, server, first.http)
        async with asyncio.timeout(DEADLINE):
            async for notification in listener.notifies():
                assert json.loads(notification.payload)[1] == [], "that it is there, and no news before"
                break
        await until(lambda: not first.server.notifications._is_alone, "it has heard of the other")
        await asyncio.sleep(0.3)  # it looks for others now and then, and finds one
        for sender, receiver in ((first, second), (second, first)):
            parked = await park(receiver, "default")
            await sender.call("enqueue", body=2)
            assert await seconds_until_done(parked) < SOON
    await until(lambda: first.server.notifications._is_alone, "it is alone again")


# -------------------------------------------------------------------------------------------------- limits and the end


async def test_more_waiting_consumers_than_allowed_are_told_to_come_later(start_broker: StartBroker) -> None:
    broker = await start_broker(max_waiting_consumers=2)
    parked = [await park(broker, "default") for _ in range(2)]
    error = await broker.error("dequeue", wait=30)
    assert (error["code"], error["data"]["type"], error["data"]["outcome"]) == (-32002, "overloaded", "none")
    assert error["data"]["retry_after"] > 0
    assert error["data"]["limit"] == 2
    await broker.call("create_queue", queue="full")
    await broker.call("enqueue", queue="full", body=1)
    assert len((await broker.call("dequeue", queue="full", wait=30))["messages"]) == 1  # it need not wait
    await broker.call("enqueue_batch", messages=[{"body": 1}, {"body": 2}])
    await asyncio.wait_for(asyncio.gather(*parked), DEADLINE)
    assert await broker.call("dequeue", wait=0.01) == {"messages": []}


async def test_a_consumer_that_is_woken_in_vain_keeps_its_place(start_broker: StartBroker) -> None:
    broker = await start_broker(max_waiting_consumers=1)
    parked = await park(broker, "default")
    for _ in range(20):
        broker.server.waiting.hear(News("default", 0.0, 1))
        assert (await broker.error("dequeue", wait=30))["code"] == -32002
    await broker.call("enqueue", body=1)
    assert len(await asyncio.wait_for(parked, DEADLINE)) == 1


async def test_consumers_that_wait_get_an_empty_answer_when_the_broker_stops(
    database_url: str, crowd: aiohttp.ClientSession
) -> None:
    async with Server(database_url, Settings(port=0)) as server:
        broker = Broker(server.url, server, crowd)
        parked = [asyncio.create_task(broker.call("dequeue", wait=60)) for _ in range(30)]
        await until(lambda: server.waiting.waiting == 30, "all wait")
    answers = await asyncio.wait_for(asyncio.gather(*parked), DEADLINE)
    assert answers == [{"messages": []}] * 30


async def test_what_was_leased_for_a_client_that_hangs_up_while_the_broker_stops_is_given_back(
    database_url: str, start_broker: StartBroker, connect: Connect
) -> None:
    other = await start_broker()
    await other.call("create_queue", queue="q")
    await other.call("enqueue", queue="q", body=1)
    holder, watcher = await connect(), await connect()

    async def stop(server: Server) -> None:
        await server.__aexit__(None, None, None)

    server = await Server(database_url, Settings(port=0)).__aenter__()
    async with holder.transaction():
        await holder.execute("LOCK TABLE broker.messages")
        client = connect_raw(Broker(server.url, server, other.http))
        client.sendall(request({"queue": "q"}))
        await until_blocked(watcher)
        stopping = asyncio.create_task(stop(server))
        await until(lambda: server.runner.is_draining, "it is being stopped")
        client.close()
        await until(lambda: not server.runner.connections, "the server has seen it")
    await asyncio.wait_for(stopping, DEADLINE)
    await until_untouched(other, "q")


@pytest.mark.parametrize("next_one", [0, 1])
async def test_waking_reaches_the_next_where_the_first_one_cannot_use_it(
    pair: tuple[Broker, Broker], next_one: int, connect: Connect
) -> None:
    """The first one is woken, and its statement is cancelled by an administrator. The next waits here or elsewhere."""
    broker = pair[0]
    holder, watcher = await connect(), await connect()
    first = asyncio.create_task(broker.error("dequeue", wait=60))
    await until(lambda: broker.server.waiting.waiting == 1, "it waits")
    parked = await park(pair[next_one], "default")
    await watcher.execute(INSERT, {"queue": "default", "count": 1, "body": "1"})
    async with holder.transaction():
        await holder.execute("LOCK TABLE broker.messages IN SHARE ROW EXCLUSIVE MODE")
        broker.server.waiting.tell(News("default", 0.0, 1))
        await until_blocked(watcher)
        await watcher.execute(BLOCKED.replace("count(*)", "pg_cancel_backend(pid)"))
        assert (await asyncio.wait_for(first, DEADLINE))["code"] == -32001
    assert await seconds_until_done(parked) < SOON
    assert parked.result()[0]["receive_count"] == 1
