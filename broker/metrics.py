"""The broker's metrics in the text format of Prometheus.

Counters and gauges are of this broker, summed over its processes where it has several; what is the database's is read
when somebody asks: see `gauges`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector

from broker.gauges import DatabaseGauges
from broker.histograms import LateHistogram

CONTENT_TYPE = CONTENT_TYPE_LATEST
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
        self.call_messages = LateHistogram(
            "wonderq_call_messages",
            "Messages that a call brought, took or named, for the methods that may have many.",
            (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000),
            self.registry,
            "method",
        )
        self.statement_seconds = LateHistogram(
            "wonderq_statement_seconds",
            "Time that the statements took which carry calls, one commit each, by kind of call.",
            (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1, 5, 10),
            self.registry,
            "call",
        )
        self.statement_calls = LateHistogram(
            "wonderq_statement_calls",
            "Calls that these statements carried: how many shared a commit.",
            (1, 2, 4, 8, 16, 32, 64, 128, 256, 1000),
            self.registry,
            "call",
        )
        self.lease_age = LateHistogram(
            "wonderq_lease_age_seconds",
            "Time from delivery to delete, of messages that were deleted at their first delivery; a sample: one in 16"
            " statements is asked for it.",
            (0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15, 30, 60, 300, 1800, 7200, 43200),
            self.registry,
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
        self.sweeps = Counter(
            "wonderq_sweeps", "Sweeps by outcome: done or failed.", ["outcome"], registry=self.registry
        )
        for outcome in ("done", "failed"):
            self.sweeps.labels(outcome)
        self.breaker = self._gauge(
            "wonderq_breaker_open", "Processes that send no writes, because PostgreSQL could not confirm them."
        )
        self.breaker_openings = self._counter("wonderq_breaker_openings", "How often a process stopped sending writes.")
        self.waiting = self._gauge("wonderq_waiting_consumers", "Consumers that wait for a message.")
        self.connections = self._gauge("wonderq_client_connections", "Open client connections.")
        self.in_flight = self._gauge("wonderq_calls_in_flight", "Calls that are not answered yet.")
        self.calls_waiting = self._gauge(
            "wonderq_calls_waiting", "Calls that wait for a statement to carry them, or for a connection."
        )
        self.pool = self._gauge("wonderq_database_connections", "Connections to the database for calls.")
        self.pool_busy = self._gauge(
            "wonderq_database_connections_busy", "Those connections for calls that are in use."
        )
        self.limit = Gauge(
            "wonderq_limit",
            "Limits in force, of all processes together, by setting.",
            ["limit"],
            registry=self.registry,
            multiprocess_mode="sum",
        )
        self.processes = self._gauge("wonderq_processes", "Processes that serve.")
        self.processes.set(1)
        self.cpu_seconds = self._counter("wonderq_process_cpu_seconds", "CPU time that the processes have used.")
        self._cpu_seconds_told = 0.0
        self.memory = self._gauge("wonderq_process_resident_memory_bytes", "Memory that the processes have.")
        self.started_at = Gauge(
            "wonderq_start_time_seconds",
            "When the first of the processes was started, in seconds since 1970.",
            registry=self.registry,
            multiprocess_mode="min",
        )
        self.started_at.set_to_current_time()
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
        self._late = (self.call_messages, self.statement_seconds, self.statement_calls, self.lease_age)
        # Whoever answers a request for the metrics reads them anew.
        self.of_database = DatabaseGauges()
        self._shown = CollectorRegistry()
        own = self.registry
        self._shown.register(own if folder is None else MultiProcessCollector(None, folder))  # type: ignore[no-untyped-call]
        self._shown.register(self.of_database)

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

    def statement_ended(self, call: str, calls: int, seconds: float) -> None:
        """Count one statement, the calls that it carried, and how long it took."""
        self.statement_calls.observe(calls, call)
        self.statement_seconds.observe(seconds, call)

    def push_ended(self, outcome: str, seconds: float) -> None:
        """Count one POST to a url."""
        self.pushes.labels(outcome).inc()
        self.push_seconds.observe(seconds)

    def batch(self, method: str, messages: int) -> None:
        """Take in how many messages a call was about."""
        self.call_messages.observe(messages, method)

    def show_limits(self, limits: Mapping[str, float]) -> None:
        """Say which limits are in force, each for this process."""
        for name, limit in limits.items():
            self.limit.labels(name).set(limit)

    def settle(self) -> None:
        """Bring up to date what is not at each event."""
        for histogram in self._late:
            histogram.settle()
        seconds = time.process_time()
        self.cpu_seconds.inc(max(0.0, seconds - self._cpu_seconds_told))
        self._cpu_seconds_told = seconds
        self.memory.set(resident_memory())

    def text(self) -> bytes:
        """Return everything as Prometheus reads it."""
        self.settle()
        return generate_latest(self._shown)


def resident_memory() -> int:
    """Return how many bytes of memory this process has; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGESIZE")
