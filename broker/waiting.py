"""Long polling: who waits for which queue, and what wakes them.

A consumer that waits holds neither a connection nor a transaction: it is an entry in a line, one line for each
queue. What wakes the first in line is news of this broker or of another (something was enqueued, a lease was
shortened, a queue was resumed), the end of a delay or of a lease (a timer on the earliest known one), or the
look that is taken once a second for all the queues that somebody waits for. Whoever finds as much as it asked
for wakes the next, so a wake-up never ends with a consumer that had no use for it.

Dangerous to change: a consumer stands in line before it looks, so that nothing comes unseen between the look
and the wait; and who is woken leaves the line at once, so that one wake-up is not spent on two.

Promises: what was leased for a client that hung up is given back. Does not promise an order among those who wait.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from broker.errors import BrokerError, Overloaded
from broker.storage import handing_out, leases
from broker.storage.calls import Calls
from broker.storage.database import Database
from broker.storage.handing_out import Delivery
from broker.storage.low_water import UNKNOWN
from broker.storage.notifications import News
from broker.tally import RETURNED, Tally

log = logging.getLogger("broker.waiting")

# Nobody depends on this look but for what no news came of: a lost notification, an enqueue in SQL.
LOOK_SECONDS = 0.9
# Looks for queues that somebody has just begun to wait for are gathered for this long.
GATHER_SECONDS = 0.005
# Leases that end sooner are news to the other brokers; those that end later are seen by their looks in time.
SHORT_LEASE_SECONDS = 2 * LOOK_SECONDS
# A message that is ready but locked by somebody's transaction is tried again after 10 ms, 20 ms, … up to 1 s.
RETRY_SECONDS = 0.01


NOTHING = Delivery([], [], 0.0)


class Line:
    """Those who wait for one queue, first come first."""

    def __init__(self, on_time: Callable[[], None]) -> None:
        # Ordered, and anybody can leave it at once wherever he stands: thousands may hang up together.
        self._waiting: OrderedDict[asyncio.Future[bool], None] = OrderedDict()
        self._timer: asyncio.Handle | None = None
        self._wakes_at = 0.0  # by the loop's clock; uvloop's handle of a time that has come does not know it
        self._on_time = on_time
        self.in_vain = 0
        # Whether there may be messages of which nobody who stands here was told, and how often that was found.
        self.may_have_more = True
        self.doubts = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def enter(self) -> asyncio.Future[bool]:
        """Stand in line; return what is done when it is one's turn: True where news were used up for it."""
        waiter: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        return waiter

    def leave(self, waiter: asyncio.Future[bool]) -> bool:
        """Leave the line. Where it was one's turn already, it is the next one's; True where news found nobody."""
        if waiter.done():
            is_news = waiter.result()
            return self.wake(1, is_news=is_news) > 0 and is_news
        del self._waiting[waiter]
        return False

    def wake(self, consumers: int, *, is_news: bool = False) -> int:
        """Wake the first ones; return how many fewer there were."""
        while consumers > 0 and self._waiting:
            waiter, _ = self._waiting.popitem(last=False)
            waiter.set_result(is_news)
            consumers -= 1
        if consumers > 0:
            self.doubt()
        return consumers

    def wake_more(self) -> None:
        """Wake two, where one has found as much as it asked for: soon all look who wait, in one statement."""
        for _ in range(min(2, len(self._waiting))):
            self.wake(1)

    def doubt(self) -> None:
        """There may be messages of which nobody was told."""
        self.may_have_more = True
        self.doubts += 1

    def wake_in(self, seconds: float) -> bool:
        """Wake the first one in so many seconds; return False where an earlier time was known."""
        loop = asyncio.get_running_loop()
        when = loop.time() + seconds
        if self._timer is not None and self._wakes_at <= when:
            return False
        self.forget_time()
        self._wakes_at = when
        self._timer = loop.call_at(when, self._time_has_come)
        return True

    def _time_has_come(self) -> None:
        self._timer = None
        self.doubt()
        self.wake(1)
        self._on_time()

    def forget_time(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class WaitingRoom:
    """Dequeues for consumers, and lets them wait where there is nothing yet."""

    def __init__(
        self, database: Database, calls: Calls, *, max_waiting: int = 10_000, tally: Tally | None = None
    ) -> None:
        self._database = database
        self._tally = Tally() if tally is None else tally
        self._calls = calls
        self._max_waiting = max_waiting
        self._waiting = 0
        # A line is opened for the first one and forgotten at the next look at all, when nobody stands in it.
        self._lines: dict[str, Line] = {}
        self._to_look_at: set[str] = set()
        self._look_soon = asyncio.Event()
        self._background: set[asyncio.Task[Any]] = set()
        self._is_closing = False
        # How often all who waited were sent away.
        self._sent_away = 0
        self.tell_others: Callable[[News], None] = lambda _: None

    @property
    def waiting(self) -> int:
        """How many consumers wait now."""
        return self._waiting

    async def dequeue(
        self,
        queue: str,
        max_messages: int,
        visibility_timeout: float | None,
        wait: float,
        *,
        at_most_once: bool = False,
        takes_place: bool = True,
        while_allowed: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> Delivery:
        """Take messages; where there are none, wait up to `wait` seconds. Raises QueueNotFound, Overloaded.

        Who comes when others wait already does not look first: they have found nothing, and it would be theirs. A
        consumer of the broker's own takes no place from its clients. What `while_allowed` raises ends the wait.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        has_place = has_looked = is_woken = is_news = False
        sent_away = self._sent_away
        try:
            while True:
                delivery = NOTHING
                line = self._line(queue)
                waiter = line.enter() if wait > 0 and not self._is_closing else None
                try:
                    if waiter is None or is_woken or len(line) == 1 or loop.time() >= until:
                        has_looked = True
                        delivery = await self._take(
                            queue, max_messages, visibility_timeout, at_most_once=at_most_once, is_news=is_news
                        )
                        if delivery.messages or waiter is None or loop.time() >= until:
                            return delivery
                        self._look_at(queue)
                    if takes_place and not has_place:
                        self._take_place()
                        has_place = True
                    async with while_allowed():  # and not while it takes: what is taken at most once would be lost
                        await asyncio.wait({waiter}, timeout=until - loop.time())
                    is_woken = waiter.done()
                    if self._is_closing or self._sent_away > sent_away or (has_looked and not is_woken):
                        return delivery
                    if is_woken:
                        is_news = waiter.result()
                        waiter = None  # the wake-up is used by the next look
                finally:
                    if waiter is not None and self._line(queue).leave(waiter):
                        self.tell_others(News(queue, 0.0, 1))
        finally:
            self._waiting -= has_place

    def _take_place(self) -> None:
        if self._waiting >= self._max_waiting:
            raise Overloaded(
                limit=self._max_waiting, what="waiting consumers", retry_after=1, counted_as="waiting_consumers"
            )
        self._waiting += 1

    def _line(self, queue: str) -> Line:
        line = self._lines.get(queue)
        if line is None:
            line = self._lines[queue] = Line(lambda: self._look_at(queue))
        return line

    async def _take(
        self, queue: str, max_messages: int, visibility_timeout: float | None, *, at_most_once: bool, is_news: bool
    ) -> Delivery:
        """Dequeue once; `is_news` where news were used up for this."""
        line = self._line(queue)
        doubts = line.doubts
        try:
            delivery = await self._calls.dequeue(queue, max_messages, visibility_timeout, at_most_once=at_most_once)
        except (BrokerError, asyncio.CancelledError):
            self._look_at(queue)  # what this one may have been woken for is somebody else's now
            if is_news:
                self.tell_others(News(queue, 0.0, 1))
            raise
        if line is not self._line(queue):
            doubts = -1  # it was forgotten meanwhile; the new one doubts for reasons of its own
        self._taken(queue, delivery, max_messages, doubts)
        return delivery

    def _taken(self, queue: str, delivery: Delivery, max_messages: int, doubts: int) -> None:
        """See to what a look at the queue means for those who wait; `doubts` are the line's before the look."""
        line = self._line(queue)
        if delivery.messages:
            line.in_vain = 0
        if delivery.is_cut:
            line.doubt()
        if len(delivery.messages) < max_messages and not delivery.is_cut:
            if line.doubts == doubts:
                line.may_have_more = False
        elif line.may_have_more:
            line.wake_more()
        if delivery.leases and delivery.lease_seconds < SHORT_LEASE_SECONDS:
            self.tell(News(queue, delivery.lease_seconds, len(delivery.leases)))

    async def give_back(self, queue: str, delivery: Delivery) -> None:
        """Undo a delivery whose answer did not reach the client. Where that fails the leases end by themselves."""
        if not delivery.leases:
            return
        try:
            given_back = await self._database.write(lambda connection: leases.give_back(connection, delivery.leases))
        except BrokerError as error:
            log.warning("leases not given back messages=%d reason=%s", len(delivery.leases), error.type)
            return
        if given_back:
            self._tally.add(queue, RETURNED, given_back)
        self.tell(News(queue, 0.0, len(delivery.leases)))

    def give_back_soon(self, queue: str, delivery: Delivery) -> None:
        """Give back in a task of its own, for a caller that is being cancelled."""
        if delivery.leases:
            self._in_background(self.give_back(queue, delivery))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def tell(self, news: News) -> None:
        """Wake those who wait here, and let the other brokers know of what is left for them."""
        left = self.hear(news)
        if left:
            self.tell_others(news._replace(messages=left))

    def hear(self, news: News) -> int:
        """Take in news of this broker or of another; return for how many messages nobody waits here."""
        line = self._lines.get(news.queue)
        if line is None:
            return news.messages
        line.in_vain = 0
        if news.seconds <= 0:
            return line.wake(news.messages, is_news=True)
        line.wake_in(news.seconds)
        return news.messages

    def look_at_all(self) -> None:
        """Look soon at every queue that somebody waits for: news may have been lost."""
        self._to_look_at.update(self._lines)
        self._look_soon.set()

    def _look_at(self, queue: str) -> None:
        self._to_look_at.add(queue)
        self._look_soon.set()

    async def run(self) -> None:
        """Look once a second, and whenever somebody begins to wait or was woken by the clock, until cancelled."""
        loop = asyncio.get_running_loop()
        next_look_at_all = loop.time() + LOOK_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(next_look_at_all):
                    await self._look_soon.wait()
                    await asyncio.sleep(GATHER_SECONDS)
            except TimeoutError:
                self._forget_empty_lines()
                self._to_look_at.update(self._lines)
                next_look_at_all = loop.time() + LOOK_SECONDS
            self._look_soon.clear()
            queues = sorted(queue for queue in self._to_look_at if self._lines.get(queue))
            self._to_look_at.clear()
            if queues:
                await self._look(queues)

    def _forget_empty_lines(self) -> None:
        for queue in [queue for queue, line in self._lines.items() if not line]:
            self._lines.pop(queue).forget_time()

    async def _look(self, queues: list[str]) -> None:
        try:
            found = await self._next_visible(queues)
        except BrokerError as error:
            log.warning("no look at the queues reason=%s", error.type)
            return
        for queue in queues:
            line = self._lines.get(queue)
            if line is None:
                continue
            if queue not in found:
                line.wake(len(line))  # the queue is gone: they shall hear of it
            elif (seconds := found[queue]) is not None:
                self._expect(line, seconds)

    async def _next_visible(self, queues: list[str]) -> dict[str, float | None]:
        """Ask for all these queues, from the low-water hints on or, where they are doubted, from the beginning."""
        low_water = self._calls.low_water
        doubted = [queue for queue in queues if low_water.is_in_doubt(queue)]
        floors = {queue: UNKNOWN if queue in doubted else low_water.floors(queue) for queue in queues}
        began_at = time.monotonic()
        found = await self._database.read(lambda connection: handing_out.next_visible(connection, queues, floors))
        low_water.looked_from_the_beginning(doubted, time.monotonic() - began_at)
        for queue in doubted:
            seconds = found.get(queue)
            if seconds is not None and seconds <= 0:
                low_water.forget_queue(queue)
        return found

    def _expect(self, line: Line, seconds: float) -> None:
        if seconds > 0:
            line.wake_in(seconds)
            return
        # Ready, and yet nobody could take it when they looked: locked for the moment.
        if line.wake_in(min(RETRY_SECONDS * 2**line.in_vain, LOOK_SECONDS) if line.in_vain else 0):
            line.in_vain = min(line.in_vain + 1, 10)

    def send_away(self) -> None:
        """Give everybody who waits an empty answer."""
        self._sent_away += 1
        for line in self._lines.values():
            line.wake(len(line))

    def close(self) -> None:
        """Give everybody who waits an empty answer, and let nobody wait any more."""
        self._is_closing = True
        for line in self._lines.values():
            line.forget_time()
            line.wake(len(line))

    async def settle(self, timeout: float) -> None:
        """Finish what is to be undone for clients that hung up, as far as that is possible in so many seconds."""
        if self._background:
            await asyncio.wait(set(self._background), timeout=timeout)
