"""The low-water hint: below which time a lane of a queue holds nothing any more.

What was taken from a lane leaves dead entries in its index. Vacuum removes them, but not while some session holds
an old snapshot; without a hint every dequeue would walk past all of them again. The hint of a lane is a time that
is not later than the `visible_at` of any message that can ever be handed out from it. Each broker finds its own,
from what its own statements have seen; brokers need not agree on it.

Why it is safe. A statement that looks at a lane sees, as of its snapshot, the first message in it that is ready,
also one that somebody else has locked: what lies before it is gone. A message which the snapshot does not show can
still appear below that time only if the transaction that brings it was under way. So:

- Whoever writes a `visible_at` takes the time after his transaction has got its id (`pg_current_xact_id()` or a row
  lock comes first, `clock_timestamp()` then).
- Every dequeue notes the time of its statement, and then takes its snapshot, whose xmax is above every id that was
  given out so far. So a transaction with an id below that xmax is the only one whose message can carry an earlier
  time; and when a later snapshot's xmin has reached that xmax, every such transaction has ended, and the snapshot
  shows what it brought. The time of the newest such note is the bound.
- hint = the earlier of the first ready message and the bound, less a margin for clocks that are corrected.

A transaction that only reads has no id and holds nothing back; one that writes holds the bound back while it lasts,
which costs time and never a message. A clock that was set back is noticed when a statement that was sent later
reports an earlier time. For what is left (a step that nobody could see, messages written by hand) each broker looks
from the very beginning after every lost connection, once a minute, and where a queue seems empty.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from broker.errors import BrokerError
from broker.storage.database import Connection, Database

log = logging.getLogger("broker.low_water")

# What became ready within this time and was taken is walked past by every dequeue while an old snapshot is held: 300
# entries at 15,000 messages a second, a tenth of a millisecond.
MARGIN = timedelta(seconds=0.02)
# Notes closer to each other than this are not worth keeping.
NOTE_EVERY = timedelta(seconds=0.005)
MOST_NOTES = 512
MOST_QUEUES = 10_000
LOOK_FROM_THE_BEGINNING_SECONDS = 60.0
QUEUES_PER_LOOK = 100
# A queue that seems empty is looked at once more from the very beginning, unless that has just cost more than one
# part in so many of the time.
DOUBT_SHARE = 10


class Floors(NamedTuple):
    """The hints of a queue's two lanes; None where nothing is known yet, which is minus infinity."""

    fresh: datetime | None
    returned: datetime | None


class View(NamedTuple):
    """What one statement saw: its time, and the bounds of its snapshot."""

    now: datetime
    xmin: int
    xmax: int


class Before(NamedTuple):
    """The newest time of the database that had been seen, and how many connections had been lost."""

    newest: datetime | None
    lost_connections: int


UNKNOWN = Floors(None, None)


class LowWater:
    """The hints of this broker."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._floors: dict[str, Floors] = {}
        self._doubt_again_at: dict[str, float] = {}
        self._notes: deque[tuple[datetime, int]] = deque(maxlen=MOST_NOTES)
        self._newest: datetime | None = None
        self._lost_connections = database.lost_connections

    def before(self) -> Before:
        """Return what is to be known of the time before a statement is sent, when it has been answered."""
        return Before(self._newest, self._database.lost_connections)

    def floors(self, queue: str) -> Floors:
        """Return where to begin in the lanes of a queue."""
        if self._lost_connections != self._database.lost_connections:
            self.forget()
        return self._floors.get(queue, UNKNOWN)

    def is_in_doubt(self, queue: str) -> bool:
        """Whether a queue that seems empty is to be looked at from the very beginning."""
        return self.floors(queue) != UNKNOWN and self.may_be_doubted(queue)

    def may_be_doubted(self, queue: str) -> bool:
        """Whether enough time has passed since a look from the very beginning."""
        return time.monotonic() >= self._doubt_again_at.get(queue, 0)

    def looked_from_the_beginning(self, queues: Iterable[str], seconds: float) -> None:
        """Doubt these queues no more for a while, after a look that took so long."""
        if len(self._doubt_again_at) > MOST_QUEUES:
            self._doubt_again_at.clear()
        again_at = time.monotonic() + DOUBT_SHARE * seconds
        self._doubt_again_at.update(dict.fromkeys(queues, again_at))

    def forget(self) -> None:
        """Know nothing any more: the database may be another one now, or its clock."""
        self._lost_connections = self._database.lost_connections
        self._floors.clear()
        self._doubt_again_at.clear()
        self._notes.clear()
        self._newest = None

    def forget_queue(self, queue: str) -> None:
        """Look at a queue from the very beginning the next time."""
        self._floors.pop(queue, None)

    def learn(self, view: View, before: Before, first_ready: Mapping[str, tuple[Floors, Floors]]) -> None:
        """Take in what a statement has seen.

        `before` was taken when it was sent. `first_ready` has for each queue the floors from
        which the statement looked, and the first ready message in each lane, None where there was none.
        """
        if before.newest is not None and view.now < before.newest:
            log.warning("the clock of the database was set back")
            self.forget()
        if before.lost_connections != self._database.lost_connections:
            return  # it may have seen another database
        self._newest = view.now if self._newest is None else max(self._newest, view.now)
        bound = self._bound(view)
        self._note(view)
        if bound is None:
            return
        for queue, (used, first) in first_ready.items():
            known = self._floors.get(queue, UNKNOWN)
            self._floors[queue] = Floors(
                _raised(known.fresh, used.fresh, first.fresh, bound),
                _raised(known.returned, used.returned, first.returned, bound),
            )
        if len(self._floors) > MOST_QUEUES:
            self._floors.clear()

    def _bound(self, view: View) -> datetime | None:
        """Return up to which time everything that was ever written is in this view."""
        notes = self._notes
        while len(notes) > 1 and notes[1][1] <= view.xmin:
            notes.popleft()
        if notes and notes[0][1] <= view.xmin:
            return min(notes[0][0], view.now) - MARGIN
        return None

    def _note(self, view: View) -> None:
        if not self._notes or view.now - self._notes[-1][0] >= NOTE_EVERY:
            if len(self._notes) == MOST_NOTES:
                # A transaction lasts: keep notes further apart, the oldest and the newest among them.
                self._notes = deque(list(self._notes)[::2], maxlen=MOST_NOTES)
            self._notes.append((view.now, view.xmax))

    async def run(self) -> None:
        """Look from the very beginning once a minute, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_FROM_THE_BEGINNING_SECONDS)
            queues = list(self._floors)
            for start in range(0, len(queues), QUEUES_PER_LOOK):
                await self.look_from_the_beginning(queues[start : start + QUEUES_PER_LOOK])

    async def look_from_the_beginning(self, queues: Sequence[str]) -> None:
        """Lower the hints of these queues where a message lies below them."""
        try:
            found = await self._database.read(lambda connection: first_ready(connection, queues))
        except BrokerError as error:
            log.warning("hints are forgotten reason=%s", error.type)
            self.forget()
            return
        for queue, first in found.items():
            known = self._floors.get(queue)
            if known is not None:
                self._floors[queue] = Floors(*map(_lowered, known, first))


def _raised(known: datetime | None, used: datetime | None, first: datetime | None, bound: datetime) -> datetime | None:
    """Return the new hint of a lane of which one statement saw the part from `used` on."""
    if used is not None and (known is None or used > known):
        return known  # lowered meanwhile: the statement did not see what that was for
    seen = bound if first is None else min(first, bound)
    return seen if known is None else max(known, seen)


def _lowered(known: datetime | None, first: datetime | None) -> datetime | None:
    return known if known is None or first is None else min(known, first)


# No locks. Walks both lanes from their very beginning to the first message that is ready.
_FIRST_READY = """
SELECT
    q.name,
    (
        SELECT m.visible_at
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint AND m.lane >= 0
            AND m.visible_at <= statement_timestamp()
            AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())
        ORDER BY m.visible_at, m.id
        LIMIT 1
    ),
    (
        SELECT m.visible_at
        FROM broker.messages m
        WHERE (m.queue_id * 4::bigint + m.lane) = q.id * 4::bigint + 1 AND m.lane >= 0
            AND m.visible_at <= statement_timestamp()
            AND (m.expires_at IS NULL OR m.expires_at > statement_timestamp())
        ORDER BY m.visible_at, m.id
        LIMIT 1
    )
FROM unnest(%(queues)b::text[]) AS w (name)
JOIN broker.queues q ON q.name = w.name AND q.deleted_at IS NULL
"""


async def first_ready(connection: Connection, queues: Sequence[str]) -> dict[str, Floors]:
    """Return for each queue when the first ready message of each lane became visible, None where there is none."""
    cursor = await connection.execute(_FIRST_READY, {"queues": list(queues)})
    return {name: Floors(fresh, returned) for name, fresh, returned in await cursor.fetchall()}
