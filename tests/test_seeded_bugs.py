"""The bugs of the mutation check can still be put into the broker: their places move with the code."""

from __future__ import annotations

import runpy
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
    for test in mutation.tests:
        assert (ROOT / test.split("::")[0]).is_file()
