"""The consumer loop: takes messages, lets a handler have each, and sees to their leases until they are deleted.

    async def handle(message: Message) -> None: ...

    await client.consume("mail", handle, concurrency=20)

It takes no more than it has free places for, so nothing that it holds waits. While handlers run their leases are
extended, those that are due by one call. A message whose handler returns is deleted; deletions that come together
share a call. One whose handler raises is given back, and comes again after a pause that grows with its
`receive_count`, until the queue's `max_receives` ends it. An outage of broker or database is waited out.

Delivery is at least once: a message comes again if this process is killed, if its lease ended because the broker was
away for longer than that or the event loop was blocked, or if a deletion failed while it stopped. At most once
(`at_most_once=True`) it is removed before the handler has it, and there are no leases, deletions or second tries.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import math
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Unpack

from broker.client.errors import BrokerError, ConnectionFailed, Forbidden, LeaseLost
from broker.client.messages import ConsumerOptions, Handler, Message
from broker.client.signals import told_by_signals
from broker.client.tracing import span_of
from broker.client.transport import pause_before, retry_after_of

if TYPE_CHECKING:
    from broker.client.client import Client

MOST_AT_ONCE = 1_000
LONGEST_VISIBILITY_TIMEOUT = 43_200.0
# Where the queue's may not be asked for.
DEFAULT_LEASE_SECONDS = 30.0
# At most once, a call that is broken off loses messages. So a stop waits until it is answered.
LONGEST_WAIT_AT_MOST_ONCE = 5.0
LONGEST_PAUSE_TO_DELETE = 1.0
# What a broker says that has failed itself.
FAILED = -32603

_log = logging.getLogger("broker.client")


@dataclass(eq=False)
class _Held:
    """A message that a handler has. `leased_at` is a time of the event loop, when its lease began or was extended.

    `is_settled`: it was handled, or given back.
    """

    message: Message
    leased_at: float
    task: asyncio.Task[None] | None = None
    is_lost: bool = False
    is_settled: bool = False


class Consumer:
    """One loop over one queue; `run` it once. `handler` is a coroutine function, or a plain one for threads."""

    def __init__(self, client: Client, queue: str, handler: Handler, **options: Unpack[ConsumerOptions]) -> None:
        if unknown := options.keys() - ConsumerOptions.__annotations__.keys():
            raise TypeError(f"There is no option {', '.join(sorted(unknown))}; see ConsumerOptions.")
        self._client = client
        self._once = client.with_deadline(0)
        self._queue = queue
        self._handler = handler
        self._concurrency = options.get("concurrency", 10)
        self._lease = options.get("visibility_timeout")
        self._at_most_once = options.get("at_most_once", False)
        self._wait = options.get("wait", 20.0)
        if self._concurrency < 1 or self._wait <= 0:
            raise ValueError("`concurrency` must be 1 or more, and `wait` more than 0.")
        if self._at_most_once:
            self._wait = min(self._wait, LONGEST_WAIT_AT_MOST_ONCE)
        self._left = options.get("max_messages")
        self._first_pause = options.get("first_pause", 1.0)
        self._longest_pause = options.get("longest_pause", 600.0)
        self._cancels = options.get("cancel_on_lost_lease", True)
        self._on_error = options.get("on_error")
        self._threads: ThreadPoolExecutor | None = None
        self._running: set[_Held] = set()
        self._handled: list[str] = []  # receipts of what is to be deleted
        self._unfinished: list[str] = []  # receipts of what is to be given back at once
        self._poll: asyncio.Task[list[Message]] | None = None
        self._has_work_to_delete = asyncio.Event()
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._is_aborting = False
        self._trouble_since: float | None = None
        self._gives_up_at: float | None = None

    def stop(self) -> None:
        """Take no more; `run` returns when what is held is handled."""
        self._is_stopping = True
        self._changed.set()
        if self._poll is not None and (not self._at_most_once or self._trouble_since is not None or self._is_aborting):
            self._poll.cancel()  # This hangs up; what was leased meanwhile the broker takes back.

    def abort(self) -> None:
        """Cancel the handlers and give everything back, then let `run` return. Threads cannot be cancelled."""
        self._is_aborting = True
        self.stop()
        for held in self._running:
            if held.task is not None and not held.is_settled:
                held.task.cancel()

    def has_lost(self, message: Message) -> bool:
        """Whether the lease of a message that is being handled is over, so that somebody else may have it."""
        return any(held.is_lost for held in self._running if held.message is message)

    async def run(self, *, handle_signals: bool = True) -> None:
        """Consume until `stop`, `abort`, `max_messages`, or SIGTERM or SIGINT: the second signal aborts.

        Raises BrokerError where the broker does not answer at all within the client's deadline, or refuses what no
        repeat can mend (QueueNotFound, Forbidden); what is held then is finished before.
        """
        loop = asyncio.get_running_loop()
        self._gives_up_at = loop.time() + self._client.deadline
        if not _is_coroutine_function(self._handler):
            self._threads = ThreadPoolExecutor(self._concurrency, "wonderq-consumer")
        beside: list[asyncio.Task[None]] = []
        with told_by_signals(lambda: loop.call_soon_threadsafe(self.told_to_stop), listens=handle_signals):
            try:
                if not self._at_most_once:
                    self._lease = self._lease or await self._lease_of_the_queue()
                    beside += [asyncio.create_task(each) for each in (self._keep_leases(), self._delete_handled())]
                for task in beside:
                    task.add_done_callback(lambda _: self.stop())  # It has failed: there is no end to them.
                await self._take()
            except asyncio.CancelledError:
                self.abort()
                raise
            finally:
                self._is_stopping = True
                await self._finish(beside)
                if self._threads is not None:
                    self._threads.shutdown(wait=False)

    def told_to_stop(self) -> None:
        """Do as at a signal: the first stops, the second aborts."""
        if self._is_stopping:
            self.abort()
        else:
            _log.info("%s: stopping, with %d messages to finish", self._queue, len(self._running))
            self.stop()

    async def _lease_of_the_queue(self) -> float:
        try:
            return float((await self._client.get_queue(self._queue))["visibility_timeout"])
        except Forbidden:
            return DEFAULT_LEASE_SECONDS  # It may be allowed to receive, and no more.

    async def _take(self) -> None:
        """Begin with messages as long as there are free places, until the end."""
        while not self._is_stopping and self._left != 0:
            free = self._concurrency - len(self._running)
            # What was handled and not deleted yet has a bound, too.
            if free <= 0 or len(self._handled) >= max(self._concurrency, MOST_AT_ONCE):
                self._changed.clear()
                await self._changed.wait()
                continue
            messages = await self._messages(min(free, MOST_AT_ONCE, free if self._left is None else self._left))
            if self._is_stopping and not self._at_most_once:
                self._unfinished += [message.receipt for message in messages if message.receipt is not None]
                return
            if self._left is not None:
                self._left -= len(messages)
            now = asyncio.get_running_loop().time()
            for message in messages:
                held = _Held(message, now)
                self._running.add(held)
                held.task = asyncio.create_task(self._handle(held))
                held.task.add_done_callback(partial(self._ended, held))

    async def _messages(self, max_messages: int) -> list[Message]:
        """Wait for messages, through whatever outage; return none if `stop` breaks it off."""
        self._poll = asyncio.create_task(self._ask(max_messages))
        try:
            await asyncio.wait({self._poll})
        finally:
            self._poll.cancel()
        return [] if self._poll.cancelled() else self._poll.result()

    async def _ask(self, max_messages: int) -> list[Message]:
        failures = 0
        while True:
            try:
                messages = await self._once.dequeue(
                    self._queue,
                    max_messages=max_messages,
                    wait=self._wait,
                    visibility_timeout=self._lease,
                    delivery="at_most_once" if self._at_most_once else None,
                )
                self._is_well()
                return messages
            except BrokerError as error:
                # As long as nobody has answered it is not waited for longer than for any other call.
                if self._gives_up_at is None:
                    is_final = not _may_pass(error)
                else:
                    is_final = not error.retryable or asyncio.get_running_loop().time() >= self._gives_up_at
                if is_final:
                    raise
                self._is_in_trouble(error)
                await asyncio.sleep(pause_before(failures, retry_after_of(error)))
                failures += 1

    async def _handle(self, held: _Held) -> None:
        message = held.message
        try:
            with span_of(message):
                await self._call_handler(message)
        except asyncio.CancelledError:
            if self._is_aborting and message.receipt is not None:
                self._unfinished.append(message.receipt)
            elif not held.is_lost:
                await self._give_back(held, RuntimeError("the handler was cancelled, and not by this loop"))
        except Exception as error:
            await self._give_back(held, error)
        else:
            held.is_settled = True
            if message.receipt is not None:
                self._handled.append(message.receipt)
                self._has_work_to_delete.set()

    def _ended(self, held: _Held, task: asyncio.Task[None]) -> None:
        if task.cancelled() and not held.is_settled and held.message.receipt is not None:
            self._unfinished.append(held.message.receipt)  # An abort came before it had begun.
        self._running.discard(held)
        self._changed.set()

    async def _call_handler(self, message: Message) -> None:
        if self._threads is None:
            await self._handler(message)
            return
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._threads, context.run, self._handler, message)
        if inspect.isawaitable(result):
            await result

    async def _give_back(self, held: _Held, error: Exception) -> None:
        held.is_settled = True
        message, after = held.message, "is lost"
        if message.receipt is not None and not held.is_lost:
            doubled = self._first_pause * 2.0 ** min(message.receive_count - 1, 40)
            pause = min(doubled, self._longest_pause) * random.uniform(0.5, 1.5)  # noqa: S311  no secret
            pause = min(pause, LONGEST_VISIBILITY_TIMEOUT)
            after = f"comes again in {pause:.1f} s, unless that was its last delivery"
            try:
                await self._client.extend_visibility(message.receipt, pause)
            except LeaseLost:
                pass  # It has come back already.
            except BrokerError as failure:
                after = f"comes again when its lease ends ({failure})"
        _log.error("%s: the handler failed; message %s %s", self._queue, message.message_id, after, exc_info=error)
        if self._on_error is not None:
            try:
                result = self._on_error(message, error)
                if inspect.isawaitable(result):
                    await result
            except Exception:
                _log.exception("%s: on_error failed", self._queue)

    async def _give_back_unfinished(self) -> None:
        """Give back what was not begun, or broken off, with no pause."""
        while receipts := self._unfinished[:MOST_AT_ONCE]:
            del self._unfinished[:MOST_AT_ONCE]
            try:
                await self._client.extend_visibility_batch(receipts, 0)
            except BrokerError as error:
                _log.warning("%s: %d messages come again when their leases end: %s", self._queue, len(receipts), error)

    async def _keep_leases(self) -> None:
        """Extend what has less than three quarters of its lease left, three times in each lease."""
        assert self._lease is not None, "`run` has asked for it"
        clock, pause = asyncio.get_running_loop().time, self._lease / 3
        extending = self._client.with_deadline(min(self._lease / 3, self._client.deadline))
        while True:
            await asyncio.sleep(pause)
            now, pause = clock(), self._lease / 3
            held_for_long = [held for held in self._running if now - held.leased_at > self._lease / 4]
            due = [held for held in held_for_long if not (held.is_lost or held.is_settled)]
            for some in (due[n : n + MOST_AT_ONCE] for n in range(0, len(due), MOST_AT_ONCE)):
                receipts, asked_at = [held.message.receipt for held in some], clock()
                try:
                    results = await extending.extend_visibility_batch(receipts, self._lease)
                except BrokerError as error:
                    self._is_in_trouble(error)
                    pause = min(1.0, self._lease / 12)
                    continue
                for held, result in zip(some, results, strict=True):
                    if isinstance(result, LeaseLost) and held in self._running:
                        self._lose(held)
                    elif not isinstance(result, BrokerError):
                        held.leased_at = asked_at

    def _lose(self, held: _Held) -> None:
        held.is_lost = True
        _log.warning("%s: the lease of message %s has ended while it was handled", self._queue, held.message.message_id)
        if self._cancels and self._threads is None and held.task is not None:
            held.task.cancel()

    async def _delete_handled(self) -> None:
        """Delete what was handled, by as many calls as there are answers; whatever comes meanwhile shares the next."""
        failures, clock, gives_up_at = 0, asyncio.get_running_loop().time, math.inf
        while True:
            if not self._handled:
                self._has_work_to_delete.clear()
                await self._has_work_to_delete.wait()
            receipts = self._handled[:MOST_AT_ONCE]
            try:
                results = await self._once.delete_batch(receipts)
            except BrokerError as error:
                self._is_in_trouble(error)
                if self._is_stopping:
                    gives_up_at = min(gives_up_at, clock() + self._client.deadline)
                if _may_pass(error) and clock() < gives_up_at:
                    # Soon: when the broker is back, others may be given what is not deleted and whose lease has ended.
                    await asyncio.sleep(pause_before(failures, retry_after_of(error), LONGEST_PAUSE_TO_DELETE))
                    failures += 1
                    continue
                _log.error("%s: %d handled messages come again: %s", self._queue, len(receipts), error)
            else:
                failures = 0
                lost = sum(isinstance(result, BrokerError) for result in results)
                if lost:
                    _log.warning("%s: %d messages were handled after their leases had ended", self._queue, lost)
            del self._handled[: len(receipts)]
            self._changed.set()

    async def _finish(self, beside: list[asyncio.Task[None]]) -> None:
        """Return when nothing is held any more. Raises what has ended the tasks `beside`."""
        while self._running or (self._handled and not any(task.done() for task in beside)):
            self._changed.clear()
            await self._changed.wait()
        await self._give_back_unfinished()
        for task in beside:
            if task.done():
                task.result()
            task.cancel()

    def _is_in_trouble(self, error: BrokerError) -> None:
        if self._trouble_since is None:
            self._trouble_since = asyncio.get_running_loop().time()
            _log.warning("%s: the broker cannot serve, trying again until it can: %s", self._queue, error)

    def _is_well(self) -> None:
        self._gives_up_at = None
        if self._trouble_since is not None:
            seconds = asyncio.get_running_loop().time() - self._trouble_since
            self._trouble_since = None
            _log.warning("%s: the broker serves again, after %.1f s", self._queue, seconds)


def _may_pass(error: BrokerError) -> bool:
    """Whether it may be different later, with a broker that has worked before."""
    return error.retryable or isinstance(error, ConnectionFailed) or error.code == FAILED


def _is_coroutine_function(handler: Handler) -> bool:
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(getattr(handler, "__call__", None))  # noqa: B004
