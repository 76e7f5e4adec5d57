"""Migrations on databases of every kind: empty, migrated, newer, in a foreign encoding, without a superuser."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from broker.model import NewMessage
from broker.server import Server
from broker.settings import Settings
from broker.storage import leases, queues, storing, sweeps
from broker.storage.migrate import MIGRATION_LOCK, MigrationError, available_migrations, migrate, newest_applied
from broker.storage.sessions import configure
from broker.storage.storing import EnqueueCall
from conftest import PATIENCE, Broker, dequeue
from test_cli import one_life_by_every_method

_names = (f"wonderq_test_migrate_{os.getpid()}_{n}" for n in itertools.count())


@contextmanager
def database(server: str, options: str) -> Iterator[str]:
    """Yield how to connect to a database that was created with these options."""
    name = sql.Identifier(next(_names))
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {} TEMPLATE template0 ").format(name) + sql.SQL(options))
        try:
            yield make_conninfo(server, dbname=name.as_string().strip('"'))
        finally:
            connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


def every_migration() -> list[str]:
    return [name for _, name, _ in available_migrations()]


async def test_ten_brokers_that_start_at_once_migrate_an_empty_database_once(empty_database_url: str) -> None:
    applied = await asyncio.gather(*(migrate(empty_database_url) for _ in range(10)))
    assert sorted(map(len, applied)) == [0] * 9 + [len(every_migration())]
    with psycopg.connect(empty_database_url) as connection:
        rows = connection.execute("SELECT name FROM broker.migrations ORDER BY number").fetchall()
        assert [name for (name,) in rows] == every_migration()
        assert connection.execute("SELECT name FROM broker.queues").fetchall() == [("default",)]


async def test_a_second_run_does_nothing(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        before = connection.execute("SELECT oid, relname FROM pg_class ORDER BY oid").fetchall()
        assert await migrate(database_url) == []
        assert connection.execute("SELECT oid, relname FROM pg_class ORDER BY oid").fetchall() == before


async def test_the_newest_migration_is_known_afterwards(database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        assert await newest_applied(connection) == available_migrations()[-1][0]


async def test_a_database_that_a_newer_broker_migrated_is_refused_and_left_alone(database_url: str) -> None:
    newer = available_migrations()[-1][0] + 1
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO broker.migrations (number, name) VALUES (%s, 'of_tomorrow')", [newer])
        with pytest.raises(MigrationError, match=f"migrated to {newer} by a newer broker .* start the newer version"):
            await migrate(database_url)
        assert connection.execute("SELECT max(number) FROM broker.migrations").fetchone() == (newer,)


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
async def test_a_database_that_is_not_utf8_is_refused_and_left_alone(test_server: str, encoding: str) -> None:
    with database(test_server, f"ENCODING '{encoding}' LOCALE_PROVIDER libc LOCALE 'C'") as url:
        with pytest.raises(MigrationError, match=f"encoding is {encoding} .* ENCODING 'UTF8' TEMPLATE template0"):
            await migrate(url)
        with psycopg.connect(url) as connection:
            row = connection.execute("SELECT count(*) FROM pg_namespace WHERE nspname = 'broker'").fetchone()
            assert row == (0,)


async def test_a_migration_that_fails_leaves_nothing_behind(empty_database_url: str) -> None:
    with psycopg.connect(empty_database_url, autocommit=True) as connection:
        # The last thing that the first migration makes is in the way.
        connection.execute("CREATE SCHEMA broker")
        connection.execute("CREATE TABLE broker.sweeps ()")
        with pytest.raises(psycopg.errors.DuplicateTable):
            await migrate(empty_database_url)
        cursor = connection.execute("SELECT to_regclass('broker.queues'), to_regclass('broker.migrations')")
        assert cursor.fetchone() == (None, None)
        connection.execute("DROP TABLE broker.sweeps")
        assert await migrate(empty_database_url) == every_migration()


async def test_who_waits_for_a_migration_waits_as_long_as_it_takes(empty_database_url: str) -> None:
    """Whatever timeouts the database sets for its sessions."""
    async with await psycopg.AsyncConnection.connect(empty_database_url, autocommit=True) as first:
        name = sql.Identifier(first.info.dbname)
        await first.execute(sql.SQL("ALTER DATABASE {} SET lock_timeout = '20ms'").format(name))
        await first.execute("SELECT pg_advisory_lock(%s)", [MIGRATION_LOCK])
        migrating = asyncio.create_task(migrate(empty_database_url))
        async with asyncio.timeout(20):
            waited = False
            while not waited:
                # By the server's clock, and longer than lock_timeout.
                cursor = await first.execute(
                    "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
                    " AND datname = current_database() AND query_start < clock_timestamp() - interval '100 ms')"
                )
                waited = await cursor.fetchone() == (True,)
                assert not migrating.done()
            await first.execute("SELECT pg_advisory_unlock(%s)", [MIGRATION_LOCK])
            assert await migrating == every_migration()


async def test_an_ordinary_role_that_owns_the_database_is_enough(test_server: str) -> None:
    """No superuser, no CREATEDB, no extension: what a managed PostgreSQL gives."""
    role = sql.Identifier(next(_names))
    with psycopg.connect(test_server, autocommit=True) as admin:
        admin.execute(
            sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'secret' NOSUPERUSER NOCREATEDB NOCREATEROLE").format(role)
        )
    try:
        with database(test_server, f"ENCODING 'UTF8' OWNER {role.as_string()}") as url:
            url = make_conninfo(url, user=role.as_string().strip('"'), password="secret")
            assert await migrate(url) == every_migration()
            async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
                await configure(connection)
                await queues.create(connection, "mine", {})
                new = [NewMessage("1", None, None, None, None)]
                await storing.enqueue(connection, [EnqueueCall("mine", new)])
                delivery = await dequeue(connection, "mine", 1, None)
                assert await leases.delete(connection, delivery.leases) == [True]
                assert await sweeps.remove_expired(connection, 10) == {}
                assert await sweeps.remove_deleted(connection, 10) == 0
    finally:
        with psycopg.connect(test_server, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP ROLE {}").format(role))


@pytest.fixture
def runtime(test_server: str) -> Iterator[tuple[str, str]]:
    """The URLs of one database: of its owner, and of the role that `migrate` has made for brokers."""
    role = next(_names)
    try:
        with database(test_server, "ENCODING 'UTF8'") as url:
            asyncio.run(migrate(url, runtime_role=role))
            with psycopg.connect(url, autocommit=True) as owner:
                owner.execute(sql.SQL("ALTER ROLE {} PASSWORD 'secret'").format(sql.Identifier(role)))
            yield url, make_conninfo(url, user=role, password="secret")
    finally:
        with psycopg.connect(test_server, autocommit=True) as admin:
            admin.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


def test_the_runtime_role_may_not_change_the_schema_nor_make_tokens(runtime: tuple[str, str]) -> None:
    owner_url, url = runtime
    asyncio.run(migrate(owner_url, runtime_role=str(conninfo_to_dict(url)["user"])))  # once more changes nothing
    for statement in (
        "CREATE TABLE broker.more ()",
        "CREATE TABLE public.more ()",
        "ALTER TABLE broker.messages ADD COLUMN more int",
        "DROP TABLE broker.messages",
        "TRUNCATE broker.messages",
        "DELETE FROM broker.migrations",
        "INSERT INTO broker.tokens (id, name, secret_hash) VALUES ('a', 'a', sha256('a'))",
        "UPDATE broker.tokens SET admin = true",
        "CREATE ROLE more",
        "SET ROLE postgres",
    ):
        with psycopg.connect(url) as connection, pytest.raises(psycopg.Error) as refused:
            connection.execute(statement.encode())
        assert refused.value.sqlstate in ("42501", "22023"), statement
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT rolsuper, rolcreaterole, rolcreatedb FROM pg_roles WHERE rolname = user"
        ).fetchone()
        assert row == (False, False, False)


async def test_a_broker_of_the_runtime_role_serves_every_method(runtime: tuple[str, str]) -> None:
    _, url = runtime
    chosen = Settings(host="127.0.0.1", port=0, sweep_interval=0.05, webhook_allow=("127.0.0.0/8",))
    assert await migrate(url) == [], "nothing is missing, so nothing is needed"
    async with Server(url, chosen) as server, aiohttp.ClientSession() as http:
        broker = Broker(server.url, server, http)
        await one_life_by_every_method(broker)
        await broker.call("enqueue", body=1, ttl=0.01)
        await broker.call("enqueue", body=1, idempotency_key="k")
        await broker.call("create_queue", queue="gone")
        await broker.call("enqueue", queue="gone", body=1)
        await broker.call("delete_queue", queue="gone")
        async with asyncio.timeout(PATIENCE):
            while b"wonderq_messages_expired_total 1.0" not in server.metrics.text():
                await asyncio.sleep(0.05)
        assert b'wonderq_sweeps_total{outcome="failed"} 0.0' in server.metrics.text()
        assert (await broker.call("count_messages"))["exact"]


async def test_a_database_that_is_not_migrated_is_named_to_the_runtime_role(
    runtime: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, url = runtime
    newer = [*available_migrations(), (999, "999_of_tomorrow", "CREATE TABLE broker.tomorrow ()")]
    monkeypatch.setattr("broker.storage.migrate.available_migrations", lambda: newer)
    with pytest.raises(MigrationError, match="wonderq migrate"):
        await migrate(url)
