"""Brokers behind PgBouncer, in session mode and in transaction mode.

In session mode all is as without it. In transaction mode the broker prepares no statements, and what it sets for its
sessions and LISTENs for is lost, which docs/operations.md says; but every promise holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psycopg

from history import check
from packages import CannotInstall, unpack
from pair import PATIENCE, Node, as_account, folder_for_servers, free_port
from parts import Options, Result, Say
from under_load import at_work

ROOT = Path(__file__).parents[2]
PACKAGES = ("pgbouncer", "libevent-2.1-7", "libc-ares2")
TESTS = ("tests/test_messages.py",)
TESTS_SECONDS = 900
LOAD_SECONDS = 15.0


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    with folder_for_servers() as folder:
        try:
            await asyncio.to_thread(unpack, folder / "debian", *PACKAGES)
        except CannotInstall as error:
            yield Result("PgBouncer", skipped=str(error))
            return
        node = Node(folder, "single")
        try:
            await node.make()
            await node.start()
            for mode in ("session", "transaction"):
                result = Result(f"the tests of messages, {mode} mode")
                async with pooled(folder, node, mode, 90) as port:
                    result.figures = await tested(port)
                result.expect(not result.figures["failed"], f"{result.figures['failed']} tests failed")
                yield result
            for mode, size in (("session", 90), ("transaction", 4)):
                result = Result(f"under load, {mode} mode")
                async with pooled(folder, node, mode, size) as port:
                    await under_load(result, folder, port, mode, options)
                yield result
        finally:
            await node.close()


@contextlib.asynccontextmanager
async def pooled(folder: Path, node: Node, mode: str, size: int) -> AsyncIterator[int]:
    """Yield the port of a PgBouncer before a server, which has so many connections for each database."""
    port = free_port()
    configuration = folder / "pgbouncer.ini"
    configuration.write_text(
        f"""[databases]
* = host=127.0.0.1 port={node.port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = any
pool_mode = {mode}
max_client_conn = 500
default_pool_size = {size}
server_idle_timeout = 2
ignore_startup_parameters = extra_float_digits
"""
    )
    # `auth_type = any` lets everybody in as this one.
    configuration.write_text(configuration.read_text().replace(f"port={node.port}", f"port={node.port} user=postgres"))
    libraries = f"LD_LIBRARY_PATH={folder}/debian/usr/lib/x86_64-linux-gnu"
    with (folder / f"pgbouncer-{mode}.log").open("wb") as log:
        process = subprocess.Popen(
            [*as_account(), "env", libraries, str(folder / "debian/usr/sbin/pgbouncer"), str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                with contextlib.suppress(psycopg.OperationalError):
                    async with await psycopg.AsyncConnection.connect(conninfo(port)):
                        break
                await asyncio.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def conninfo(port: int) -> str:
    return f"host=127.0.0.1 port={port} user=postgres dbname=postgres sslmode=disable"


async def under_load(result: Result, folder: Path, port: int, mode: str, options: Options) -> None:
    """Let clients work through two brokers for a while; note which of their calls failed."""
    front = Node(folder, "front")
    front.port = port
    async with at_work(folder, [front], options.seed, brokers=2) as (brokers, load):
        await asyncio.sleep(LOAD_SECONDS)
        verdict = check(load.events())
        result.figures = {
            "acknowledged": verdict.acknowledged,
            "failed": verdict.failures.total(),
            "failures": dict(verdict.failures.most_common()),
        }
        # The queue is not drained, so nothing can be said of what is lost.
        broken = {name: len(values) for name, values in verdict.violations.items() if name != "lost"}
        result.figures["broken_promises"] = broken
        result.expect(not broken, f"broken promises: {broken}")
        result.expect(not verdict.failures, f"calls failed: {dict(verdict.failures)}")
        for broker in brokers:
            result.expect("CAN BE LOST" not in broker.log, f"{broker.name}: commits are not durable")


async def tested(port: int) -> dict[str, object]:
    """Run the tests on a server; return how many passed and failed, and the first of those that failed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=line", "-rf", "-p", "no:cacheprovider",
        "-o", "timeout=60", "--maxfail=30", *TESTS,
        cwd=ROOT,
        env={**os.environ, "TEST_DATABASE_URL": conninfo(port)},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(TESTS_SECONDS):
            said = (await process.communicate())[0].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)\b", said)}
    failed = counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    reasons = [line for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return {"passed": counts.get("passed", 0), "failed": failed, "reasons": reasons[:5] or said[-300:] * (not counts)}
