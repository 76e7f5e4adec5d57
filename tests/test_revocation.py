"""A token that was revoked, or has expired, counts nowhere after five seconds: not in any process of any broker."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import psycopg
import pytest

from broker.storage import tokens
from broker.storage.database import Connection
from broker.storage.tokens import Grant
from broker_process import DEADLINE, Process, Start
from outside import request, send
from test_token_commands import token as token_command

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

SECONDS = 5.0
# New connections are shared out between the processes of a broker.
LOOKS = 40


async def statuses(broker: Process, token: str) -> set[int]:
    """Call over many connections, so that every process answers; return the statuses that came."""
    call = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "list_queues"}).encode()
    asked = request("POST", "/rpc", call, f"Authorization: Bearer {token}")
    answers = await asyncio.gather(*(send(broker.url, asked) for _ in range(LOOKS)))
    return {answer.status for answer in answers}


@pytest.mark.parametrize("way", ["revoked", "expired"])
async def test_a_token_that_counts_no_more_is_refused_by_every_process_within_five_seconds(
    start: Start, database_url: str, connection: Connection, way: str, record_property: Callable[[str, Any], None]
) -> None:
    flags = ("--database-url", database_url, "--auth", "required", "--max-failed-logins", "1000000")
    brokers = [await (await start(*flags, "--processes", "2")).ready(), await (await start(*flags)).ready()]
    assert len(brokers[0].workers) == 2
    token = await tokens.create(connection, "ada", Grant(manage=["*"]), None)
    kept = await tokens.create(connection, "bob", Grant(manage=["*"]), None)
    for broker in brokers:
        assert await statuses(broker, token) == {200}
    await end(database_url, way)
    ended_at = time.monotonic()
    await refused(brokers, lambda broker: statuses(broker, token))
    took = time.monotonic() - ended_at
    for broker in brokers:
        assert await statuses(broker, token) == {401}, "for good"
        assert await statuses(broker, kept) == {200}, "nobody else"
    record_property("revocation", f"{way}: refused by every process after {took:.1f} s")
    # It normally takes one second; what is promised is five, on a machine that is not busy with other tests.
    assert took < 3 * SECONDS


async def end(database_url: str, way: str) -> None:
    if way == "revoked":
        done = await asyncio.to_thread(token_command, database_url, "revoke", "ada")
        assert done.exit_code == 0
        return
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("UPDATE broker.tokens SET expires_at = statement_timestamp() WHERE name = 'ada'")


async def refused(brokers: list[Process], look: Callable[[Process], Awaitable[set[int]]]) -> None:
    """Wait until every process of every broker refuses."""
    async with asyncio.timeout(DEADLINE):
        for broker in brokers:
            while await look(broker) != {401}:
                await asyncio.sleep(0.1)
