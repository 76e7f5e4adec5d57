"""What surrounds a broker in tests: a client that sends any bytes, and power over its database."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

# Only catches a hang; many times longer than anything takes.
PATIENCE = 30.0


@dataclass(frozen=True)
class Answer:
    """An HTTP answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        assert self.headers["content-type"].split(";")[0] == "application/json", self.headers
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer that has to do with no call: JSON-RPC with an id of null."""
        answer = self.json
        assert set(answer) == {"jsonrpc", "error", "id"}
        assert (answer["jsonrpc"], answer["id"]) == ("2.0", None)
        error: dict[str, Any] = answer["error"]
        assert set(error) == {"code", "message", "data"}
        assert {"type", "retryable", "outcome"} <= set(error["data"])
        assert len(error["message"]) > 20
        return error


async def send(url: str, *pieces: bytes) -> Answer:
    """Send bytes to a server; return what it answered until it closed. Say `Connection: close` in them."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    async with asyncio.timeout(PATIENCE):
        try:
            with contextlib.suppress(ConnectionError):  # It may have answered before it has read all.
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
            answer = await reader.read()
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return Answer(int(first.split()[1]), headers, body)


def request(
    method: str = "POST",
    path: str = "/rpc",
    body: bytes | None = b"",
    *fields: str,
    host: str | None = "localhost",
    content_type: str | None = "application/json",
) -> bytes:
    """Return an HTTP request. A body of None: no Content-Length, for fields that say otherwise."""
    lines = [f"{method} {path} HTTP/1.1", "Connection: close"]
    if host is not None:
        lines.append(f"Host: {host}")
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, *fields, "", ""]).encode() + (body or b"")


async def eventually(fact: Callable[[], Awaitable[Any]]) -> Any:
    """Ask until the answer is true; return it."""
    async with asyncio.timeout(PATIENCE):
        while not (answer := await fact()):
            await asyncio.sleep(0.01)
        return answer


@contextlib.contextmanager
def without_database(server: str, database_url: str) -> Iterator[None]:
    """Close every connection to a database and refuse new ones, until the block ends."""
    name = str(conninfo_to_dict(database_url)["dbname"])
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(allow.format(sql.Identifier(name), sql.Literal(False)))
        connection.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            connection.execute(allow.format(sql.Identifier(name), sql.Literal(True)))


@contextlib.asynccontextmanager
async def locked(database_url: str, table: str) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """Keep every statement off a table until the block ends; yield the connection that does."""
    async with await psycopg.AsyncConnection.connect(database_url) as connection:
        await connection.execute(
            sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(sql.Identifier(*table.split(".")))
        )
        yield connection
        await connection.rollback()


async def blocked_enqueues(connection: psycopg.AsyncConnection[Any]) -> list[int]:
    """Return the backends of this database in which an `enqueue` waits for a lock; services may wait too."""
    await connection.execute("SELECT pg_stat_clear_snapshot()")
    cursor = await connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND query LIKE '%/* enqueue */%'"
    )
    return [pid for (pid,) in await cursor.fetchall()]
