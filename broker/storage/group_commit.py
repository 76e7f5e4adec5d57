"""Group commit: calls of one kind that come while a statement is under way become the next statement.

A commit and the work around a statement cost the same for one call as for a hundred, so calls that are there
together share them. There is no timer: a lone call is sent at once, and the busier the broker, the more calls a
statement carries.

Promises. A call that fails spoils no other: where a statement fails for what is in it, each of its calls is run
apart. Queues are served in turn, so that a busy one cannot starve another, and when too many calls wait, those of
the queue with the most are refused. No call of a statement waits for a lock that only another call needs: rows that
somebody else holds on to are tried apart, patiently, while the others go on. A call is answered by its own deadline.

Does not promise an order between calls that are under way at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from broker import requests
from broker.errors import BrokerError, InternalError
from broker.storage import outcomes
from broker.storage.database import Connection, Database
from broker.storage.outcomes import LockedRows

C = TypeVar("C")
R = TypeVar("R")

log = logging.getLogger("broker.group_commit")

# Statements of one kind that may be under way at once. One does: each carries more calls then, and the disk has
# fewer commits to wait for. A second one is sent where so many messages wait that PostgreSQL may as well work on two
# processors, or where the first one takes long. From 24 messages on it would bring 64 clients 4 to 8 per cent more
# calls, for a fifth more commits.
STATEMENTS = 2
PARALLEL_SIZE = 100
SLOW_SECONDS = 0.02
# Event loops count in milliseconds, so a timer may come a little early.
CLOCK_SECONDS = 0.002
# A request that lies in its socket takes a few turns of the event loop to become a call. A statement is sent when so
# many turns have brought none, or at the latest after so many.
QUIET_TURNS = 3
MOST_TURNS = 50
# Messages that one statement carries, unless a single call has more.
MAX_SIZE = 1_000
# Calls that may wait for somebody else's locks at one time.
PATIENT_CALLS = 2


class Again:
    """The result of a call that has to be run again, by itself."""


AGAIN = Again()

Statement = Callable[[Connection, Sequence[C]], Awaitable[Sequence[R | BrokerError | Again]]]


@dataclass(slots=True, eq=False)
class _Pending(Generic[C, R]):
    """A call that has not been answered."""

    call: C
    size: int
    options: Hashable
    deadline: float
    future: asyncio.Future[R]
    # From here on nobody knows whether it was carried out, until the database has said so.
    is_sent: bool = False

    def fail(self, error: BrokerError) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def expire(self) -> None:
        self.fail(outcomes.late(is_sent=self.is_sent).error())


class GroupCommit(Generic[C, R]):
    """Gathers calls of one kind into statements.

    `statement` carries out several calls in one transaction and returns their results in order. `abandon` is told
    of results that nobody waits for any more.
    """

    def __init__(
        self,
        database: Database,
        statement: Statement[C, R],
        *,
        max_calls: int,
        abandon: Callable[[C, R], None] = lambda call, result: None,
        watch: Callable[[int, float], None] = lambda calls, seconds: None,
    ) -> None:
        self._database = database
        self._statement = statement
        self._max_calls = max_calls
        self._abandon = abandon
        self._watch = watch
        # The calls of each queue, first come first; the queue whose turn it is comes first.
        self._lines: OrderedDict[Hashable, deque[_Pending[C, R]]] = OrderedDict()
        self._waiting = 0
        self._waiting_size = 0
        self._arrived = 0
        self._under_way = 0
        self._newest_began_at = 0.0
        self._is_starting = False
        self._patience = asyncio.Semaphore(PATIENT_CALLS)
        self._tasks: set[asyncio.Task[None]] = set()
        database.breaker.opened.append(self._refuse_waiting)

    @property
    def waiting(self) -> int:
        """How many calls wait for a statement to carry them."""
        return self._waiting

    async def call(self, call: C, *, line: Hashable, size: int = 1, options: Hashable = None) -> R:
        """Carry out one call with whatever others there are; return its result or raise its error.

        `line` is the queue that the call belongs to. Calls of one line share a statement only where their `options`
        are equal.
        """
        refusal = self._database.breaker.refusal()
        if refusal is not None:
            raise refusal
        if self._waiting >= self._max_calls:
            self._make_room(line)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._database.request_timeout
        pending: _Pending[C, R] = _Pending(call, size, options, deadline, loop.create_future())
        self._lines.setdefault(line, deque()).append(pending)
        self._waiting += 1
        self._waiting_size += size
        self._arrived += 1
        self._start_soon(loop)
        timer = loop.call_at(deadline, pending.expire)
        try:
            return await pending.future
        except asyncio.CancelledError:
            if not pending.future.cancelled() and not pending.future.exception():
                self._abandon(call, pending.future.result())
            raise
        finally:
            timer.cancel()

    def _make_room(self, line: Hashable) -> None:
        """Refuse the newest call of the longest line. Raises Overloaded where that is the one that is coming."""
        refusal = self._database.too_many_calls()
        own = len(self._lines.get(line, ()))
        if own * len(self._lines) >= self._max_calls:
            raise refusal  # more than its share; no need to look at the others
        longest = max(self._lines.values(), key=len, default=deque())
        if len(longest) <= own + 1:
            raise refusal
        self._waiting -= 1
        refused = longest.pop()
        self._waiting_size -= refused.size
        refused.fail(refusal)

    def _refuse_waiting(self) -> None:
        """Answer what has not been sent, when the breaker has opened: the statements before it may be stuck."""
        refusal = self._database.breaker.refusal()
        assert refusal is not None, "the breaker is open"
        for line in self._lines.values():
            self._fail(list(line), refusal)

    def _start_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start a statement once everything that has already arrived has been read."""
        if not self._is_starting and self._lines and self._may_start(loop):
            self._is_starting = True
            loop.call_soon(self._start_when_quiet, loop, self._arrived, 0, MOST_TURNS)

    def _may_start(self, loop: asyncio.AbstractEventLoop) -> bool:
        if self._under_way in (0, STATEMENTS):
            return not self._under_way
        return (
            self._waiting_size >= PARALLEL_SIZE or loop.time() - self._newest_began_at >= SLOW_SECONDS - CLOCK_SECONDS
        )

    def _start_when_quiet(self, loop: asyncio.AbstractEventLoop, arrived: int, quiet_turns: int, turns: int) -> None:
        """Let the event loop read on while every few of its turns bring another call."""
        quiet_turns = quiet_turns + 1 if self._arrived == arrived else 0
        if quiet_turns < QUIET_TURNS and turns and self._waiting < MAX_SIZE:
            loop.call_soon(self._start_when_quiet, loop, self._arrived, quiet_turns, turns - 1)
            return
        self._is_starting = False
        batch = self._take()
        if batch:
            self._under_way += 1
            self._newest_began_at = loop.time()
            self._in_background(self._send(batch))
            self._start_soon(loop)

    def _take(self) -> list[_Pending[C, R]]:
        """Take calls for a statement from the lines, from each in turn."""
        batch: list[_Pending[C, R]] = []
        size = 0
        options: dict[Hashable, Hashable] = {}
        put_off: list[Hashable] = []
        put_off_lines = []
        while self._lines:
            name, line = next(iter(self._lines.items()))
            pending = line[0]
            if batch and size + pending.size > MAX_SIZE:
                break
            if options.setdefault(name, pending.options) != pending.options:
                put_off.append(name)
                put_off_lines.append(self._lines.pop(name))
                continue
            line.popleft()
            self._waiting -= 1
            self._waiting_size -= pending.size
            if line:
                self._lines.move_to_end(name)
            else:
                del self._lines[name]
            if not pending.future.done():
                batch.append(pending)
                size += pending.size
        for name, line in zip(reversed(put_off), reversed(put_off_lines), strict=True):
            self._lines[name] = line
            self._lines.move_to_end(name, last=False)
        return batch

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        # A statement carries the calls of many requests: what it logs is under the id of none of them.
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _send(self, batch: list[_Pending[C, R]]) -> None:
        loop = asyncio.get_running_loop()
        slow = loop.call_later(SLOW_SECONDS, self._start_soon, loop)
        try:
            await self._carry_out(batch)
        finally:
            slow.cancel()
            self._under_way -= 1
            self._start_soon(loop)

    async def _carry_out(self, batch: list[_Pending[C, R]], *, is_patient: bool = False) -> None:
        """Run one statement and answer its calls; those that cannot share one are run apart."""
        sent: list[_Pending[C, R]] = []
        seconds = 0.0

        async def operation(connection: Connection) -> Sequence[R | BrokerError | Again]:
            nonlocal seconds
            sent[:] = [pending for pending in batch if not pending.future.done()]
            for pending in sent:
                pending.is_sent = True
            began_at = time.perf_counter()
            results = await self._statement(connection, [pending.call for pending in sent]) if sent else ()
            seconds = time.perf_counter() - began_at
            return results

        try:
            results = await self._database.write(operation, is_patient=is_patient)
        except LockedRows as error:
            self._were_not_carried_out(sent)
            if is_patient:
                self._fail(batch, error)
            elif len(batch) == 1:
                self._in_background(self._patiently(batch))
            else:
                await self._apart(batch)
            return
        except InternalError as error:
            if error.outcome == "none" and len(batch) > 1:
                self._were_not_carried_out(sent)
                await self._apart(batch)
            else:
                self._fail(batch, error)
            return
        except BrokerError as error:
            self._fail(batch, error)
            return
        except Exception:
            failure = InternalError(outcome="unknown", request_id=requests.new_id())
            log.exception("statement failed request_id=%s", failure.extra["request_id"])
            self._fail(batch, failure)
            return
        self._watch(len(sent), seconds)
        again = [pending for pending, result in zip(sent, results, strict=True) if not self._settle(pending, result)]
        if again:
            await self._apart(again)

    def _were_not_carried_out(self, sent: list[_Pending[C, R]]) -> None:
        for pending in sent:
            pending.is_sent = False

    def _settle(self, pending: _Pending[C, R], result: R | BrokerError | Again) -> bool:
        """Answer a call; return False where it has to be run again."""
        if isinstance(result, Again):
            return False
        if isinstance(result, BrokerError):
            pending.fail(result)
        elif pending.future.done():
            self._abandon(pending.call, result)
        else:
            pending.future.set_result(result)
        return True

    def _fail(self, batch: list[_Pending[C, R]], error: BrokerError) -> None:
        for pending in batch:
            pending.fail(error.copy())

    async def _apart(self, batch: list[_Pending[C, R]]) -> None:
        await asyncio.gather(*(self._carry_out([pending]) for pending in batch))

    async def _patiently(self, batch: list[_Pending[C, R]]) -> None:
        self._waiting += 1
        try:
            async with self._patience:
                await self._carry_out(batch, is_patient=True)
        finally:
            self._waiting -= 1
