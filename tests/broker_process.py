"""A broker as a real process, and what can be seen of it and its PostgreSQL from outside."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import secrecy

# Only catches a hang.
DEADLINE = 60.0


async def until(condition: Callable[[], Any], seconds: float = DEADLINE) -> None:
    """Wait for what no event announces."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


class Process:
    """One `python -m broker serve`."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self.log_path = log
        self.pid = process.pid
        self.url = ""

    @property
    def log(self) -> str:
        """What it has said on standard error."""
        return self.log_path.read_text()

    @property
    def lines(self) -> list[dict[str, Any]]:
        """What it has logged, an object for each line that is written to its end."""
        whole = self.log.rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    async def ready(self) -> Process:
        """Wait until it listens."""
        assert self._process.stdout is not None
        line = (await asyncio.wait_for(self._process.stdout.readline(), DEADLINE)).decode()
        found = re.fullmatch(r"listening on (http://\S+)\n", line)
        assert found, f"{line!r} {self.log}"
        self.url = found[1]
        return self

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def workers(self) -> dict[int, int]:
        """The pids of its workers, by their numbers."""
        return {line["worker"]: line["pid"] for line in self.lines if line["event"] == "worker serves"}

    async def says(self, words: str) -> None:
        """Wait until it has said so."""
        await until(lambda: words in self.log)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def signal_all(self, number: int) -> None:
        """Send a signal to its workers as well, as some service managers do."""
        for pid in (*self.workers.values(), self.pid):
            os.kill(pid, number)

    async def ended(self, seconds: float = DEADLINE) -> int:
        """Wait until it has ended; return its exit code."""
        return await asyncio.wait_for(self._process.wait(), seconds)

    async def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
            for pid in self.workers.values():
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    shutil.rmtree(shared_folder(pid), ignore_errors=True)
                    os.kill(pid, signal.SIGKILL)
        await self._process.wait()
        transport = self._process._transport  # type: ignore[attr-defined]
        transport.close()


Start = Callable[..., Awaitable[Process]]


@contextlib.asynccontextmanager
async def starting(folder: Path) -> AsyncIterator[Start]:
    """Start a broker with these flags: `await start("--data-dir", …, BROKER_PORT="0")`."""
    started: list[Process] = []
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "PG", "DATABASE_"))}
    kept |= {name: os.environ[name] for name in ("BROKER_PG_BIN",) if name in os.environ}
    # The server that all tests share does without fsync.
    kept |= {"BROKER_ALLOW_DATA_LOSS": "yes"}

    async def start_one(*flags: str, port: int = 0, **variables: str) -> Process:
        log = folder / f"broker-{len(started)}.log"
        with log.open("wb") as stderr:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "broker", "serve", "--port", str(port), *flags),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env=kept | variables,
            )
        started.append(Process(process, log))
        return started[-1]

    try:
        yield start_one
    finally:
        for process in started:
            await process.kill()
            secrecy.keep(process.log_path)


@contextlib.contextmanager
def without_its_postgresql(folder: Path) -> Iterator[Path]:
    """Yield a folder; in the end, kill each PostgreSQL that runs on a data directory in it."""
    yield folder
    for pid in itertools.chain.from_iterable(postgres_pids(data_dir) for data_dir in folder.iterdir()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def postgres_pids(data_dir: Path) -> list[int]:
    """Return every process of the PostgreSQL in a data directory, the postmaster first."""
    pids = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and os.readlink(entry / "cwd") == str(data_dir / "postgres"):
                pids.append(int(entry.name))
    return sorted(pids)


def shared_folder(pid: int) -> Path:
    """Return where a worker and its siblings count."""
    found = re.search(r"(/\S*/wonderq-\w+)/", Path(f"/proc/{pid}/maps").read_text())
    assert found
    return Path(found[1])
