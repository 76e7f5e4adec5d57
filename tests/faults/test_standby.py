"""What a synchronous standby that hangs, a primary that hangs, and a failover mean to brokers and their clients.

Times are asserted only where one is promised: deadlines, and what comes by itself. A standby is hung by SIGSTOP, and
its primary then hears nothing of it for the five seconds of wal_sender_timeout and longer: commits wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import aiohttp
import psycopg
import pytest

from broker.errors import BrokerError, Unavailable
from broker.model import NewMessage
from broker.storage import breaker, database as databases
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.migrate import migrate
from brokers import Deployment, answer, call, running_deployment
from pair import PATIENCE, Pair, running_pair, until

# A deadline, and what a busy machine may add to the half second that is promised after it.
LATE = 2.5
WAITS = "SELECT pid FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


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
        for _ in range(8 if is_prepared else 0):  # psycopg prepares a statement after five uses
            await write_all(write, database)
        pair.standby.pause()
        writing = asyncio.create_task(error_of(write(database)))
        while not writing.done():
            await pair.primary.query(f"SELECT pg_{how}_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
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
