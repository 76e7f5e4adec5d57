"""The connections to PostgreSQL: a pool for calls, deadlines, and errors translated into ours.

Promises: a call ends at its deadline, also when the server hangs; a caller that is cancelled does not cut a
statement short; whatever a statement raises reaches the caller as a `BrokerError` that says whether
anything may have been done. Does not promise to repeat a call whose outcome is unknown.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
import select
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import psycopg
from psycopg import AsyncConnection
from psycopg.errors import Diagnostic
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from broker import requests
from broker.errors import BrokerError, InternalError, Overloaded, Unavailable
from broker.storage import durability, outcomes, sessions
from broker.storage.breaker import Breaker
from broker.storage.durability import ServerFacts
from broker.storage.outcomes import BY_MOMENT, Failure, LockedRows, Moment
from broker.storage.sessions import Connection as Connection
from broker.storage.sessions import configure, cut, deadline

T = TypeVar("T")
SPACES = re.compile(r" ?([,()=<>]) ?")
Operation = Callable[[Connection], Awaitable[T]]

log = logging.getLogger("broker.database")

# Connections of the pool that no write gets: however many writes are stuck, reads and health checks find one.
KEPT_FOR_READS = 2
# A new connection is made ready, or given up, within this.
CONFIGURE_SECONDS = 5.0
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
# Where a backend of PostgreSQL says that it stopped to wait for a synchronous standby, though it has committed. Its
# words depend on the server's language.
STOPPED_WAITING = "SyncRepWaitForLSN"


def one_line(statement: str) -> str:
    """Return a statement without spaces that mean nothing: psycopg remembers how to send it only up to 4096 characters.

    Spaces around punctuation go, also inside quotes: a statement must not have any there.
    """
    return SPACES.sub(r"\1", " ".join(statement.split()))


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


def time_left(deadline: float) -> float:
    """Return how many seconds there are until a time of `time.monotonic()`; a moment where it has passed."""
    return max(0.01, deadline - time.monotonic())


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
        # The server that was reached last is tried first.
        self._conninfo = sessions.with_defaults(conninfo)
        self.request_timeout = request_timeout
        self.max_calls = max_calls
        self._under_way: dict[asyncio.Task[Any], _Call] = {}
        self._services: WeakSet[Connection] = WeakSet()
        self._states: WeakKeyDictionary[Connection, _State] = WeakKeyDictionary()
        # Each may mean that the database is another one now.
        self.lost_connections = 0
        # What the newest connection has found; None before there is one.
        self.facts: ServerFacts | None = None
        self.breaker = Breaker(self.connect, self._is_overdue, request_timeout=request_timeout)
        # So many writes may have a connection.
        self.writing = asyncio.Semaphore(max(1, connections - KEPT_FOR_READS))
        self._most_under_way = max_calls + connections
        self._reconnecting: asyncio.Task[None] | None = None
        self._draining: asyncio.Task[None] | None = None
        self._pool: AsyncConnectionPool[Connection] = AsyncConnectionPool(
            lambda: self._conninfo,
            connection_class=AsyncConnection[tuple[Any, ...]],
            kwargs={"autocommit": True},
            min_size=1,
            max_size=connections,
            max_waiting=max_calls,
            timeout=request_timeout,
            max_idle=IDLE_SECONDS,
            reconnect_timeout=RECONNECT_TIMEOUT_SECONDS,
            configure=self._configure,
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

    def pool_use(self) -> tuple[int, int]:
        """Return how many connections the pool has, and how many of them are in use."""
        stats = self._pool.get_stats()
        size = stats.get("pool_size", 0)
        return size, size - stats.get("pool_available", 0)

    @property
    def waiting(self) -> int:
        """How many calls have no connection yet."""
        return max(0, len(self._under_way) - self.pool_use()[1])

    async def connect(self) -> Connection:
        """Return a connection of its own, for a service; the caller closes it."""
        connection = await sessions.connect(self._conninfo)
        self._services.add(connection)
        try:
            await self._configure(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _configure(self, connection: Connection) -> None:
        """Make a new connection ready, and take note of what it leads to."""
        state = self._states[connection] = _State()
        connection.add_notice_handler(state.notice)
        with deadline(connection, CONFIGURE_SECONDS):
            await configure(connection)
            facts = await durability.server_facts(connection)
        self._has_reached(facts, connection)
        self._conninfo = sessions.beginning_with(self._conninfo, connection.info.host, connection.info.port)

    def _has_reached(self, facts: ServerFacts, connection: Connection) -> None:
        before, self.facts = self.facts, facts
        if before is None or before.durability != facts.durability:
            log.info("database postgresql=%s durability=%s", facts.version, facts.level)
            if facts.risks:
                log.warning("ACKNOWLEDGED MESSAGES CAN BE LOST because=%s", "; ".join(facts.risks))
        self.breaker.has_answered()
        if before is not None and before.started != facts.started:
            self._has_moved(connection)

    def _has_moved(self, newest: Connection) -> None:
        """Leave a server that is not the database any more: it may hang, and what waits for it would do so for long."""
        log.warning("the database was started again, or is another server now")
        self.lost_connections += 1
        for call in self._under_way.values():
            call.cut()
        for connection in self._services:
            if connection is not newest:
                cut(connection)
        self._draining = asyncio.create_task(self._pool.drain())

    def cut_services(self) -> None:
        """End what the services wait for, where the server does not answer their good-bye."""
        for connection in self._services:
            cut(connection)

    async def read(self, operation: Operation[T], *, timeout: float | None = None) -> T:
        """Run an operation that changes nothing: when it fails, nothing was done."""
        try:
            return await self._run(operation, timeout, is_write=False, is_patient=None)
        except LockedRows:
            return await self._run(operation, timeout, is_write=False)

    async def write(self, operation: Operation[T], *, timeout: float | None = None, is_patient: bool = True) -> T:
        """Run an operation on a connection of the pool, within the deadline.

        A caller that is cancelled leaves the statement running to its end, or to the deadline; its result is
        dropped. One that is not patient gets LockedRows, and nothing was done, where somebody else has held a lock
        for a tenth of a second.

        Raises Unavailable, with outcome "unknown" where the connection broke, or the deadline passed, after
        the statement was sent, or no standby confirmed it, and with "none" where it never was, the breaker being open
        among others: see `outcomes`; Overloaded where too many calls wait.
        """
        refusal = self.breaker.refusal()
        if refusal is not None:
            raise refusal
        return await self._run(operation, timeout, is_write=True, is_patient=is_patient)

    async def set_patience(self, connection: Connection, *, is_patient: bool) -> None:
        """Let the statements of a connection wait for locks as long as it takes, or hardly at all."""
        state = self.state_of(connection)
        if state.is_patient is not is_patient:
            milliseconds = 0 if is_patient else LOCK_TIMEOUT_MILLISECONDS
            await connection.execute(f"SET lock_timeout = {milliseconds}".encode())
            state.is_patient = is_patient

    def state_of(self, connection: Connection) -> _State:
        """Return what is known of a connection of ours."""
        return self._states[connection]

    def _is_overdue(self, seconds: float) -> bool:
        """Whether a statement has been under way for so many seconds."""
        sent_before = asyncio.get_running_loop().time() - seconds
        return any(call.was_sent_before(sent_before) for call in self._under_way.values())

    async def _run(
        self, operation: Operation[T], timeout: float | None, *, is_write: bool, is_patient: bool | None = True
    ) -> T:
        if len(self._under_way) >= self._most_under_way:
            raise self.too_many_calls()
        call = _Call(self, self._pool, operation, is_write=is_write, is_patient=is_patient)
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

    def too_many_calls(self) -> Overloaded:
        """Return the error for a call that comes when too many wait."""
        return Overloaded(
            limit=self.max_calls, what="calls waiting for the database", retry_after=1, counted_as="calls"
        )

    def _forget(self, task: asyncio.Task[Any]) -> None:
        del self._under_way[task]
        if not task.cancelled():
            task.exception()  # seen, also where nobody waits for it any more


@dataclass(eq=False, slots=True)
class _State:
    """What is known of a connection."""

    # What its session does about locks.
    is_patient: bool = True
    # Something was committed in this use of it that no synchronous standby has confirmed.
    is_unconfirmed: bool = False

    def notice(self, diagnostic: Diagnostic) -> None:
        """Take in a notice of the server's."""
        if diagnostic.source_function == STOPPED_WAITING:
            self.is_unconfirmed = True


class _Call:
    """One operation on one connection, which can be given up without asking the server."""

    def __init__(
        self,
        database: Database,
        pool: AsyncConnectionPool[Connection],
        operation: Operation[Any],
        *,
        is_write: bool,
        is_patient: bool | None,
    ) -> None:
        self._database = database
        self._pool = pool
        self._is_patient = is_patient
        self._operation = operation
        self._is_write = is_write
        # Where the operation runs now; None once the connection is the pool's again, and so maybe another's.
        self._connection: Connection | None = None
        # By the loop's clock.
        self._sent_at: float | None = None
        self._is_given_up = False

    def was_sent_before(self, moment: float) -> bool:
        """Whether a statement has been under way since before that moment."""
        return self._connection is not None and self._sent_at is not None and self._sent_at < moment

    async def run(self) -> Any:
        for attempt in range(1, ATTEMPTS_AFTER_DEADLOCK + 1):
            try:
                return await self._attempt()
            except psycopg.Error as error:
                is_sent = self._sent_at is not None
                if not failure_of(error, is_sent=is_sent).lost_race or attempt == ATTEMPTS_AFTER_DEADLOCK:
                    raise translate(error, is_sent=is_sent, is_write=self._is_write) from error
                await asyncio.sleep(random.uniform(0.01, 0.05) * attempt)  # noqa: S311
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self) -> Any:
        self._sent_at = None
        if not self._is_write:
            return await self._on_a_connection()
        async with self._database.writing:
            if self._is_given_up:
                raise outcomes.late(is_sent=False).error()
            # While it waited for its turn, the breaker may have opened.
            refusal = self._database.breaker.refusal()
            if refusal is not None:
                raise refusal
            return await self._on_a_connection()

    async def _on_a_connection(self) -> Any:
        try:
            while True:
                async with self._pool.connection() as connection:
                    if self._is_given_up:
                        raise outcomes.late(is_sent=False).error()
                    # The pool's own check would pause longer and longer between the connections that a restart
                    # of the server has left behind. The pool replaces what is closed.
                    if is_lost(connection):
                        self._database.lost_connections += 1
                        await connection.close()
                        continue
                    return await self._use(connection)
        except PoolTimeout as error:
            raise BY_MOMENT[Moment.NO_CONNECTION].error() from error
        except TooManyRequests as error:
            raise self._database.too_many_calls() from error

    async def _use(self, connection: Connection) -> Any:
        self._connection = connection
        state = self._database.state_of(connection)
        state.is_unconfirmed = False
        try:
            if self._is_patient is not None:  # or it is not worth a round trip to the server
                await self._database.set_patience(connection, is_patient=self._is_patient)
            self._sent_at = asyncio.get_running_loop().time()
            return await self._operation(connection)
        except psycopg.errors.ReadOnlySqlTransaction:
            await connection.close()  # a primary that was demoted: the next one is found by connecting
            raise
        finally:
            self._connection = None
            # One that we have cut ourselves says nothing about the server.
            self._database.lost_connections += connection.closed and not self._is_given_up
            if state.is_unconfirmed and self._is_write:
                # Whatever the operation made of it, an error or an answer.
                raise BY_MOMENT[Moment.NOT_CONFIRMED].error()

    def give_up(self) -> BrokerError:
        """Cut the connection, so that the statement ends for us now; return the error to raise."""
        self._is_given_up = True
        self.cut()
        return outcomes.late(is_sent=self._sent_at is not None).error(is_write=self._is_write)

    def cut(self) -> None:
        """End what it waits for on its connection."""
        if self._connection is not None:
            cut(self._connection)


def translate(error: psycopg.Error, *, is_sent: bool, is_write: bool) -> BrokerError:
    """Return the error that a caller gets for an error of the database: see `outcomes`."""
    failure = failure_of(error, is_sent=is_sent)
    if failure.answer is InternalError:
        request_id = requests.current_or_new()
        log.error("database refused a statement sqlstate=%s request_id=%s", error.sqlstate, request_id, exc_info=error)
        return failure.error(is_write=is_write, request_id=request_id)
    if failure.answer is Unavailable:
        log.warning("statement failed reason=%s sqlstate=%s sent=%s", failure.reason, error.sqlstate, is_sent)
    return failure.error(is_write=is_write)


def failure_of(error: psycopg.Error, *, is_sent: bool) -> Failure:
    """Return the line of the table of outcomes for an error of the database."""
    is_lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return outcomes.failure(error.sqlstate, is_lost=is_lost, is_sent=is_sent)
