"""A real PostgreSQL for every test that touches storage.

One server a session, in a directory that goes away with it, with fsync off (tests about crashes start their
own); one database a test, cloned from a migrated template. TEST_DATABASE_URL names another server instead: its
role must be allowed to create databases.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import psycopg
import pytest
import uvloop
from psycopg import sql
from psycopg.conninfo import make_conninfo

import secrecy
from broker import draining
from broker.embedded import EmbeddedPostgres
from broker.errors import QueueNotFound
from broker.model import NewMessage
from broker.server import Server
from broker.settings import Settings
from broker.storage import handing_out
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.handing_out import Delivery, Wanted
from broker.storage.low_water import LowWater
from broker.storage.migrate import migrate
from broker.storage.sessions import configure
from broker_process import Start, starting, without_its_postgresql
from gate import MAKE_GATE, Gate

# Of each of the processes that share the tests: they may share a server too.
TEMPLATE = "_".join(["wonderq_test_template", *filter(None, [os.environ.get("PYTEST_XDIST_WORKER")])])
# Only catches a hang.
PATIENCE = 30.0
FAST = {"fsync": "off", "full_page_writes": "off", "max_connections": "300", "max_wal_size": "256MB"}
# A file system in memory, and many times what tests leave there.
MEMORY = "/dev/shm"
MEMORY_BYTES = 4 * 2**30
DATA = "wonderq-data-"
# What each process has found that should have been in no log.
SEARCHES: list[dict[str, Any]] = []

_names = (f"wonderq_test_{os.getpid()}_{n}" for n in itertools.count())


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run asynchronous tests on the event loop that a server runs on."""
    return {"uvloop": uvloop.new_event_loop}


def pytest_configure(config: pytest.Config) -> None:
    """Begin to keep every log of this process, and let the programs that tests start hear of Ctrl-C.

    A shell that runs something in the background lets it ignore that, and so everything which that starts.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    secrecy.watching = secrecy.Watch(Path(tempfile.mkdtemp(prefix="wonderq-logs-")))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Search the logs for every secret used; a run that let one out fails."""
    assert secrecy.watching is not None
    found = secrecy.watching.end()
    shutil.rmtree(secrecy.watching.folder, ignore_errors=True)
    about = {"found": found, "secrets": len(secrecy.KNOWN.alike) + len(secrecy.KNOWN.others)}
    about |= {"bytes": secrecy.KNOWN.searched_bytes, "tables": secrecy.KNOWN.searched_tables}
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["secrecy"] = about
        return
    SEARCHES.append(about)
    if any(each["found"] for each in SEARCHES) and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take in what one of the processes that share the tests has found."""
    if "secrecy" in getattr(node, "workeroutput", {}):
        SEARCHES.append(node.workeroutput["secrecy"])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that tests have recorded by `record_property`, whichever process they ran in."""
    searched = {name: sum(each[name] for each in SEARCHES) for name in ("secrets", "bytes", "tables")}
    terminalreporter.write_line(
        "searched for {secrets:,} secrets: {bytes:,} bytes of logs and rows, {tables:,} tables".format(**searched)
    )
    for place in (place for each in SEARCHES for place in each["found"]):
        terminalreporter.write_line(f"a secret can be read: {place}", red=True)
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, figures in report.user_properties:
                terminalreporter.write_line(f"{name}: {figures}")


@contextmanager
def data_folder(otherwise: str | None = None) -> Iterator[Path]:
    """Yield a new folder for data that need not outlast the system: in memory, where there is room for it.

    To make a database is to make some three hundred files, and most tests have one made: on a disk that takes longer
    than many a test.
    """
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES
    if has_room:
        remove_what_the_killed_left()
    where = MEMORY if has_room else otherwise
    with tempfile.TemporaryDirectory(prefix=DATA, dir=where, ignore_cleanup_errors=True) as name:
        os.chmod(name, 0o755)  # as root, PostgreSQL runs as another account
        held = os.open(name, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
        try:
            yield Path(name)
        finally:
            os.close(held)


def remove_what_the_killed_left() -> None:
    """Give memory back that runs held which were killed: the lock of a folder ends with the process that made it."""
    for folder in Path(MEMORY).glob(f"{DATA}*"):
        with suppress(OSError):
            held = os.open(folder, os.O_RDONLY)
            try:
                if time.time() - folder.stat().st_mtime > PATIENCE:  # or it may have been made just now
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(held)


@contextmanager
def private_server(make: Callable[..., EmbeddedPostgres] = EmbeddedPostgres) -> Iterator[str]:
    """Yield how to connect to a PostgreSQL whose directory goes away with it; `make` builds it."""
    with data_folder() as folder:
        postgres = make(folder, settings=FAST)
        conninfo = asyncio.run(postgres.start())
        try:
            yield conninfo
        finally:
            asyncio.run(postgres.stop())


@contextmanager
def with_template(conninfo: str) -> Iterator[str]:
    """Yield how to connect to a server while it has the migrated template."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")
        connection.execute(f"CREATE DATABASE {TEMPLATE} TEMPLATE template0 ENCODING 'UTF8'")
    asyncio.run(migrate(make_conninfo(conninfo, dbname=TEMPLATE)))
    yield conninfo
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")


@pytest.fixture(scope="session")
def test_server() -> Iterator[str]:
    """A PostgreSQL with a migrated template database."""
    named = os.environ.get("TEST_DATABASE_URL")
    with nullcontext(named) if named else private_server() as server, with_template(server) as conninfo:
        yield conninfo


@contextmanager
def new_database(server: str, template: str) -> Iterator[str]:
    """Yield how to connect to a database of its own."""
    name = next(_names)
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(
            sql.SQL("CREATE DATABASE {} TEMPLATE {} ENCODING 'UTF8'").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        try:
            secrets_before = secrecy.KNOWN.lasting
            yield make_conninfo(server, dbname=name)
            if secrecy.KNOWN.lasting > secrets_before:
                found = secrecy.KNOWN.found_in_database(make_conninfo(server, dbname=name))
                assert not found, f"a secret can be read in a table: {found}"
        finally:
            connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(test_server: str) -> Iterator[str]:
    """A migrated database."""
    with new_database(test_server, TEMPLATE) as conninfo:
        yield conninfo


@pytest.fixture
def empty_database_url(test_server: str) -> Iterator[str]:
    """A database without anything in it."""
    with new_database(test_server, "template0") as conninfo:
        yield conninfo


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the account of an embedded PostgreSQL can enter."""
    with data_folder() as made, without_its_postgresql(made):
        yield made


@pytest.fixture
async def start(folder: Path) -> AsyncIterator[Start]:
    """Start a broker as a process with these flags: `await start("--data-dir", …, BROKER_PORT="0")`."""
    async with starting(folder) as start_one:
        yield start_one


Connect = Callable[[], Any]


@pytest.fixture
async def connect(database_url: str) -> AsyncIterator[Connect]:
    """Make connections as the broker makes them: `await connect()`."""
    async with AsyncExitStack() as stack:

        async def one_more() -> Connection:
            connection: Connection = await psycopg.AsyncConnection.connect(database_url, autocommit=True)
            await configure(connection)
            await stack.enter_async_context(connection)
            return connection

        yield one_more


@pytest.fixture
async def gate(connect: Connect) -> Gate:
    """What holds a statement back."""
    keeper = await connect()
    await keeper.execute(MAKE_GATE)
    return Gate(keeper)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The connections of a broker."""
    opened = Database(database_url, request_timeout=PATIENCE)
    await opened.open(PATIENCE)
    yield opened
    await opened.close()


@pytest.fixture
def calls(database: Database) -> Calls:
    """The calls of a broker that nobody watches."""
    return Calls(database)


@pytest.fixture
def no_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers believe their low-water hints also where a queue seems empty."""
    monkeypatch.setattr(LowWater, "may_be_doubted", lambda self, queue: False)


@pytest.fixture
async def connection(connect: Connect) -> Connection:
    """One connection as the broker makes them."""
    made: Connection = await connect()
    return made


@dataclass
class Broker:
    """A running broker, and a session to talk to it."""

    url: str
    server: Server
    http: aiohttp.ClientSession

    async def post(self, data: bytes, **headers: str) -> tuple[int, bytes]:
        """POST these bytes to /rpc; return status and body."""
        async with self.http.post(
            f"{self.url}/rpc", data=data, headers={"Content-Type": "application/json", **headers}
        ) as response:
            return response.status, await response.read()

    async def answer(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Call a method; return the whole answer."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        async with self.http.post(f"{self.url}/rpc", json=request) as response:
            assert response.status == 200, await response.text()
            answer: dict[str, Any] = await response.json()
            return answer

    async def call(self, method: str, /, **params: Any) -> Any:
        """Call a method; return its result, or fail with its error."""
        answer = await self.answer(method, **params)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    async def error(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Call a method; return its error, or fail where it had none."""
        answer = await self.answer(method, **params)
        assert "error" in answer, answer
        error: dict[str, Any] = answer["error"]
        return error


StartBroker = Callable[..., Any]


@pytest.fixture
async def start_broker(database_url: str) -> AsyncIterator[StartBroker]:
    """Start brokers in this process, all on one database: `await start_broker(sweep_interval=60)`."""
    with pytest.MonkeyPatch.context() as patch:
        async with AsyncExitStack() as stack:
            http = await stack.enter_async_context(aiohttp.ClientSession())

            async def start(**settings: Any) -> Broker:
                chosen = replace(Settings(host="127.0.0.1", port=0), **settings)
                server = await stack.enter_async_context(Server(database_url, chosen))
                return Broker(server.url, server, http)

            yield start
            # The test is over: there is nobody whose request could still be on its way.
            patch.setattr(draining, "QUIET_TIME", 0.0)


@pytest.fixture
async def broker(start_broker: StartBroker) -> Broker:
    """A broker on an empty database."""
    started: Broker = await start_broker()
    return started


@pytest.fixture
def broker_url(broker: Broker) -> str:
    """The URL of a broker on an empty database."""
    return broker.url


async def _serve_until(stop: asyncio.Event, conninfo: str, started: Callable[[Server], None]) -> None:
    async with Server(conninfo, Settings(host="127.0.0.1", port=0)) as server:
        started(server)
        await stop.wait()


@contextmanager
def server_in_a_thread(test_server: str) -> Iterator[Server]:
    """Yield a broker that runs in a thread of its own, on a database of its own."""
    with new_database(test_server, TEMPLATE) as conninfo:
        loop = uvloop.new_event_loop()
        stop = asyncio.Event()
        started: Future[Server] = Future()
        serving = _serve_until(stop, conninfo, started.set_result)
        thread = Thread(target=loop.run_until_complete, args=(serving,), daemon=True)
        thread.start()
        yield started.result(timeout=60)
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=60)
        loop.close()


def new(*bodies: object) -> list[NewMessage]:
    """Return messages that have these bodies, which are JSON already, and nothing else."""
    return [NewMessage(str(body), None, None, None, None) for body in bodies]


async def dequeue(
    connection: Connection,
    queue: str,
    max_messages: int,
    visibility_timeout: float | None,
    *,
    at_most_once: bool = False,
    fresh_first: bool = False,
) -> Delivery:
    """Take messages on a connection, as a broker does that knows nothing of the queue. Raises QueueNotFound."""
    wanted = Wanted(queue, max_messages, visibility_timeout, fresh_first)
    handed_out = await handing_out.hand_out(connection, [wanted], at_most_once=at_most_once)
    if queue not in handed_out.deliveries:
        raise QueueNotFound(queue=queue)
    return handed_out.deliveries[queue]


@pytest.fixture(scope="session")
def standing_server(test_server: str) -> Iterator[Server]:
    """A broker for the whole session.

    For tests by the hundred that send what is refused: to start and drain a broker takes half a second.
    """
    with server_in_a_thread(test_server) as server:
        yield server


@pytest.fixture
async def standing_broker(standing_server: Server) -> AsyncIterator[Broker]:
    """The broker that all tests of the session share: whoever uses it leaves it as it was."""
    async with aiohttp.ClientSession() as http:
        yield Broker(standing_server.url, standing_server, http)
