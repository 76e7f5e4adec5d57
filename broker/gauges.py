"""What the metrics say of the database: read when somebody asks, and never summed over processes."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily

from broker import __version__
from broker.model import Counts

# Queues shown one by one; the first by name, so that which these are does not change from one answer to the next.
MAX_QUEUES_SHOWN = 100
# The rest of them together. A queue of this name is among them as well.
OTHER = "other"
STATUSES = ("ready", "delayed", "leased")


@dataclass(eq=False)
class DatabaseGauges:
    """Figures as the database has said them last; what is not known is left out."""

    is_up: bool = False
    # By queue: its messages, and for how many seconds the oldest has been ready.
    queues: Mapping[str, tuple[Counts, float | None]] = field(default_factory=dict)
    queues_in_all: int | None = None
    # One of the levels of `durability`.
    durability: str | None = None
    postgresql: str | None = None
    subscriptions: Mapping[str, int] = field(default_factory=dict)

    def describe(self) -> Iterable[Metric]:
        """Return the families without their figures, for who wants to know which there are."""
        return DatabaseGauges().collect()

    def collect(self) -> Sequence[Metric]:
        """Return the families with their figures."""
        messages = GaugeMetricFamily(
            "wonderq_queue_messages",
            f"Messages by queue and status: of the first {MAX_QUEUES_SHOWN} queues by name, and of the others together"
            f' as queue="{OTHER}". More than 50 may be an estimate.',
            labels=["queue", "status"],
        )
        oldest = GaugeMetricFamily(
            "wonderq_queue_oldest_message_age_seconds",
            "For how long the message that waits longest has been ready, by queue as above.",
            labels=["queue"],
        )
        for queue, (counts, age) in self.queues.items():
            for status in STATUSES:
                messages.add_metric([queue, status], getattr(counts, status))
            oldest.add_metric([queue], age or 0)
        durability = GaugeMetricFamily(
            "wonderq_durability",
            "1 for the level at which acknowledged messages are safe: replicated, durable or at_risk.",
            labels=["level"],
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
        return [
            messages,
            oldest,
            self._number_of_queues(),
            durability,
            subscriptions,
            GaugeMetricFamily(
                "wonderq_database_up", "Whether the database answered just now: 1 or 0.", value=int(self.is_up)
            ),
            self._info(),
        ]

    def _number_of_queues(self) -> Metric:
        family = GaugeMetricFamily("wonderq_queues", "Queues that there are.")
        if self.queues_in_all is not None:
            family.add_metric([], self.queues_in_all)
        return family

    def _info(self) -> Metric:
        family = GaugeMetricFamily(
            "wonderq_info", "1, for what runs: version, Python, PostgreSQL.", labels=["version", "python", "postgresql"]
        )
        family.add_metric([__version__, platform.python_version(), self.postgresql or ""], 1)
        return family


def with_others(
    shown: Mapping[str, tuple[Counts, float | None]], everything: Counts, oldest: float | None
) -> dict[str, tuple[Counts, float | None]]:
    """Add, as one more queue, what lies in those that are not shown; all that there is may be an estimate."""
    figures = {
        status: max(0, getattr(everything, status) - sum(getattr(counts, status) for counts, _ in shown.values()))
        for status in STATUSES
    }
    own, own_age = shown.get(OTHER, (Counts(0, 0, 0, 0, exact=True), None))
    figures = {status: number + getattr(own, status) for status, number in figures.items()}
    rest = Counts(**figures, total=sum(figures.values()), exact=everything.exact)
    return {**shown, OTHER: (rest, max((age for age in (own_age, oldest) if age is not None), default=None))}
