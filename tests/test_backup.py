"""A dump of the queues, restored into another database by the commands of docs/operations.md, and served from there."""

from __future__ import annotations

import asyncio
import os
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path
from typing import Any

import pytest

from broker.installation import EmbeddedError, find_installation
from broker.server import Server
from broker.settings import Settings
from conftest import PATIENCE, Broker, StartBroker
from pasting import blocks_of

DEADLINE = 120

Json = dict[str, Any]


async def do_as_the_page_says(beginning: str, folder: Path, conninfo: str) -> None:
    """Run the block of the page that begins so, by the programs of the newest PostgreSQL that is here."""
    (block,) = (one for one in blocks_of("docs/operations.md") if one.text.startswith(beginning))
    try:
        programs = find_installation().bin_dir
    except EmbeddedError as error:
        pytest.skip(str(error))
    environ = os.environ | {"DATABASE_URL": conninfo, "PATH": f"{programs}:{os.environ['PATH']}"}
    shell = await asyncio.create_subprocess_exec(
        "sh", "-euc", block.text, cwd=folder, env=environ, stdout=PIPE, stderr=STDOUT
    )
    async with asyncio.timeout(DEADLINE):
        said, _ = await shell.communicate()
    assert (shell.returncode, said.decode()) == (0, "")


async def test_a_restored_dump_has_every_message_lease_and_setting_as_it_was(
    start_broker: StartBroker, database_url: str, empty_database_url: str, tmp_path: Path
) -> None:
    """Two databases: what happens to the first one after the dump is nowhere in the second."""
    broker = await start_broker()
    await broker.call("create_queue", queue="q", visibility_timeout=3600, max_receives=5)
    await broker.call("create_queue", queue="short", visibility_timeout=0.5)
    await broker.call("enqueue", queue="short", body="its lease ends")
    await broker.call("dequeue", queue="short")
    held, ready = [await broker.call("enqueue", queue="q", body=name) for name in ("held", "ready")]
    (lease,) = (await broker.call("dequeue", queue="q"))["messages"]
    await broker.call("enqueue", queue="q", body="late", delay=3600, idempotency_key="key")
    await do_as_the_page_says("pg_dump ", tmp_path, database_url)
    await broker.call("purge_queue", queue="q")

    await do_as_the_page_says("pg_restore ", tmp_path, empty_database_url)
    async with Server(empty_database_url, Settings(host="127.0.0.1", port=0)) as server:
        await check(Broker(server.url, server, broker.http), lease, ready, held)


async def check(restored: Broker, lease: Json, ready: Json, held: Json) -> None:
    """Look at what a restored database serves."""
    counted = await restored.call("count_messages", queue="q")
    assert counted == {"ready": 1, "delayed": 1, "leased": 1, "total": 3, "exact": True}
    queue = await restored.call("get_queue", queue="q")
    assert (queue["visibility_timeout"], queue["max_receives"]) == (3600, 5)
    # A lease that has ended meanwhile is over; one that runs still is nobody else's, and its receipt is good.
    (again,) = (await restored.call("dequeue", queue="short", wait=PATIENCE))["messages"]
    assert (again["body"], again["receive_count"]) == ("its lease ends", 2)
    (taken,) = (await restored.call("dequeue", queue="q", max_messages=10))["messages"]
    assert taken["message_id"] == ready["message_id"]
    assert await restored.call("delete", receipt=lease["receipt"]) == {"deleted": True}
    # Keys count on, and new ids are none of the old ones.
    repeated = await restored.call("enqueue", queue="q", body="late", idempotency_key="key")
    assert repeated["duplicate"]
    new = await restored.call("enqueue", queue="q", body="new")
    assert new["message_id"] > repeated["message_id"] > held["message_id"]
