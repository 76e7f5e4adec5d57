"""The broker's metrics in the text format of Prometheus.

Counters and gauges are of this broker, summed over its processes where it has several; gauges of queues are read
from the database when somebody asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector

from broker.model import Counts

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Queues shown one by one; the first by name.
MAX_QUEUES_SHOWN = 100
# What can be over: most are named as the setting, without max_ or timeout.
LIMITS = (
    "request_bytes", "nesting", "batch", "header_time", "body_time", "connections", "waiting_consumers", "calls",
    "calls_in_flight", "calls_per_token", "call_rate_per_token", "failed_logins", "subscriptions", "secrets",
)  # fmt: skip


# The times at which counters were made: no process knows them of all, and nobody asks.
disable_created_metrics()  # type: ignore[no-untyped-call]


def share_metrics(folder: Path, worker: int) -> None:
    """Keep the metrics of this process, from now on, in files of a folder where all workers have theirs.

    The files are mapped into memory, so that what was counted outlives a worker that is killed. They bear its number
    and not its pid: the worker that takes its place counts on from there, and says anew what its gauges are.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


class Metrics:
    """Every metric of one broker; of this process alone where none was told of the folder that they share."""

    def __init__(self, folder: Path | None = None) -> None:
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
        self.statements = Counter(
            "wonderq_statements", "Statements that carried calls, one commit each.", ["call"], registry=self.registry
        )
        self.gathered_calls = Counter(
            "wonderq_gathered_calls",
            "Calls that these statements carried: divided by them, how many share a commit.",
            ["call"],
            registry=self.registry,
        )
        self.enqueued = self._counter("wonderq_messages_enqueued", "Messages stored.")
        self.published = self._counter(
            "wonderq_messages_published", "Messages published to topics, however many copies."
        )
        self.duplicates = self._counter(
            "wonderq_messages_duplicate", "Messages not stored, because their idempotency key was used before."
        )
        self.delivered = self._counter("wonderq_messages_delivered", "Messages handed out.")
        self.deleted = self._counter("wonderq_messages_deleted", "Messages deleted by clients.")
        self.expired = self._counter("wonderq_messages_expired", "Expired messages removed.")
        self.dead_lettered = self._counter(
            "wonderq_messages_dead_lettered", "Messages moved to a dead-letter queue, their deliveries used up."
        )
        self.dropped = self._counter(
            "wonderq_messages_dropped", "Messages removed, their deliveries used up, for want of a dead-letter queue."
        )
        self.redriven = self._counter("wonderq_messages_redriven", "Messages moved back out of a dead-letter queue.")
        self.ended_leases = self._counter(
            "wonderq_leases_ended", "Leases seen to end undeleted, and not taken again before they were seen."
        )
        self.refused_logins = Counter(
            "wonderq_logins_refused",
            "Requests without a token that counts: unauthorized, or throttled after many of them.",
            ["reason"],
            registry=self.registry,
        )
        self.refused = Counter(
            "wonderq_refused",
            "What was refused, or closed, because it was over a limit of the broker, by limit.",
            ["limit"],
            registry=self.registry,
        )
        for limit in LIMITS:
            self.refused.labels(limit)
        self.sweeps = Counter("wonderq_sweeps", "Sweeps by outcome.", ["outcome"], registry=self.registry)
        self.breaker = self._gauge(
            "wonderq_breaker_open", "Processes that send no writes, because PostgreSQL could not confirm them."
        )
        self.breaker_openings = self._counter("wonderq_breaker_openings", "How often a process stopped sending writes.")
        self.waiting = self._gauge("wonderq_waiting_consumers", "Consumers that wait for a message.")
        self.connections = self._gauge("wonderq_client_connections", "Open client connections.")
        self.pushes = Counter(
            "wonderq_pushes",
            "POSTs to subscribed urls by outcome: delivered (2xx), refused (another status), gone (410), timeout,"
            " unanswered (no connection, or no HTTP), forbidden (an address that may not be reached).",
            ["outcome"],
            registry=self.registry,
        )
        self.push_seconds = Histogram(
            "wonderq_push_seconds",
            "Time from the beginning of a POST to its answer.",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 15, 60),
            registry=self.registry,
        )
        self.pushing = self._gauge("wonderq_pushes_under_way", "Messages on their way to subscribed urls.")
        # What to call for these labels: looking them up costs more than counting.
        self._counted_calls: dict[tuple[str, str], tuple[Callable[[], None], Callable[[float], None]]] = {}
        self._counted_statements: dict[str, tuple[Callable[[], None], Callable[[float], None]]] = {}
        self._of_database = DatabaseGauges()
        self._shown = CollectorRegistry()
        own = self.registry
        self._shown.register(own if folder is None else MultiProcessCollector(None, folder))  # type: ignore[no-untyped-call]
        self._shown.register(self._of_database)

    def _counter(self, name: str, about: str) -> Counter:
        return Counter(name, about, registry=self.registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(name, about, registry=self.registry, multiprocess_mode="sum")

    def call_ended(self, method: str, outcome: str, seconds: float) -> None:
        """Count one call."""
        try:
            count, observe = self._counted_calls[method, outcome]
        except KeyError:
            count, observe = self.calls.labels(method, outcome).inc, self.call_seconds.labels(method).observe
            self._counted_calls[method, outcome] = count, observe
        count()
        observe(seconds)

    def over_limit(self, limit: str) -> None:
        """Count something that was refused because it was over a limit, one of LIMITS."""
        self.refused.labels(limit).inc()

    def statement_ended(self, call: str, calls: int) -> None:
        """Count one statement, and the calls that it carried."""
        try:
            count, add_calls = self._counted_statements[call]
        except KeyError:
            count, add_calls = self.statements.labels(call).inc, self.gathered_calls.labels(call).inc
            self._counted_statements[call] = count, add_calls
        count()
        add_calls(calls)

    def push_ended(self, outcome: str, seconds: float) -> None:
        """Count one POST to a url."""
        self.pushes.labels(outcome).inc()
        self.push_seconds.observe(seconds)

    def show_subscriptions(self, counted: Mapping[str, int]) -> None:
        """Replace the gauges of subscriptions by state."""
        self._of_database.subscriptions = counted

    def show_queues(self, counted: dict[str, tuple[Counts, float | None]]) -> None:
        """Replace the gauges of the queues."""
        self._of_database.counted = counted

    def show_durability(self, level: str | None) -> None:
        """Replace the gauge of how safe messages are; None where that is not known."""
        self._of_database.durability = level

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self._shown)


class DatabaseGauges:
    """The gauges of queues, subscriptions and durability: the database's, and so never summed over processes."""

    def __init__(self) -> None:
        self.counted: dict[str, tuple[Counts, float | None]] = {}
        self.durability: str | None = None
        self.subscriptions: Mapping[str, int] = {}

    def collect(self) -> Iterable[Metric]:
        """Return them as they were found last."""
        messages = GaugeMetricFamily(
            "wonderq_queue_messages",
            "Messages by queue and status; more than 50 may be an estimate.",
            labels=["queue", "status"],
        )
        oldest = GaugeMetricFamily(
            "wonderq_queue_oldest_message_age_seconds",
            "For how long the message that waits longest has been ready.",
            labels=["queue"],
        )
        for queue, (counts, age) in self.counted.items():
            for status in ("ready", "delayed", "leased"):
                messages.add_metric([queue, status], getattr(counts, status))
            oldest.add_metric([queue], age or 0)
        durability = GaugeMetricFamily(
            "wonderq_durability", "1 for the level at which acknowledged messages are safe.", labels=["level"]
        )
        if self.durability is not None:
            durability.add_metric([self.durability], 1)
        subscriptions = GaugeMetricFamily(
            "wonderq_subscriptions",
            "Subscriptions by state: active, failing (their url is only probed), ended.",
            labels=["state"],
        )
        for state, number in sorted(self.subscriptions.items()):
            subscriptions.add_metric([state], number)
        return messages, oldest, durability, subscriptions
