"""The service that pushes: a consumer like any other, which hands each message to its receiver by an HTTP POST.

Every url that is subscribed has a queue of its own. Each process of each broker leases from it, sends what it has
leased, and deletes what was taken; so any number of them share the work, and any may die. A message that was not taken
stays leased until it may be tried again: no message waits here for its next attempt, and a pause outlives the broker.

Promises. A message is deleted when its receiver has answered 2xx; until then it is tried again, after 1 s, doubling,
± 50 %, at most an hour, or as long as `Retry-After` says, until its deliveries are used up and the sweeper moves it to
the dead letters. While a lease runs nobody else sends the message. An endpoint that fails, hangs or answers nonsense
takes no place from the others: an endpoint never has more places than it leaves free, fewer where it does not answer,
and one that has failed several times in a row is only probed, with one message at a time, by one of all brokers, in
places kept for that.

Does not promise that a message arrives only once: a receiver may have taken what it could not confirm, and knows it
by its `webhook-id`. Nor an order: several messages are on their way at once, and some are tried again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from yarl import URL

from broker.endpoints import Endpoint
from broker.errors import BrokerError, Unavailable
from broker.metrics import Metrics
from broker.model import Lease, Message
from broker.places import Places
from broker.receivers import Answer, Outcome, Receivers
from broker.storage import subscriptions
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.handing_out import Delivery
from broker.storage.notifications import News
from broker.storage.subscriptions import PushTarget

log = logging.getLogger("broker.webhooks")

# How often the targets are read, and those that fail are looked through for one to probe.
LOOK_SECONDS = 1.0
# A look that is not answered by then gives its connection back to those who call.
LOOK_PATIENCE_SECONDS = 2.0
# A consumer asks for messages anew after so long; nothing depends on it.
WAIT_SECONDS = 60.0
# An endpoint that fails is probed each time after so long, and so many of them at one time.
PROBE_SECONDS = 5.0
PROBES = 16
# The first pause before a message is tried again, which doubles, the longest, and by which share they vary.
FIRST_PAUSE_SECONDS = 1.0
MAX_PAUSE_SECONDS = 3600.0
JITTER = 0.5
# A lease outlasts a push by this, and a message that was leased waits at most so long for its place: the rest is for
# the database, before and after.
LEASE_MARGIN_SECONDS = 30.0
PATIENCE_SECONDS = 10.0
# An endpoint that has had all its places taken is given the next messages when half are free, or after this.
GATHER_SECONDS = 0.01
# While the database is away.
RETRY_SECONDS = 0.5
# Other brokers see what becomes ready later by their own looks in time.
NEWS_SECONDS = 2.0

NOWHERE = URL("https://nowhere.invalid/")

T = TypeVar("T")


class Dequeue(Protocol):
    """How messages are leased: `wait` and `visibility_timeout` in seconds."""

    def __call__(
        self, queue: str, max_messages: int, visibility_timeout: float | None, wait: float
    ) -> Awaitable[Delivery]: ...


@dataclass(frozen=True)
class PushLimits:
    """How much is on its way from one process: to one endpoint, and in all; `timeout` of one push, in seconds.

    With 64 at one time an endpoint that answers at once is sent 1.7 times as many as with 32, and with 128 no more.
    """

    concurrency: int = 64
    total: int = 256
    timeout: float = 15.0


@dataclass(eq=False)
class Push:
    """One message on its way."""

    endpoint: Endpoint
    message: Message
    lease: Lease
    # Once there is an answer, the message is no longer to be given back as if nothing had been.
    is_answered: bool = False


class Webhooks:
    """Pushes to every url that is subscribed, as far as the limits allow."""

    def __init__(
        self,
        database: Database,
        calls: Calls,
        receivers: Receivers,
        metrics: Metrics,
        *,
        dequeue: Dequeue,
        give_back_soon: Callable[[str, Delivery], None],
        tell: Callable[[News], object],
        limits: PushLimits,
    ) -> None:
        self._database = database
        self._calls = calls
        self._receivers = receivers
        self._metrics = metrics
        self._dequeue = dequeue
        self._give_back_soon = give_back_soon
        self._tell = tell
        self._limits = limits
        self._lease_seconds = limits.timeout + LEASE_MARGIN_SECONDS
        self._endpoints: dict[int, Endpoint] = {}
        self._places = Places(limits.total)
        self._probes = asyncio.Semaphore(PROBES)
        self._pushes: dict[asyncio.Task[None], Push] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._has_changed = asyncio.Event()
        self._is_stopping = False

    @property
    def under_way(self) -> int:
        """How many messages are on their way now."""
        return len(self._pushes)

    def changed(self) -> None:
        """Somebody has subscribed, or ended a subscription, or changed a secret."""
        self._has_changed.set()

    async def run(self) -> None:
        """Follow the targets, and probe those that fail, until cancelled."""
        while True:
            self._has_changed.clear()
            try:
                await self._look()
                await self._claim_probes()
            except BrokerError as error:
                log.warning("no look at the subscriptions reason=%s", error.type)
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._has_changed.wait()

    async def _look(self) -> None:
        """Read the targets; begin to consume for those that are new, and cease for those that are gone."""
        read_at = asyncio.get_running_loop().time()
        targets = {
            each.id: each
            for each in await self._database.read(subscriptions.push_targets, timeout=LOOK_PATIENCE_SECONDS)
        }
        for number in self._endpoints.keys() - targets.keys():
            gone = self._endpoints.pop(number)
            gone.has_ended = True
            self._regulate(gone)
        for number, target in targets.items():
            endpoint = self._endpoints.get(number)
            if endpoint is None:
                endpoint = self._endpoints[number] = Endpoint(target, url_of(target), self._limits.concurrency)
            endpoint.learn(target, read_at)
            self._regulate(endpoint)

    def _regulate(self, endpoint: Endpoint) -> None:
        """Let an endpoint have a consumer where it may be pushed to, and none where not."""
        loop = asyncio.get_running_loop()
        may_consume = endpoint.may_be_sent_messages(loop.time()) and not self._is_stopping
        if may_consume and (endpoint.consumer is None or endpoint.consumer.done()):
            endpoint.consumer = asyncio.create_task(self._consume(endpoint))
            endpoint.consumer.add_done_callback(_complain)
        elif not may_consume and endpoint.consumer is not None:
            endpoint.consumer.cancel()
            endpoint.consumer = None
        if 0 < endpoint.paused_until - loop.time() < LOOK_SECONDS:
            loop.call_at(endpoint.paused_until, self._regulate, endpoint)

    async def _consume(self, endpoint: Endpoint) -> None:
        """Lease messages and send them, until cancelled."""
        while True:
            wanted = await self._wanted(endpoint)
            try:
                delivery = await self._dequeue(endpoint.target.queue, wanted, self._lease_seconds, WAIT_SECONDS)
            except BrokerError:
                # The database is away, of which the next look tells, or the queue is just being deleted.
                await asyncio.sleep(RETRY_SECONDS * random.uniform(1, 2))  # noqa: S311
                continue
            await self._send(endpoint, delivery)

    async def _wanted(self, endpoint: Endpoint) -> int:
        """Return how many messages to lease, as soon as they are worth a statement."""
        loop = asyncio.get_running_loop()
        gather_until = loop.time() + GATHER_SECONDS
        while not endpoint.is_half_free and (endpoint.room <= 0 or loop.time() < gather_until):
            endpoint.has_answered.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout_at(gather_until if endpoint.room > 0 else None):
                    await endpoint.has_answered.wait()
        # Where there is no place at all, a message is leased and waits for it in order with the others.
        return max(1, min(endpoint.room, self._places.room(endpoint)))

    async def _send(self, endpoint: Endpoint, delivery: Delivery) -> None:
        """Send what was leased, each message when it has a place; give back what has not had one in time."""
        self._metrics.delivered.inc(len(delivery.messages))
        sent = 0
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                for message, lease in zip(delivery.messages, delivery.leases, strict=True):
                    await self._places.take(endpoint)
                    sent += 1
                    self._begin(Push(endpoint, message, lease), lambda: self._places.release(endpoint))
        except TimeoutError:
            log.warning("no places for messages, which are given back messages=%d", len(delivery.messages) - sent)
        finally:
            self._give_back(endpoint.target.queue, delivery.leases[sent:])

    def _give_back(self, queue: str, leases: Sequence[Lease]) -> None:
        """Let messages be handed out again as if they had not been."""
        self._give_back_soon(queue, Delivery([], list(leases), 0.0))

    def _begin(self, push: Push, done: Callable[[], object]) -> None:
        """Send a message in a task of its own."""
        push.endpoint.sent += 1
        task = asyncio.create_task(self._push(push))
        self._pushes[task] = push

        def end(task: asyncio.Task[None]) -> None:
            del self._pushes[task]
            push.endpoint.sent -= not push.is_answered
            done()
            _complain(task)

        task.add_done_callback(end)

    async def _push(self, push: Push) -> None:
        """Send a message and do with it what the answer asks for."""
        endpoint, message, secrets = push.endpoint, push.message, push.endpoint.target.secrets
        began_at = time.perf_counter()
        try:
            answer = await self._receivers.post(endpoint.url, message.message_id, bytes(message.body), secrets)
        except Exception:
            log.exception("a push failed in an unknown way host=%s", endpoint.url.raw_host)
            answer = Answer(Outcome.UNANSWERED)
        push.is_answered = True
        endpoint.sent -= 1
        endpoint.has_answered.set()
        self._metrics.push_ended(answer.outcome, time.perf_counter() - began_at)
        if answer.outcome is Outcome.DELIVERED:
            self._has_succeeded(endpoint)
            await self._delete(push.lease)
        elif answer.outcome is Outcome.GONE:
            self._has_ended(endpoint)
            await self._extend(push, 0.0)
        else:
            self._has_failed(endpoint, answer)
            await self._extend(push, self._pause_of(push, answer))

    def _pause_of(self, push: Push, answer: Answer) -> float:
        """Return in how many seconds a message may be tried again; after its last delivery the sweeper takes it now."""
        max_receives = push.endpoint.target.max_receives
        if max_receives is not None and push.message.receive_count >= max_receives:
            return 0.0
        return pause_after(push.message.receive_count) if answer.retry_after is None else answer.retry_after

    async def _delete(self, lease: Lease) -> None:
        deleted = await self._until_answered(lambda: self._calls.delete([lease]))
        self._metrics.deleted.inc(deleted == [True])

    async def _extend(self, push: Push, seconds: float) -> None:
        """Let the lease end in so many seconds. Where it has ended already nothing is left to do."""
        await self._until_answered(lambda: self._calls.extend([push.lease], seconds))
        if 0 < seconds < NEWS_SECONDS:
            self._tell(News(push.endpoint.target.queue, seconds, 1))

    async def _until_answered(self, call: Callable[[], Awaitable[T]]) -> T:
        """Call until the database has answered. Raises what will not be better the next time.

        What it does may be done twice: a message is deleted once, and a lease is extended from now on.
        """
        while True:
            try:
                result = await call()
                if not (isinstance(result, list) and any(isinstance(each, Unavailable) for each in result)):
                    return result
            except BrokerError as error:
                if not error.retryable:
                    raise
            await asyncio.sleep(RETRY_SECONDS * random.uniform(1, 2))  # noqa: S311

    def _has_succeeded(self, endpoint: Endpoint) -> None:
        if endpoint.has_taken_one():
            log.info("endpoint takes messages again host=%s", endpoint.url.raw_host)
            self._note(endpoint, lambda connection: subscriptions.note_active(connection, endpoint.target.id))
            self._regulate(endpoint)

    def _has_failed(self, endpoint: Endpoint, answer: Answer) -> None:
        number, seconds = endpoint.target.id, answer.retry_after
        if seconds is not None and endpoint.pause(asyncio.get_running_loop().time() + seconds):
            self._note(endpoint, lambda connection: subscriptions.pause(connection, number, seconds))
        if endpoint.has_failed(answer):
            log.warning("endpoint fails and is only probed host=%s outcome=%s", endpoint.url.raw_host, answer.outcome)
            self._note(endpoint, lambda connection: subscriptions.note_failing(connection, number, PROBE_SECONDS))
        self._regulate(endpoint)

    def _has_ended(self, endpoint: Endpoint) -> None:
        if not endpoint.has_ended:
            endpoint.has_ended = True
            log.warning("endpoint wants no more: its subscription ends host=%s", endpoint.url.raw_host)
            self._note(endpoint, lambda connection: subscriptions.end(connection, endpoint.target.id))
            self._regulate(endpoint)

    def _note(self, endpoint: Endpoint, write: Callable[[Connection], Awaitable[None]]) -> None:
        """Let the database, and so every broker, know of an endpoint what was found out here."""

        async def note() -> None:
            try:
                async with endpoint.notes:
                    await self._until_answered(lambda: self._database.write(write))
            except BrokerError as error:
                log.error(
                    "what is known of an endpoint was not noted host=%s reason=%s", endpoint.url.raw_host, error.type
                )
            finally:
                endpoint.pending_notes -= 1
                endpoint.noted_at = asyncio.get_running_loop().time()

        endpoint.pending_notes += 1
        self._in_background(note())

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _claim_probes(self) -> None:
        """Probe those endpoints that fail and are due: of all brokers this one does it this time."""
        if self._is_stopping or not any(each.is_failing for each in self._endpoints.values()):
            return
        due = await self._database.write(lambda connection: subscriptions.claim_probes(connection, PROBE_SECONDS))
        for number in due:
            endpoint = self._endpoints.get(number)
            if endpoint is not None and not endpoint.is_probed:
                endpoint.is_probed = True
                self._in_background(self._probe(endpoint))

    async def _probe(self, endpoint: Endpoint) -> None:
        """Send one message to an endpoint that fails, in one of the places for that."""
        await self._probes.acquire()
        is_sent = False

        def done() -> None:
            self._probes.release()
            endpoint.is_probed = False

        try:
            if self._is_stopping or endpoint.has_ended or not endpoint.is_failing:
                return
            delivery = await self._dequeue(endpoint.target.queue, 1, self._lease_seconds, 0.0)
            if self._is_stopping:
                self._give_back(endpoint.target.queue, delivery.leases)
                return
            self._metrics.delivered.inc(len(delivery.messages))
            for message, lease in zip(delivery.messages, delivery.leases, strict=True):
                self._begin(Push(endpoint, message, lease), done)
                is_sent = True
        except BrokerError as error:
            log.warning("no message to probe with queue=%s reason=%s", endpoint.target.queue, error.type)
        finally:
            if not is_sent:
                done()

    def stop_taking(self) -> None:
        """Lease nothing from now on; what is on its way goes on."""
        self._is_stopping = True
        for endpoint in self._endpoints.values():
            self._regulate(endpoint)

    async def drain(self, timeout: float) -> None:
        """Let what is on its way arrive, for so many seconds at most; give the rest back, ready at once."""
        self.stop_taking()
        if self._pushes:
            await asyncio.wait(set(self._pushes), timeout=timeout)
        left: dict[str, list[Lease]] = {}
        for task, push in self._pushes.items():
            task.cancel()
            if not push.is_answered:
                left.setdefault(push.endpoint.target.queue, []).append(push.lease)
        for queue, leases in left.items():
            self._give_back(queue, leases)

    async def close(self) -> None:
        """End everything, and close every connection."""
        self.stop_taking()
        tasks = [*self._pushes, *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._receivers.close()


def url_of(target: PushTarget) -> URL:
    """Return where to push to; nowhere, so that it fails like others do, where a url cannot be read any more."""
    try:
        return URL(target.url)
    except ValueError:
        log.error("url cannot be read subscription=%s topic=%s", target.name, target.topic)
        return NOWHERE


def pause_after(receive_count: int) -> float:
    """Return for how many seconds to leave a message alone that has been delivered in vain so often."""
    doubled = FIRST_PAUSE_SECONDS * 2.0 ** min(receive_count - 1, 30)
    return min(doubled * random.uniform(1 - JITTER, 1 + JITTER), MAX_PAUSE_SECONDS)  # noqa: S311


def _complain(task: asyncio.Task[None]) -> None:
    """Say of a task that has ended if it failed in a way that nobody has thought of."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("pushing failed in an unknown way; what was on its way may be sent again", exc_info=error)
