"""The modules of the demo: found, described, and what the subscribers do with them.

A name is a path below the directory, percent-encoded, because a path is bytes that need not be UTF-8.
"""

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from examples.demo.files import list_files

FUNCTION = re.compile(rb"^[ \t]*(?:async[ ]+)?def[ ]+(\w+)", re.MULTILINE)
LARGE = 4096
# The packages that `lines` asks for: the largest.
PACKAGES_ASKED_FOR = 10


@dataclass(frozen=True)
class Module:
    """A module, and what the headers of its message say."""

    name: str
    package: str
    size: str

    @property
    def headers(self) -> dict[str, str]:
        return {"package": self.package, "size": self.size}


def find_modules(data_dir: Path) -> tuple[Path, list[Module]]:
    """Return the directory to work on and the modules below it."""
    left_out = {os.fsencode(data_dir)}
    if given := os.environ.get("DEMO_DIR"):
        directory = Path(given).resolve()
    else:
        directory = Path(sysconfig.get_path("stdlib")).resolve()
        left_out |= {b"site-packages", b"dist-packages", b"test", b"tests"}
    names = [name for name in list_files(directory, left_out) if name.endswith(".py")]
    return directory, [describe(directory, name) for name in names]


def describe(directory: Path, name: str) -> Module:
    """Return a module with its package, which is a folder or `.`, and `small` or `large`."""
    package, slash, _ = name.partition("/")
    try:
        size = path_of(directory, name).stat().st_size
    except OSError:
        size = 0
    return Module(name, package if slash else ".", "large" if size >= LARGE else "small")


def filter_of_lines(modules: list[Module]) -> dict[str, list[str]]:
    """Return what `lines` asks for: large modules of the packages that have the most modules."""
    packages = Counter(module.package for module in modules).most_common(PACKAGES_ASKED_FOR)
    return {"package": [package for package, _ in packages], "size": ["large"]}


def is_wanted(module: Module, wanted: Mapping[str, list[str]]) -> bool:
    """Tell by ourselves whether a filter lets a module through: every header has one of its values."""
    return all(module.headers[header] in values for header, values in wanted.items())


def path_of(directory: Path, name: str) -> Path:
    """Return where a module is."""
    return directory / os.fsdecode(unquote_to_bytes(name))


def index(text: bytes) -> dict[str, Any]:
    """Return every function of a module with its line."""
    functions: list[list[Any]] = []
    line, position = 1, 0
    for found in FUNCTION.finditer(text):
        line += text.count(b"\n", position, found.start(1))
        position = found.start(1)
        functions.append([found[1].decode(errors="replace"), line])
    return {"functions": functions}


def lines(text: bytes) -> dict[str, Any]:
    """Count the lines of a module, and those that are neither blank nor a comment."""
    stripped = [line.strip() for line in text.splitlines()]
    return {"lines": len(stripped), "code": sum(bool(line) and not line.startswith(b"#") for line in stripped)}


# By the name of a subscriber, what it does with a module.
WORK: dict[str, Callable[[bytes], dict[str, Any]]] = {"index": index, "lines": lines}


def work(subscriber: str, directory: Path, name: str) -> dict[str, Any]:
    """Do a subscriber's work on a module; return what was found, or that it cannot be read."""
    try:
        text = path_of(directory, name).read_bytes()
    except OSError:
        return {"error": "unreadable"}
    return WORK[subscriber](text)
