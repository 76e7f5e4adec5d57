"""What a synchronous standby that hangs, a primary that hangs, and a failover mean to brokers and their clients.

Times are asserted only where one is promised: deadlines, and what comes by itself. A standby is hung by SIGSTOP, and
its primary then hears nothing of it for the five seconds of wal_sender_timeout and longer: commits wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
import psycopg
import pytest

from broker.errors import BrokerError, Unavailable
from broker.model import NewMessage, message_id_of
from broker.storage import broadcasting, inspection, notifications, queues, subscriptions, topics
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.migrate import migrate
from broker.storage.sessions import deadline
from brokers import REQUEST_TIMEOUT, Deployment, answer, call, running_deployment
from pair import PATIENCE, Pair, running_pair, until

# A deadline, and what a busy machine may add to the half second that is promised after it.
LATE = 2.5
WAITS = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
# What `--database-connections` is by default.
DATABASE_CONNECTIONS = 8
# How long the standby is away, after that was noticed.
AWAY_SECONDS = float(os.environ.get("AWAY_SECONDS", "5"))


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """A primary with the broker's tables, and its synchronous standby."""
    async with running_pair() as pair:
        await migrate(pair.primary.conninfo)
        yield pair


@pytest.fixture
async def deployment() -> AsyncIterator[Deployment]:
    """One broker on a primary and its synchronous standby."""
    async with running_deployment(1) as deployment:
        yield deployment


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


@contextlib.asynccontextmanager
async def opened(conninfo: str, **settings: Any) -> AsyncIterator[Database]:
    database = Database(conninfo, **settings)
    await database.open(PATIENCE)
    try:
        yield database
    finally:
        await database.close()


def new(*bodies: object) -> list[NewMessage]:
    return [NewMessage(str(body), None, None, None, None) for body in bodies]


async def error_of(work: Awaitable[Any]) -> BrokerError:
    with pytest.raises(BrokerError) as raised:
        await work
    return raised.value


# ---------------------------------------------------------------------------- commits that no standby has confirmed


async def plain(database: Database) -> Any:
    """A statement in the simple protocol."""

    async def operation(connection: Connection) -> Any:
        await connection.execute("CREATE TABLE IF NOT EXISTS plain (n int)")
        return (await connection.execute("INSERT INTO plain VALUES (1)")).statusmessage

    return await database.write(operation)


async def enqueue(database: Database) -> Any:
    """Through the group commit: the extended protocol."""
    return await Calls(database).enqueue("default", new(1))


async def several(database: Database) -> Any:
    """What several calls share is unknown to each of them."""
    calls = Calls(database)
    answers = await asyncio.gather(*(calls.enqueue("default", new(n)) for n in range(5)), return_exceptions=True)
    for each in answers:
        assert isinstance(each, BrokerError), each
    raise answers[-1]  # type: ignore[misc]


Write = Callable[[Database], Awaitable[Any]]


@pytest.mark.parametrize("how", ["cancel", "terminate"])
@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("write", [plain, enqueue, several])
async def test_a_commit_that_no_standby_has_confirmed_is_never_answered_with_a_result(
    pair: Pair, write: Write, is_prepared: bool, how: str
) -> None:
    """Somebody ends the wait: PostgreSQL has committed, and says so, with a notice beside."""
    async with opened(pair.primary.conninfo, connections=3, request_timeout=PATIENCE) as database:
        for _ in range(8 if is_prepared else 1):  # psycopg prepares a statement after five uses
            await write_all(write, database)
        pair.standby.pause()
        writing = asyncio.create_task(error_of(write(database)))
        ended: set[int] = set()  # each once: a second cancel could come late, and end what its session does next
        while not writing.done():
            for (pid,) in await pair.primary.query(WAITS):
                if pid not in ended:
                    ended.add(pid)
                    await pair.primary.query(f"SELECT pg_{how}_backend(%s)", [pid])
            await asyncio.sleep(0.01)
        error = await writing
        assert (type(error), error.outcome) == (Unavailable, "unknown")
        pair.standby.resume()
        # The mark of one use of a connection is not left for the next.
        assert await Calls(database).enqueue("default", new(2))


async def write_all(write: Write, database: Database) -> None:
    if write is several:
        write = enqueue
    await write(database)


# What may be repeated: how it is made ready, the call, and what it answers when it was done already.


async def with_a_key(database: Database) -> Callable[[], Awaitable[Any]]:
    message = NewMessage("1", None, None, None, None, "key")

    async def send() -> Any:
        return (await Calls(database).enqueue("default", [message])).duplicates

    return send


async def a_delete(database: Database) -> Callable[[], Awaitable[Any]]:
    calls = Calls(database)
    await calls.enqueue("default", new(1))
    delivery = await calls.dequeue("default", 1, 600)
    return lambda: calls.delete(delivery.leases)


async def a_delete_by_id(database: Database) -> Callable[[], Awaitable[Any]]:
    stored = await Calls(database).enqueue("default", new(1))
    message_id = message_id_of(stored.ids[0])
    return lambda: database.write(lambda connection: inspection.delete(connection, "default", message_id, None))


async def a_queue(database: Database) -> Callable[[], Awaitable[Any]]:
    async def create() -> Any:
        return (await database.write(lambda connection: queues.create(connection, "new", {}))).queue

    return create


async def made_topics(database: Database) -> None:
    """Let there be topics of both kinds, of which one has a subscription."""

    async def make(connection: Connection) -> None:
        await topics.create(connection, "topic", None)
        await topics.create(connection, "nobody", None)
        await topics.create(connection, "later", "on_broadcast")

    await database.write(make)
    await subscribe(database)


async def subscribe(database: Database, name: str = "s") -> Any:
    params: dict[str, Any] = {"queue": "default", "url": None, "filter": None, "attributes": {}}
    subscription, _ = await database.write(lambda c: subscriptions.subscribe(c, "topic", name, **params))
    return subscription.name


def a_publish(topic: str, key: str | None) -> Callable[[Database], Awaitable[Callable[[], Awaitable[Any]]]]:
    async def prepare(database: Database) -> Callable[[], Awaitable[Any]]:
        await made_topics(database)

        async def send() -> Any:
            published = await Calls(database).publish(topic, NewMessage("1", None, None, None, None, key))
            return published.is_duplicate, published.deliveries

        return send

    return prepare


async def a_subscription(database: Database) -> Callable[[], Awaitable[Any]]:
    await made_topics(database)
    return lambda: subscribe(database, "new")


async def a_broadcast(database: Database) -> Callable[[], Awaitable[Any]]:
    await made_topics(database)
    await Calls(database).publish("later", NewMessage("1", None, None, None, None))

    async def send() -> Any:
        return (await broadcasting.broadcast(database, "later")).messages

    return send


@pytest.mark.parametrize(
    ("prepare", "answer_if_done"),
    [
        pytest.param(with_a_key, frozenset({0}), id="a key"),
        pytest.param(a_delete, [False], id="a delete"),
        pytest.param(a_delete_by_id, False, id="a delete by id"),
        pytest.param(a_queue, "new", id="a queue"),
        pytest.param(a_publish("topic", "key"), (True, 1), id="a publish"),
        pytest.param(a_publish("nobody", None), (False, 0), id="a publish to nobody"),
        pytest.param(a_subscription, "new", id="a subscription"),
        pytest.param(a_broadcast, 0, id="a broadcast"),
    ],
)
async def test_what_was_done_already_is_confirmed_only_when_the_standby_has_it(
    pair: Pair, prepare: Callable[[Database], Awaitable[Callable[[], Awaitable[Any]]]], answer_if_done: Any
) -> None:
    """The first call has committed on the primary alone; who repeats it has to wait for the standby like that one."""
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with opened(pair.primary.conninfo, connections=3, request_timeout=PATIENCE) as database:
        repeat = await prepare(database)
        pair.standby.pause()
        first = asyncio.create_task(error_of(repeat()))
        while not first.done():
            await pair.primary.query(f"SELECT pg_cancel_backend(pid) FROM ({waits.replace('1', 'pid')}) AS w")
            await asyncio.sleep(0.01)
        assert (await first).outcome == "unknown"
        again = asyncio.ensure_future(repeat())
        while not (again.done() or await pair.primary.query(waits)):
            await asyncio.sleep(0.01)
        assert not again.done(), "it was answered while only the primary had it"
        pair.standby.resume()
        assert await again == answer_if_done


# ------------------------------------------------------------------------------------- a standby that is away


async def test_while_the_standby_is_away_writes_are_refused_at_once_reads_go_on_and_nothing_is_lost(
    deployment: Deployment, http: aiohttp.ClientSession
) -> None:
    """Eight producers ask all the time; then the primary is killed, and the standby must have what was acknowledged."""
    (broker,), pair = deployment.brokers, deployment.pair
    clients = Clients(http, broker.url)
    async with clients.at_work(producers=8):
        await until(clients.have_stored(100))
        pair.standby.pause()
        away_at = time.monotonic()
        await until(clients.are_refused)
        opened_at = time.monotonic()
        sessions = []
        while time.monotonic() - opened_at < AWAY_SECONDS:
            since = time.monotonic()
            assert (await call(http, broker.url, "count_messages"))["total"] > 0
            assert time.monotonic() - since < LATE, "reads go on"
            [(number,)] = await pair.primary.query(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'wonderq'"
            )
            sessions.append(number)
        assert max(sessions) <= DATABASE_CONNECTIONS + 10
        refusals = [each for each in clients.failures if each.began_at > opened_at]
        assert refusals
        for each in refusals:
            assert each.data["outcome"] == "none"
            assert each.data["retry_after"] > 0
            assert "standby" in each.message
            assert each.seconds < LATE
        async with http.get(f"{broker.url}/readyz") as response:
            assert (await response.json())["status"] == "read_only"
        async with http.get(f"{broker.url}/metrics") as response:
            assert "wonderq_breaker_open 1.0" in await response.text()

        pair.standby.resume()
        back_at = time.monotonic()
        stored = len(clients.stored)
        await until(clients.have_stored(stored + 100))
        assert time.monotonic() - back_at < 5 + LATE
    # Whoever was told "unknown" was told so by its deadline.
    for each in clients.failures:
        if each.began_at < opened_at:
            assert each.seconds < REQUEST_TIMEOUT + LATE
    assert away_at < opened_at < away_at + REQUEST_TIMEOUT + LATE
    assert broker.log.count("WRITES ARE REFUSED") == broker.log.count("writes are sent again") == 1
    await pair.primary.kill()
    await pair.fail_over()
    found = {number for (number,) in await pair.primary.query("SELECT body::text::int FROM broker.messages")}
    assert clients.stored - found == set(), "acknowledged and lost"
    assert found - clients.stored - clients.unknown == set(), "nobody was told that this may have been stored"


async def test_news_wait_for_no_standby(pair: Pair) -> None:
    async with await psycopg.AsyncConnection.connect(pair.primary.conninfo, autocommit=True) as connection:
        pair.standby.pause()
        with deadline(connection, PATIENCE / 4):
            await connection.execute(notifications._NOTIFY, {"channel": "any", "payload": "news"})
        pair.standby.resume()


# ------------------------------------------------------------------------------------- a primary that hangs


async def test_while_the_primary_hangs_every_call_is_answered_by_its_deadline_and_then_all_is_well_again(
    deployment: Deployment, http: aiohttp.ClientSession
) -> None:
    (broker,), pair = deployment.brokers, deployment.pair
    clients = Clients(http, broker.url)
    async with clients.at_work(producers=4, readers=4):
        await until(clients.have_stored(50))
        pair.primary.pause()
        await until(clients.are_refused)
        refused = len(clients.failures)
        await until(clients.have_failed(refused + 50))
        pair.primary.resume()
        stored = len(clients.stored)
        await until(clients.have_stored(stored + 50))
    assert all(each.seconds < REQUEST_TIMEOUT + LATE for each in clients.failures)
    assert "does not answer" in broker.log
    [(listening,)] = await pair.primary.query(LISTENING)
    assert listening >= 1


LISTENING = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock' AND granted"


@pytest.mark.parametrize("how", ["killed", "hung", "cut off"])
async def test_after_a_failover_the_new_primary_is_found_without_a_restart(
    deployment: Deployment, http: aiohttp.ClientSession, how: str
) -> None:
    """Hung, or cut off without a word, the old primary stays where it is, the first of the hosts."""
    (broker,), pair = deployment.brokers, deployment.pair
    old, new = pair.primary, pair.standby
    clients = Clients(http, broker.url)
    async with clients.at_work(producers=4, readers=2):
        await until(clients.have_stored(50))
        if how == "killed":
            await old.kill()
        elif how == "hung":
            old.pause()
        else:
            broker.proxies[0].swallow()
        await new.promote()
        stored = len(clients.stored)
        await until(clients.have_stored(stored + 50))
        assert all(each.seconds < REQUEST_TIMEOUT + LATE for each in clients.failures)

    async def services_are_there() -> bool:
        """To listen; what notifies and looks after the server is not seen by a lock."""
        [(listening,)] = await new.query(LISTENING)
        return bool(listening >= 1)

    await until(services_are_there)
    expired = await call(http, broker.url, "enqueue", body=-1, ttl=0.1)
    swept = f"SELECT count(*) = 0 FROM broker.messages WHERE body::text = '-1' -- {expired['message_id']}"

    async def is_swept() -> bool:
        return await new.query(swept) == [(True,)]

    await until(is_swept)
    found = {number for (number,) in await new.query("SELECT body::text::int FROM broker.messages")}
    assert clients.stored - found == set(), "acknowledged and lost"
    assert "Traceback" not in broker.log


class Failure:
    """An error that a client was told."""

    def __init__(self, began_at: float, error: dict[str, Any]) -> None:
        self.began_at = began_at
        self.seconds = time.monotonic() - began_at
        self.message: str = error["message"]
        self.data: dict[str, Any] = error["data"]


class Clients:
    """Clients that ask all the time; every message has a number of its own."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._numbers = itertools.count()
        self.stored: set[int] = set()
        self.unknown: set[int] = set()
        self.failures: list[Failure] = []

    @contextlib.asynccontextmanager
    async def at_work(self, *, producers: int, readers: int = 0) -> AsyncIterator[None]:
        """Let so many of them work until the block ends and each has its last answer."""
        self._is_over = False
        tasks = [asyncio.create_task(self._produce()) for _ in range(producers)]
        tasks += [asyncio.create_task(self._read()) for _ in range(readers)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)

    async def _produce(self) -> None:
        while not self._is_over:
            number = next(self._numbers)
            failure = await self._ask("enqueue", body=number)
            if failure is None:
                self.stored.add(number)
            elif failure.data["outcome"] == "unknown":
                self.unknown.add(number)

    async def _read(self) -> None:
        while not self._is_over:
            await self._ask("count_messages")

    async def _ask(self, method: str, **params: Any) -> Failure | None:
        began_at = time.monotonic()
        answered = await answer(self._http, self._url, method, **params)
        if "error" not in answered:
            return None
        failure = Failure(began_at, answered["error"])
        assert failure.data["type"] == "unavailable", answered
        self.failures.append(failure)
        await asyncio.sleep(0.02)
        return failure

    def have_stored(self, number: int) -> Callable[[], Awaitable[bool]]:
        """Say whether so many messages are stored."""

        async def fact() -> bool:
            return len(self.stored) >= number

        return fact

    def have_failed(self, number: int) -> Callable[[], Awaitable[bool]]:
        """Say whether so many calls have failed."""

        async def fact() -> bool:
            return len(self.failures) >= number

        return fact

    async def are_refused(self) -> bool:
        """Whether somebody was told that nothing is written."""
        return any("retry_after" in each.data for each in self.failures)
