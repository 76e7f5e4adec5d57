"""Random faults for hours: the soak of tests/faults, seed after seed, summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator

from parts import Options, Result, Say
from soak import soak

SEEDS = 20
FAULTS_EACH = 25
ACKNOWLEDGED = 200_000
# A slow machine needs more seeds for as many messages; so many at most.
MOST_SEEDS = 100
QUICK_SEEDS = 2
QUICK_FAULTS_EACH = 10


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    """Run seeds from the given one on, until there were enough faults and enough messages."""
    seeds = options.number(SEEDS, QUICK_SEEDS)
    faults_each = QUICK_FAULTS_EACH if options.is_quick else FAULTS_EACH
    enough = 0 if options.is_quick or options.times else ACKNOWLEDGED
    total = Result("all seeds")
    figures: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    number = 0
    while number < seeds or (figures["acknowledged"] < enough and number < MOST_SEEDS):
        seed = options.seed + number
        number += 1
        result = Result(f"seed {seed}")
        outcome = await soak(seed, faults=faults_each, say=lambda _: None)
        verdict = outcome.verdict
        kinds += outcome.faults
        result.figures = {
            "faults": outcome.faults.total(),
            "acknowledged": verdict.acknowledged,
            "lost": len(verdict.lost),
            "recovered": verdict.recovered,
            "duplicated": verdict.duplicated.total(),
            "drain_seconds": round(outcome.drain_seconds, 1),
        }
        figures.update({name: value for name, value in result.figures.items() if isinstance(value, int)})
        result.violations = [f"{name}: {what}" for name, what in outcome.violations.items()]
        total.violations += [f"seed {seed}: {violation}" for violation in result.violations]
        yield result
    total.figures = {"seeds": number, **figures, "kinds": dict(kinds)}
    total.expect(figures["acknowledged"] >= enough, f"no more than {figures['acknowledged']} messages")
    yield total
