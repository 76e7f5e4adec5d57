"""What `wonderq doctor` asks of a database: facts, of which it makes findings. Nothing here judges, and nothing writes.

It works as any role that may connect. What a role may not see is None, or is missing: a role that is not a member of
pg_monitor sees that others hold a snapshot, and not since when. A question that is not answered in time is left out,
and named in `unanswered`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from broker.storage import durability, migrate, sessions
from broker.storage.durability import ServerFacts
from broker.storage.sessions import Connection

STATEMENT_TIMEOUT = "5s"
ROUND_TRIPS = 5
# Of a kind; more are not told one by one.
SHOWN = 20


class Role(NamedTuple):
    """Who we are there, and whether we see what the sessions of others do."""

    name: str
    is_superuser: bool
    sees_all: bool


class Connections(NamedTuple):
    """Sessions of clients, in all databases of the server, and how many there may be without a superuser."""

    used: int
    most: int


class Snapshot(NamedTuple):
    """A session or a transaction that keeps vacuum from its work; `seconds` is None where this role may not see it."""

    pid: int
    role: str | None
    application: str | None
    state: str | None
    seconds: float | None
    transactions: int


class Prepared(NamedTuple):
    """A transaction that was prepared for a commit in two phases, and waits for it."""

    name: str
    seconds: float


class Slot(NamedTuple):
    """A replication slot: how much WAL it keeps, and for how many transactions it keeps vacuum from its work."""

    name: str
    is_active: bool
    wal_status: str | None
    wal_bytes: int | None
    transactions: int | None


class Table(NamedTuple):
    """A table of the broker's, as the statistics of the server know it."""

    name: str
    live: int
    dead: int
    table_bytes: int
    index_bytes: int
    last_vacuum: datetime | None
    has_autovacuum: bool


class Server(NamedTuple):
    """What holds for the whole server."""

    version_number: int
    autovacuum: str
    track_counts: str
    frozen_age: int
    clock: datetime


@dataclass
class Facts:
    """What was found out. A part is None where its question was not answered."""

    seconds: float = 0.0
    clock_difference: float = 0.0
    durability: ServerFacts | None = None
    server: Server | None = None
    role: Role | None = None
    connections: Connections | None = None
    newest_migration: int | None = None
    sweep_seconds: float | None = None
    snapshots: Sequence[Snapshot] = ()
    prepared: Sequence[Prepared] = ()
    slots: Sequence[Slot] = ()
    tables: Sequence[Table] = ()
    unanswered: list[str] = field(default_factory=list)


_SERVER = """
SELECT
    current_setting('server_version_num')::int, current_setting('autovacuum'), current_setting('track_counts'),
    (SELECT age(datfrozenxid) FROM pg_database WHERE datname = current_database()),
    clock_timestamp()
"""

_ROLE = """
SELECT rolname, rolsuper, rolsuper OR pg_has_role('pg_read_all_stats', 'USAGE')
FROM pg_roles
WHERE rolname = current_user
"""

# Who may not see what a session does sees its database all the same.
_CONNECTIONS = """
SELECT
    (SELECT count(*) FROM pg_stat_activity WHERE coalesce(backend_type, 'client backend') = 'client backend'
        AND usesysid IS NOT NULL),
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0)
"""

# Of this database, and walsenders, whose standby may hold a snapshot too (hot_standby_feedback). We are not meant.
_SNAPSHOTS = """
SELECT
    pid, usename, application_name, state,
    extract(epoch FROM clock_timestamp() - xact_start)::float8,
    age(coalesce(backend_xmin, backend_xid))
FROM pg_stat_activity
WHERE coalesce(backend_xmin, backend_xid) IS NOT NULL AND pid <> pg_backend_pid()
    AND (datname = current_database() OR datname IS NULL)
ORDER BY age(coalesce(backend_xmin, backend_xid)) DESC, pid
LIMIT %(shown)s
"""

_PREPARED = """
SELECT gid, extract(epoch FROM clock_timestamp() - prepared)::float8
FROM pg_prepared_xacts
WHERE database = current_database()
ORDER BY prepared
LIMIT %(shown)s
"""

_SLOTS = """
SELECT
    slot_name, active, wal_status,
    CASE WHEN NOT pg_is_in_recovery() THEN pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)::bigint END,
    greatest(age(xmin), age(catalog_xmin))
FROM pg_replication_slots
ORDER BY slot_name
LIMIT %(shown)s
"""

_TABLES = """
SELECT
    s.relname, s.n_live_tup, s.n_dead_tup, pg_relation_size(s.relid), pg_indexes_size(s.relid),
    greatest(s.last_vacuum, s.last_autovacuum),
    NOT coalesce(c.reloptions && ARRAY['autovacuum_enabled=false', 'autovacuum_enabled=off'], false)
FROM pg_stat_user_tables s
JOIN pg_class c ON c.oid = s.relid
WHERE s.schemaname = 'broker'
ORDER BY s.relname
"""

_SWEPT = """
SELECT extract(epoch FROM clock_timestamp() - ended_leases_seen_until)::float8
FROM broker.sweeps
"""

_HAS_SCHEMA = """
SELECT to_regclass('broker.migrations') IS NOT NULL
"""


async def examine(conninfo: str) -> Facts:
    """Ask a database for all of it. Raises psycopg.Error where it cannot be reached."""
    async with await sessions.connect(sessions.with_defaults(conninfo)) as connection:
        await connection.execute("SET default_transaction_read_only = on")
        await connection.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT}'")
        return await Examiner(connection).examine()


class Examiner:
    """Asks on one connection; a question that fails leaves its part out."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.facts = Facts()

    async def examine(self) -> Facts:
        """Ask everything."""
        facts = self.facts
        facts.seconds = await self._round_trip()
        facts.durability = await durability.server_facts(self._connection)
        asked_at = time.time()
        server = await self._rows("the server", _SERVER)
        if server:
            facts.server = Server(*server[0])
            # Half way between the question and its answer.
            facts.clock_difference = facts.server.clock.timestamp() - (asked_at + time.time()) / 2
        role = await self._rows("the role", _ROLE)
        facts.role = Role(*role[0]) if role else None
        connections = await self._rows("connections", _CONNECTIONS)
        facts.connections = Connections(*connections[0]) if connections else None
        facts.snapshots = [Snapshot(*row) for row in await self._rows("snapshots", _SNAPSHOTS)]
        facts.prepared = [Prepared(*row) for row in await self._rows("prepared transactions", _PREPARED)]
        facts.slots = [Slot(*row) for row in await self._rows("replication slots", _SLOTS)]
        facts.newest_migration = 0
        if (await self._rows("the schema", _HAS_SCHEMA)) == [(True,)]:
            facts.newest_migration = await self._newest_migration()
            facts.tables = [Table(*row) for row in await self._rows("tables", _TABLES)]
            swept = await self._rows("the sweeper", _SWEPT)
            facts.sweep_seconds = swept[0][0] if swept else None
        return facts

    async def _round_trip(self) -> float:
        """Return how many seconds a question takes that needs no work: the best of a few."""
        best = float("inf")
        for _ in range(ROUND_TRIPS):
            began_at = time.monotonic()
            await self._connection.execute("SELECT")
            best = min(best, time.monotonic() - began_at)
        return best

    async def _newest_migration(self) -> int | None:
        try:
            return await migrate.newest_applied(self._connection)
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.QueryCanceled):
            self.facts.unanswered.append("migrations")
            return None

    async def _rows(self, what: str, statement: str) -> list[tuple[Any, ...]]:
        """Return what a statement finds; nothing, and its name remembered, where it may not ask or takes too long."""
        try:
            return await (await self._connection.execute(statement, {"shown": SHOWN})).fetchall()
        except (psycopg.errors.InsufficientPrivilege, psycopg.errors.QueryCanceled, psycopg.errors.UndefinedTable):
            self.facts.unanswered.append(what)
            return []
