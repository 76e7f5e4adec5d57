"""A session with PostgreSQL: how it is reached, what is set for it, and how it is ended where the server hangs.

Promises: only a server that takes writes is talked to, unless the connection string says otherwise; a connection is
made or given up in a bounded time; a peer that has vanished is noticed by the kernel within some ten seconds.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
from psycopg import AsyncConnection
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Format

from broker.storage import binary

Connection = AsyncConnection[tuple[Any, ...]]

# For each host, when there are several; psycopg takes no less than two. Its own default is to wait for minutes.
CONNECT_SECONDS = 5
# What a connection string that does not say otherwise means.
CONNECTION_DEFAULTS = {
    # Queues are never read from a standby, and of several hosts the one that takes writes is looked for.
    "target_session_attrs": "read-write",
    # A peer that vanished without a word is noticed: while we wait for it, after 5 + 3 × 2 seconds, and where it does
    # not take what we send, after ten.
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}

# Plans must not depend on what the table looked like when a statement was first prepared, or when it was last
# analysed: one made for an empty table stays in use when there are millions of rows. So every statement of the
# broker leaves the planner one index to go by, and reading more of the table than that is never right. Then a plan
# can be made once and kept: for a single message, planning costs as much as everything else. Parallel workers
# and JIT cost more than they give for a few rows.
# The role or the database may have other defaults for its sessions: the statements rely on READ COMMITTED, and
# what they send and read is UTF-8 and ISO dates.
SESSION_SETTINGS = {
    "application_name": "wonderq",
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
    "lock_timeout": "0",
    "max_parallel_workers_per_gather": "0",
    "idle_in_transaction_session_timeout": "10s",
    # A statement that waits, and whose connection we have cut, ends by itself where the server's system can tell
    # (Linux). Without it, each of them would keep its connection until it gets what it waits for.
    "client_connection_check_interval": "1s",
    "default_transaction_isolation": "read committed",
    "client_encoding": "UTF8",
    "DateStyle": "ISO",
    "TimeZone": "UTC",
}

# All at once: a connection that is made while calls wait for it costs one round trip, not one for each setting.
_SET_ALL = """
SELECT pg_backend_pid(), count(set_config(name, value, false))
FROM unnest(%s::text[], %s::text[]) AS s (name, value)
"""


class JsonLoader(Loader):
    """Load JSON as the bytes that were stored."""

    def load(self, data: Buffer) -> msgspec.Raw:
        return msgspec.Raw(bytes(data))


class BinaryJsonLoader(JsonLoader):
    format = Format.BINARY


def with_defaults(conninfo: str) -> str:
    """Return a connection string with what it leaves open; its connect_timeout is kept where it is a shorter one."""
    given = conninfo_to_dict(conninfo)
    seconds = str(given.get("connect_timeout", ""))
    bounded = min(int(seconds) if seconds.isdecimal() else 0, CONNECT_SECONDS) or CONNECT_SECONDS
    return make_conninfo("", **{**CONNECTION_DEFAULTS, **given, "connect_timeout": bounded})


def beginning_with(conninfo: str, host: str, port: int) -> str:
    """Return a connection string that tries one of its hosts first, so that a hung one before it costs no time."""
    given = conninfo_to_dict(conninfo)
    lists = {name: str(given[name]).split(",") for name in ("host", "hostaddr", "port") if name in given}
    hosts = lists.get("host", lists.get("hostaddr", []))
    ports = lists.get("port", ["5432"])
    ports = [number or "5432" for number in (ports * len(hosts) if len(ports) == 1 else ports)]
    places = list(zip(hosts, ports, strict=False))
    if (host, str(port)) not in places:
        return conninfo
    first = places.index((host, str(port)))
    for name, words in lists.items():
        if len(words) > 1:
            given[name] = ",".join([words[first], *words[:first], *words[first + 1 :]])
    return make_conninfo("", **given)


async def connect(conninfo: str) -> Connection:
    """Return a new connection that is not configured. Raises psycopg.OperationalError within the time for each host."""
    return await AsyncConnection.connect(conninfo, autocommit=True)


async def configure(connection: Connection) -> None:
    """Make a new connection ready for use."""
    binary.register(connection.adapters)
    connection.adapters.register_loader("json", JsonLoader)
    connection.adapters.register_loader("json", BinaryJsonLoader)
    cursor = await connection.execute(_SET_ALL, [list(SESSION_SETTINGS), list(SESSION_SETTINGS.values())])
    row = await cursor.fetchone()
    assert row is not None, "a select of aggregates returns one row"
    if row[0] != connection.info.backend_pid:
        # Who answered at first was a pooler, and who answers next may be another session than this one: a statement
        # that was prepared here would not be there, or be another's.
        connection.prepare_threshold = None


def cut(connection: Connection) -> None:
    """Shut a connection's socket down: whoever waits on it gets an error at once.

    psycopg's own way asks the server to cancel and waits for it, which takes ten seconds and more when the server
    hangs.
    """
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as half:
            half.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg.Error):
        pass  # it is closed already


@contextmanager
def deadline(connection: Connection, seconds: float) -> Iterator[None]:
    """Cut the connection where the block takes longer: what it awaits there raises psycopg.OperationalError."""
    timer = asyncio.get_running_loop().call_later(seconds, cut, connection)
    try:
        yield
    finally:
        timer.cancel()
