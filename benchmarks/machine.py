"""What the figures were taken on: the machine, and the versions of all that took part."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.processes import Cluster
from benchmarks.sql_peers import Pgmq, Procrastinate

LIBRARIES = ("aiohttp", "psycopg", "uvloop", "msgspec", "py-spy")
# How each program says its version, and what of it to keep.
PROGRAMS = {
    "wrk": (("wrk", "-v"), r"wrk (\S+)"),
    "beanstalkd": (("beanstalkd", "-v"), r"beanstalkd (\S+)"),
    "Redis": (("redis-server", "--version"), r"v=(\S+)"),
}


def machine() -> dict[str, str]:
    """Return what is known of this machine, without its name."""
    processor = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor[1].strip() if processor else platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{memory / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def versions(cluster: Cluster) -> dict[str, str]:
    """Return the versions of all that takes part; what is not installed is left out."""
    found = {"PostgreSQL": cluster.version(), "Python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    for peer in (Pgmq, Procrastinate):
        if (version := peer.version()) is not None:
            found[peer.name] = version
    for name, (command, pattern) in PROGRAMS.items():
        if shutil.which(command[0]):
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            match = re.search(pattern, said.stdout + said.stderr)
            found[name] = match[1] if match else "of an unknown version"
    return found
