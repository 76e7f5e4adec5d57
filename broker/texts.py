"""Bodies and headers as they are stored: the text of what a client sent, within limits that the schema cannot say."""

from __future__ import annotations

import msgspec
from msgspec import Raw

from broker.errors import InvalidParams, MessageTooLarge
from broker.model import NewMessage
from broker.storage.messages import TOO_LARGE
from broker.storage.publishing import MAX_MESSAGE_BYTES

MAX_HEADER_BYTES = 4096


def new_message(
    body: Raw,
    headers: dict[str, str],
    sender: str | None,
    delay: float | None,
    ttl: float | None,
    idempotency_key: str | None = None,
    where: str = "headers",
) -> NewMessage:
    """Return what is stored for a message as a client sent it. Raises InvalidParams."""
    return NewMessage(json_text(body), header_text(headers, where), sender, delay, ttl, idempotency_key)


def json_text(body: Raw) -> str:
    """Return a body's text, as it was sent; TOO_LARGE in place of one that no queue takes."""
    return bytes(body).decode() if len(body) <= MAX_MESSAGE_BYTES else TOO_LARGE


def too_large(error: MessageTooLarge, body: Raw) -> MessageTooLarge:
    """Return the error for a body that is larger than the text that was refused in its place."""
    return MessageTooLarge(index=error.index, **error.extra | {"given": len(body)})


def header_text(headers: dict[str, str], where: str = "headers") -> str | None:
    """Return headers as JSON, None where there are none. Raises InvalidParams, naming `where`, over 4 KiB."""
    if not headers:
        return None
    size = sum(len(name.encode()) + len(value.encode()) for name, value in headers.items())
    if size > MAX_HEADER_BYTES:
        raise InvalidParams(
            reason=f"`{where}` may have {MAX_HEADER_BYTES} bytes in all, and {size} were given.",
            param=where,
            limit=MAX_HEADER_BYTES,
            given=size,
        )
    return msgspec.json.encode(headers).decode()
