"""The mutation check: each of these bugs, put into a copy of the tree, must make the tests fail that are named for it.

First the tests are run on the copy as it is, where all must pass. A bug whose place is gone is a mistake in
seeded_bugs.py; one that a test does not notice is a promise that nobody watches.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from parts import Options, Result, Say
from seeded_bugs import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
COPIED = ("broker", "tests", "benchmarks", "rpc_schema.json", "setup.cfg", "pyproject.toml")
# Only catches a hang: the tests of one bug have their own deadlines.
PATIENCE = 1200.0


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    """Run the tests of each bug, in a copy that has it."""
    with tempfile.TemporaryDirectory(prefix="wonderq-mutations-", ignore_cleanup_errors=True) as name:
        tree = Path(name)
        tree.chmod(0o755)
        for each in COPIED:
            copy(ROOT / each, tree / each)
        chosen = [each for each in MUTATIONS if not options.only or any(text in each.name for text in options.only)]
        if not chosen:
            raise ValueError(f"no bug has any of {options.only} in its name")
        tests = sorted({test for mutation in chosen for test in mutation.tests})
        say(f"{len(chosen)} bugs, {len(tests)} tests, which must pass without them")
        untouched = Result("no bug", {"tests": len(tests)})
        untouched.violations += [f"{test} fails without any bug" for test in await failing(tree, tests)]
        yield untouched
        for mutation in chosen:
            yield await tried(tree, mutation)


async def tried(tree: Path, mutation: Mutation) -> Result:
    """Put a bug in, run its tests, take it out again."""
    result = Result(mutation.name)
    file = tree / mutation.file
    before = file.read_text()
    after = before
    for old, new in mutation.edits:
        result.expect(old in after and old != new, f"{mutation.file} has no {old.strip()[:60]!r} any more")
        after = after.replace(old, new)
    if result.violations:
        return result
    file.write_text(after)
    try:
        failed = await failing(tree, list(mutation.tests))
    finally:
        file.write_text(before)
    result.figures = {"failed": f"{len(failed)} of {len(mutation.tests)}"}
    for test in mutation.tests:
        result.expect(test in failed, f"survived {test}")
    return result


async def failing(tree: Path, tests: list[str]) -> list[str]:
    """Run these tests in a copy of the tree; return those of which a case failed. Raises RuntimeError if none ran."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests,
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    try:
        async with asyncio.timeout(PATIENCE):
            said = (await process.communicate())[0].decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    if process.returncode not in (0, 1):
        raise RuntimeError(f"the tests could not be run:\n{said[-3000:]}")
    nodes = [
        line.split(" ", 1)[1].split(" - ")[0] for line in said.splitlines() if line.startswith(("FAILED ", "ERROR "))
    ]
    return [test for test in tests if any(is_case(node, test) for node in nodes)]


def is_case(node: str, test: str) -> bool:
    """Whether what pytest has named is this test, a case of it, or in this file."""
    return node == test or node.startswith((f"{test}[", f"{test}::"))


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    else:
        shutil.copy(source, target)
