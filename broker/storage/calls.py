"""The calls on the way of a message, each gathered with others of its kind: see `group_commit.py`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from broker.errors import BrokerError, QueueFull, QueueNotFound
from broker.model import Lease, NewMessage
from broker.storage import handing_out, idempotency, leases, publishing, storing
from broker.storage.database import Connection, Database
from broker.storage.group_commit import AGAIN, Again, GroupCommit
from broker.storage.handing_out import Delivery, DequeueCall, HandOut, Wanted
from broker.storage.leases import Extended
from broker.storage.low_water import UNKNOWN, LowWater
from broker.storage.publishing import PublishCall, Published
from broker.storage.storing import EnqueueCall, Stored
from broker.tally import DELETED, DELIVERED, ENQUEUED, RETURNED, Tally

# One hand-out in so many takes fresh messages first, so that returned ones cannot starve a queue.
FRESH_FIRST_EVERY = 8
REMEMBERED_HAND_OUTS = 10_000
REMEMBERED_TOPICS = 10_000
# Bodies that fill a statement as a message more would.
BYTES_LIKE_ONE_MESSAGE = 4096

ExtendCall = tuple[Sequence[Lease], float]
# One in so many statements that delete asks how old the leases were.
AGES_EVERY = 16
Watch = Callable[[str, int, float], None]


class Calls:
    """Carries out enqueue, publish, dequeue, delete and extend.

    Of what was done for a caller who is gone, `undelivered` is told, with the queue, where it is messages that were
    leased, `stored` where it is messages that were stored, and `published` where it is one that was published. `watch`
    is told, for every statement, of which kind it was, how many calls it carried and how many seconds it took, and
    `watch_ages`, for some of those that delete, how many seconds old the leases were. What statements have done to
    messages is added to the `tally`, whether or not anybody still waits for it.
    """

    def __init__(
        self,
        database: Database,
        *,
        max_calls: int = 10_000,
        undelivered: Callable[[str, Delivery], None] = lambda queue, delivery: None,
        stored: Callable[[str, Stored], None] = lambda queue, result: None,
        published: Callable[[Published], None] = lambda result: None,
        watch: Watch = lambda kind, calls, seconds: None,
        watch_ages: Callable[[Sequence[float]], None] = lambda ages: None,
        tally: Tally | None = None,
    ) -> None:
        self.low_water = LowWater(database)
        self._tally = Tally() if tally is None else tally
        self._watch_ages = watch_ages
        self._deletes = 0
        self._hand_outs: dict[str, int] = {}
        # How many copies the last message of a topic came to: so much larger is a call than the message alone.
        self._deliveries: dict[str, int] = {}

        def abandon(call: DequeueCall, delivery: Delivery) -> None:
            undelivered(call.queue, delivery)

        self._enqueue: GroupCommit[EnqueueCall, Stored] = GroupCommit(
            database,
            self._store,
            max_calls=max_calls,
            abandon=lambda call, result: stored(call.queue, result),
            watch=partial(watch, "enqueue"),
        )
        self._publish: GroupCommit[PublishCall, Published] = GroupCommit(
            database,
            self._copy,
            max_calls=max_calls,
            abandon=lambda call, result: published(result),
            watch=partial(watch, "publish"),
        )
        self._lease: GroupCommit[DequeueCall, Delivery] = GroupCommit(
            database,
            lambda connection, calls: self._hand_out(connection, calls, at_most_once=False),
            max_calls=max_calls,
            abandon=abandon,
            watch=partial(watch, "dequeue"),
        )
        self._remove: GroupCommit[DequeueCall, Delivery] = GroupCommit(
            database,
            lambda connection, calls: self._hand_out(connection, calls, at_most_once=True),
            max_calls=max_calls,
            watch=partial(watch, "dequeue"),
        )
        self._delete: GroupCommit[Sequence[Lease], list[bool | BrokerError]] = GroupCommit(
            database,
            self._remove_leased,
            max_calls=max_calls,
            watch=partial(watch, "delete"),
        )
        self._extend: GroupCommit[ExtendCall, list[Extended | BrokerError]] = GroupCommit(
            database,
            _extend,
            max_calls=max_calls,
            watch=partial(watch, "extend_visibility"),
        )

    @property
    def waiting(self) -> int:
        """How many calls wait for a statement to carry them."""
        groups = (self._enqueue, self._publish, self._lease, self._remove, self._delete, self._extend)
        return sum(group.waiting for group in groups)

    async def enqueue(self, queue: str, new: Sequence[NewMessage]) -> Stored:
        """Store messages in a queue, all or none.

        Raises QueueNotFound, MessageTooLarge, QueueFull and IdempotencyConflict, whose `index` names the message.
        """
        has_keys = any(message.idempotency_key is not None for message in new)
        size = len(new) + sum([len(message.body) for message in new]) // BYTES_LIKE_ONE_MESSAGE
        return await self._enqueue.call(EnqueueCall(queue, new, has_keys), line=queue, size=size)

    async def publish(self, topic: str, message: NewMessage) -> Published:
        """Put a copy of a message into the queue of each subscription that wants it, all or none.

        Raises TopicNotFound, MessageTooLarge, QueueFull and IdempotencyConflict.
        """
        copies = 1 + self._deliveries.get(topic, 0)
        size = copies * (1 + len(message.body) // BYTES_LIKE_ONE_MESSAGE)
        published = await self._publish.call(PublishCall(topic, message), line=topic, size=size)
        if len(self._deliveries) >= REMEMBERED_TOPICS:
            self._deliveries.clear()
        self._deliveries[topic] = published.deliveries
        return published

    async def dequeue(
        self, queue: str, max_messages: int, visibility_timeout: float | None, *, at_most_once: bool = False
    ) -> Delivery:
        """Lease up to `max_messages` (or remove them, `at_most_once`). Raises QueueNotFound."""
        group = self._remove if at_most_once else self._lease
        call = DequeueCall(queue, max_messages, visibility_timeout)
        return await group.call(call, line=queue, size=max_messages, options=visibility_timeout)

    async def delete(self, held: Sequence[Lease]) -> list[bool | BrokerError]:
        """Delete the messages of these leases: True, False where it is already gone, or LeaseLost."""
        return await self._delete.call(held, line=held[0].queue_id, size=len(held))

    async def extend(self, held: Sequence[Lease], visibility_timeout: float) -> list[Extended | BrokerError]:
        """Let these leases end `visibility_timeout` seconds from now; 0 gives the messages back at once."""
        return await self._extend.call((held, visibility_timeout), line=held[0].queue_id, size=len(held))

    async def _store(self, connection: Connection, calls: Sequence[EnqueueCall]) -> list[Stored | BrokerError | Again]:
        results = await _enqueue(connection, calls)
        new: dict[str, int] = {}
        for call, result in zip(calls, results, strict=True):
            if isinstance(result, Stored):
                new[call.queue] = new.get(call.queue, 0) + len(result.ids) - len(result.duplicates)
        self._tally.add_all(ENQUEUED, new)
        return results

    async def _copy(
        self, connection: Connection, calls: Sequence[PublishCall]
    ) -> list[Published | BrokerError | Again]:
        results = await publishing.publish(connection, calls)
        for result in results:
            if isinstance(result, Published):
                for news in result.news:
                    self._tally.add(news.queue, ENQUEUED, news.messages)
        return results

    async def _remove_leased(
        self, connection: Connection, calls: Sequence[Sequence[Lease]]
    ) -> list[list[bool | BrokerError] | BrokerError | Again]:
        held = [lease for each in calls for lease in each]
        ages: list[float] | None = [] if self._deletes % AGES_EVERY == 0 else None
        self._deletes += 1
        deleted = await leases.delete(connection, held, ages)
        if ages:
            self._watch_ages(ages)
        gone: dict[int, int] = {}
        for lease, is_deleted in zip(held, deleted, strict=True):
            if is_deleted is True:
                gone[lease.queue_id] = gone.get(lease.queue_id, 0) + 1
        self._tally.add_all(DELETED, gone)
        results = iter(deleted)
        return [[next(results) for _ in each] for each in calls]

    async def _hand_out(
        self, connection: Connection, calls: Sequence[DequeueCall], *, at_most_once: bool
    ) -> list[Delivery | BrokerError | Again]:
        """Serve the calls of each queue together, in one statement for all the queues."""
        by_queue: dict[str, list[int]] = {}
        for place, call in enumerate(calls):
            by_queue.setdefault(call.queue, []).append(place)
        wanted = [
            Wanted(
                queue,
                sum(calls[place].max_messages for place in places),
                calls[places[0]].visibility_timeout,
                fresh_first=(self._hand_outs.get(queue, 0) + 1) % FRESH_FIRST_EVERY == 0,
                floors=self.low_water.floors(queue),
            )
            for queue, places in by_queue.items()
        ]
        handed_out = await self._look(connection, wanted, at_most_once=at_most_once)
        if not any(delivery.messages for delivery in handed_out.deliveries.values()):
            doubted = [
                replace(each, floors=UNKNOWN)
                for each in wanted
                if each.floors != UNKNOWN and self.low_water.may_be_doubted(each.queue)
            ]
            if doubted:
                began_at = time.monotonic()
                again = await self._look(connection, doubted, at_most_once=at_most_once)
                handed_out.deliveries.update(again.deliveries)
                seconds = time.monotonic() - began_at
                self.low_water.looked_from_the_beginning((each.queue for each in doubted), seconds)
        results: list[Delivery | BrokerError | Again] = [AGAIN] * len(calls)
        for queue, places in by_queue.items():
            delivery = handed_out.deliveries.get(queue)
            if delivery is None:
                for place in places:
                    results[place] = QueueNotFound(queue=queue)
                continue
            if delivery.messages:
                self._count_hand_out(queue)
            shares = handing_out.share_out([calls[place] for place in places], delivery)
            for place, share in zip(places, shares, strict=True):
                if share.messages or not share.is_cut:
                    results[place] = share
        return results

    async def _look(self, connection: Connection, wanted: Sequence[Wanted], *, at_most_once: bool) -> HandOut:
        """Hand out, and learn from what was seen."""
        before = self.low_water.before()
        handed_out = await handing_out.hand_out(connection, wanted, at_most_once=at_most_once)
        if handed_out.view is not None:
            looked_from = {each.queue: each.floors for each in wanted}
            self.low_water.learn(
                handed_out.view,
                before,
                {queue: (looked_from[queue], first) for queue, first in handed_out.first_ready.items()},
            )
        self._count(handed_out, is_removed=at_most_once)
        return handed_out

    def _count(self, handed_out: HandOut, *, is_removed: bool) -> None:
        for queue, delivery in handed_out.deliveries.items():
            if delivery.messages:
                self._tally.add(queue, DELIVERED, len(delivery.messages))
                if is_removed:
                    self._tally.add(queue, DELETED, len(delivery.messages))
        for queue, messages in handed_out.redelivered.items():
            # The lease that ended first of them did so after the last sweep: none of them is counted yet.
            ended_at = handed_out.first_ready[queue].returned
            if ended_at is not None and ended_at > self._tally.swept_at:
                self._tally.add(queue, RETURNED, messages)

    def _count_hand_out(self, queue: str) -> None:
        if len(self._hand_outs) >= REMEMBERED_HAND_OUTS:
            self._hand_outs.clear()
        self._hand_outs[queue] = self._hand_outs.get(queue, 0) + 1


async def _enqueue(connection: Connection, calls: Sequence[EnqueueCall]) -> list[Stored | BrokerError | Again]:
    """Store the messages of several calls; a queue that is full only with those of a call that was refused is not.

    The statement counts what comes before in the input, refused or not. A call behind a refused one is run again.
    """
    results: list[Stored | BrokerError | Again] = []
    refused: set[str] = set()
    store = idempotency.enqueue if any(call.has_keys for call in calls) else storing.enqueue
    for call, result in zip(calls, await store(connection, calls), strict=True):
        results.append(AGAIN if isinstance(result, QueueFull) and call.queue in refused else result)
        if isinstance(result, BrokerError):
            refused.add(call.queue)
    return results


async def _extend(
    connection: Connection, calls: Sequence[ExtendCall]
) -> list[list[Extended | BrokerError] | BrokerError | Again]:
    held = [lease for each, _ in calls for lease in each]
    seconds = [visibility_timeout for each, visibility_timeout in calls for _ in each]
    results = iter(await leases.extend(connection, held, seconds))
    return [[next(results) for _ in each] for each, _ in calls]
