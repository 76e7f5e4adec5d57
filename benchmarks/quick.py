"""What one broker does on this machine, in about a minute: the figures of docs/design.md.

    python -m benchmarks.quick [--seconds 5]

Starts a broker with an embedded PostgreSQL (durable settings) in a temporary directory, in a process of its own,
and drives it over HTTP from this one. Client and server share the machine, so this is a floor, not a contest.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg

from broker.client import Client
from broker.embedded import conninfo_of_running

BODY_BYTES = 200
BATCH = 100


def new_body() -> str:
    """Return text that does not compress."""
    return "".join(random.choices(string.ascii_letters + string.digits, k=BODY_BYTES))


@contextmanager
def running_broker(data_dir: Path) -> Iterator[str]:
    """Run a broker; yield its URL."""
    command = [sys.executable, "-m", "broker", "serve", "--port", "0", "--data-dir", str(data_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        try:
            yield line.removeprefix("listening on ").strip()
        finally:
            process.send_signal(signal.SIGTERM)


async def rate(clients: int, seconds: float, url: str, work: Callable[[Client], Awaitable[int]]) -> float:
    """Return how many messages a second so many clients get through, each repeating its work."""
    until = time.perf_counter() + seconds

    async def one() -> int:
        done = 0
        async with Client(url) as client:
            while time.perf_counter() < until:
                done += await work(client)
        return done

    began_at = time.perf_counter()
    done = sum(await asyncio.gather(*(one() for _ in range(clients))))
    return done / (time.perf_counter() - began_at)


async def enqueue_one(client: Client) -> int:
    await client.enqueue("single", new_body())
    return 1


async def life_of_one(client: Client) -> int:
    await client.enqueue("life", new_body())
    for message in await client.dequeue("life"):
        await client.delete(message.receipt)
    return 1


async def life_of_batch(client: Client) -> int:
    await client.enqueue_batch("batch", [{"body": new_body()} for _ in range(BATCH)])
    messages = await client.dequeue("batch", max_messages=BATCH)
    if messages:
        await client.delete_batch([message.receipt for message in messages])
    return len(messages)


async def wake_up_milliseconds(url: str, times: int) -> list[float]:
    """Return how long messages took from the call of `enqueue` to a consumer that was waiting."""
    taken = []
    async with Client(url) as producer, Client(url) as consumer:
        for _ in range(times):
            waiting = asyncio.create_task(consumer.dequeue("parked", wait=20))
            await asyncio.sleep(0.02)  # until it waits
            began_at = time.perf_counter()
            await producer.enqueue("parked", 1)
            messages = await waiting
            taken.append((time.perf_counter() - began_at) * 1000)
            await consumer.delete(messages[0].receipt)
    return taken


async def bytes_per_message(url: str, conninfo: str, messages: int = 20_000) -> tuple[float, float]:
    """Return the bytes on disk of a stored message, indexes included, and its bytes of WAL over its life."""
    async with Client(url) as client, await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as connection:

        async def figure(statement: str) -> float:
            row = await (await connection.execute(statement.encode())).fetchone()
            assert row is not None
            return float(row[0])

        await connection.execute("CHECKPOINT")
        wal_before = await figure("SELECT pg_current_wal_lsn() - '0/0'")
        size_before = await figure("SELECT pg_total_relation_size('broker.messages')")
        for _ in range(messages // BATCH):
            await client.enqueue_batch("size", [{"body": new_body()} for _ in range(BATCH)])
        size = await figure("SELECT pg_total_relation_size('broker.messages')") - size_before
        for _ in range(messages // BATCH):
            taken = await client.dequeue("size", max_messages=BATCH)
            await client.delete_batch([message.receipt for message in taken])
        wal = await figure("SELECT pg_current_wal_lsn() - '0/0'") - wal_before
    return size / messages, wal / messages


async def durable_commit_milliseconds(conninfo: str, times: int = 500) -> float:
    """Return the median time of the smallest transaction that has to reach the disk."""
    taken = []
    async with await psycopg.AsyncConnection.connect(conninfo, autocommit=True) as connection:
        for _ in range(times):
            began_at = time.perf_counter()
            await connection.execute("SELECT pg_logical_emit_message(true, 'benchmark', '')")
            taken.append((time.perf_counter() - began_at) * 1000)
    return statistics.median(taken)


def cpu_seconds() -> dict[str, float]:
    """Return the CPU time that the broker and all of PostgreSQL have used, where /proc tells."""
    used = {"broker": 0.0, "PostgreSQL": 0.0}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
            fields = (process / "stat").read_text().rsplit(")", 1)[1].split()
            who = "broker" if b"-m broker serve" in command else "PostgreSQL" if b"postgres" in command else None
            if who is not None:
                used[who] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


async def measure(url: str, conninfo: str, seconds: float) -> None:
    async with Client(url) as client:
        for queue in ("single", "life", "batch", "parked", "size"):
            await client.create_queue(queue)
    await rate(8, 1, url, life_of_batch)  # warm
    print(f"{os.cpu_count()} cores shared by clients, broker and PostgreSQL; bodies of {BODY_BYTES} bytes\n")
    print(f"one durable commit                       {await durable_commit_milliseconds(conninfo):10.2f} ms median")
    before, began_at = cpu_seconds(), time.perf_counter()
    print(f"enqueue, single calls, 16 clients        {await rate(16, seconds, url, enqueue_one):10,.0f} messages/s")
    share = 100 / (time.perf_counter() - began_at)
    shares = ", ".join(f"{who} {(used - before[who]) * share:.0f} %" for who, used in cpu_seconds().items())
    print(f"    of one core meanwhile                {shares}")
    print(f"whole life, single calls, 16 clients     {await rate(16, seconds, url, life_of_one):10,.0f} messages/s")
    print(
        f"whole life, batches of {BATCH}, 8 clients     {await rate(8, seconds, url, life_of_batch):10,.0f} messages/s"
    )
    taken = sorted(await wake_up_milliseconds(url, 200))
    p50, p99 = statistics.median(taken), taken[int(len(taken) * 0.99)]
    print(f"enqueue to a waiting consumer            {p50:10.1f} ms median, {p99:.1f} ms p99")
    size, wal = await bytes_per_message(url, conninfo)
    print(f"on disk, while it is stored              {size:10,.0f} bytes a message")
    print(f"WAL, over its whole life                 {wal:10,.0f} bytes a message")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="how long each rate is measured")
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="wonderq-bench-", ignore_cleanup_errors=True) as folder:
        data_dir = Path(folder)
        data_dir.chmod(0o755)
        with running_broker(data_dir) as url:
            conninfo = conninfo_of_running(data_dir)
            assert conninfo is not None
            asyncio.run(measure(url, conninfo, seconds))


if __name__ == "__main__":
    main()
