"""What a part of the nightly tests is, and what it comes to."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Options:
    """What was asked for: `is_quick` for a fraction of the size, `times` in place of a part's own number.

    Of the mutations only those with one of `only` in their names.
    """

    seed: int
    is_quick: bool = False
    times: int | None = None
    only: tuple[str, ...] = ()

    def number(self, full: int, quick: int) -> int:
        """Return how often something is to be done."""
        return self.times or (quick if self.is_quick else full)


@dataclass
class Result:
    """What one case came to. A case that cannot be tried here says in `skipped` what is missing."""

    case: str
    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0.0
    began_at: float = field(default_factory=time.monotonic, repr=False)

    def expect(self, fact: object, otherwise: str) -> None:
        """Note a violation where something is not so."""
        if not fact:
            self.violations.append(otherwise)

    @property
    def verdict(self) -> str:
        return "skipped" if self.skipped else "VIOLATED" if self.violations else "ok"


Say = Callable[[str], None]
Part = Callable[[Options, Say], AsyncIterator[Result]]
