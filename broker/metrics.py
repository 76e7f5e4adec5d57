"""The broker's metrics in the text format of Prometheus.

Counters are of this process; gauges of queues are read from the database when somebody asks.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from broker.model import Counts

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Queues shown one by one; the first by name.
MAX_QUEUES_SHOWN = 100


class Metrics:
    """Every metric of one broker process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.calls = Counter(
            "wonderq_calls",
            "Calls by method and outcome: ok, or the type of the error.",
            ["method", "outcome"],
            registry=self.registry,
        )
        self.call_seconds = Histogram(
            "wonderq_call_seconds",
            "Time to answer a call, waiting included.",
            ["method"],
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 30, 90),
            registry=self.registry,
        )
        self.enqueued = self._counter("wonderq_messages_enqueued", "Messages stored.")
        self.delivered = self._counter("wonderq_messages_delivered", "Messages handed out.")
        self.deleted = self._counter("wonderq_messages_deleted", "Messages deleted by clients.")
        self.expired = self._counter("wonderq_messages_expired", "Expired messages removed.")
        self.ended_leases = self._counter(
            "wonderq_leases_ended", "Leases seen to end undeleted, and not taken again before they were seen."
        )
        self.sweeps = Counter("wonderq_sweeps", "Sweeps by outcome.", ["outcome"], registry=self.registry)
        self.waiting = Gauge("wonderq_waiting_consumers", "Consumers that wait for a message.", registry=self.registry)
        self.connections = Gauge("wonderq_client_connections", "Open client connections.", registry=self.registry)
        self._messages = Gauge(
            "wonderq_queue_messages",
            "Messages by queue and status; an estimate above 10,000.",
            ["queue", "status"],
            registry=self.registry,
        )
        self._oldest = Gauge(
            "wonderq_queue_oldest_message_age_seconds",
            "For how long the message that waits longest has been ready.",
            ["queue"],
            registry=self.registry,
        )

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, registry=self.registry)

    def call_ended(self, method: str, outcome: str, seconds: float) -> None:
        """Count one call."""
        self.calls.labels(method, outcome).inc()
        self.call_seconds.labels(method).observe(seconds)

    def show_queues(self, counted: dict[str, tuple[Counts, float | None]]) -> None:
        """Replace the gauges of the queues."""
        self._messages.clear()
        self._oldest.clear()
        for queue, (counts, age) in counted.items():
            for status in ("ready", "delayed", "leased"):
                self._messages.labels(queue, status).set(getattr(counts, status))
            self._oldest.labels(queue).set(age or 0)

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self.registry)
