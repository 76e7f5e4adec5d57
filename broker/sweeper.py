"""The sweeper: a background task of every broker that tidies the tables.

No promise to clients rests on it: what has expired is invisible and what was not deleted is ready again
whether or not it has run. It keeps the tables small, counts leases that ended, wakes those who wait for
them, and measures queues that have a large `max_messages`. Any number of brokers may sweep at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from broker.errors import BrokerError
from broker.metrics import Metrics
from broker.storage import dead_letters, sweeps
from broker.storage.database import Connection, Database
from broker.storage.dead_letters import Settled
from broker.storage.notifications import News
from broker.storage.sweeps import OF_TOPIC
from broker.tally import DEAD, EXPIRED, RETURNED, Tally

log = logging.getLogger("broker.sweeper")

# Messages that one transaction removes. While there are more, the next sweep begins at once.
BATCH_SIZE = 1_000
# What one sweep may take, unless calls may take longer.
SWEEP_SECONDS = 10.0


@dataclass(frozen=True)
class Swept:
    """What one sweep did: messages and leases by queue; of deleted queues and topics how many messages it removed.

    `settled` are those that had used up their deliveries, `of_ended` those of subscriptions that have ended.
    `exhausted` are the messages that it found to have used up their deliveries, after max_receives was lowered.
    """

    expired: Mapping[str, int]
    exhausted: int
    settled: Settled
    of_ended: Settled
    forgotten_keys: int
    ended_leases: Mapping[str, int]
    of_deleted: int
    measured_queues: int
    # When it began, on the database's clock.
    at: datetime | None = field(default=None, compare=False)

    def filled(self, batch_size: int) -> bool:
        """Whether there may be more to do right now."""
        return batch_size <= max(
            sum(self.expired.values()),
            self.exhausted,
            self.settled.messages,
            self.forgotten_keys,
            self.of_ended.messages,
            self.of_deleted,
        )


async def sweep_once(connection: Connection, batch_size: int = BATCH_SIZE) -> Swept:
    """Sweep once, each step in a transaction of its own of at most `batch_size` messages; return what was done."""
    chores = await sweeps.chores(connection)
    return Swept(
        expired=await sweeps.remove_expired(connection, batch_size) if chores.expired else {},
        exhausted=await dead_letters.mark_exhausted(connection, batch_size) if chores.lowered_max_receives else 0,
        settled=await dead_letters.settle(connection, batch_size) if chores.exhausted else Settled(),
        of_ended=await dead_letters.settle_ended(connection, batch_size) if chores.ended_subscriptions else Settled(),
        forgotten_keys=await sweeps.forget_keys(connection, batch_size) if chores.idempotency_keys else 0,
        ended_leases=await sweeps.count_ended_leases(connection),
        of_deleted=await sweeps.remove_deleted(connection, batch_size) if chores.deleted_queues else 0,
        measured_queues=await sweeps.measure_queues(connection) if chores.sizes else 0,
        at=chores.at,
    )


class Sweeper:
    """Sweeps every `interval` seconds."""

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        tally: Tally,
        tell: Callable[[News], object],
        *,
        interval: float,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._tally = tally
        self._tell = tell
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
        self._count(swept)
        self._metrics.sweeps.labels("done").inc()
        self._metrics.expired.inc(sum(swept.expired.values()))
        self._metrics.ended_leases.inc(sum(swept.ended_leases.values()))
        for settled in (swept.settled, swept.of_ended):
            self._metrics.dead_lettered.inc(sum(settled.moved.values()))
            self._metrics.dropped.inc(sum(settled.dropped.values()))
        for queue, messages in swept.settled.dropped.items():
            log.warning("messages dropped, their deliveries used up queue=%s messages=%d", queue, messages)
        for queue, messages in swept.of_ended.dropped.items():
            log.warning("messages dropped, their subscription ended queue=%s messages=%d", queue, messages)
        for found in (swept.ended_leases, swept.settled.moved, swept.settled.returned, swept.of_ended.moved):
            for queue, messages in found.items():
                self._tell(News(queue, 0.0, messages))

    def _count(self, swept: Swept) -> None:
        """Add to what happened in this minute."""
        of_queues = {queue: messages for queue, messages in swept.expired.items() if not queue.startswith(OF_TOPIC)}
        self._tally.add_all(EXPIRED, of_queues)
        self._tally.add_all(RETURNED, swept.ended_leases)
        self._tally.add_all(RETURNED, swept.settled.returned)
        for settled in (swept.settled, swept.of_ended):
            self._tally.add_all(DEAD, settled.dead)
        if swept.at is not None:
            self._tally.swept_at = swept.at
