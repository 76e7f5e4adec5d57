"""The sweeper: a background task of every broker that tidies the tables.

No promise to clients rests on it: what has expired is invisible and what was not deleted is ready again
whether or not it has run. It keeps the tables small, counts leases that ended, wakes those who wait for
them, and measures queues that have a large `max_messages`. Any number of brokers may sweep at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.errors import BrokerError
from broker.metrics import Metrics
from broker.storage import sweeps
from broker.storage.database import Connection, Database
from broker.storage.notifications import News

log = logging.getLogger("broker.sweeper")

# Messages that one transaction removes. While there are more, the next sweep begins at once.
BATCH_SIZE = 1_000
# What one sweep may take, unless calls may take longer.
SWEEP_SECONDS = 10.0


@dataclass(frozen=True)
class Swept:
    """What one sweep did: messages and leases by queue, and how many messages of deleted queues it removed."""

    expired: Mapping[str, int]
    ended_leases: Mapping[str, int]
    of_deleted_queues: int
    measured_queues: int

    def filled(self, batch_size: int) -> bool:
        """Whether there may be more to do right now."""
        return sum(self.expired.values()) >= batch_size or self.of_deleted_queues >= batch_size


async def sweep_once(connection: Connection, batch_size: int = BATCH_SIZE) -> Swept:
    """Sweep once, each step in a transaction of its own of at most `batch_size` messages; return what was done."""
    chores = await sweeps.chores(connection)
    return Swept(
        expired=await sweeps.remove_expired(connection, batch_size) if chores.expired else {},
        ended_leases=await sweeps.count_ended_leases(connection),
        of_deleted_queues=await sweeps.remove_deleted_queues(connection, batch_size) if chores.deleted_queues else 0,
        measured_queues=await sweeps.measure_queues(connection) if chores.sizes else 0,
    )


class Sweeper:
    """Sweeps every `interval` seconds."""

    def __init__(
        self, database: Database, metrics: Metrics, hear: Callable[[News], object], *, interval: float
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._hear = hear
        self._interval = interval

    async def run(self) -> None:
        """Sweep until cancelled, and again after every failure.

        A sweep is a write like any other: it has a deadline, and there is none while the breaker is open.
        """
        timeout = max(SWEEP_SECONDS, self._database.request_timeout)
        while True:
            is_filled = False
            try:
                swept = await self._database.write(sweep_once, timeout=timeout)
            except BrokerError as error:
                self._metrics.sweeps.labels("failed").inc()
                log.warning("sweep failed reason=%s", error.message)
            else:
                self._report(swept)
                is_filled = swept.filled(BATCH_SIZE)
            await asyncio.sleep(0 if is_filled else self._interval)

    def _report(self, swept: Swept) -> None:
        self._metrics.sweeps.labels("done").inc()
        self._metrics.expired.inc(sum(swept.expired.values()))
        self._metrics.ended_leases.inc(sum(swept.ended_leases.values()))
        for queue, messages in swept.ended_leases.items():
            self._hear(News(queue, 0.0, messages))
