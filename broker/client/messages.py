"""What goes in and comes out: messages, and what can be said about messages, queues, subscriptions and consumers.

Names, units (seconds) and limits are those of `rpc_schema.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from functools import cached_property
from typing import Any, TypedDict

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """A message as it was delivered, or as `list_messages` shows it; only the latter has a `status`.

    `receipt` is None with at-most-once delivery, and where nothing was delivered. `topic` and `published_id` are None
    unless it is a copy of what was published.
    """

    message_id: str
    queue: str
    receipt: str | None = None
    body_json: msgspec.Raw = msgspec.field(name="body")
    headers: dict[str, str]
    sender: str | None
    receive_count: int
    enqueued_at: datetime
    first_received_at: datetime | None
    visible_at: datetime
    expires_at: datetime | None
    dead_letter: dict[str, Any] | None
    topic: str | None = None
    published_id: str | None = None
    status: str | None = None

    @cached_property
    def body(self) -> Any:
        """The body as Python sees it; `bytes(message.body_json)` is the very text that was sent."""
        # Not before it is asked for: a body that Python cannot hold (an integer of 5,000 digits) must
        # fail where it is used, and not spoil the messages beside it.
        return json.loads(bytes(self.body_json))


class Messages(msgspec.Struct):
    """The result of a `dequeue`, and a page of `list_messages`."""

    messages: list[Message]
    next: str | None = None


class MessageOptions(TypedDict, total=False):
    """What can be said about a message beside its body."""

    headers: Mapping[str, str]
    sender: str | None
    delay: float | None
    ttl: float | None
    idempotency_key: str | None


class NewMessage(MessageOptions):
    """One element of `enqueue_batch`."""

    body: Any


class QueueAttributes(TypedDict, total=False):
    """What `create_queue` and `update_queue` can be told about a queue."""

    visibility_timeout: float | None
    message_ttl: float | None
    delay: float | None
    max_message_bytes: int | None
    max_receives: int | None
    dead_letter_queue: str | None
    idempotency_window: float | None
    max_messages: int | None
    paused: bool | None


class SubscriptionOptions(TypedDict, total=False):
    """What `subscribe` can be told: `queue` or `url`, and of which messages there are to be copies."""

    queue: str | None
    url: str | None
    filter: Mapping[str, list[str]] | None
    max_receives: int | None
    dead_letter_queue: str | None


class Subscription(msgspec.Struct, frozen=True, kw_only=True):
    """Who gets copies; `secret` is there once, in the answer that made a subscription with a `url`."""

    subscription_id: str
    topic: str
    name: str
    queue: str
    url: str | None
    filter: dict[str, list[str]] | None
    state: str
    secret: str | None


class Published(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a message: `deliveries` copies, each of which names this id as its `published_id`."""

    message_id: str
    duplicate: bool
    deliveries: int


class Broadcast(msgspec.Struct, frozen=True, kw_only=True):
    """How many stored messages were given out, in how many copies; not `complete`: call it again."""

    messages: int
    deliveries: int
    complete: bool


# A coroutine function, or a plain one, which runs in a thread. What it returns does not matter.
Handler = Callable[[Message], Any]


class ConsumerOptions(TypedDict, total=False):
    """How to consume. All times are in seconds.

    - `concurrency` (10): how many handlers may run at the same time.
    - `visibility_timeout` (the queue's, or 30 where that may not be asked for): how long a lease is, and what it is
      extended by. A message of a consumer that was killed comes back after it.
    - `wait` (20): for how long one call waits for messages.
    - `at_most_once` (False): messages are gone before the handler has them.
    - `max_messages` (None): stop after so many.
    - `first_pause` (1), `longest_pause` (600): before a message comes again whose handler failed; it doubles each
      time, ± 50 %.
    - `cancel_on_lost_lease` (True): cancel a handler (not one in a thread) when somebody else may have its message.
    - `on_error` (None): called with message and exception when a handler failed, beside the log.
    """

    concurrency: int
    visibility_timeout: float | None
    wait: float
    at_most_once: bool
    max_messages: int | None
    first_pause: float
    longest_pause: float
    cancel_on_lost_lease: bool
    on_error: Callable[[Message, Exception], Any] | None
