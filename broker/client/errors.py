"""What a call can end with: every failure is a `BrokerError` that says whether anything was done.

| exception | what is known |
|---|---|
| `OutcomeUnknown` | the call may have been carried out; under its `idempotency_key` it can be repeated |
| any other `BrokerError` | certainly nothing was done |
| `ConnectionFailed` | no answer of a broker came; `ConnectionLost`, where it is an `OutcomeUnknown` too |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BrokerError(Exception):
    """A call failed; `code`, `type`, `retryable`, `outcome` and `data` say how.

    With `outcome` "none" certainly nothing was done; with "unknown" it may have been.
    """

    def __init__(self, code: int, message: str, data: Mapping[str, Any]) -> None:
        super().__init__(code, message, data)
        self.code = code
        self.message = message
        self.data = data
        self.type: str = data.get("type", "internal_error")
        self.retryable: bool = data.get("retryable", False)
        self.outcome: str = data.get("outcome", "unknown")

    def __str__(self) -> str:
        return f"{self.message} ({self.type}, {self.code})"


class OutcomeUnknown(BrokerError):
    """The call may have been carried out, and nobody can know: the answer was lost, or the broker could not tell.

    `idempotency_key` is the key of an `enqueue` or a `publish`, `idempotency_keys` are those of each message of an
    `enqueue_batch`: who repeats the call with them, within the queue's `idempotency_window`, stores nothing twice.
    """

    idempotency_keys: tuple[str, ...] = ()

    @property
    def idempotency_key(self) -> str | None:
        """The key, where there is one and no more."""
        return self.idempotency_keys[0] if len(self.idempotency_keys) == 1 else None


class ConnectionFailed(BrokerError):
    """No answer of a broker came, and nothing was done: nothing was sent, or all that was asked for was to read."""


class ConnectionLost(ConnectionFailed, OutcomeUnknown):
    """No answer of a broker came after the call was sent, so that it may have been carried out."""


class QueueNotFound(BrokerError):
    """There is no such queue."""


class QueueFull(BrokerError):
    """The queue holds its `max_messages`, and went on doing so until the client's deadline."""


class LeaseLost(BrokerError):
    """The lease is over: somebody else has, or had, the message."""


class Forbidden(BrokerError):
    """The token may not do this, or there is none where one is needed."""


class IdempotencyConflict(BrokerError):
    """The key was used for another body."""


_BY_TYPE: Mapping[str, type[BrokerError]] = {
    "queue_not_found": QueueNotFound,
    "queue_full": QueueFull,
    "lease_lost": LeaseLost,
    "forbidden": Forbidden,
    "idempotency_conflict": IdempotencyConflict,
}


def error_of(code: int, message: str, data: Mapping[str, Any]) -> BrokerError:
    """Return the exception for an error of a broker."""
    return _BY_TYPE.get(data.get("type", ""), BrokerError)(code, message, data)


def no_answer(message: str, *, outcome: str, retryable: bool = True) -> ConnectionFailed:
    """Return the exception for an answer that did not come, or was no broker's."""
    return ConnectionFailed(-32001, message, {"type": "unavailable", "retryable": retryable, "outcome": outcome})


def in_doubt(error: BrokerError, keys: tuple[str, ...]) -> OutcomeUnknown:
    """Return the exception for a call that ended with `error`, and of which an attempt may have been carried out."""
    kind = ConnectionLost if isinstance(error, ConnectionFailed) else OutcomeUnknown
    doubt = kind(error.code, error.message, {**error.data, "outcome": "unknown"})
    doubt.idempotency_keys = keys
    return doubt
