"""The Python client: it calls a broker, and consumes from it.

    async with Client("http://127.0.0.1:8080") as client:
        await client.enqueue("default", {"hello": "world"})
        await client.consume("default", handle)

`Client` is asynchronous, `SyncClient` the same for programs that are not. Whatever goes wrong, on the way or at the
broker, is a `BrokerError`; where a call may have been carried out and nobody can know, it is `OutcomeUnknown`. Calls
are repeated where that is safe, within a deadline. docs/client.md has more. Nothing of the server is imported here:
this package, aiohttp and msgspec are all that it takes.
"""

from broker.client.client import Client
from broker.client.consumer import Consumer
from broker.client.errors import (
    BrokerError,
    ConnectionFailed,
    ConnectionLost,
    Forbidden,
    IdempotencyConflict,
    LeaseLost,
    OutcomeUnknown,
    QueueFull,
    QueueNotFound,
)
from broker.client.messages import (
    Broadcast,
    ConsumerOptions,
    Handler,
    Message,
    MessageOptions,
    NewMessage,
    Published,
    QueueAttributes,
    Subscription,
    SubscriptionOptions,
)
from broker.client.synchronous import SyncClient

__all__ = [
    "Broadcast",
    "BrokerError",
    "Client",
    "ConnectionFailed",
    "ConnectionLost",
    "Consumer",
    "ConsumerOptions",
    "Forbidden",
    "Handler",
    "IdempotencyConflict",
    "LeaseLost",
    "Message",
    "MessageOptions",
    "NewMessage",
    "OutcomeUnknown",
    "Published",
    "QueueAttributes",
    "QueueFull",
    "QueueNotFound",
    "Subscription",
    "SubscriptionOptions",
    "SyncClient",
]
