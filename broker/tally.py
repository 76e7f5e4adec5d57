"""What this process has done to messages, by minute and queue, until it is appended to the database.

Everybody who runs a statement adds here what it did; `statistics` takes it from here. To add is to add to a number in
a list: no statement, no lock, nothing that waits.

Promises: what was added is handed out by `take` exactly once, in the minute in which it was added, on the database's
clock as it was last heard. Memory is bounded: where too many queues would have to be told apart, and while the database
is away for long, further ones are counted together, as messages of no queue. Does not outlive the process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime

ENQUEUED, DELIVERED, DELETED, RETURNED, DEAD, EXPIRED = KINDS = range(6)
# Queues and minutes that are told apart, in a few hundred bytes each.
MOST_ROWS = 50_000
# Minutes that are told apart: as many as can be asked for. Older ones would not be shown.
MOST_MINUTES = 1_440

# A queue's name, or its id where that is what was known. None: no queue that could be told.
QueueKey = str | int | None
# By minute since 1970 and queue, in the order of KINDS.
Rows = dict[tuple[int, QueueKey], list[int]]


class Tally:
    """Counts messages by minute, queue and kind."""

    def __init__(self) -> None:
        self._rows: Rows = {}
        self._minute = 0
        # By our clock.
        self._minute_ends_at = 0.0
        # Until the database has said what time it is, the system's clock is taken for its.
        self._offset = time.time() - time.monotonic()
        # When this process has last counted leases that had ended, on the database's clock. What has ended before is
        # counted; of what ended since, the next sweep counts those that nobody has taken again by then.
        self.swept_at = datetime.max.replace(tzinfo=UTC)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, queue: QueueKey, kind: int, messages: int = 1) -> None:
        """Count messages of a queue, now."""
        now = time.monotonic()
        if now >= self._minute_ends_at:
            self._begin_minute(now)
        key = (self._minute, queue)
        row = self._rows.get(key)
        if row is None:
            row = self._new_row(key)
        row[kind] += messages

    def add_all(self, kind: int, messages: Mapping[str, int] | Mapping[int, int]) -> None:
        """Count messages of several queues, now."""
        for queue, number in messages.items():
            self.add(queue, kind, number)

    def _begin_minute(self, now: float) -> None:
        self._minute = int((now + self._offset) // 60)
        self._minute_ends_at = (self._minute + 1) * 60 - self._offset

    def _new_row(self, key: tuple[int, QueueKey]) -> list[int]:
        if len(self._rows) >= MOST_ROWS:
            key = (key[0], None)
            if key not in self._rows and len(self._rows) >= MOST_ROWS + MOST_MINUTES:
                del self._rows[min(self._rows, key=_minute_of)]
        return self._rows.setdefault(key, [0] * len(KINDS))

    def hear_time(self, seconds: float) -> None:
        """Take in the time of the database's clock, in seconds since 1970."""
        self._offset = seconds - time.monotonic()
        self._minute_ends_at = 0.0

    def take(self) -> Rows:
        """Return everything that was counted, and count anew."""
        taken, self._rows = self._rows, {}
        return taken

    def put_back(self, rows: Rows) -> None:
        """Count again what was taken and could not be appended."""
        for key, counts in rows.items():
            row = self._rows.get(key)
            if row is None:
                row = self._new_row(key)
            for kind in KINDS:
                row[kind] += counts[kind]

    def forget(self, queue: str) -> None:
        """Let what was counted of a queue be that of no queue: it was deleted, and another may get its name."""
        self.put_back({(key[0], None): self._rows.pop(key) for key in list(self._rows) if key[1] == queue})


def _minute_of(key: tuple[int, QueueKey]) -> int:
    return key[0]
