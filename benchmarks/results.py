"""What the benchmarks found: samples, checks against targets, cells, and their JSON.

A *sample* is what one contestant did in one round. A *cell* is one row of the table of targets: its samples, and
the checks made of them. Names of figures end in their unit: `messages_per_second`, `p50_ms`, `wal_bytes`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
US = "WonderQ"


@dataclass
class Sample:
    """What one contestant did in one round.

    `case` tells what was varied (such as the size of bodies), `cpu` the share of one core that each process had
    (1.0: one core was busy all the time), `errors` how many answers were errors, by kind.
    """

    case: str
    who: str
    round: int
    figures: dict[str, float]
    cpu: dict[str, float] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)


@dataclass
class Check:
    """A figure and what it has to reach. Without a limit it is only reported; without a value it is missing."""

    what: str
    value: float | None
    unit: str
    at_least: float | None = None
    at_most: float | None = None

    @property
    def target(self) -> str:
        """The limit in words, empty where there is none."""
        limits = ((self.at_least, "≥"), (self.at_most, "≤"))
        return " and ".join(
            f"{sign} {figure(limit)} {self.unit}".strip() for limit, sign in limits if limit is not None
        )

    @property
    def verdict(self) -> str:
        """Whether the limit is kept: `reached`, `NOT reached`, `reported` (no limit) or `not measured`."""
        if self.value is None:
            return "not measured"
        if self.at_least is None and self.at_most is None:
            return "reported"
        kept = (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )
        return "reached" if kept else "NOT reached"


@dataclass
class Cell:
    """One row of the table of targets, as it was measured."""

    name: str
    title: str
    samples: list[Sample] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    took_seconds: float = 0.0

    def of(self, case: str, who: str) -> list[Sample]:
        """Return the samples of a contestant, round by round."""
        return [sample for sample in self.samples if (sample.case, sample.who) == (case, who)]

    def contestants(self) -> list[tuple[str, str]]:
        """Return each case and contestant once, in the order in which they were measured first."""
        return list(dict.fromkeys((sample.case, sample.who) for sample in self.samples))

    def median(self, case: str, who: str, name: str) -> float | None:
        """Return the median of a figure over the rounds."""
        return median(sample.figures[name] for sample in self.of(case, who) if name in sample.figures)

    def ratio(self, name: str, one: tuple[str, str], other: tuple[str, str]) -> float | None:
        """Return the median over the rounds of one contestant's figure by the other's in the same round."""
        figures = {sample.round: sample.figures.get(name) for sample in self.of(*other)}
        return median(
            sample.figures[name] / divisor
            for sample in self.of(*one)
            if name in sample.figures and (divisor := figures.get(sample.round))
        )

    def cpu(self, case: str, who: str) -> dict[str, float]:
        """Return the median share of one core of each process."""
        samples = self.of(case, who)
        names = dict.fromkeys(name for sample in samples for name in sample.cpu)
        shares = {name: median(sample.cpu[name] for sample in samples if name in sample.cpu) for name in names}
        return {name: share for name, share in shares.items() if share is not None}

    @property
    def errors(self) -> dict[str, int]:
        """The answers that were errors, by contestant and kind. Where there is one, no figure counts."""
        found: dict[str, int] = {}
        for sample in self.samples:
            for kind, count in sample.errors.items():
                name = f"{sample.who}, {sample.case}: {kind}"
                found[name] = found.get(name, 0) + count
        return {name: count for name, count in found.items() if count}

    @property
    def is_valid(self) -> bool:
        """Whether it ran to its end, and every answer was what had been asked for."""
        return not self.failure and not self.errors


@dataclass
class Results:
    """A whole run."""

    kind: str
    taken_at: str
    seconds: float
    rounds: int
    machine: dict[str, str]
    versions: dict[str, str]
    postgresql_settings: dict[str, str]
    cells: list[Cell]

    def write(self, path: Path) -> None:
        """Write everything as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False) + "\n", "utf-8")

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read what `write` wrote. Raises ValueError where the format is another."""
        data: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if data.pop("format", None) != FORMAT:
            raise ValueError(f"{path.name} is not of format {FORMAT}: measure again")
        data["cells"] = [
            Cell(
                **{
                    **cell,
                    "samples": [Sample(**sample) for sample in cell["samples"]],
                    "checks": [Check(**check) for check in cell["checks"]],
                }
            )
            for cell in data["cells"]
        ]
        return cls(**data)


def median(values: Iterable[float]) -> float | None:
    """Return the median, or None of nothing."""
    known = list(values)
    return statistics.median(known) if known else None


def percentile(values: Iterable[float], share: float) -> float:
    """Return the smallest value that at least this share (0 to 1) of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


def figure(value: float) -> str:
    """Return a number with about three digits, as a person would write it."""
    if value == int(value) and abs(value) < 1000:
        return f"{int(value)}"
    return (
        f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:.1f}"
        if abs(value) >= 10
        else f"{value:.2g}"
        if (abs(value) < 0.1)
        else f"{value:.2f}"
    )


def shares(cpu: Mapping[str, float]) -> str:
    """Return shares of one core in words: `broker 97 %, PostgreSQL 61 %`."""
    return ", ".join(f"{name} {share * 100:.0f} %" for name, share in cpu.items())


def table(cells: Iterable[Cell]) -> str:
    """Return the run for a terminal: each cell's figures, then its checks."""
    lines = []
    for cell in cells:
        lines += ["", f"{cell.name}: {cell.title}"]
        for case, who in cell.contestants():
            names = dict.fromkeys(name for sample in cell.of(case, who) for name in sample.figures)
            values = ((name, cell.median(case, who, name)) for name in names)
            text = "  ".join(f"{name} {figure(value)}" for name, value in values if value is not None)
            lines.append(f"    {case:<22} {who:<22} {text}")
            if cpu := shares(cell.cpu(case, who)):
                lines.append(f"    {'':<22} {'':<22} CPU: {cpu}")
        lines += [f"    note: {note}" for note in cell.notes]
        lines += [f"    ERRORS: {count} × {name}" for name, count in cell.errors.items()]
        if cell.failure:
            lines.append(f"    FAILED: {cell.failure}")
        for check in cell.checks:
            value = "–" if check.value is None else f"{figure(check.value)} {check.unit}"
            verdict = check.verdict if cell.is_valid else "invalid"
            lines.append(f"  → {check.what}: {value}" + (f" ({check.target})" if check.target else "") + f": {verdict}")
    return "\n".join(lines)
