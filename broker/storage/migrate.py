"""Bring the schema of a database up to date: plain SQL files, forward only, under an advisory lock.

Any number of brokers may start at once on an empty database: one of them migrates in a single transaction,
the others wait for it and find nothing left to do. A database that a newer broker has migrated is refused.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

import psycopg
from psycopg import sql

from broker.storage.sessions import with_defaults

# Any number will do as long as every version of the broker uses the same.
MIGRATION_LOCK = 0x57_6F_6E_64_65_72_51
MINIMUM_VERSION = 15_00_00

_LOCK = "SELECT pg_advisory_xact_lock(%s)"

_IS_THERE = """
SELECT to_regclass('broker.migrations') IS NOT NULL
"""

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


# What a broker needs that does not migrate: no right to change the schema, nor to make tokens.
_GRANTS = (
    "GRANT USAGE ON SCHEMA broker TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA broker TO {role}",
    "GRANT USAGE ON ALL SEQUENCES IN SCHEMA broker TO {role}",
    "GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA broker TO {role}",
    "REVOKE INSERT, UPDATE, DELETE ON broker.migrations, broker.tokens FROM {role}",
)

_ROLE_EXISTS = """
SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = %s)
"""


async def migrate(conninfo: str, *, runtime_role: str | None = None) -> list[str]:
    """Apply what is missing; return the names of what was applied. Changes nothing where nothing is missing.

    `runtime_role` is a role that brokers are to connect as: it is made if there is none of this name, and gets what it
    needs and no more. Raises MigrationError for a database that is too old, not UTF8, or migrated by a newer broker.
    """
    # Whatever encoding the role or the database prefers for its sessions: these files are UTF-8.
    async with await psycopg.AsyncConnection.connect(with_defaults(conninfo), client_encoding="UTF8") as connection:
        await check_database(connection)
        await connection.execute("SET LOCAL lock_timeout = 0")
        await connection.execute("SET LOCAL statement_timeout = 0")
        if runtime_role is None and not await _is_anything_missing(connection):
            return []
        await connection.execute(_LOCK, [MIGRATION_LOCK])
        await check_rights(connection)
        await connection.execute(_CREATE_SCHEMA)
        await connection.execute(_CREATE_MIGRATIONS)
        rows = await (await connection.execute(_APPLIED)).fetchall()
        missing = missing_migrations([number for (number,) in rows])
        for number, name, text in missing:
            await connection.execute(text.encode())
            await connection.execute(_REMEMBER, [number, name])
        if runtime_role is not None:
            await _grant(connection, runtime_role)
        return [name for _, name, _ in missing]


async def _is_anything_missing(connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> bool:
    """Look without a lock and without a right to more than that. Raises MigrationError."""
    if (await (await connection.execute(_IS_THERE)).fetchone()) != (True,):
        return True
    return bool(missing_migrations([number for (number,) in await (await connection.execute(_APPLIED)).fetchall()]))


async def _grant(connection: psycopg.AsyncConnection[tuple[Any, ...]], role: str) -> None:
    name = sql.Identifier(role)
    if (await (await connection.execute(_ROLE_EXISTS, [role])).fetchone()) != (True,):
        await connection.execute(sql.SQL("CREATE ROLE {role} LOGIN").format(role=name))
    for grant in _GRANTS:
        await connection.execute(sql.SQL(grant).format(role=name))


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


_MAY_MIGRATE = """
SELECT has_database_privilege(current_database(), 'CREATE')
"""


async def check_rights(connection: psycopg.AsyncConnection[tuple[Any, ...]]) -> None:
    """Raise MigrationError where this role may not migrate."""
    if (await (await connection.execute(_MAY_MIGRATE)).fetchone()) != (True,):
        raise MigrationError(
            f"The database is not migrated, and the role {connection.info.user} may not do it; run wonderq migrate"
            f" --runtime-role {connection.info.user} as the role that owns it."
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
