"""The nouns of the domain as they are handed from storage to methods to the wire.

Shapes are the contract's, field by field and in its order. Bodies are `msgspec.Raw`: the bytes that
the producer sent, never parsed.
"""

from __future__ import annotations

import struct
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64, crc32
from datetime import UTC, datetime, timedelta

import msgspec

from broker.errors import InvalidReceipt

MAX_BODY_BYTES_PER_ANSWER = 8 * 2**20
NO_TIME = timedelta(0)

# The lanes of a queue: what was never handed out, what was handed out before, and what was for the last time.
FRESH = 0
RETURNED = 1
LAST = 2


class NewMessage(msgspec.Struct, frozen=True):
    """A message to store. `delay` and `ttl` in seconds, None for the queue's; `body` and `headers` are JSON."""

    body: str
    headers: str | None
    sender: str | None
    delay: float | None
    ttl: float | None
    idempotency_key: str | None = None


class Lease(msgspec.Struct, frozen=True):
    """One delivery of one message. `token` is random, so that a receipt cannot be guessed: a UUID's 16 bytes."""

    queue_id: int
    id: int
    token: bytes


# A receipt is a lease in 32 bytes: queue, message, token, and a checksum, so that a receipt cut short or
# mistyped is told apart from one whose message is gone. It is written in base64 for URLs, without padding.
_LEASE = struct.Struct(">IQ16s")
_SEALED_LEASE = struct.Struct(">IQ16sI")
_RECEIPT_LENGTH = 43
_TO_URL = bytes.maketrans(b"+/", b"-_")
# What does not belong into a receipt becomes what does not belong into base64.
_FROM_URL = bytes.maketrans(b"-_+/=", b"+/!!!")
# The last of 43 characters carries four bits of the 256; the other two are nothing.
_LAST_CHARACTERS = frozenset("AEIMQUYcgkosw048")


def receipt_of(lease: Lease) -> str:
    """Return the receipt that names this lease: 43 characters of A-Z a-z 0-9 - _."""
    packed = _LEASE.pack(lease.queue_id, lease.id, lease.token)
    sealed = packed + crc32(packed).to_bytes(4, "big")
    return b2a_base64(sealed, newline=False)[:_RECEIPT_LENGTH].translate(_TO_URL).decode()


def lease_of(receipt: str) -> Lease:
    """Return the lease that a receipt names.

    Raises InvalidReceipt where its form alone shows that this broker did not make it.
    """
    if len(receipt) != _RECEIPT_LENGTH or not receipt.isascii() or receipt[-1] not in _LAST_CHARACTERS:
        raise InvalidReceipt
    try:
        sealed = a2b_base64(receipt.encode().translate(_FROM_URL) + b"=", strict_mode=True)
    except Base64Error:
        raise InvalidReceipt from None
    queue_id, message_id, token, checksum = _SEALED_LEASE.unpack(sealed)
    if queue_id >= 2**31 or message_id >= 2**63 or crc32(memoryview(sealed)[:-4]) != checksum:
        raise InvalidReceipt
    return Lease(queue_id, message_id, token)


def message_id_of(number: int) -> str:
    """Return a message's id as clients see it: 16 hexadecimal digits, in the order of the numbers."""
    return f"{number:016x}"


def message_number_of(message_id: str) -> int | None:
    """Return the number behind a message's id, or None where no message can have this id."""
    if len(message_id) != 16 or not all(digit in "0123456789abcdef" for digit in message_id):
        return None
    number = int(message_id, 16)
    return number if number < 2**63 else None


def timestamp(moment: datetime) -> str:
    """Return RFC 3339 in UTC with microseconds, always all six."""
    if moment.utcoffset() != NO_TIME:
        moment = moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds")[:26] + "Z"


def timestamp_or_null(moment: datetime | None) -> str | None:
    """As `timestamp`; None stays None."""
    return None if moment is None else timestamp(moment)


def number(value: float) -> float | int:
    """Return a number as a person would write it: 30, not 30.0."""
    return int(value) if value == int(value) else value


class Message(msgspec.Struct):
    """A message as it is delivered. The last two are there where it is a copy of what was published."""

    message_id: str
    queue: str
    receipt: str | None
    body: msgspec.Raw
    headers: msgspec.Raw
    sender: str | None
    receive_count: int
    enqueued_at: str
    first_received_at: str | None
    visible_at: str
    expires_at: str | None
    dead_letter: msgspec.Raw | None = None
    topic: str | msgspec.UnsetType = msgspec.UNSET
    published_id: str | msgspec.UnsetType = msgspec.UNSET


class StoredMessage(msgspec.Struct):
    """A message as it is seen from outside. The last two are there where it is a copy of what was published."""

    message_id: str
    queue: str
    status: str
    body: msgspec.Raw
    headers: msgspec.Raw
    sender: str | None
    receive_count: int
    enqueued_at: str
    first_received_at: str | None
    visible_at: str
    expires_at: str | None
    dead_letter: msgspec.Raw | None = None
    topic: str | msgspec.UnsetType = msgspec.UNSET
    published_id: str | msgspec.UnsetType = msgspec.UNSET


class Counts(msgspec.Struct):
    """Messages of one queue by status."""

    ready: int
    delayed: int
    leased: int
    total: int
    exact: bool


class Queue(msgspec.Struct):
    """A queue and its attributes. Times in seconds. The last two are there when they were asked for."""

    queue: str
    visibility_timeout: float
    message_ttl: float | None
    delay: float
    max_message_bytes: int
    max_receives: int | None
    dead_letter_queue: str | None
    idempotency_window: float
    max_messages: int | None
    paused: bool
    created_at: str
    updated_at: str
    counts: Counts | msgspec.UnsetType = msgspec.UNSET
    oldest_ready_age: float | None | msgspec.UnsetType = msgspec.UNSET


class Topic(msgspec.Struct):
    """A topic. The last two are there when they were asked for: its subscriptions, and the messages that it stores."""

    topic: str
    delivery: str
    created_at: str
    subscriptions: int | msgspec.UnsetType = msgspec.UNSET
    messages: int | msgspec.UnsetType = msgspec.UNSET


class Subscription(msgspec.Struct):
    """Who gets copies of what is published to a topic. `secret` is there once, when the subscription is made."""

    subscription_id: str
    topic: str
    name: str
    queue: str
    url: str | None
    filter: dict[str, list[str]] | None
    state: str
    secret: str | None = None
