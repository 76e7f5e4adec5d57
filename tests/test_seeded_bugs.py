"""The bugs of the mutation check can still be put into the broker: their places move with the code."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
MUTATIONS: list[Any] = list(runpy.run_path(str(ROOT / "tests" / "nightly" / "seeded_bugs.py"))["MUTATIONS"])


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[mutation.name for mutation in MUTATIONS])
def test_a_seeded_bug_has_its_place(mutation: Any) -> None:
    text = (ROOT / mutation.file).read_text("utf-8")
    for old, new in mutation.edits:
        assert old in text
        assert old != new
        text = text.replace(old, new)
    compile(text, mutation.file, "exec")


def test_the_tests_that_must_notice_them_are_there() -> None:
    tests = sorted({test for mutation in MUTATIONS for test in mutation.tests})
    collecting = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *tests]
    collected = subprocess.run(collecting, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert collected.returncode == 0, collected.stdout[-3000:] + collected.stderr[-3000:]
