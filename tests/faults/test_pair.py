"""The servers and the proxy of these tests do what they say."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import psycopg
import pytest

from pair import Node, Pair, running_node, running_pair
from proxy import Lost, Proxy

Connection = psycopg.AsyncConnection[tuple[object, ...]]


async def connect(port: int) -> Connection:
    return await psycopg.AsyncConnection.connect(
        f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable", autocommit=True
    )


async def rows(node: Node) -> int:
    [(count,)] = await node.query("SELECT count(*) FROM t")
    return int(count)


async def test_what_the_primary_has_committed_the_standby_has_when_it_takes_over() -> None:
    async with running_pair() as pair:
        await pair.primary.query("CREATE TABLE t (n int)")
        for turn in range(3):
            await pair.primary.query("INSERT INTO t SELECT 1")
            await pair.primary.kill()
            await pair.fail_over()
            assert await rows(pair.primary) == turn + 1
            await pair.rejoin()
        await assert_commits_wait_for_the_standby(pair)


async def assert_commits_wait_for_the_standby(pair: Pair) -> None:
    pair.standby.pause()
    writing = asyncio.create_task(pair.primary.query("INSERT INTO t SELECT 1"))
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    async with asyncio.timeout(60):
        while not await pair.primary.query(waits):
            assert not writing.done()
    pair.standby.resume()
    await writing


async def test_a_server_that_was_killed_leaves_no_process_and_comes_back() -> None:
    async with running_node() as node:
        await node.query("CREATE TABLE t (n int)")
        sleeping = asyncio.create_task(node.query("SELECT pg_sleep(600)"))
        await node.kill()
        with pytest.raises(psycopg.OperationalError):
            await sleeping
        with pytest.raises(psycopg.OperationalError):
            await rows(node)
        await node.start()
        assert await rows(node) == 0


async def test_a_connection_is_cut_before_or_after_the_statement_was_carried_out() -> None:
    async with running_node() as node, Proxy(node.port) as proxy:
        await node.query("CREATE TABLE t (n int, word text)")
        for is_prepared in (True, False):
            await assert_is_cut(node, proxy, "request", is_prepared=is_prepared, stored=0)
            await assert_is_cut(node, proxy, "reply", is_prepared=is_prepared, stored=1)


async def assert_is_cut(node: Node, proxy: Proxy, lost: Lost, *, is_prepared: bool, stored: int) -> None:
    """The text of a prepared statement is not sent again: what is bound to it is recognised by its name."""
    await node.query("TRUNCATE t")
    statement = "/* store */ INSERT INTO t VALUES (%s, %s)"
    async with await connect(proxy.port) as connection:
        for _ in range(3 if is_prepared else 0):
            await connection.execute(statement, [1, "first"], prepare=True)
        await node.query("TRUNCATE t")
        others = [proxy.cut("/* other */"), proxy.cut("third")]
        cut = proxy.cut("/* store */" if stored else "second", lost=lost)
        with pytest.raises(psycopg.OperationalError):
            await connection.execute(statement, [2, "second"])
        await asyncio.wait_for(cut.happened.wait(), 60)
    assert await rows(node) == stored
    assert [other.done for other in others] == [0, 0]
    async with await connect(proxy.port) as again:  # once only
        await again.execute(statement, [2, "second"])
    assert await rows(node) == stored + 1


async def test_the_network_swallows_refuses_resets_and_heals() -> None:
    async with running_node() as node, Proxy(node.port) as proxy, await connect(proxy.port) as connection:
        await node.query("CREATE TABLE t (n int)")
        proxy.swallow(requests=False)
        writing = asyncio.create_task(connection.execute("INSERT INTO t SELECT 1"))
        async with asyncio.timeout(60):
            while await rows(node) == 0:
                pass
        assert not writing.done()
        proxy.heal()
        await writing

        proxy.delay(0.3)
        before = asyncio.get_running_loop().time()
        await connection.execute("SELECT 1")
        assert asyncio.get_running_loop().time() - before >= 0.6
        proxy.heal()

        proxy.refuse()
        with pytest.raises(psycopg.OperationalError):
            await connect(proxy.port)
        await connection.execute("SELECT 1")
        proxy.reset()
        with pytest.raises(psycopg.OperationalError):
            await connection.execute("SELECT 1")
        proxy.heal()
        with suppress(psycopg.OperationalError):
            await connection.close()
        async with await connect(proxy.port) as again:
            await again.execute("SELECT 1")
