"""Programs that the system need not have: fetched, and unpacked into a folder, not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


class CannotInstall(Exception):
    """Says what is missing."""


def unpack(folder: Path, *packages: str) -> None:
    """Fetch packages of Debian and unpack them into a new folder. Raises CannotInstall."""
    folder.mkdir()
    try:
        for package in packages:
            _run(folder, "apt-get", "-qq", "download", package)
        for file in folder.glob("*.deb"):
            _run(folder, "dpkg", "-x", file, folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotInstall(f"{', '.join(packages)} cannot be fetched: {error}") from error


def install(environment: Path, python: Path, *packages: str) -> None:
    """Make an environment with a Python of the system and packages of PyPI. Raises CannotInstall."""
    if not python.exists():
        raise CannotInstall(f"there is no {python}, which PostgreSQL's account could run")
    try:
        _run(environment.parent, python, "-m", "venv", "--without-pip", environment)
        pip = (sys.executable, "-m", "pip", "--python", environment / "bin/python", "--disable-pip-version-check")
        _run(environment.parent, *pip, "install", "-qq", *packages)
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotInstall(f"{', '.join(packages)} cannot be installed: {error}") from error


def _run(folder: Path, *words: object) -> None:
    subprocess.run([str(word) for word in words], cwd=folder, check=True, stdin=subprocess.DEVNULL, capture_output=True)
