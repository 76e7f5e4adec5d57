"""What clients did and saw, and the check of it, in the manner of Jepsen's total-queue.

What is published has as many histories as there are subscriptions: of all that was published, what each wants of it.

A history is complete only when the queue was drained to its end afterwards. Every producer sends values that nobody
else sends. What a client was not told (its process was killed, the connection broke) is unknown, and counts neither
as done nor as not done.

Leases are compared on the database's clock, as answers tell it, to the millisecond. Clocks of clients order only
what a delete has promised.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

import msgspec

# Fractions of a second that are lost when a lease's beginning is told from its end.
_CLOCK = timedelta(milliseconds=1)
# Longer than a broker is paused.
READ_WITHIN_SECONDS = 5.0


class Event(msgspec.Struct, tag_field="what", frozen=True, kw_only=True):
    """Something that a client did or was told; `at` in seconds on a clock that all processes share."""

    at: float


class Attempted(Event, tag="attempted", frozen=True, kw_only=True):
    """A producer begins to send these values, and repeats that with the same keys until it is told."""

    values: list[str]


class Acknowledged(Event, tag="acknowledged", frozen=True, kw_only=True):
    """It was told that they are stored; or published, in so many copies."""

    values: list[str]
    message_ids: list[str]
    deliveries: int | None = None


class Refused(Event, tag="refused", frozen=True, kw_only=True):
    """It gives these values up, having been told of each attempt that certainly nothing was done."""

    values: list[str]


class Delivered(Event, tag="delivered", frozen=True, kw_only=True):
    """A consumer, which asked at `asked_at`, was given a message for `visibility_timeout` seconds.

    `published_id` is the id that the publisher was told, of a copy.
    """

    asked_at: float
    value: str
    message_id: str
    receipt: str
    visible_at: datetime
    visibility_timeout: float
    published_id: str | None = None

    @property
    def leased_at(self) -> datetime:
        return self.visible_at - timedelta(seconds=self.visibility_timeout)


class Deleting(Event, tag="deleting", frozen=True, kw_only=True):
    """A consumer begins to delete what it was given."""

    receipt: str


class Deleted(Event, tag="deleted", frozen=True, kw_only=True):
    """It was told: "deleted", "gone" (it was gone already) or "lease_lost"."""

    receipt: str
    result: str


class Extending(Event, tag="extending", frozen=True, kw_only=True):
    """A consumer begins to let its lease end so many seconds from now; 0 gives the message back."""

    receipt: str
    visibility_timeout: float


class Extended(Event, tag="extended", frozen=True, kw_only=True):
    """It was told when the lease ends; None: the lease is lost."""

    receipt: str
    visible_at: datetime | None


class Broadcast(Event, tag="broadcast", frozen=True, kw_only=True):
    """A topic was broadcast: so many messages, and whether that was all."""

    messages: int
    complete: bool


class Failed(Event, tag="failed", frozen=True, kw_only=True):
    """An attempt failed, which said whether anything may have been done, after so many seconds."""

    method: str
    outcome: str
    type: str
    seconds: float


class Pushed(Event, tag="pushed", frozen=True, kw_only=True):
    """A receiver is sent a message; `push` names this time."""

    push: str
    value: str
    message_id: str


class Answering(Event, tag="answering", frozen=True, kw_only=True):
    """It begins to answer that it has taken it, or that it has not."""

    push: str
    is_taken: bool


class Answered(Event, tag="answered", frozen=True, kw_only=True):
    """The answer is sent."""

    push: str


AnyEvent = (
    Attempted
    | Acknowledged
    | Refused
    | Delivered
    | Deleting
    | Deleted
    | Extending
    | Extended
    | Broadcast
    | Pushed
    | Answering
    | Answered
    | Failed
)


def read(text: bytes) -> list[AnyEvent]:
    """Read events, one a line; the last line of a client that was killed may be half written."""
    whole, _, _ = text.rpartition(b"\n")
    decoder = msgspec.json.Decoder(AnyEvent)
    return [decoder.decode(line) for line in whole.splitlines()]


def wanted(events: Iterable[AnyEvent], suffix: str) -> list[AnyEvent]:
    """Return what publishers did and were told of the values that end so, and nothing of what failed."""
    chosen: list[AnyEvent] = []
    for event in events:
        match event:
            case Attempted() | Refused() | Acknowledged() if event.values[0].endswith(suffix):
                assert len(event.values) == 1, "they are published one by one"
                chosen.append(event)
    return chosen


@dataclass
class Hold:
    """One delivery and what its consumer did with it."""

    delivered: Delivered
    is_deleting: bool = False
    result: str | None = None
    # When its consumer was told that the message is gone.
    gone_at: float = math.inf
    may_be_given_back: bool = False
    # When the lease ends at the earliest.
    ends_at: datetime = field(init=False)

    def __post_init__(self) -> None:
        self.ends_at = self.delivered.visible_at


@dataclass
class Verdict:
    """What a history comes to. All but `recovered` name violations of a promise."""

    attempted: int = 0
    acknowledged: int = 0
    deliveries: int = 0
    # Acknowledged, and never came out.
    lost: list[str] = field(default_factory=list)
    # Came out, and nobody had sent it, or who did was told that it was certainly not stored.
    unexpected: list[str] = field(default_factory=list)
    # Came out under two message ids, or was acknowledged under two.
    stored_twice: list[str] = field(default_factory=list)
    # Handed out while a lease was running.
    leased_twice: list[str] = field(default_factory=list)
    # Handed out although its delete had been answered.
    redelivered_after_delete: list[str] = field(default_factory=list)
    # Came out, though its producer never heard that it was stored.
    recovered: int = 0
    # Handed out once more, because the consumer had given it back.
    given_back: int = 0
    # Handed out once more after its lease, by what became of the lease.
    duplicated: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    slowest_enqueue_seconds: float = 0.0

    @property
    def violations(self) -> dict[str, list[str]]:
        names = ("lost", "unexpected", "stored_twice", "leased_twice", "redelivered_after_delete")
        return {name: values for name in names if (values := getattr(self, name))}

    @property
    def duplicated_share(self) -> float:
        return self.duplicated.total() / max(1, self.deliveries)

    def summary(self) -> dict[str, Any]:
        """Return it as JSON; at most ten of each violation."""
        return {
            "attempted": self.attempted,
            "acknowledged": self.acknowledged,
            "deliveries": self.deliveries,
            **{name: len(values) for name, values in self._lists()},
            "recovered": self.recovered,
            "given_back": self.given_back,
            "duplicated": dict(self.duplicated),
            "duplicated_share": round(self.duplicated_share, 4),
            "slowest_enqueue_seconds": round(self.slowest_enqueue_seconds, 2),
            "failures": dict(self.failures.most_common()),
            "violations": {name: values[:10] for name, values in self.violations.items()},
        }

    def _lists(self) -> list[tuple[str, list[str]]]:
        return [(name, value) for name, value in vars(self).items() if isinstance(value, list)]


def check(events: Iterable[AnyEvent]) -> Verdict:
    """Judge the events of all clients after the queue was drained."""
    verdict = Verdict()
    sent: dict[str, float] = {}
    acknowledged: set[str] = set()
    refused: set[str] = set()
    ids: dict[str, set[str]] = defaultdict(set)
    copies: dict[str, set[str]] = defaultdict(set)
    holds: dict[str, Hold] = {}
    for event in sorted(events, key=lambda event: event.at):
        match event:
            case Attempted():
                sent |= dict.fromkeys(event.values, event.at)
            case Acknowledged():
                acknowledged.update(event.values)
                for value, message_id in zip(event.values, event.message_ids, strict=True):
                    ids[value].add(message_id)
                    slowest = max(verdict.slowest_enqueue_seconds, event.at - sent[value])
                    verdict.slowest_enqueue_seconds = slowest
            case Refused():
                refused.update(event.values)
            case Delivered():
                holds[event.receipt] = Hold(event)
                ids[event.value].add(event.published_id or event.message_id)
                copies[event.value].add(event.message_id)
            case Failed():
                verdict.failures[f"{event.method} {event.type} {event.outcome}"] += 1
            case Broadcast() | Pushed() | Answering() | Answered():
                pass
            case _:
                _note(holds[event.receipt], event)
    came_out = {hold.delivered.value for hold in holds.values()}
    verdict.attempted = len(sent)
    verdict.acknowledged = len(acknowledged)
    verdict.deliveries = len(holds)
    verdict.lost = sorted(acknowledged - came_out)
    verdict.unexpected = sorted(value for value in came_out if value not in sent or value in refused)
    verdict.recovered = len(came_out & sent.keys() - acknowledged - refused)
    verdict.stored_twice = sorted(value for value in ids if len(ids[value]) > 1 or len(copies[value]) > 1)
    _check_leases(verdict, holds.values())
    return verdict


def check_pushes(events: Iterable[AnyEvent], lease_seconds: float, until: float) -> Verdict:
    """Judge what was published and what a receiver was sent of it, after the queue has become empty.

    A message that the receiver has taken, and said so, is sent again only where its broker has died before it had it
    deleted: not before the lease has ended. `until` then: from that time on leases were made to end. What a receiver
    said shortly before it was killed may not have been heard.
    """
    events = sorted(events, key=lambda event: event.at)
    verdict = check(event for event in events if not isinstance(event, Pushed | Answering | Answered))
    pushes = {event.push: event for event in events if isinstance(event, Pushed)}
    taken = {event.push for event in events if isinstance(event, Answering) and event.is_taken}
    told = _heard(events) & taken
    sent = {value for event in events if isinstance(event, Attempted) for value in event.values}
    refused = {value for event in events if isinstance(event, Refused) for value in event.values}
    came = {event.value for event in pushes.values()}
    verdict.deliveries = len(pushes)
    # What came out through no other hands was thought to be lost: it has to have been taken.
    verdict.lost = sorted(set(verdict.lost) - {pushes[push].value for push in taken})
    verdict.unexpected = sorted(value for value in came if value not in sent or value in refused)
    verdict.recovered = len((came & sent) - refused) - len(came & _acknowledged(events))
    ids: dict[str, list[Pushed]] = defaultdict(list)
    for event in pushes.values():
        ids[event.value].append(event)
    for value, of_value in ids.items():
        if len({event.message_id for event in of_value}) > 1:
            verdict.stored_twice.append(value)
        for earlier, later in pairwise(of_value):
            if earlier.push in told and later.at < min(until, earlier.at + lease_seconds):
                verdict.leased_twice.append(f"{value} {earlier.push} {later.push}")
            elif earlier.push in taken:
                verdict.duplicated["its broker did not have it deleted"] += 1
            else:
                verdict.given_back += 1
    return verdict


def _heard(events: Iterable[AnyEvent]) -> set[str]:
    """Return the pushes whose answers have certainly arrived.

    An answer that a broker has not read yet, because it was paused, is lost when the receiver dies: its system then
    resets the connection.
    """
    answered = [event for event in events if isinstance(event, Answered)]
    last_at = {_receiver_of(event.push): event.at for event in answered}
    newest = max(last_at, key=lambda receiver: last_at[receiver], default="")
    return {
        event.push
        for event in answered
        if _receiver_of(event.push) == newest or last_at[_receiver_of(event.push)] - event.at >= READ_WITHIN_SECONDS
    }


def _receiver_of(push: str) -> str:
    return push.rpartition("-")[0]


def _acknowledged(events: Iterable[AnyEvent]) -> set[str]:
    return {value for event in events if isinstance(event, Acknowledged) for value in event.values}


def together(verdicts: Mapping[str, Verdict]) -> Verdict:
    """Return what the histories of several queues come to; what is violated is said to be so of which."""
    total = Verdict()
    for name, verdict in verdicts.items():
        for each in ("attempted", "acknowledged", "deliveries", "recovered", "given_back"):
            setattr(total, each, getattr(total, each) + getattr(verdict, each))
        for each, values in verdict._lists():
            getattr(total, each).extend(f"{name}: {value}" for value in values)
        total.duplicated += verdict.duplicated
        total.failures += verdict.failures
        total.slowest_enqueue_seconds = max(total.slowest_enqueue_seconds, verdict.slowest_enqueue_seconds)
    return total


def _note(hold: Hold, event: Deleting | Deleted | Extending | Extended) -> None:
    """Add to a delivery what its consumer did or was told."""
    match event:
        case Deleting():
            hold.is_deleting = True
        case Deleted():
            hold.result = event.result
            hold.gone_at = math.inf if event.result == "lease_lost" else event.at
        case Extending(visibility_timeout=0):
            hold.may_be_given_back = True
        case Extended(visible_at=datetime() as visible_at) if not hold.may_be_given_back:
            hold.ends_at = visible_at


def _check_leases(verdict: Verdict, holds: Iterable[Hold]) -> None:
    of_message: dict[str, list[Hold]] = defaultdict(list)
    for hold in holds:
        of_message[hold.delivered.message_id].append(hold)
    for message_id, taken in of_message.items():
        taken.sort(key=lambda hold: hold.delivered.leased_at)
        name = f"{taken[0].delivered.value} {message_id}"
        gone_at = min(hold.gone_at for hold in taken)
        if any(hold.delivered.asked_at > gone_at for hold in taken) or any(
            hold.result == "deleted" for hold in taken[:-1]
        ):
            verdict.redelivered_after_delete.append(name)
        for earlier, later in pairwise(taken):
            if earlier.may_be_given_back:
                verdict.given_back += 1
            elif later.delivered.leased_at < earlier.ends_at - _CLOCK:
                verdict.leased_twice.append(name)
            else:
                verdict.duplicated[_reason(earlier)] += 1


def _reason(hold: Hold) -> str:
    """Return why a message whose lease ended had not been deleted."""
    if not hold.is_deleting:
        return "its consumer did not delete it"
    return "its delete came too late" if hold.result == "lease_lost" else "its delete had no known outcome"
