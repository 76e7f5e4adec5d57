"""The service that keeps what happened in each minute: it appends what this process has counted, and tidies up.

Promises: what was counted is appended about a second later, to the minute in which it happened, also where the
database was away meanwhile; and when the broker is told to stop. With many busy queues it is appended less often, so
that no more rows come of it than `ROWS_A_SECOND`, but at least once a minute. Nothing is appended twice: where it is
not known whether an append was committed, it is not repeated. A broker that is killed has not appended the last of it.
"""

from __future__ import annotations

import asyncio
import logging
import time

from broker.errors import BrokerError
from broker.storage import statistics
from broker.storage.database import Connection, Database
from broker.tally import Tally

log = logging.getLogger("broker.statistics")

# How often is appended, where anything happened.
APPEND_SECONDS = 1.0
# So many rows a second come from one process: with 10,000 busy queues it appends every 40 seconds.
ROWS_A_SECOND = 250
# And at least so often.
MOST_SECONDS = 60.0
# How often minutes that are over are summed up, and old ones removed.
TIDY_SECONDS = 60.0
# An append that is not answered by then gives its connection back to those who call.
PATIENCE_SECONDS = 5.0


class Statistics:
    """Appends what the tally of this process has."""

    def __init__(self, database: Database, tally: Tally) -> None:
        self._database = database
        self._tally = tally
        # While one append is under way, whoever stops the broker waits for it.
        self._appending = asyncio.Lock()

    async def run(self) -> None:
        """Append and tidy up until cancelled."""
        append_at = tidy_at = 0.0
        while True:
            now = time.monotonic()
            if now >= tidy_at:
                tidy_at = now + TIDY_SECONDS
                await self._tidy()
            if now >= append_at:
                rows = await self.append()
                append_at = now + min(rows / ROWS_A_SECOND, MOST_SECONDS)
            await asyncio.sleep(APPEND_SECONDS)

    async def append(self, timeout: float = PATIENCE_SECONDS) -> int:
        """Append everything that was counted by now; return how many rows it was. What could not be is kept."""
        async with self._appending:
            if not self._tally:
                return 0
            rows = self._tally.take()
            try:
                now = await self._database.write(
                    lambda connection: statistics.append(connection, rows), timeout=timeout
                )
            except BrokerError as error:
                if error.outcome == "none":
                    self._tally.put_back(rows)
                else:
                    log.warning("statistics may not have been appended rows=%d reason=%s", len(rows), error.type)
                return 0
            self._tally.hear_time(now)
            return len(rows)

    async def _tidy(self) -> None:
        try:
            self._tally.hear_time(await self._database.write(tidy_once))
        except BrokerError as error:
            log.warning("statistics not tidied up reason=%s", error.type)


async def tidy_once(connection: Connection) -> float:
    """Sum up what is over and remove what is old; return what time it is on the database's clock."""
    while await statistics.sum_up(connection) >= statistics.BATCH_SIZE:
        pass
    while await statistics.trim(connection) >= statistics.BATCH_SIZE:
        pass
    return await statistics.append(connection, {})
