"""The pool finds a database that is back, at once and by itself.

A deadline of five seconds stands for "at once" (half a second where nothing else runs): the pool's own pauses
would add up to more.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

from broker.storage import sessions
from broker.storage.database import Connection, Database
from outside import without_database

SOON = 5.0
CONNECTIONS = 8


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    opened = Database(database_url, connections=CONNECTIONS, request_timeout=60)
    await opened.open(60)
    yield opened
    await opened.close()


async def one(connection: Connection) -> Any:
    return await (await connection.execute("SELECT 1")).fetchone()


async def fill(database: Database) -> None:
    """Make the pool as large as it gets."""
    everybody = asyncio.Barrier(CONNECTIONS)

    async def with_the_others(connection: Connection) -> None:
        await everybody.wait()

    await asyncio.gather(*(database.read(with_the_others) for _ in range(CONNECTIONS)))


async def test_connections_that_a_restart_left_behind_delay_nobody(database: Database, database_url: str) -> None:
    await fill(database)
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        cursor = await connection.execute(
            "SELECT count(pg_terminate_backend(pid, 10000)) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        assert await cursor.fetchone() == (CONNECTIONS,)
    async with asyncio.timeout(SOON):
        for _ in range(CONNECTIONS):
            assert await database.read(one) == (1,)


async def test_a_call_that_waits_while_the_database_is_away_is_served_when_it_is_back(
    database: Database, database_url: str, test_server: str
) -> None:
    """Nobody but the one call asks for a connection meanwhile."""
    await fill(database)
    with without_database(test_server, database_url):
        waiting = asyncio.create_task(database.read(one))
        # Longer than the pool tries on its own.
        done, _ = await asyncio.wait({waiting}, timeout=3)
        assert not done
    async with asyncio.timeout(SOON):
        assert await waiting == (1,)


@pytest.mark.parametrize("is_pooled", [False, True])
async def test_behind_a_pooler_nothing_is_prepared(
    database: Database, monkeypatch: pytest.MonkeyPatch, is_pooled: bool
) -> None:
    """A pooler names a session of its own at first. (`make test-nightly ARGS=pgbouncer` has a real one.)"""
    if is_pooled:
        of_another = sessions._SET_ALL.replace("pg_backend_pid()", "pg_backend_pid() + 1")
        monkeypatch.setattr(sessions, "_SET_ALL", of_another)

    async def prepared(connection: Connection) -> Any:
        for _ in range(10):
            await connection.execute("SELECT %s::int", [1])
        return await (await connection.execute("SELECT count(*) FROM pg_prepared_statements", prepare=False)).fetchone()

    async with await database.connect() as connection:
        assert await prepared(connection) == ((0,) if is_pooled else (1,))
