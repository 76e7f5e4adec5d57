"""Bring the schema of a database up to date: plain SQL files, forward only, under an advisory lock.

Any number of brokers may start at once on an empty database: one of them migrates in a single transaction,
the others wait for it and find nothing left to do. A database that a newer broker has migrated is refused.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import psycopg

from broker.storage.sessions import with_defaults

# Any number will do as long as every version of the broker uses the same.
MIGRATION_LOCK = 0x57_6F_6E_64_65_72_51
MINIMUM_VERSION = 15_00_00

_LOCK = "SELECT pg_advisory_xact_lock(%s)"

_CREATE_SCHEMA = """
CREATE SCHEMA IF NOT EXISTS broker
"""

_CREATE_MIGRATIONS = """
CREATE TABLE IF NOT EXISTS broker.migrations (
    number     integer     PRIMARY KEY,
    name       text        NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
)
"""

_APPLIED = """
SELECT number
FROM broker.migrations
ORDER BY number
"""

_REMEMBER = """
INSERT INTO broker.migrations (number, name)
VALUES (%s, %s)
"""


class MigrationError(Exception):
    """The database cannot be used as it is; the message says why and what to do."""


def available_migrations() -> list[tuple[int, str, str]]:
    """Return (number, name, SQL) of each migration in this package, in order."""
    files = resources.files("broker.storage.migrations").iterdir()
    found = [
        (int(file.name.split("_")[0]), file.name.removesuffix(".sql"), file.read_text("utf-8"))
        for file in files
        if file.name.endswith(".sql")
    ]
    return sorted(found)


async def migrate(conninfo: str) -> list[str]:
    """Apply what is missing; return the names of what was applied.

    Raises MigrationError for a database that is too old, not UTF8, or migrated by a newer broker.
    """
    # Whatever encoding the role or the database prefers for its sessions: these files are UTF-8.
    async with await psycopg.AsyncConnection.connect(with_defaults(conninfo), client_encoding="UTF8") as connection:
        await check_database(connection)
        await connection.execute("SET LOCAL lock_timeout = 0")
        await connection.execute("SET LOCAL statement_timeout = 0")
        await connection.execute(_LOCK, [MIGRATION_LOCK])
        await connection.execute(_CREATE_SCHEMA)
        await connection.execute(_CREATE_MIGRATIONS)
        rows = await (await connection.execute(_APPLIED)).fetchall()
        missing = missing_migrations([number for (number,) in rows])
        for number, name, sql in missing:
            await connection.execute(sql.encode())
            await connection.execute(_REMEMBER, [number, name])
        return [name for _, name, _ in missing]


def missing_migrations(applied: list[int]) -> list[tuple[int, str, str]]:
    """Return those of this package that are not applied yet."""
    available = available_migrations()
    newest = available[-1][0]
    if applied and max(applied) > newest:
        raise MigrationError(
            f"The database was migrated to {max(applied)} by a newer broker and this one knows up to"
            f" {newest}; start the newer version of wonderq."
        )
    return [migration for migration in available if migration[0] not in applied]


async def check_database(connection: psycopg.AsyncConnection[tuple[object, ...]]) -> None:
    """Raise MigrationError where this database cannot hold messages."""
    if connection.info.server_version < MINIMUM_VERSION:
        raise MigrationError(
            f"This PostgreSQL is {connection.info.parameter_status('server_version')}; WonderQ needs 15 or later."
        )
    row = await (await connection.execute("SHOW server_encoding")).fetchone()
    if row is None or row[0] != "UTF8":
        raise MigrationError(
            f"The database's encoding is {row and row[0]} and messages are UTF-8; create one with"
            " CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0."
        )


_NEWEST_APPLIED = """
SELECT coalesce(max(number), 0)
FROM broker.migrations
"""


async def newest_applied(connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> int:
    """Return the number of the newest migration that the database has."""
    row = await (await connection.execute(_NEWEST_APPLIED)).fetchone()
    assert row is not None, "an aggregate returns one row"
    return int(row[0])
