"""What a process knows of a url that is pushed to: whether it may be sent messages now, and how many at one time.

Each process finds out for itself; what concerns all of them (that an endpoint fails, is well again, wants a pause, or
no more) it notes in the database, where the others learn it. Times are the event loop's.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from yarl import URL

from broker.receivers import Answer, Outcome
from broker.storage.subscriptions import PushTarget

# An endpoint is only probed after so many failures in a row.
FAILURES = 5
# An endpoint that is new is sent so many messages at one time. Each that it takes is one more, and where it does not
# answer, or asks for patience, it is half as many: so a dead one soon has one place, and a busy one what it can bear.
FIRST_AT_ONCE = 2
# Pauses that differ by less are one.
SAME_PAUSE_SECONDS = 1.0


@dataclass(eq=False)
class Endpoint:
    """A url that is pushed to. `most_at_once` is the limit for messages that are sent and not answered."""

    target: PushTarget
    url: URL
    most_at_once: int
    at_once: int = FIRST_AT_ONCE
    sent: int = 0
    # Messages that hold places, until the database knows what came of them; probes hold none.
    places: int = 0
    is_failing: bool = False
    has_ended: bool = False
    is_probed: bool = False
    paused_until: float = 0.0
    failures_in_a_row: int = 0
    consumer: asyncio.Task[None] | None = None
    # Set whenever a message has been answered.
    has_answered: asyncio.Event = field(default_factory=asyncio.Event)
    # What was found out here is noted in order, and not overruled by what the database said before it knew.
    notes: asyncio.Lock = field(default_factory=asyncio.Lock)
    pending_notes: int = 0
    noted_at: float = 0.0

    def learn(self, target: PushTarget, read_at: float) -> None:
        """Take in what the database said when it was asked."""
        self.target = target
        if self.pending_notes or self.noted_at > read_at:
            return
        if self.is_failing and not target.is_failing:
            self.failures_in_a_row = 0
        self.is_failing = target.is_failing
        self.paused_until = read_at + target.paused_for if target.paused_for else 0.0

    def may_be_sent_messages(self, now: float) -> bool:
        """Whether messages may be leased for it, other than to probe."""
        return not (self.has_ended or self.is_failing or self.paused_until > now)

    @property
    def room(self) -> int:
        """How many more messages it may be sent."""
        return min(self.at_once, self.most_at_once) - self.sent

    @property
    def is_half_free(self) -> bool:
        """Whether it may be sent half as many messages as it may have, or more."""
        return self.room * 2 >= min(self.at_once, self.most_at_once)

    def has_taken_one(self) -> bool:
        """Count a success; return whether it failed until now."""
        self.failures_in_a_row = 0
        self.at_once = min(self.at_once + 1, self.most_at_once)
        is_well_again, self.is_failing = self.is_failing, False
        return is_well_again

    def has_failed(self, answer: Answer) -> bool:
        """Count a failure; return whether it is taken to fail from now on."""
        self.failures_in_a_row += 1
        if answer.outcome is not Outcome.REFUSED or answer.retry_after is not None:
            self.at_once = max(1, self.at_once // 2)
        if self.is_failing or self.failures_in_a_row < FAILURES:
            return False
        self.is_failing = True
        return True

    def pause(self, until: float) -> bool:
        """Leave it alone until then; return False where it is left alone as long already."""
        if until < self.paused_until + SAME_PAUSE_SECONDS:
            return False
        self.paused_until = until
        return True
