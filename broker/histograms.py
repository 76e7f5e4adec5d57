"""Histograms that cost next to nothing where they are observed.

Prometheus' own takes two locks and, where processes share their metrics, writes to two places of a mapped file for each
value. Here a value is added to a list of this process, and the list to Prometheus' histogram when somebody reads it, or
twice a second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Histogram


class LateHistogram:
    """A histogram, with one label at most, that is told of its values by `settle`."""

    def __init__(
        self, name: str, about: str, buckets: Sequence[float], registry: CollectorRegistry, label: str | None = None
    ) -> None:
        self._histogram = Histogram(name, about, [label] if label else [], buckets=buckets, registry=registry)
        self._label = label
        self._of_label: dict[str, _Values] = {}
        if label is None:
            self._values("")

    def observe(self, value: float, label: str = "") -> None:
        """Take in a value."""
        values = self._of_label.get(label)
        if values is None:
            values = self._values(label)
        values.counts[bisect_left(values.bounds, value)] += 1
        values.sum += value

    def observe_all(self, values: Iterable[float], label: str = "") -> None:
        """Take in several values."""
        for value in values:
            self.observe(value, label)

    def settle(self) -> None:
        """Let Prometheus' histogram have what was taken in."""
        for values in self._of_label.values():
            values.settle()

    def _values(self, label: str) -> _Values:
        child = self._histogram.labels(label) if self._label else self._histogram
        values = self._of_label[label] = _Values(child)
        return values


class _Values:
    """The values of one label that Prometheus has not heard of."""

    def __init__(self, child: Histogram) -> None:
        self._child = child
        # The last one is infinite: whatever comes has a bucket.
        self.bounds: list[float] = list(child._upper_bounds)
        self.counts = [0] * len(self.bounds)
        self.sum = 0.0

    def settle(self) -> None:
        if not any(self.counts):
            return
        counts, self.counts = self.counts, [0] * len(self.bounds)
        total, self.sum = self.sum, 0.0
        for bucket, count in zip(self._child._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._child._sum.inc(total)
