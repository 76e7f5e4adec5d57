"""Places for messages on their way: so many in all, shared so that who is slow cannot keep them from the others.

Whoever holds as many places as are free gets no more. So one who takes all that he can leaves half of them, and of n
who do so and now and then give one back each soon has one in n + 1: as many are left for the next one who comes. Who
waits is served in order, and is given the place, not told to try again: a place that comes free is never forgotten.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Protocol


class Holder(Protocol):
    """Somebody who holds places."""

    places: int


class Places:
    """So many places in all."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._free = total
        self._waiting: OrderedDict[Holder, asyncio.Future[None]] = OrderedDict()

    @property
    def taken(self) -> int:
        """How many places are held."""
        return self._total - self._free

    def room(self, holder: Holder) -> int:
        """Return how many places one could take now, one after the other."""
        # The n-th is to be had where holder.places + n - 1 < free - (n - 1).
        return max(0, (self._free - holder.places + 1) // 2)

    async def take(self, holder: Holder) -> None:
        """Take a place as soon as there is one. A holder waits for one at a time."""
        if holder.places < self._free:
            self._grant(holder)
            return
        granted = self._waiting[holder] = asyncio.get_running_loop().create_future()
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._waiting.pop(holder, None)
            else:
                self.release(holder)  # it was granted, and nobody is there to use it
            raise

    def release(self, holder: Holder) -> None:
        """Give a place back, and on to those who wait."""
        holder.places -= 1
        self._free += 1
        while served := next((each for each in self._waiting if each.places < self._free), None):
            granted = self._waiting.pop(served)
            if not granted.done():  # or its holder has just ceased to wait
                self._grant(served)
                granted.set_result(None)

    def _grant(self, holder: Holder) -> None:
        holder.places += 1
        self._free -= 1
