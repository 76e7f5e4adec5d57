"""The circuit breaker: while PostgreSQL could not confirm a write, none is sent.

A commit waits for the synchronous standbys, and no timeout of PostgreSQL ends that wait: a write that is given up
leaves a session of the server behind, stuck until a standby confirms. New connections and new writes would leave one
after the other, until the server has no more connections for anybody. So a statement that takes long is a reason to
ask the server, on a connection kept for that, whether it answers, whether it takes writes, and whether sessions of
our role wait for a standby. Where one of them has waited through two looks in a row, or the server does not answer,
the breaker opens: writes are answered at once, with outcome "none". The looks go on, and close it when all is well.

A statement that merely takes long, or waits for somebody's lock, does not open it. Reads go on while it is open.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import psycopg

from broker.errors import BrokerError
from broker.storage.outcomes import BY_MOMENT, Moment
from broker.storage.sessions import Connection, deadline

log = logging.getLogger("broker.breaker")

# A statement that takes longer is a reason to look, unless calls have less than twice as long.
OVERDUE_SECONDS = 1.0
# From one look to the next, unless calls have less than four times as long.
LOOK_EVERY_SECONDS = 0.5
# A server that takes longer to say that it is well does not answer. Many times what a busy one needs.
LOOK_SECONDS = 3.0
RETRY_AFTER_SECONDS = 1

NO_ANSWER = "The database does not answer, and nothing is written until it does"
NO_STANDBY = "No synchronous standby confirms what is written, and nothing more is written until one does"
READ_ONLY = "The database is a standby and takes no writes, and nothing is written until a primary is found"

# A session waits for the same commit as long as its `query_start` is the same. An ordinary role sees what its own
# sessions wait for, and NULL for those of others.
_LOOK = """/* look */
SELECT
    pg_is_in_recovery(),
    ARRAY(
        SELECT concat_ws(' ', pid, query_start)
        FROM pg_stat_activity
        WHERE wait_event = 'SyncRep' AND usename = current_user
    )
"""


class Breaker:
    """Says whether writes may be sent; `run` keeps that true.

    `connect` makes a connection for the looks. `is_overdue` says whether a statement has been under way for more than
    so many seconds. `request_timeout` is how long calls may take. What is in `opened` is called whenever it opens.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[Connection]],
        is_overdue: Callable[[float], bool],
        *,
        request_timeout: float,
    ) -> None:
        self._connect = connect
        self._is_overdue = is_overdue
        # It opens before the first of the writes that are stuck is given up, so no more of them come.
        self._overdue_seconds = min(OVERDUE_SECONDS, request_timeout / 2)
        self._look_every_seconds = min(LOOK_EVERY_SECONDS, request_timeout / 4)
        # Who waited for a standby at the last look.
        self._waiting: frozenset[str] = frozenset()
        # Why no write is sent now, as a sentence; None while all is well.
        self.reason: str | None = None
        self.opened: list[Callable[[], None]] = []

    def refusal(self) -> BrokerError | None:
        """Return the error for a write that comes now, if it is not to be sent."""
        if self.reason is None:
            return None
        return BY_MOMENT[Moment.BREAKER_IS_OPEN].error(reason=self.reason, retry_after=RETRY_AFTER_SECONDS)

    def has_answered(self) -> None:
        """Take note that the server has taken a new connection: it answers."""
        if self.reason == NO_ANSWER:
            self._found(None)

    async def run(self) -> None:
        """Look whenever there is a reason to, until cancelled."""
        while True:
            try:
                async with await self._connect() as connection:
                    while True:
                        await asyncio.sleep(self._look_every_seconds)
                        if self._has_reason():
                            await self._look(connection)
            except psycopg.Error:
                if self._has_reason():
                    self._found(NO_ANSWER)
            await asyncio.sleep(self._look_every_seconds)

    def _has_reason(self) -> bool:
        return self.reason is not None or bool(self._waiting) or self._is_overdue(self._overdue_seconds)

    async def _look(self, connection: Connection) -> None:
        """Ask the server what stands in the way of a write. Raises psycopg.Error where it does not answer."""
        try:
            with deadline(connection, LOOK_SECONDS):
                row = await (await connection.execute(_LOOK)).fetchone()
        except psycopg.Error:
            # By now the calls that were the reason may have been given up.
            self._found(NO_ANSWER)
            raise
        assert row is not None, "a select without FROM returns one row"
        is_standby, waiting = row[0], frozenset(row[1])
        is_stuck = not self._waiting.isdisjoint(waiting)
        self._waiting = waiting
        if is_standby:
            self._found(READ_ONLY)
        else:
            self._found(NO_STANDBY if is_stuck else None)

    def _found(self, reason: str | None) -> None:
        before, self.reason = self.reason, reason
        if reason == before:
            return
        if reason is None:
            log.warning("writes are sent again")
            return
        log.error("WRITES ARE REFUSED reason=%s", reason)
        if before is None:
            for tell in self.opened:
                tell()
