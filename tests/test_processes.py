"""Brokers as real processes: how they start, how they stop, and what is left when they or PostgreSQL are killed.

The crash tests use embedded PostgreSQL servers with their durable settings, each in a data directory of its own; what
processes die of takes nothing from a system's memory.
Deadlines only catch a hang; what is asserted about time is said in the test.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest

from broker import processes
from broker.embedded import EmbeddedPostgres, conninfo_of_running
from broker.server import DRAIN_SECONDS
from broker.settings import Settings
from broker.sharing import Scoreboard
from broker.worker import SCOREBOARD, Job
from broker_process import DEADLINE, Process, Start, postgres_pids, shared_folder, until
from outside import eventually
from receiver import receiving, silent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")

STOP_SECONDS = 10.0
SWARM = Path(__file__).with_name("swarm.py")


@pytest.fixture
def data_dir(folder: Path) -> Path:
    return folder / "data"


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def answer(http: aiohttp.ClientSession, url: str, method: str, /, **params: Any) -> dict[str, Any]:
    """Call a method; return the whole answer, which must come with HTTP 200."""
    request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    async with http.post(f"{url}/rpc", json=request, timeout=aiohttp.ClientTimeout(total=DEADLINE)) as response:
        assert response.status == 200, await response.text()
        answered: dict[str, Any] = await response.json()
        return answered


async def call(http: aiohttp.ClientSession, url: str, method: str, /, **params: Any) -> Any:
    """Call a method; return its result."""
    answered = await answer(http, url, method, **params)
    assert "result" in answered, answered
    return answered["result"]


async def status_of(http: aiohttp.ClientSession, url: str) -> tuple[int, dict[str, Any]]:
    async with http.get(url) as response:
        return response.status, await response.json()


async def drain(http: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    """Take out all that lies in the default queue, also what is leased."""
    messages: list[dict[str, Any]] = []
    after = None
    while True:
        page = await call(http, url, "list_messages", queue="default", limit=1000, after=after)
        messages += page["messages"]
        if (after := page["next"]) is None:
            return messages


class Ledger:
    """What producers were told of each message that they sent, by its body."""

    def __init__(self) -> None:
        self.bodies = itertools.count()
        self.acknowledged: dict[int, str] = {}
        self.refused: set[int] = set()
        self.unknown: set[int] = set()
        self.slowest = 0.0

    async def produce(self, url: str, stop: asyncio.Event) -> None:
        """Send one message after the other over one connection; note every outcome."""
        async with aiohttp.ClientSession() as http:
            while not stop.is_set():
                body = next(self.bodies)
                began_at = time.monotonic()
                try:
                    answered = await answer(http, url, "enqueue", body=body)
                except aiohttp.ClientConnectorError:
                    self.refused.add(body)
                    return
                except aiohttp.ClientError:
                    self.unknown.add(body)
                    return
                finally:
                    self.slowest = max(self.slowest, time.monotonic() - began_at)
                if "result" in answered:
                    self.acknowledged[body] = answered["result"]["message_id"]
                    continue
                error = answered["error"]
                assert (error["code"], error["data"]["type"]) == (-32001, "unavailable"), error
                (self.refused if error["data"]["outcome"] == "none" else self.unknown).add(body)
                await asyncio.sleep(0.01)

    def check(self, stored: list[dict[str, Any]]) -> None:
        """Compare with what is stored: all that was acknowledged, once, and nothing that was refused."""
        found = {message["body"]: message["message_id"] for message in stored}
        assert len(found) == len(stored)
        lost = {body for body, message_id in self.acknowledged.items() if found.get(body) != message_id}
        assert not lost
        assert not self.refused & found.keys()
        assert found.keys() <= self.acknowledged.keys() | self.unknown


# ------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 3)])
async def test_a_broker_that_is_told_to_stop_under_load_drops_no_request(
    start: Start, data_dir: Path, http: aiohttp.ClientSession, number: int, processes: int
) -> None:
    broker = await (await start("--data-dir", str(data_dir), "--processes", str(processes))).ready()
    await call(http, broker.url, "create_queue", queue="empty")
    outcomes: Counter[str] = Counter()

    async def live(session: aiohttp.ClientSession) -> None:
        """Enqueue, dequeue, delete, for as long as it is answered 200."""
        receipt = None
        for method in itertools.cycle(["enqueue", "dequeue", "delete"]):
            params = {"enqueue": {"body": 1}, "dequeue": {}, "delete": {"receipt": receipt}}[method]
            if method == "delete" and receipt is None:
                continue
            request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
            try:
                async with session.post(f"{broker.url}/rpc", json=request) as response:
                    text = await response.read()
            except aiohttp.ClientConnectorError:
                outcomes["could not connect"] += 1
                return
            outcomes[str(response.status)] += 1
            if response.status == 503:
                assert response.headers["Retry-After"]
                assert json.loads(text)["error"]["data"]["outcome"] == "none"
                return
            result = json.loads(text)["result"]
            if method == "dequeue":
                receipt = result["messages"][0]["receipt"] if result["messages"] else None

    async with contextlib.AsyncExitStack() as stack:
        sessions = [await stack.enter_async_context(aiohttp.ClientSession()) for _ in range(30)]
        parked = [asyncio.create_task(call(http, broker.url, "dequeue", queue="empty", wait=60)) for _ in range(10)]
        living = [asyncio.create_task(live(session)) for session in sessions]
        await until(lambda: outcomes["200"] > 300)
        broker.signal_all(number)
        began_at = time.monotonic()
        assert await broker.ended(STOP_SECONDS + DEADLINE) == 0
        assert time.monotonic() - began_at < STOP_SECONDS
        await asyncio.wait_for(asyncio.gather(*living), DEADLINE)  # none of them saw its connection dropped
        assert await asyncio.wait_for(asyncio.gather(*parked), DEADLINE) == [{"messages": []}] * 10
    assert sum(outcomes.values()) - outcomes["200"] == 30
    assert postgres_pids(data_dir) == []
    assert "Traceback" not in broker.log
    assert "Exception" not in broker.log


@pytest.mark.parametrize("processes", ["1", "3"])
async def test_a_broker_that_is_being_stopped_says_so_and_answers_what_is_under_way(
    start: Start, database_url: str, http: aiohttp.ClientSession, processes: str
) -> None:
    """Those of its processes that are idle go on refusing until the last one is."""
    broker = await (await start(DATABASE_URL=database_url, BROKER_PROCESSES=processes)).ready()
    assert (await status_of(http, f"{broker.url}/readyz"))[0] == 200
    with psycopg.connect(database_url) as holder, psycopg.connect(database_url, autocommit=True) as watcher:
        holder.execute("LOCK TABLE broker.messages")
        under_way = asyncio.create_task(call(http, broker.url, "enqueue", body="under way"))
        waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%/* enqueue */%'"
        await until(lambda: watcher.execute(waits).fetchone() == (1,))
        broker.signal(signal.SIGTERM)
        await broker.says("stopping")
        await asyncio.sleep(0.5 if processes != "1" else 0)  # for those that are idle to see that they are
        for path in ("/readyz", "/healthz") * 3:
            status, body = await status_of(http, broker.url + path)
            assert (status, body["error"]["data"]["draining"]) == (503, True)
        assert (await status_of(http, f"{broker.url}/livez"))[0] == 200
        async with http.post(f"{broker.url}/rpc", json={"jsonrpc": "2.0", "id": 1, "method": "enqueue"}) as refused:
            assert refused.status == 503
            assert refused.headers["Retry-After"]
        with socket.create_connection(("127.0.0.1", int(broker.url.rsplit(":", 1)[1]))) as slow:
            # Who sends head and body apart must not be answered between: many take that for a broken connection.
            slow.sendall(b"POST /rpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
            slow.sendall(b"Content-Length: 2\r\n\r\n")
            assert (await status_of(http, f"{broker.url}/livez"))[0] == 200
            slow.setblocking(False)
            with pytest.raises(BlockingIOError):
                slow.recv(1)
            slow.sendall(b"{}")
            loop = asyncio.get_running_loop()
            assert (await asyncio.wait_for(loop.sock_recv(slow, 100), DEADLINE)).startswith(b"HTTP/1.1 503 ")
        assert not under_way.done()
        holder.commit()
    assert (await asyncio.wait_for(under_way, DEADLINE))["duplicate"] is False
    assert await broker.ended() == 0


async def test_a_broker_whose_database_hangs_stops_within_ten_seconds(
    start: Start, folder: Path, http: aiohttp.ClientSession
) -> None:
    postgres = EmbeddedPostgres(folder / "other")
    try:
        broker = await (await start("--database-url", await postgres.start())).ready()
        await call(http, broker.url, "enqueue", body=1)
        pause(folder / "other", signal.SIGSTOP)
        hanging = [asyncio.create_task(answer(http, broker.url, "enqueue", body=1)) for _ in range(3)]
        await until(lambda: all(task.get_coro().cr_await is not None for task in hanging))  # type: ignore[union-attr]
        await asyncio.sleep(0.1)  # so that they are under way; where they are not, the test is weaker, not wrong
        broker.signal(signal.SIGTERM)
        began_at = time.monotonic()
        assert await broker.ended() == 0
        assert time.monotonic() - began_at < STOP_SECONDS
        await asyncio.gather(*hanging, return_exceptions=True)
    finally:
        pause(folder / "other", signal.SIGCONT)
        await postgres.stop()


@pytest.mark.parametrize("processes", [1, 2])
async def test_a_broker_that_stops_gives_back_what_an_endpoint_does_not_answer(
    start: Start, http: aiohttp.ClientSession, database_url: str, processes: int
) -> None:
    flags = ("--database-url", database_url, "--webhook-allow", "127.0.0.0/8", "--processes", str(processes))
    broker = await (await start(*flags)).ready()
    await call(http, broker.url, "create_topic", topic="t")
    async with receiving(silent) as receiver:
        queue = (await call(http, broker.url, "subscribe", topic="t", name="a", url=receiver.url))["queue"]
        for number in range(10):
            await call(http, broker.url, "publish", topic="t", body=number)
        await receiver.received(2)
        broker.signal(signal.SIGTERM)
        assert await broker.ended(STOP_SECONDS) == 0
        pushed = len(receiver.requests)
    assert "Traceback" not in broker.log
    with psycopg.connect(database_url) as connection:
        left = connection.execute(
            "SELECT m.receive_count, m.visible_at <= now(), count(*)::int FROM broker.messages m"
            " JOIN broker.queues q ON q.id = m.queue_id WHERE q.name = %s GROUP BY 1, 2",
            (queue,),
        ).fetchall()
    assert left == [(0, True, 10)]
    assert pushed <= 2 * processes


@pytest.mark.parametrize("moment", ["while PostgreSQL starts", "while it waits for the database"])
async def test_a_broker_that_is_stopped_before_it_is_ready_leaves_nothing_behind(
    start: Start, folder: Path, data_dir: Path, moment: str
) -> None:
    if moment == "while PostgreSQL starts":
        broker = await start("--data-dir", str(data_dir))
        await until(lambda: (data_dir / "postgres.new").exists())
    else:
        broker = await start("--database-url", f"host={folder}")
        await broker.says("waiting for the database")
    broker.signal(signal.SIGTERM)
    assert await broker.ended(STOP_SECONDS) == 0
    assert postgres_pids(data_dir) == []
    assert "Traceback" not in broker.log


# -------------------------------------------------------------------------------------------------------------- crashes


async def test_a_broker_that_is_killed_under_load_loses_nothing_that_it_acknowledged(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    ledger = Ledger()
    for kill in range(3):
        broker = await (await start("--data-dir", str(data_dir))).ready()
        producing = [asyncio.create_task(ledger.produce(broker.url, asyncio.Event())) for _ in range(10)]
        wanted = len(ledger.acknowledged) + 200 + 50 * kill
        await until(lambda wanted=wanted: len(ledger.acknowledged) > wanted)  # type: ignore[misc]
        broker.signal(signal.SIGKILL)
        await broker.ended()
        await asyncio.gather(*producing)
    broker = await (await start("--data-dir", str(data_dir))).ready()
    ledger.check(await drain(http, broker.url))


@pytest.mark.parametrize("victims", ["the postmaster", "all processes"])
async def test_a_broker_outlives_its_postgresql(
    start: Start, data_dir: Path, http: aiohttp.ClientSession, victims: str
) -> None:
    broker = await (await start("--data-dir", str(data_dir), "--request-timeout", "3")).ready()
    ledger, stop = Ledger(), asyncio.Event()
    producing = [asyncio.create_task(ledger.produce(broker.url, stop)) for _ in range(10)]
    parked = asyncio.create_task(answer(http, broker.url, "dequeue", wait=0))
    for _ in range(2):
        acknowledged = len(ledger.acknowledged)
        await until(lambda acknowledged=acknowledged: len(ledger.acknowledged) > acknowledged + 100)  # type: ignore[misc]
        pids = postgres_pids(data_dir)
        for pid in pids[:1] if victims == "the postmaster" else [*pids[1:], pids[0]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        acknowledged = len(ledger.acknowledged)
        await until(lambda acknowledged=acknowledged: len(ledger.acknowledged) > acknowledged + 100)  # type: ignore[misc]
        assert not any(task.done() for task in producing)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*producing), DEADLINE)
    await parked
    assert ledger.slowest < 3 + 5
    assert (await status_of(http, f"{broker.url}/readyz"))[0] == 200
    ledger.check(await drain(http, broker.url))
    assert "is started again" in broker.log
    assert "Traceback" not in broker.log


def pause(data_dir: Path, number: int) -> None:
    for pid in postgres_pids(data_dir):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


async def test_the_outcome_of_a_call_whose_connection_breaks_is_unknown_and_of_a_reading_one_none(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    """Both wait for a lock when PostgreSQL is killed."""
    broker = await (await start("--data-dir", str(data_dir))).ready()
    conninfo = conninfo_of_running(data_dir)
    assert conninfo is not None
    waits = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE ANY (ARRAY[%s, %s])"
    connect = psycopg.connect
    with contextlib.closing(connect(conninfo)) as holder, contextlib.closing(connect(conninfo)) as watcher:
        watcher.autocommit = True
        holder.execute("LOCK TABLE broker.messages")
        writing = asyncio.create_task(answer(http, broker.url, "enqueue", body=1))
        reading = asyncio.create_task(answer(http, broker.url, "list_messages", queue="default"))
        patterns = ("%/* enqueue */%", "%page AS MATERIALIZED%")
        await until(lambda: watcher.execute(waits, patterns).fetchone() == (2,))
        for pid in reversed(postgres_pids(data_dir)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for task, outcome in ((writing, "unknown"), (reading, "none")):
            error = (await asyncio.wait_for(task, DEADLINE))["error"]
            assert (error["code"], error["data"]["outcome"]) == (-32001, outcome)


async def test_calls_to_a_database_that_hangs_are_answered_in_time_and_served_when_it_goes_on(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    """One call waits for a lock when PostgreSQL is stopped: it has certainly been sent. More come later."""
    broker = await (await start("--data-dir", str(data_dir), "--request-timeout", "1")).ready()
    await call(http, broker.url, "enqueue", body="before")
    (message,) = (await call(http, broker.url, "dequeue", visibility_timeout=600))["messages"]
    receipt = message["receipt"]
    calls: list[tuple[str, dict[str, Any], set[str]]] = [
        ("enqueue", {"body": 1}, {"none", "unknown"}),
        ("dequeue", {}, {"none", "unknown"}),
        ("dequeue", {"wait": 1}, {"none", "unknown"}),
        ("extend_visibility", {"receipt": receipt, "visibility_timeout": 600}, {"none", "unknown"}),
        ("get_queue", {"queue": "default"}, {"none"}),
        ("count_messages", {}, {"none"}),
        ("get_server", {}, {"none"}),
    ]
    conninfo = conninfo_of_running(data_dir)
    assert conninfo is not None
    # At first a statement waits for a tenth of a second only, and is sent again then.
    waits = """
        SELECT 1 FROM pg_stat_activity
        WHERE query LIKE '%/* enqueue */%' AND wait_event_type = 'Lock'
            AND clock_timestamp() - query_start > interval '0.2 seconds'
    """
    with (
        contextlib.closing(psycopg.connect(conninfo)) as holder,
        contextlib.closing(psycopg.connect(conninfo, autocommit=True)) as watcher,
    ):
        holder.execute("LOCK TABLE broker.messages")
        in_doubt = asyncio.create_task(answer(http, broker.url, "enqueue", body="in doubt"))
        await until(lambda: in_doubt.done() or watcher.execute(waits).fetchone())
        pause(data_dir, signal.SIGSTOP)
        try:
            error = (await asyncio.wait_for(in_doubt, DEADLINE))["error"]
            assert (error["code"], error["data"]["outcome"]) == (-32001, "unknown")
            for _ in range(3):  # more than there are connections
                began_at = time.monotonic()
                answers = await asyncio.gather(
                    *(answer(http, broker.url, method, **params) for method, params, _ in calls)
                )
                assert time.monotonic() - began_at < 1 + 10 * 0.5
                for (method, _, outcomes), answered in zip(calls, answers, strict=True):
                    assert answered["error"]["code"] == -32001, method
                    assert answered["error"]["data"]["outcome"] in outcomes, method
            assert (await status_of(http, f"{broker.url}/readyz"))[0] == 503
            assert (await status_of(http, f"{broker.url}/livez"))[0] == 200
        finally:
            pause(data_dir, signal.SIGCONT)

    async with asyncio.timeout(DEADLINE):
        while "error" in await answer(http, broker.url, "enqueue", body="after"):
            pass
    parked = asyncio.create_task(call(http, broker.url, "dequeue", queue="default", max_messages=1000, wait=30))
    assert (await asyncio.wait_for(parked, DEADLINE))["messages"]
    assert await call(http, broker.url, "delete", receipt=receipt) == {"deleted": True}
    assert (await status_of(http, f"{broker.url}/readyz"))[0] == 200


async def test_clients_that_hang_up_on_a_database_that_hangs_do_not_use_up_its_connections(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    """It goes on again only for new connections: those on which somebody waited stay silent for ever."""
    flags = ("--request-timeout", "2", "--database-connections", "2")
    broker = await (await start("--data-dir", str(data_dir), *flags)).ready()
    await call(http, broker.url, "enqueue", body=1)
    pause(data_dir, signal.SIGSTOP)
    hung = postgres_pids(data_dir)
    for _ in range(4):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await answer(http, broker.url, "enqueue", body=2)
    postmaster = hung[0]
    titles = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in hung}
    for pid in hung:
        if pid == postmaster or "[local]" not in titles[pid]:
            os.kill(pid, signal.SIGCONT)
    async with asyncio.timeout(DEADLINE):
        while "error" in await answer(http, broker.url, "enqueue", body=3):
            pass
    assert any("[local]" in title for title in titles.values())
    pause(data_dir, signal.SIGCONT)


# ------------------------------------------------------------------------------------------------------------- starting


async def test_ten_brokers_that_start_at_once_on_an_empty_database_all_become_ready(
    start: Start, empty_database_url: str, http: aiohttp.ClientSession
) -> None:
    brokers = [await start("--database-url", empty_database_url) for _ in range(10)]
    await asyncio.gather(*(broker.ready() for broker in brokers))
    sent = await call(http, brokers[0].url, "enqueue", body=1)
    for broker in brokers:
        assert (await status_of(http, f"{broker.url}/readyz"))[0] == 200
    (message,) = (await call(http, brokers[9].url, "dequeue"))["messages"]
    assert message["message_id"] == sent["message_id"]
    for broker in brokers:
        broker.signal(signal.SIGTERM)
    assert [await broker.ended() for broker in brokers] == [0] * 10


async def test_an_embedded_database_keeps_its_messages_over_restarts(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    ids = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        broker = await (await start(BROKER_DATA_DIR=str(data_dir))).ready()
        ids.append((await call(http, broker.url, "enqueue", body=number))["message_id"])
        broker.signal(number)
        await broker.ended()
    broker = await (await start(BROKER_DATA_DIR=str(data_dir))).ready()
    assert [message["message_id"] for message in await drain(http, broker.url)] == ids


async def refusal(broker: Process) -> str:
    """Wait until a broker that cannot start has ended with exit code 1; return the one line in which it says why."""
    assert await broker.ended() == 1
    assert "Traceback" not in broker.log
    lines = [line for line in broker.log.splitlines() if line.startswith("wonderq: ")]
    assert len(lines) == 1, broker.log
    assert broker.log.endswith(lines[0] + "\n")
    return lines[0]


async def test_a_broker_waits_for_a_database_that_is_away_when_it_starts(start: Start, folder: Path) -> None:
    postgres = EmbeddedPostgres(folder / "late")
    conninfo = await postgres.start()
    await postgres.stop()
    broker = await start("--database-url", conninfo)
    await broker.says("waiting for the database")
    try:
        await postgres.start()
        await broker.ready()
    finally:
        await broker.kill()
        await postgres.stop()


async def test_a_broker_gives_a_database_that_stays_away_up_in_one_line(start: Start, folder: Path) -> None:
    line = await refusal(await start("--database-url", f"host={folder}", "--startup-timeout", "0.5"))
    assert "The database cannot be used" in line
    assert "--database-url" in line


async def test_a_database_that_refuses_is_not_tried_again(start: Start, folder: Path) -> None:
    rules = folder / "hba.conf"
    rules.write_text("local wonderq wonderq trust\nlocal wonderq guarded scram-sha-256\nlocal missing wonderq trust\n")
    rules.chmod(0o644)
    postgres = EmbeddedPostgres(folder / "strict", settings={"hba_file": str(rules)})
    conninfo = await postgres.start()
    try:
        with psycopg.connect(conninfo) as connection:
            connection.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'")
        for url, words in (
            (conninfo.replace("@/wonderq?", "@/missing?"), 'database "missing" does not exist'),
            (conninfo.replace("//wonderq@", "//guarded:wrong@"), "password authentication failed"),
            (conninfo.replace("//wonderq@", "//guarded@"), "no password supplied"),
            (conninfo.replace("//wonderq@", "//nobody@"), "no pg_hba.conf entry"),
        ):
            broker = await start("--database-url", url)
            line = await refusal(broker)
            assert words in line
            assert "--database-url" in line
            assert "waiting for the database" not in broker.log
    finally:
        await postgres.stop()


@pytest.mark.parametrize("processes", ["1", "2"])
async def test_a_database_that_would_lose_messages_is_refused_once_until_that_is_allowed(
    start: Start, test_server: str, database_url: str, processes: str
) -> None:
    if "TEST_DATABASE_URL" in os.environ:
        pytest.skip("whether another server would lose messages is not known")
    broker = await start(DATABASE_URL=database_url, BROKER_PROCESSES=processes, BROKER_ALLOW_DATA_LOSS="no")
    line = await refusal(broker)
    assert "fsync is off; full_page_writes is off" in line
    assert "--allow-data-loss" in line
    broker = await start(
        "--allow-data-loss", DATABASE_URL=database_url, BROKER_PROCESSES=processes, BROKER_ALLOW_DATA_LOSS=""
    )
    await broker.ready()
    assert broker.log.count("DATA LOSS IS ALLOWED") == 1


async def test_what_the_broker_s_own_role_has_set_counts(start: Start, folder: Path) -> None:
    postgres = EmbeddedPostgres(folder / "durable")
    conninfo = await postgres.start()

    async def refused(*statements: str) -> str:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())
        return await refusal(await start("--database-url", conninfo, BROKER_ALLOW_DATA_LOSS="no"))

    try:
        assert "synchronous_commit is off" in await refused("ALTER ROLE wonderq SET synchronous_commit = off")
        line = await refused(
            "ALTER ROLE wonderq SET synchronous_commit = local",
            "ALTER SYSTEM SET synchronous_standby_names = 'nobody'",
            "SELECT pg_reload_conf()",
        )
        assert "synchronous_commit is local" in line
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM RESET synchronous_standby_names")
            connection.execute("SELECT pg_reload_conf()")
        broker = await start("--database-url", conninfo, BROKER_ALLOW_DATA_LOSS="no")
        await broker.ready()
        assert '"durability": "durable"' in broker.log
    finally:
        await postgres.stop()


async def test_a_port_that_is_in_use_is_said_in_one_line(start: Start, database_url: str, data_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}" in await refusal(await start(DATABASE_URL=database_url, port=port))
        assert "--port" in await refusal(await start("--data-dir", str(data_dir), port=port))
    assert postgres_pids(data_dir) == []


async def test_a_broker_is_open_to_the_network_only_where_that_was_said(
    start: Start, database_url: str, http: aiohttp.ClientSession
) -> None:
    line = await refusal(await start("--host", "0.0.0.0", DATABASE_URL=database_url))
    assert "0.0.0.0" in line
    assert "--auth off" in line
    broker = await (await start("--host", "0.0.0.0", "--auth", "off", DATABASE_URL=database_url)).ready()
    assert "NO AUTHENTICATION" in broker.log
    assert await call(http, broker.url.replace("0.0.0.0", "127.0.0.1"), "count_messages")


async def test_a_second_broker_on_a_data_directory_names_the_first(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    broker = await (await start("--data-dir", str(data_dir))).ready()
    line = await refusal(await start("--data-dir", str(data_dir)))
    assert f"in use by process {broker.pid}" in line
    assert await call(http, broker.url, "enqueue", body=1)


# ---------------------------------------------------------------------------------------------------- several processes


class Line:
    """A connection to a broker, kept alive, and which of its workers has it."""

    def __init__(self, broker: Process, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._broker = broker
        self._reader = reader
        self._writer = writer

    def close(self) -> None:
        self._writer.close()

    @property
    def worker(self) -> int:
        """The number of the worker that has it."""
        ends = [f"0100007F:{port:04X}" for port in (self._broker.port, self._writer.get_extra_info("sockname")[1])]
        rows = [row.split() for row in Path("/proc/net/tcp").read_text().splitlines()]
        # A line comes twice where others come and go while the system writes it.
        (inode,) = {row[9] for row in rows if row[1:3] == ends} - {"0"}
        for number, pid in self._broker.workers.items():
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if os.readlink(entry) == f"socket:[{inode}]":
                        return number
        raise AssertionError("nobody has it")

    async def get(self, path: str) -> bytes:
        """Return the body of the answer, which must be a 200."""
        return await self._exchange(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n", b"")

    async def call(self, method: str, **params: Any) -> Any:
        """Call a method; return its result."""
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        head = "POST /rpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return json.loads(await self._exchange(f"{head}Content-Length: {len(body)}\r\n\r\n", body))["result"]

    async def metrics(self) -> dict[str, float]:
        """Return what /metrics shows, by name and labels."""
        lines = (await self.get("/metrics")).decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    async def _exchange(self, head: str, body: bytes) -> bytes:
        self._writer.write(head.encode() + body)
        async with asyncio.timeout(DEADLINE):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"Content-Length: (\d+)", head)
            assert length, head
            answered = await self._reader.readexactly(int(length[1]))
        assert head.startswith("HTTP/1.1 200 "), head
        return answered


Connect = Callable[[Process], Awaitable[Line]]


@pytest.fixture
def connect_line() -> Iterator[Connect]:
    """Open connections, each of which has been answered on: `await connect_line(broker)`."""
    with contextlib.ExitStack() as stack:

        async def one_more(broker: Process) -> Line:
            line = Line(broker, *await asyncio.open_connection("127.0.0.1", broker.port))
            stack.callback(line.close)
            await line.get("/livez")
            return line

        yield one_more


async def one_to_each(broker: Process, connect_line: Connect) -> list[Line]:
    """Return a connection to each worker, by its number."""
    lines: dict[int, Line] = {}
    others = []  # Open until the end: whoever has the fewest gets the next.
    async with asyncio.timeout(DEADLINE):
        while lines.keys() != broker.workers.keys():
            line = await connect_line(broker)
            if lines.setdefault(line.worker, line) is not line:
                others.append(line)
    for line in others:
        line.close()
    return [lines[number] for number in sorted(lines)]


async def test_workers_share_connections_evenly_and_nobody_waits_for_one_that_hangs(
    start: Start, database_url: str, connect_line: Connect
) -> None:
    broker = await (await start("--processes", "2", DATABASE_URL=database_url)).ready()
    lines = await asyncio.gather(*(connect_line(broker) for _ in range(64)))
    spread = Counter(line.worker for line in lines)
    assert min(spread[0], spread[1]) >= 16, spread  # about 32 where nothing else runs
    assert (await lines[0].call("get_server"))["processes"] == 2

    os.kill(broker.workers[0], signal.SIGSTOP)
    assert [(await connect_line(broker)).worker for _ in range(20)] == [1] * 20


async def test_a_worker_that_hangs_is_killed_when_the_time_to_stop_is_over(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert DRAIN_SECONDS + processes.END_SECONDS < STOP_SECONDS - 1
    monkeypatch.setattr(processes, "DRAIN_SECONDS", 0.1)
    monkeypatch.setattr(processes, "END_SECONDS", 0.1)
    caplog.set_level("INFO")
    settings = Settings(port=0)
    async with processes.listening(settings) as listeners:
        with processes.shared_folder() as folder:
            job = Job(settings, database_url, 0, [each.fileno() for each in listeners], folder)
            worker = processes.Worker(job, Scoreboard(folder / SCOREBOARD, 1))
            await worker.start()
            pid = int(caplog.text.rpartition("pid=")[2])
            os.kill(pid, signal.SIGSTOP)
            await asyncio.wait_for(processes.end([worker]), DEADLINE)
    assert not Path(f"/proc/{pid}").exists()


async def test_a_message_through_one_worker_wakes_who_waits_at_another(
    start: Start, database_url: str, connect_line: Connect
) -> None:
    broker = await (await start("--processes", "2", DATABASE_URL=database_url)).ready()
    lines = await one_to_each(broker, connect_line)
    for here, there in ((0, 1), (1, 0)) * 4:
        parked = asyncio.create_task(lines[there].call("dequeue", wait=30))
        await asyncio.sleep(0.1)  # for it to be waiting; where it is not yet, the test is weaker, not wrong
        began_at = time.monotonic()
        await lines[here].call("enqueue", body=1)
        assert (await parked)["messages"]
        # It takes some 5 ms. Who hears nothing looks once a second, and so is in time only half as often as not.
        assert time.monotonic() - began_at < 0.5


async def test_metrics_are_summed_over_the_workers_whoever_shows_them_and_never_fall(
    start: Start, database_url: str, connect_line: Connect
) -> None:
    calls = 'wonderq_calls_total{method="get_queue",outcome="ok"}'
    ready = 'wonderq_queue_messages{queue="default",status="ready"}'
    broker = await (await start("--processes", "2", DATABASE_URL=database_url)).ready()
    alone = await (await start(DATABASE_URL=database_url)).ready()
    one, other = lines = await one_to_each(broker, connect_line)
    single = await connect_line(alone)
    for line in (single, one, one, one, other, other):
        await line.call("get_queue", queue="default")
    for line in (single, other):
        await line.call("enqueue", body=1)
        await line.call("create_queue", queue="empty")
    for line in lines:
        sums = await line.metrics()
        assert sums[calls] == sums['wonderq_call_seconds_count{method="get_queue"}'] == 5
        assert sums["wonderq_messages_enqueued_total"] == 1
        assert sums[ready] == 2
    # Both have swept at some time.
    await eventually(lambda: have_the_same_names(single, other))

    further = [await connect_line(broker) for _ in range(6)]
    parked = [asyncio.create_task(line.call("dequeue", queue="empty", wait=60)) for line in further]
    held_by = Counter(line.worker for line in further)
    assert held_by.keys() == {0, 1}
    for line in lines:
        await until_shown(line, "wonderq_waiting_consumers", 6)
        await until_shown(line, "wonderq_client_connections", 8)

    shown = [await one.metrics()]
    os.kill(broker.workers[1], signal.SIGKILL)
    killed = broker.workers[1]
    async with asyncio.timeout(DEADLINE):
        while broker.workers[1] == killed:
            shown.append(await one.metrics())
    ended = [line["worker"] for line in broker.lines if line["event"] == "worker has ended and is started again"]
    assert ended == [1]
    await until_shown(one, "wonderq_client_connections", 8 - 1 - held_by[1])
    other.close()
    lines = [one, *(line for line in await one_to_each(broker, connect_line) if line.worker == 1)]
    await lines[1].call("get_queue", queue="default")
    for line in lines:
        await until_shown(line, "wonderq_waiting_consumers", held_by[0])
        shown.append(await line.metrics())
        assert shown[-1][calls] == 6
        assert shown[-1][ready] == 2
    counters = [name for name in shown[0] if re.search(r"_(total|count|sum|bucket)\b", name)]
    assert len(counters) > 20
    for earlier, later in itertools.pairwise(shown):
        assert all(earlier[name] <= later[name] for name in counters)
    for task in parked:
        task.cancel()
    await asyncio.gather(*parked, return_exceptions=True)


async def until_shown(line: Line, name: str, value: float) -> None:
    async def is_shown() -> bool:
        return (await line.metrics())[name] == value

    await eventually(is_shown)


async def have_the_same_names(line: Line, other: Line) -> bool:
    return (await line.metrics()).keys() == (await other.metrics()).keys()


async def test_a_worker_that_is_killed_under_load_takes_nothing_with_it_but_its_connections(
    start: Start, database_url: str, http: aiohttp.ClientSession
) -> None:
    broker = await (await start("--processes", "2", DATABASE_URL=database_url)).ready()
    ledger, stop = Ledger(), asyncio.Event()

    async def produce() -> None:
        while not stop.is_set():
            await ledger.produce(broker.url, stop)

    producing = [asyncio.create_task(produce()) for _ in range(10)]

    async def kill(number: int) -> None:
        acknowledged, pid = len(ledger.acknowledged), broker.workers[number]
        await until(lambda: len(ledger.acknowledged) > acknowledged + 100)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: broker.workers[number] != pid)

    for number in (0, 1, 0):
        await kill(number)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*producing), DEADLINE)
    assert ledger.unknown
    assert not ledger.refused  # the port was open all the time
    ledger.check(await drain(http, broker.url))


async def test_workers_end_with_a_supervisor_that_is_killed_and_the_next_one_can_have_its_port(
    start: Start, data_dir: Path, http: aiohttp.ClientSession
) -> None:
    flags = ("--processes", "2", "--data-dir", str(data_dir))
    broker = await (await start(*flags)).ready()
    pids = list(broker.workers.values())
    folder = shared_folder(pids[0])
    parked = [asyncio.create_task(answer(http, broker.url, "dequeue", wait=60)) for _ in range(10)]
    await call(http, broker.url, "create_queue", queue="kept")
    broker.signal(signal.SIGKILL)
    await broker.ended()
    second = await (await start(*flags, port=broker.port)).ready()
    assert second.url == broker.url
    async with aiohttp.ClientSession() as fresh:  # with no connection to those that are ending
        assert await call(fresh, second.url, "get_queue", queue="kept")
    await until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert not folder.exists()
    await asyncio.wait_for(asyncio.gather(*parked, return_exceptions=True), DEADLINE)
    assert "Traceback" not in broker.log
    folder = shared_folder(second.workers[0])
    assert folder.exists()
    second.signal(signal.SIGTERM)
    assert await second.ended() == 0
    assert not folder.exists()


async def test_a_worker_that_dies_again_and_again_ends_the_broker_in_one_line(start: Start, data_dir: Path) -> None:
    broker = await (await start("--processes", "2", "--data-dir", str(data_dir))).ready()
    killing = asyncio.create_task(kill_again_and_again(broker))
    assert "A worker ends again and again" in await refusal(broker)
    killing.cancel()
    assert postgres_pids(data_dir) == []
    assert not any(Path(f"/proc/{pid}").exists() for pid in broker.workers.values())


async def kill_again_and_again(broker: Process) -> None:
    while True:
        with contextlib.suppress(ProcessLookupError):
            os.kill(broker.workers[1], signal.SIGKILL)
        await asyncio.sleep(0.01)


async def test_workers_that_cannot_start_are_said_in_one_line(start: Start, folder: Path) -> None:
    postgres = EmbeddedPostgres(folder / "narrow")
    conninfo = await postgres.start()
    try:
        with psycopg.connect(conninfo, autocommit=True) as connection:
            connection.execute("CREATE ROLE narrow LOGIN CONNECTION LIMIT 1")
            connection.execute("GRANT CREATE ON DATABASE wonderq TO narrow")
        # The supervisor has the one connection, and then one of the workers.
        url = conninfo.replace("//wonderq@", "//narrow@")
        line = await refusal(await start("--processes", "3", "--startup-timeout", "0.3", DATABASE_URL=url))
        assert "The database cannot be reached" in line
    finally:
        await postgres.stop()


async def test_a_port_is_not_shared_with_another_broker_nor_with_anybody_who_would(
    start: Start, database_url: str
) -> None:
    broker = await (await start("--processes", "2", DATABASE_URL=database_url)).ready()
    for number in ("1", "2"):
        other = await start("--processes", number, DATABASE_URL=database_url, port=broker.port)
        line = await refusal(other)
        assert f"Cannot listen on 127.0.0.1:{broker.port}" in line
        assert "--port" in line
    with socket.socket() as sharing:
        sharing.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with pytest.raises(OSError, match="in use"):
            sharing.bind(("127.0.0.1", broker.port))


# ------------------------------------------------------------------------------------------------------------- together

MESSAGES = 50_000
PRODUCERS = 8
CONSUMERS = 16


async def test_sixteen_consumers_share_the_messages_of_eight_producers(
    start: Start, folder: Path, database_url: str, http: aiohttp.ClientSession
) -> None:
    """Producers and consumers are processes, half of them at each of two brokers.

    No lease can end while they run. So the stretches for which a message was held would overlap, or its
    receive_count be above one, if it had ever been handed out twice; and it would be missing in the logs of the
    consumers if it never was.
    """
    brokers = [await (await start("--database-url", database_url)).ready() for _ in range(2)]
    await call(http, brokers[0].url, "create_queue", queue="shared")
    stop_file = folder / "stop"
    each = MESSAGES // PRODUCERS

    async def swarm(n: int, *words: object) -> tuple[int, str]:
        command = [sys.executable, "-I", "-S", str(SWARM), brokers[n % 2].url, "shared", *map(str, words)]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            out, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            await process.wait()
            raise
        return process.returncode or 0, out.decode()

    async with asyncio.timeout(2 * DEADLINE), asyncio.TaskGroup() as tasks:
        consuming = [tasks.create_task(swarm(n, "consume", stop_file)) for n in range(CONSUMERS)]
        producing = [tasks.create_task(swarm(n, "produce", n * each, each)) for n in range(PRODUCERS)]
        assert [await task for task in producing] == [(0, "")] * PRODUCERS
        stop_file.touch()

    assert [task.result()[0] for task in consuming] == [0] * CONSUMERS
    logs = [line.split() for task in consuming for line in task.result()[1].splitlines()]
    held: dict[str, list[tuple[float, float]]] = {}
    for _, message_id, _, _, held_from, held_until in logs:
        held.setdefault(message_id, []).append((float(held_from), float(held_until)))
    for stretches in held.values():
        stretches.sort()
        assert all(until <= begin for (_, until), (begin, _) in itertools.pairwise(stretches))
    assert {int(body) for body, *_ in logs} == set(range(MESSAGES))
    assert len(logs) == len(held) == MESSAGES
    assert {receive_count for _, _, receive_count, *_ in logs} == {"1"}
    assert sum(task.result()[1] != "" for task in consuming) == CONSUMERS  # none was left without
    assert (await call(http, brokers[1].url, "count_messages", queue="shared"))["total"] == 0
    for broker in brokers:
        broker.signal(signal.SIGTERM)
        assert await broker.ended() == 0
        assert '"error"' not in broker.log
        assert "Traceback" not in broker.log
    with psycopg.connect(database_url) as connection:
        deadlocks = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        assert connection.execute(deadlocks).fetchone() == (0,)
