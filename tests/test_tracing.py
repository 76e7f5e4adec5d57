"""Trace context from producer to consumer, with OpenTelemetry's own SDK."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from broker.client import Client, Message
from broker.client.tracing import headers_with_trace
from broker.server import Server

GIVEN = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture(scope="session")
def _exporter() -> InMemorySpanExporter:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)  # which a process can do once
    return exporter


@pytest.fixture
def spans(_exporter: InMemorySpanExporter) -> Iterator[InMemorySpanExporter]:
    _exporter.clear()
    yield _exporter
    _exporter.clear()


@pytest.fixture
async def client(broker_url: str) -> AsyncIterator[Client]:
    async with Client(broker_url) as client:
        yield client


@pytest.fixture
async def queue(client: Client) -> str:
    name = f"tracing-{uuid.uuid4().hex}"
    await client.create_queue(name)
    return name


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_a_handler_runs_in_a_span_that_is_a_child_of_the_producers(
    client: Client, queue: str, spans: InMemorySpanExporter
) -> None:
    tracer = trace.get_tracer("test")
    topic = f"{queue}-topic"
    await client.create_topic(topic)
    await client.subscribe(topic, "one", queue=queue)
    with tracer.start_as_current_span("producing"):
        message_id = await client.enqueue(queue, "alone")
        await client.enqueue_batch(queue, [{"body": "in a batch"}])
        await client.publish(topic, "published")

    async def handle(message: Message) -> None:
        with tracer.start_as_current_span("inside"):
            await asyncio.sleep(0)

    await client.consume(queue, handle, max_messages=3)

    [producer] = named(spans, "producing")
    handled, inside = named(spans, f"process {queue}"), named(spans, "inside")
    assert len(handled) == len(inside) == 3
    for span in handled:
        assert span.kind is trace.SpanKind.CONSUMER
        assert span.parent is not None
        assert span.parent.span_id == producer.context.span_id
        assert span.context.trace_id == producer.context.trace_id
    assert {span.parent and span.parent.span_id for span in inside} == {span.context.span_id for span in handled}
    [alone] = [span for span in handled if dict(span.attributes or {})["messaging.message.id"] == message_id]
    assert dict(alone.attributes or {}) == {
        "messaging.system": "wonderq",
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "messaging.destination.name": queue,
        "messaging.message.id": message_id,
        "messaging.message.body.size": len('"alone"'),
        "messaging.wonderq.receive_count": 1,
    }


async def test_a_failure_is_seen_in_its_span(client: Client, queue: str, spans: InMemorySpanExporter) -> None:
    await client.enqueue(queue, 1)

    async def handle(message: Message) -> None:
        raise RuntimeError("no")

    # The span that the loop itself runs in is no parent of anything.
    with trace.get_tracer("test").start_as_current_span("the whole loop"):
        await client.consume(queue, handle, max_messages=1)

    [span] = named(spans, f"process {queue}")
    assert span.parent is None
    assert span.status.status_code is trace.StatusCode.ERROR
    assert [event.name for event in span.events] == ["exception"]


async def test_a_plain_handler_in_a_thread_is_in_the_span_too(
    client: Client, queue: str, spans: InMemorySpanExporter
) -> None:
    await client.enqueue(queue, 1)
    seen: list[int] = []

    await client.consume(
        queue, lambda message: seen.append(trace.get_current_span().get_span_context().span_id), max_messages=1
    )

    [span] = named(spans, f"process {queue}")
    assert seen == [span.context.span_id]


async def test_a_trace_that_the_caller_gives_wins(client: Client, queue: str, spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("test").start_as_current_span("producing"):
        await client.enqueue(queue, 1, headers={"traceparent": GIVEN, "tracestate": "a=b", "kind": "x"})
    headers: list[dict[str, str]] = []

    async def handle(message: Message) -> None:
        headers.append(message.headers)

    await client.consume(queue, handle, max_messages=1)

    [span] = named(spans, f"process {queue}")
    assert headers == [{"traceparent": GIVEN, "tracestate": "a=b", "kind": "x"}]
    assert f"{span.context.trace_id:032x}" == GIVEN.split("-")[1]
    assert span.context.trace_state.get("a") == "b"


def test_two_traces_are_not_mixed() -> None:
    current = trace.SpanContext(1, 2, is_remote=False, trace_state=trace.TraceState([("c", "d")]))
    with trace.use_span(trace.NonRecordingSpan(current)):
        own = {"traceparent": f"00-{1:032x}-{2:016x}-00"}
        assert headers_with_trace(None) == {**own, "tracestate": "c=d"}
        assert headers_with_trace({"traceparent": GIVEN}) == {"traceparent": GIVEN}
        assert headers_with_trace({"tracestate": "a=b"}) == {**own, "tracestate": "a=b"}


def test_what_are_no_headers_is_left_for_the_broker_to_refuse() -> None:
    wrong: Any = 5
    with trace.get_tracer("test").start_as_current_span("producing"):
        assert headers_with_trace(wrong) == 5


async def test_without_a_span_nothing_is_added(client: Client, queue: str, spans: InMemorySpanExporter) -> None:
    await client.enqueue(queue, 1)
    await client.enqueue(queue, 2, headers={"kind": "x"})

    assert [message.headers async for message in client.list_messages(queue)] == [{}, {"kind": "x"}]


@pytest.mark.parametrize("full", [{f"h{n}": "" for n in range(64)}, {"h": "x" * 4090}])
async def test_a_trace_is_not_worth_a_message_that_is_refused(
    client: Client, queue: str, full: dict[str, str], spans: InMemorySpanExporter
) -> None:
    with trace.get_tracer("test").start_as_current_span("producing"):
        await client.enqueue(queue, 1, headers=full)
        assert headers_with_trace({"small": "x"}) != {"small": "x"}

    [message] = [message async for message in client.list_messages(queue)]
    assert message.headers == full


def test_a_program_that_does_not_trace_loads_nothing_of_it(standing_server: Server) -> None:
    """It consumes a message that has a trace; the package is installed here, and not imported."""
    url = standing_server.url
    script = f"""
import asyncio, json, sys
from broker.client import Client
async def main():
    seen = []
    async def handle(message):
        seen.append(message.headers)
    async with Client({url!r}) as client:
        await client.create_queue("untraced")
        await client.enqueue("untraced", 1, headers={{"traceparent": {GIVEN!r}}})
        await client.consume("untraced", handle, max_messages=1)
    print(json.dumps([seen, sorted(name for name in sys.modules if name.startswith("opentelemetry"))]))
asyncio.run(main())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(ran.stdout) == [[{"traceparent": GIVEN}], []]
