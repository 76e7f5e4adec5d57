"""The connections to PostgreSQL: a pool for calls, deadlines, and errors translated into ours.

Promises: a call ends at its deadline, also when the server hangs; a caller that is cancelled does not cut a
statement short; whatever a statement raises reaches the caller as a `BrokerError` that says whether
anything may have been done. Does not promise to repeat a call whose outcome is unknown.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import re
import select
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary, WeakSet

import msgspec
import psycopg
from psycopg import AsyncConnection, sql
from psycopg.abc import Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from broker.errors import BrokerError, InternalError, Overloaded, Unavailable
from broker.storage import binary

T = TypeVar("T")
SPACES = re.compile(r" ?([,()=<>]) ?")
Connection = AsyncConnection[tuple[Any, ...]]
Operation = Callable[[Connection], Awaitable[T]]

log = logging.getLogger("broker.database")

# A statement whose server is gone is given up by us, not by libpq (its default is to wait for ever).
CONNECT_TIMEOUT_SECONDS = 5
# How long a statement that is not patient waits for somebody else's lock.
LOCK_TIMEOUT_MILLISECONDS = 100
# At the end, how long statements may still take, and then the pool to close.
CLOSE_SECONDS = 0.5
# The pool doubles its pauses between attempts to connect, from a second on. It is made to give up before, and then
# asked again, so that a database that is back is found within half a second.
RECONNECT_TIMEOUT_SECONDS = 0.25
# What a burst needed is given back soon, one connection in so many seconds; it takes some ten milliseconds to make one
# again, which only a call that finds all others busy waits for.
IDLE_SECONDS = 3
ATTEMPTS_AFTER_DEADLOCK = 3

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

# SQLSTATEs after which the outcome is not known: the server went away or was told to while it worked
# (57P01 admin_shutdown, 57P02 crash_shutdown), or failed to write (58030 io_error); class 08 is a lost
# connection. Any other error that the server reports has rolled the statement back.
UNKNOWN_OUTCOME = {"57P01", "57P02", "57P05", "58030"}
# The statement lost against another one and was rolled back; the same statement may be sent again.
LOST_RACE = {"40001", "40P01"}
# The server cannot take the statement now: a reason to try again, not a mistake in it.
CANNOT_NOW = {"57014", "57P03", "57P04", "25006", "53000", "53100", "53200", "53300", "55P03"}


def one_line(statement: str) -> str:
    """Return a statement without spaces that mean nothing: psycopg remembers how to send it only up to 4096 characters.

    Spaces around punctuation go, also inside quotes: a statement must not have any there.
    """
    return SPACES.sub(r"\1", " ".join(statement.split()))


class LockedRows(Unavailable):
    """{reason}; try again in a moment.

    Somebody else held a lock for longer than the statement was willing to wait. Nothing was done.
    """


class JsonLoader(Loader):
    """Load JSON as the bytes that were stored."""

    def load(self, data: Buffer) -> msgspec.Raw:
        return msgspec.Raw(bytes(data))


class BinaryJsonLoader(JsonLoader):
    format = Format.BINARY


async def configure(connection: Connection) -> None:
    """Make a new connection ready for use."""
    binary.register(connection.adapters)
    connection.adapters.register_loader("json", JsonLoader)
    connection.adapters.register_loader("json", BinaryJsonLoader)
    for name, value in SESSION_SETTINGS.items():
        await connection.execute(sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(value)))


_CONFIRM = """
SELECT pg_logical_emit_message(true, 'wonderq', '')
"""


async def confirm(connection: Connection) -> None:
    """Wait until the standby has what was read, where there is one that commits wait for.

    What this transaction saw may be committed here and not there yet. PostgreSQL lets a transaction wait for the
    standby only if it wrote something; so it writes nothing much. To be used before an answer says that something was
    done already.
    """
    await connection.execute(_CONFIRM)


def is_lost(connection: Connection) -> bool:
    """Whether the server has closed an idle connection; costs one system call where it has not.

    An idle connection has nothing to read. If it has, the server said goodbye, or sent a notice.
    """
    poll = select.poll()
    try:
        poll.register(connection.fileno(), select.POLLIN)
        while poll.poll(0):
            connection.pgconn.consume_input()
    except psycopg.Error:
        return True
    return connection.closed


class Database:
    """The pool of connections for calls, and single ones for services."""

    def __init__(
        self,
        conninfo: str,
        *,
        connections: int = 8,
        max_calls: int = 10_000,
        request_timeout: float = 10.0,
    ) -> None:
        self.conninfo = conninfo
        self.request_timeout = request_timeout
        self.max_calls = max_calls
        self._under_way: dict[asyncio.Task[Any], _Call] = {}
        self._services: WeakSet[Connection] = WeakSet()
        self._patience: WeakKeyDictionary[Connection, bool] = WeakKeyDictionary()
        # Each may mean that the database is another one now.
        self.lost_connections = 0
        self._reconnecting: asyncio.Task[None] | None = None
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            conninfo,
            connection_class=AsyncConnection[tuple[Any, ...]],
            kwargs={"autocommit": True, "connect_timeout": CONNECT_TIMEOUT_SECONDS},
            min_size=1,
            max_size=connections,
            max_waiting=max_calls,
            timeout=request_timeout,
            max_idle=IDLE_SECONDS,
            reconnect_timeout=RECONNECT_TIMEOUT_SECONDS,
            configure=configure,
            reconnect_failed=self._try_again,
            name="wonderq",
            open=False,
        )

    async def open(self, timeout: float) -> None:
        """Open the pool; raise Unavailable where no connection can be made within `timeout` seconds."""
        await self._pool.open()
        try:
            await self._pool.wait(timeout)
        except PoolTimeout:
            raise Unavailable(reason="The database cannot be reached") from None

    async def close(self, timeout: float = CLOSE_SECONDS) -> None:
        """Let running statements end, then close every connection; what has not ended in time is cut off."""
        if self._under_way:
            await asyncio.wait(set(self._under_way), timeout=timeout)
        for call in self._under_way.values():
            call.give_up()
        await self._pool.close(timeout)
        if self._under_way:  # those who waited for a connection have to be told that there is none
            await asyncio.wait(set(self._under_way), timeout=timeout)

    def _try_again(self, _: AsyncConnectionPool[Connection]) -> None:
        if self._reconnecting is None or self._reconnecting.done():
            self._reconnecting = asyncio.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        """Ask for a connection until there is one: the pool tries to make one whenever it is asked."""
        while True:
            try:
                async with self._pool.connection(timeout=2 * RECONNECT_TIMEOUT_SECONDS):
                    return
            except PoolTimeout:
                continue
            except (PoolClosed, TooManyRequests):
                return

    async def connect(self) -> Connection:
        """Return a connection of its own, for a service; the caller closes it."""
        connection = await AsyncConnection.connect(
            self.conninfo, autocommit=True, connect_timeout=CONNECT_TIMEOUT_SECONDS
        )
        await configure(connection)
        self._services.add(connection)
        return connection

    def cut_services(self) -> None:
        """End what the services wait for, where the server does not answer their good-bye."""
        for connection in self._services:
            cut(connection)

    async def read(self, operation: Operation[T], *, timeout: float | None = None) -> T:
        """Run an operation that changes nothing: when it fails, nothing was done."""
        try:
            return await self._run(operation, timeout, unknown="none", is_patient=None)
        except LockedRows:
            return await self._run(operation, timeout, unknown="none")

    async def write(self, operation: Operation[T], *, timeout: float | None = None, is_patient: bool = True) -> T:
        """Run an operation on a connection of the pool, within the deadline.

        A caller that is cancelled leaves the statement running to its end, or to the deadline; its result is
        dropped. One that is not patient gets LockedRows, and nothing was done, where somebody else has held a lock
        for a tenth of a second.

        Raises Unavailable with outcome "unknown" where the connection broke, or the deadline passed, after
        the statement was sent, and with "none" where it never was; Overloaded where too many calls wait.
        """
        return await self._run(operation, timeout, unknown="unknown", is_patient=is_patient)

    async def set_patience(self, connection: Connection, *, is_patient: bool) -> None:
        """Let the statements of a connection wait for locks as long as it takes, or hardly at all."""
        if self._patience.get(connection, True) is not is_patient:
            milliseconds = 0 if is_patient else LOCK_TIMEOUT_MILLISECONDS
            await connection.execute(f"SET lock_timeout = {milliseconds}".encode())
            self._patience[connection] = is_patient

    async def _run(
        self, operation: Operation[T], timeout: float | None, *, unknown: str, is_patient: bool | None = True
    ) -> T:
        call = _Call(self, self._pool, operation, unknown, is_patient=is_patient)
        task = asyncio.create_task(call.run())
        self._under_way[task] = call
        task.add_done_callback(self._forget)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + (timeout or self.request_timeout)
        try:
            done, _ = await asyncio.wait({task}, timeout=deadline - loop.time())
        except asyncio.CancelledError:
            # Or clients that hang up on a hung server would use up the connections.
            loop.call_at(deadline, call.give_up)
            raise
        if not done:
            raise call.give_up()
        result: T = task.result()
        return result

    def _forget(self, task: asyncio.Task[Any]) -> None:
        del self._under_way[task]
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more


class _Call:
    """One operation on one connection, which can be given up without asking the server."""

    def __init__(
        self,
        database: Database,
        pool: AsyncConnectionPool[Connection],
        operation: Operation[Any],
        unknown: str,
        *,
        is_patient: bool | None,
    ) -> None:
        self._database = database
        self._pool = pool
        self._is_patient = is_patient
        self._operation = operation
        self._unknown = unknown
        # Where the operation runs now; None once the connection is the pool's again, and so maybe another's.
        self._connection: Connection | None = None
        self._is_sent = False
        self._is_given_up = False

    async def run(self) -> Any:
        for attempt in range(1, ATTEMPTS_AFTER_DEADLOCK + 1):
            try:
                return await self._attempt()
            except psycopg.Error as error:
                if error.sqlstate not in LOST_RACE or attempt == ATTEMPTS_AFTER_DEADLOCK:
                    raise self._translate(error) from error
                await asyncio.sleep(random.uniform(0.01, 0.05) * attempt)  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self) -> Any:
        self._is_sent = False
        try:
            while True:
                async with self._pool.connection() as connection:
                    if self._is_given_up:
                        raise Unavailable(reason="The database did not answer in time")
                    # The pool's own check would pause longer and longer between the connections that a restart
                    # of the server has left behind. The pool replaces what is closed.
                    if is_lost(connection):
                        self._database.lost_connections += 1
                        await connection.close()
                        continue
                    return await self._use(connection)
        except PoolTimeout as error:
            raise Unavailable(reason="The database cannot be reached") from error
        except TooManyRequests as error:
            limit = self._database.max_calls
            raise Overloaded(limit=limit, what="calls waiting for the database", retry_after=1) from error

    async def _use(self, connection: Connection) -> Any:
        self._connection = connection
        try:
            if self._is_patient is not None:  # or it is not worth a round trip to the server
                await self._database.set_patience(connection, is_patient=self._is_patient)
            self._is_sent = True
            return await self._operation(connection)
        except psycopg.errors.ReadOnlySqlTransaction:
            await connection.close()  # a primary that was demoted: the next one is found by connecting
            raise
        finally:
            self._connection = None
            # One that we have cut ourselves says nothing about the server.
            self._database.lost_connections += connection.closed and not self._is_given_up

    def give_up(self) -> Unavailable:
        """Cut the connection, so that the statement ends for us now; return the error to raise.

        psycopg's own way asks the server to cancel and waits for it, which takes ten seconds and more when
        the server hangs.
        """
        self._is_given_up = True
        if self._connection is not None:
            cut(self._connection)
        return Unavailable(
            reason="The database did not answer in time", outcome=self._unknown if self._is_sent else "none"
        )

    def _translate(self, error: psycopg.Error) -> BrokerError:
        return translate(error, sent=self._is_sent, unknown=self._unknown)


def cut(connection: Connection) -> None:
    """Shut a connection's socket down: whoever waits on it gets an error at once."""
    try:
        with socket.socket(fileno=os.dup(connection.fileno())) as half:
            half.shutdown(socket.SHUT_RDWR)
    except (OSError, psycopg.Error):
        pass  # it is closed already


def translate(error: psycopg.Error, *, sent: bool, unknown: str) -> BrokerError:
    """Return the error that a caller gets for an error of the database."""
    state = error.sqlstate or ""
    if isinstance(error, psycopg.errors.LockNotAvailable):
        return LockedRows(reason="Somebody else has locked what this call is about")
    if state in CANNOT_NOW or state in LOST_RACE:
        log.warning("database cannot do it now sqlstate=%s", state)
        return Unavailable(reason="The database cannot do this now")
    if state in UNKNOWN_OUTCOME or state.startswith("08"):
        return Unavailable(reason="The database went away", outcome=unknown)
    if not state and isinstance(error, psycopg.OperationalError):
        return Unavailable(reason="The database went away", outcome=unknown if sent else "none")
    request_id = uuid4().hex[:12]
    log.error("database refused a statement sqlstate=%s request_id=%s", state, request_id, exc_info=error)
    return InternalError(request_id=request_id, outcome="none" if state else unknown)
