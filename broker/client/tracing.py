"""Trace context: `traceparent` and `tracestate` of the producer's span travel in a message's headers to its handler.

For programs that use OpenTelemetry (`pip install 'wonderq[tracing]'`). One that has not imported it has no span, so it
is never imported for them. Headers that the caller gives always win. Names are those of OpenTelemetry's conventions for
messaging.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from broker.client.messages import Message

# What a message may carry; a trace is not worth a message that is refused.
_MOST_HEADERS, _MOST_HEADER_BYTES = 64, 4096


def headers_with_trace(headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
    """Return headers with the current span's context, where there is one and room for it; None for no headers."""
    if "opentelemetry.trace" not in sys.modules or not isinstance(headers, Mapping | None):
        return headers  # What are no headers the broker refuses, and not this.
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    given = {} if headers is None else dict(headers)
    carrier: dict[str, str] = {}
    if "traceparent" not in given:
        TraceContextTextMapPropagator().inject(carrier)
    both = {**carrier, **given}
    fits = len(both) <= _MOST_HEADERS and sum(len(f"{n}{v}".encode()) for n, v in both.items()) <= _MOST_HEADER_BYTES
    return both if fits and both else headers


def span_of(message: Message) -> AbstractContextManager[Any]:
    """Return the span in which a message is handled, a child of the producer's; none where nothing traces."""
    if "opentelemetry.trace" not in sys.modules:
        return nullcontext()
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return trace.get_tracer("broker.client").start_as_current_span(
        f"process {message.queue}",
        # In no other span: the one that the loop itself runs in has nothing to do with it.
        context=TraceContextTextMapPropagator().extract(message.headers),
        kind=trace.SpanKind.CONSUMER,
        attributes={
            "messaging.system": "wonderq",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": message.queue,
            "messaging.message.id": message.message_id,
            "messaging.message.body.size": len(bytes(message.body_json)),
            "messaging.wonderq.receive_count": message.receive_count,
        },
    )
