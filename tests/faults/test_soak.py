"""Nothing is lost, doubled or left behind, whatever fails in whatever order. See `soak.py`."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from soak import soak

FAULTS = 25


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1, 2])
async def test_promises_hold_under_random_faults(seed: int, record_property: Callable[[str, object], None]) -> None:
    outcome = await soak(seed, faults=FAULTS, say=print)
    summary = outcome.summary()
    kept = ("seed", "seconds", "acknowledged", "lost", "duplicated_share", "drain_seconds")
    record_property("soak", json.dumps({name: summary[name] for name in kept}))
    record_property("soak of each queue", json.dumps(summary["queues"]))
    assert outcome.violations == {}, json.dumps(summary, indent=1)
    assert outcome.faults.total() == FAULTS
    assert outcome.verdict.acknowledged > 10 * FAULTS
    for queue, verdict in outcome.verdicts.items():
        assert verdict.acknowledged > FAULTS, f"{queue} has seen too little"
