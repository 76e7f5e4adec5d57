"""What can go wrong, one class each. The first line of a docstring is the sentence that clients get.

`code` and `type` are the contract's; `outcome` says whether anything was done: "none" where
certainly nothing was, "unknown" where it may have been. Errors are raised below and translated
once on the way out, in `rpc.py`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from broker import requests


class BrokerError(Exception):
    """Something went wrong.

    `index` is the place of the element that caused it, where there were several; only a batch tells it. `counted_as`
    is the name of the limit that was reached, for the metrics.
    """

    code: ClassVar[int]
    type: ClassVar[str]
    retryable: ClassVar[bool] = False

    def __init__(
        self, *, outcome: str = "none", index: int | None = None, counted_as: str | None = None, **data: Any
    ) -> None:
        self.outcome = outcome
        self.index = index
        self.counted_as = counted_as
        self.extra = data
        sentence = " ".join((self.__class__.__doc__ or "").split("\n\n")[0].split())
        self.message = sentence.format_map(data)
        super().__init__(self.message)

    @property
    def data(self) -> dict[str, Any]:
        """The `data` member of the JSON-RPC error; a `reason` is in the message already, and so are `senders`."""
        return {
            "type": self.type,
            "retryable": self.retryable,
            "outcome": self.outcome,
            **{name: value for name, value in self.extra.items() if name not in ("reason", "senders")},
        }

    def copy(self) -> BrokerError:
        """Return the same error for another caller: each adds to its own."""
        return type(self)(outcome=self.outcome, index=self.index, counted_as=self.counted_as, **self.extra)

    def with_data(self, **data: Any) -> BrokerError:
        """Add members to `data`; return self."""
        self.extra.update(data)
        return self


class ParseError(BrokerError):
    """The text is not valid JSON: {reason}. Send one JSON-RPC 2.0 request, or an array of them, as UTF-8."""

    code = -32700
    type = "parse_error"


class InvalidRequest(BrokerError):
    """This is not a JSON-RPC 2.0 request: {reason}."""

    code = -32600
    type = "invalid_request"


class MethodNotFound(BrokerError):
    """There is no method {method}; rpc.discover lists those there are."""

    code = -32601
    type = "method_not_found"


class InvalidParams(BrokerError):
    """{reason}"""

    code = -32602
    type = "invalid_params"


class InternalError(BrokerError):
    """The broker failed; quote the request id {request_id} to whoever runs it: its log has more under that."""

    code = -32603
    type = "internal_error"


class Unavailable(BrokerError):
    """{reason}; try again in a moment."""

    code = -32001
    type = "unavailable"
    retryable = True


class Overloaded(BrokerError):
    """The limit of {limit} {what} is reached; try again in {retry_after} s."""

    code = -32002
    type = "overloaded"
    retryable = True


class Forbidden(BrokerError):
    """{reason}."""

    code = -32003
    type = "forbidden"


class QueueNotFound(BrokerError):
    """There is no queue {queue}; create it with create_queue, or see list_queues."""

    code = 1001
    type = "queue_not_found"


class QueueExists(BrokerError):
    """The queue {queue} exists and its {differs} is not what you named; see get_queue, or change it with update_queue."""  # noqa: E501

    code = 1002
    type = "queue_exists"


class MessageNotFound(BrokerError):
    """There is no message {message_id} in the queue {queue}; it was deleted, has expired, or never was."""

    code = 1003
    type = "message_not_found"


class LeaseLost(BrokerError):
    """The lease of this receipt is over; dequeue again, and use the receipt of the newest delivery."""

    code = 1004
    type = "lease_lost"


class MessageTooLarge(BrokerError):
    """The body has {given} bytes and the queue {queue} takes {limit}; send less, or raise max_message_bytes with update_queue (1 MiB at most)."""  # noqa: E501

    code = 1005
    type = "message_too_large"


class MessageLeased(BrokerError):
    """Somebody holds the message {message_id}; name the receipt if it is you, or wait until the lease ends."""

    code = 1006
    type = "message_leased"
    retryable = True


class IdempotencyConflict(BrokerError):
    """The idempotency_key {key} was used for another body; send a key of its own with each message."""

    code = 1007
    type = "idempotency_conflict"


class TopicNotFound(BrokerError):
    """There is no topic {topic}; create it with create_topic, or see list_topics."""

    code = 1008
    type = "topic_not_found"


class SubscriptionNotFound(BrokerError):
    """There is no subscription {subscription_id}; see list_subscriptions."""

    code = 1009
    type = "subscription_not_found"


class InvalidReceipt(BrokerError):
    """This is not a receipt that this broker makes; use the receipt of a message from dequeue, unchanged."""

    code = 1010
    type = "invalid_receipt"


class QueueInUse(BrokerError):
    """The queue {queue} cannot be deleted: {reason}."""

    code = 1011
    type = "queue_in_use"


class TopicExists(BrokerError):
    """The topic {topic} exists and delivers {delivery}; to change that, delete it and create it anew."""

    code = 1012
    type = "topic_exists"


class SubscriptionExists(BrokerError):
    """The topic {topic} has a subscription {name} whose {differs} is not what you named; unsubscribe it first, or use another name."""  # noqa: E501

    code = 1013
    type = "subscription_exists"


class QueueFull(BrokerError):
    """The queue {queue} holds its max_messages, {limit}; wait until consumers have caught up, or raise the limit with update_queue."""  # noqa: E501

    code = 1014
    type = "queue_full"
    retryable = True


def forbidden_receipt(permission: str) -> Forbidden:
    """Return the error for a receipt whose queue the caller may not use: it tells nothing of the queue."""
    reason = f"The token does not permit `{permission}` for the queue of this receipt; use the one that received it"
    return Forbidden(reason=reason, permission=permission)


_NULL = msgspec.Raw(b"null")


def error_object(error: BrokerError) -> dict[str, Any]:
    """Return an error as it stands in an answer, or in the result of one element of a batch."""
    return {"code": error.code, "message": error.message, "data": error.data}


def let_go(error: BaseException) -> None:
    """Take its tracebacks from an error that is about to be answered.

    They lead to frames, and one of these back to the error: a circle of some sixty objects. Where errors are many, the
    garbage collector would have to look for them again and again, and everybody waits while it does.
    """
    each: BaseException | None = error
    while each is not None:
        each.__traceback__ = None
        each = each.__context__


def error_answer(error: BrokerError, call_id: msgspec.Raw = _NULL) -> bytes:
    """Return the JSON-RPC answer that carries an error, and says of which request it is."""
    described = error_object(error)
    request_id = requests.current.get()
    if request_id is not None:
        described["data"]["request_id"] = request_id
    return msgspec.json.encode({"jsonrpc": "2.0", "error": described, "id": call_id})
