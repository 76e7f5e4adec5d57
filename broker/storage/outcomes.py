"""What a failure of the database means: the one table of what was certainly not done and what may have been.

It is asked by SQLSTATE, then by the class of the SQLSTATE (its first two characters), then by whether a statement had
been sent. The outcome is "none" where PostgreSQL has certainly rolled back, or never saw the statement, and "unknown"
where it may have committed. Whatever only reads has done nothing, however it failed.

docs/reliability.md shows this table; `python docs/generate.py` writes it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from broker.errors import BrokerError, InternalError, Unavailable


class LockedRows(Unavailable):
    """{reason}; try again in a moment.

    Somebody else held a lock for longer than the statement was willing to wait. Nothing was done.
    """


class Moment(Enum):
    """What there is to go by where PostgreSQL reported no SQLSTATE."""

    NO_CONNECTION = "no connection could be made, or none was free, before the deadline"
    LOST_BEFORE_SENDING = "the connection was lost before the statement was sent"
    LOST_AFTER_SENDING = "the connection was lost after the statement was sent"
    LATE_BEFORE_SENDING = "the deadline passed before the statement was sent"
    LATE_AFTER_SENDING = "the deadline passed after the statement was sent"
    NOT_CONFIRMED = "the commit was reported, with a notice that no synchronous standby has confirmed it"
    BREAKER_IS_OPEN = "the circuit breaker is open"
    NOT_UNDERSTOOD = "the answer could not be read"


NONE, UNKNOWN = "none", "unknown"


@dataclass(frozen=True)
class Failure:
    """One line of the table: the outcome of a write that fails like this, and the error that its caller gets."""

    when: str
    outcome: str
    reason: str
    answer: type[BrokerError] = Unavailable
    # It lost against another statement; the same one may be sent again at once.
    lost_race: bool = False

    def error(self, *, is_write: bool = True, **data: Any) -> BrokerError:
        """Return the error for the caller of a write, or of a read; `data` is what else it says."""
        return self.answer(outcome=self.outcome if is_write else NONE, **{"reason": self.reason, **data})


_CANNOT_NOW = "The database cannot do this now"
_WENT_AWAY = "The database went away"

# By SQLSTATE, or by the two characters of its class.
BY_SQLSTATE: Mapping[str, Failure] = {
    "08": Failure("connection exception, as a proxy before PostgreSQL reports it", UNKNOWN, _WENT_AWAY),
    "25006": Failure("read-only transaction: a standby, or a primary that was demoted", NONE, _CANNOT_NOW),
    "40": Failure("transaction rollback", NONE, _CANNOT_NOW),
    "40001": Failure("serialization failure", NONE, _CANNOT_NOW, lost_race=True),
    "40003": Failure("statement completion unknown", UNKNOWN, _WENT_AWAY),
    "40P01": Failure("deadlock", NONE, _CANNOT_NOW, lost_race=True),
    "53": Failure("out of disk, of memory or of connections", NONE, _CANNOT_NOW),
    "55P03": Failure("lock not available", NONE, "Somebody else has locked what this call is about", answer=LockedRows),
    "57": Failure("operator intervention", UNKNOWN, _WENT_AWAY),
    "57014": Failure("the statement was cancelled before its commit", NONE, _CANNOT_NOW),
    "57P01": Failure("the session was terminated, or the server is being stopped", UNKNOWN, _WENT_AWAY),
    "57P02": Failure("another session has crashed, and the server ends all of them", UNKNOWN, _WENT_AWAY),
    "57P03": Failure("the server is starting, stopping or recovering", NONE, _CANNOT_NOW),
    "57P04": Failure("the database was dropped", NONE, _CANNOT_NOW),
    "58": Failure("the system under PostgreSQL failed, 58030 (I/O error) above all", UNKNOWN, _WENT_AWAY),
}

BY_MOMENT: Mapping[Moment, Failure] = {
    moment: Failure(moment.value, outcome, reason, answer)
    for moment, outcome, reason, answer in (
        (Moment.NO_CONNECTION, NONE, "The database cannot be reached", Unavailable),
        (Moment.LOST_BEFORE_SENDING, NONE, _WENT_AWAY, Unavailable),
        (Moment.LOST_AFTER_SENDING, UNKNOWN, _WENT_AWAY, Unavailable),
        (Moment.LATE_BEFORE_SENDING, NONE, "The database did not answer in time", Unavailable),
        (Moment.LATE_AFTER_SENDING, UNKNOWN, "The database did not answer in time", Unavailable),
        (Moment.NOT_CONFIRMED, UNKNOWN, "No synchronous standby has confirmed the commit", Unavailable),
        (Moment.BREAKER_IS_OPEN, NONE, "Nothing is written now", Unavailable),
        (Moment.NOT_UNDERSTOOD, UNKNOWN, "", InternalError),
    )
}

# Constraints, data, syntax, rights: PostgreSQL has refused the statement and rolled it back.
ANY_OTHER_SQLSTATE = Failure(
    "any other error that PostgreSQL reports: constraints (23), data (22), rights and names (42), …",
    NONE,
    "",
    answer=InternalError,
)


def failure(sqlstate: str | None, *, is_lost: bool, is_sent: bool) -> Failure:
    """Return the line of the table for an error; `is_lost` where it says that there is no connection any more."""
    if sqlstate:
        return BY_SQLSTATE.get(sqlstate) or BY_SQLSTATE.get(sqlstate[:2]) or ANY_OTHER_SQLSTATE
    if is_lost:
        return BY_MOMENT[Moment.LOST_AFTER_SENDING if is_sent else Moment.LOST_BEFORE_SENDING]
    return BY_MOMENT[Moment.NOT_UNDERSTOOD]


def late(*, is_sent: bool) -> Failure:
    """Return the line of the table for a call whose deadline has passed."""
    return BY_MOMENT[Moment.LATE_AFTER_SENDING if is_sent else Moment.LATE_BEFORE_SENDING]
