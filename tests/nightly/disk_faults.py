"""The disk fails: it is full, it reports that it could not write, it is slow.

Nothing acknowledged may be lost, what is said to have failed must not be there, and the broker, which is never started
again, goes on when PostgreSQL does. Where PostgreSQL gives up it is started again, as an operator would.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import psycopg

from brokers import Broker, answer, call
from pair import ACCOUNT, PATIENCE, Node, folder_for_servers
from parts import Options, Result, Say
from under_load import at_work, command, judge, mounted, what_mounting_needs

DISK_SIZE = "250m"
# How much longer the fault lasts, once a client has been told of it.
FULL_SECONDS = 4.0
FAILING_SECONDS = 2.0
SLOW_MILLISECONDS = 100
SLOW_SECONDS = 10.0
TIMES = 5
QUICK_TIMES = 2
FILLER = "filler"
FILLER_BYTES = 50_000
SOURCE = Path(__file__).with_name("faultfs.c")


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    times = options.number(TIMES, QUICK_TIMES)
    yield await full(times, options, say)
    yield await failing(times, options, say)
    yield await slow(options)


class Fillers:
    """Clients that send large messages of their own, each once and without a key, and note what they were told."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._numbers = itertools.count()
        self.stored: set[int] = set()
        self.failed: set[int] = set()
        self.told: Counter[str] = Counter()

    async def fill(self) -> None:
        while True:
            number = next(self._numbers)
            pad = base64.b64encode(os.urandom(FILLER_BYTES)).decode()
            answered = await answer(self._http, self._url, "enqueue", queue=FILLER, body={"n": number, "pad": pad})
            if "result" in answered:
                self.stored.add(number)
                await asyncio.sleep(0.02)
                continue
            data = answered["error"]["data"]
            self.told[f"{data['type']} {data['outcome']}"] += 1
            if data["outcome"] == "none":
                self.failed.add(number)
            await asyncio.sleep(0.1)

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        filling = asyncio.create_task(self.fill())
        try:
            yield
        finally:
            filling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await filling

    async def fail(self) -> None:
        """Return when one of them has been told of another failure."""
        before = self.told.total()
        async with asyncio.timeout(PATIENCE):
            while self.told.total() == before:
                await asyncio.sleep(0.02)

    async def judge(self, result: Result, node: Node) -> None:
        """Compare what was told with what is there."""
        rows = await node.query("SELECT (body ->> 'n')::int FROM broker.messages WHERE body::text LIKE '{%'")
        there = {number for (number,) in rows}
        result.figures["told"] = dict(self.told)
        result.expect(not self.stored - there, f"{len(self.stored - there)} large messages are lost")
        result.expect(not self.failed & there, f"{len(self.failed & there)} are there of which nothing was to be done")
        allowed = {"unavailable none", "unavailable unknown"}
        result.expect(self.told.keys() <= allowed, f"clients were told {dict(self.told)}")


async def full(times: int, options: Options, say: Say) -> Result:
    """Fill the disk up, and make room again."""
    result = Result("disk full")
    if missing := what_mounting_needs():
        result.skipped = missing
        return result
    with folder_for_servers() as folder:
        disk = folder / "disk"
        disk.mkdir()
        with mounted(["-t", "tmpfs", "-o", f"size={DISK_SIZE},mode=755", "tmpfs"], disk):
            shutil.chown(disk, ACCOUNT)
            node = Node(disk, "single")
            node.settings = {"max_wal_size": "64MB", "min_wal_size": "32MB", "wal_keep_size": "0"}
            try:
                await node.make()
                await node.start()
                async with at_work(folder, [node], options.seed) as ([broker], load), session() as http:
                    await call(http, broker.url, "create_queue", queue=FILLER, max_message_bytes=2**20)
                    fillers = Fillers(http, broker.url)
                    async with fillers.at_work():
                        for n in range(times):
                            await load.works()
                            fill_up(disk / "ballast")
                            await fillers.fail()
                            await asyncio.sleep(FULL_SECONDS)
                            (disk / "ballast").unlink()
                            restarted = await comes_back(node)
                            await load.works()
                            say(f"disk full {n + 1}/{times}: {dict(fillers.told)}{restarted}")
                    await judge(result, node, [broker], load)
                    await fillers.judge(result, node)
                    states = sqlstates(broker)
                    result.figures["sqlstates"] = dict(states)
                    result.expect("53100" in states or fillers.told, "nobody noticed that the disk was full")
            finally:
                await node.close()
    return result


async def failing(times: int, options: Options, say: Say) -> Result:
    """Let every fsync fail: PostgreSQL gives up, because it cannot know what the disk has."""
    result = Result("fsync fails with EIO")
    async with faulty_node(result) as (folder, node, control):
        if node is None:
            return result
        async with at_work(folder, [node], options.seed) as ([broker], load), session() as http:
            await call(http, broker.url, "create_queue", queue=FILLER, max_message_bytes=2**20)
            fillers = Fillers(http, broker.url)
            async with fillers.at_work():
                for n in range(times):
                    await load.works()
                    control.write_text("fail")
                    await fillers.fail()
                    await asyncio.sleep(FAILING_SECONDS)
                    control.write_text("")
                    restarted = await comes_back(node)
                    await load.works()
                    say(f"fsync failed {n + 1}/{times}: {dict(fillers.told)}{restarted}")
            await judge(result, node, [broker], load)
            await fillers.judge(result, node)
            result.figures["sqlstates"] = dict(sqlstates(broker))
            result.expect("could not fsync" in node.log.read_text(), "no fsync has failed")
    return result


async def slow(options: Options) -> Result:
    """Let every fsync take a tenth of a second."""
    result = Result(f"fsync takes {SLOW_MILLISECONDS} ms")
    async with faulty_node(result) as (folder, node, control):
        if node is None:
            return result
        async with at_work(folder, [node], options.seed) as (brokers, load):
            control.write_text(f"slow {SLOW_MILLISECONDS}")
            await asyncio.sleep(SLOW_SECONDS)
            await load.works()
            control.write_text("")
            verdict = await judge(result, node, brokers, load)
            result.figures["slowest_enqueue_seconds"] = round(verdict.slowest_enqueue_seconds, 2)
    return result


@contextlib.asynccontextmanager
async def faulty_node(result: Result) -> AsyncIterator[tuple[Path, Node | None, Path]]:
    """Yield a folder, a server whose fsync obeys a file, and that file; no server where there is no C compiler."""
    with folder_for_servers() as folder:
        control = folder / "control"
        compiler = shutil.which("cc")
        if compiler is None:
            result.skipped = "needs a C compiler called cc"
            yield folder, None, control
            return
        library = folder / "faultfs.so"
        command(compiler, "-shared", "-fPIC", "-O", "-o", library, SOURCE, "-ldl")
        control.write_text("")
        node = Node(folder, "single")
        try:
            await node.make()
            node.variables = {"LD_PRELOAD": str(library), "FAULT_CONTROL": str(control)}
            await node.start()
            yield folder, node, control
        finally:
            await node.close()


def session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))


def fill_up(file: Path) -> None:
    """Write until there is no room any more."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as ballast:
        while ballast.write(bytes(65536)):
            pass


async def comes_back(node: Node) -> str:
    """Wait until a server answers, and start it where it has given up; say so."""
    said = ""
    async with asyncio.timeout(PATIENCE):
        while True:
            await asyncio.sleep(0.2)
            if not node.is_running:
                await node.start()
                said = ", PostgreSQL had ended and was started again"
            with contextlib.suppress(psycopg.OperationalError):
                await node.query("SELECT 1")
                return said


def sqlstates(broker: Broker) -> Counter[str]:
    """Return what PostgreSQL has reported to a broker, by its log."""
    found: Counter[str] = Counter(re.findall(r"sqlstate=(\w+)", broker.log))
    return found
