"""Load, and what came of it: wrk with a script in Lua, or workers in processes of their own.

Both count what was certainly done. What was answered by an error, or not answered, counts as an error only.
"""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
# A pool of bodies this large repeats seldom enough: no server here compresses over more than one message.
POOL_BYTES = 4 * 2**20
MISSING_WRK = "wrk is not installed, and makes the load: apt-get install wrk (Debian, Ubuntu), brew install wrk (macOS)"


@dataclass
class Tally:
    """What a load got done: messages completed in so many seconds, errors by kind, the CPU time it took itself."""

    messages: int = 0
    calls: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    errors: dict[str, int] = field(default_factory=dict)
    p50_ms: float | None = None
    p99_ms: float | None = None
    max_ms: float | None = None
    latencies_ms: list[float] = field(default_factory=list)

    @property
    def messages_per_second(self) -> float:
        return self.messages / self.seconds if self.seconds else 0.0


class MissingProgram(Exception):
    """A program that the benchmark needs is not installed; the message says how to install it."""


def write_bodies(path: Path, size: int) -> Path:
    """Write a pool of JSON strings, one a line, each of `size` random characters, which do not compress."""
    with open(path, "wb") as file:
        for _ in range(max(100, min(10_000, POOL_BYTES // size))):
            file.write(b'"' + base64.urlsafe_b64encode(os.urandom(size))[:size] + b'"\n')
    return path


def read_bodies(path: Path) -> list[str]:
    """Return the JSON strings of a pool."""
    return path.read_text("ascii").splitlines()


class Wrk:
    """wrk on its way: one thread, so many connections, one of the scripts beside this module.

    A context manager that ends it, where it is left by an error.
    """

    def __init__(self, script: str, url: str, connections: int, seconds: float, **options: str | int | Path) -> None:
        program = shutil.which("wrk")
        if program is None:
            raise MissingProgram(MISSING_WRK)
        command = [program, "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s"]
        command += ["-s", f"{script}.lua", url, "--", *(f"{name}={value}" for name, value in options.items())]
        self._process = subprocess.Popen(
            command, cwd=HERE, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def wait(self) -> Tally:
        """Wait for its end; return what it got done."""
        process = self._process
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            output, complaint = process.stdout.read().decode(), process.stderr.read().decode()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        except BaseException:
            self.__exit__()
            raise
        finally:
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
        return tally_of(output, complaint, usage.ru_utime + usage.ru_stime)

    def stop(self) -> Tally:
        """Let it end now; return what it got done."""
        self._process.send_signal(signal.SIGINT)
        return self.wait()

    def __enter__(self) -> Wrk:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()


def wrk(script: str, url: str, connections: int, seconds: float, **options: str | int | Path) -> Tally:
    """Run wrk; return what it got done."""
    return Wrk(script, url, connections, seconds, **options).wait()


def tally_of(output: str, complaint: str, cpu_seconds: float) -> Tally:
    """Read the line that common.lua prints at the end."""
    line = re.search(r"^completed=.*$", output, re.MULTILINE)
    if line is None or complaint.strip():
        raise RuntimeError(f"wrk failed: {(complaint or output).strip()[-400:]}")
    counts, refusal = line[0].split(" refusal=", 1)
    values = {name: int(value) for name, value in (pair.split("=") for pair in counts.split())}
    errors = {f"{name} failed": values[name] for name in ("connect", "read", "write")}
    errors |= {"no answer in time": values["timeout"], f"refused ({refusal})": values["refused"]}
    return Tally(
        messages=values["completed"],
        calls=values["calls"],
        seconds=values["microseconds"] / 1e6,
        cpu_seconds=cpu_seconds,
        errors={kind: count for kind, count in errors.items() if count},
        p50_ms=values["p50"] / 1000,
        p99_ms=values["p99"] / 1000,
        max_ms=values["max"] / 1000,
    )


def run_loop(work: Coroutine[Any, Any, Tally]) -> Tally:
    """Run to its end what a worker does, on uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(work)
    tally: Tally = uvloop.run(work)
    return tally


class Work(Protocol):
    """What a worker does, in a process of its own: it can be pickled."""

    def run(self, ready: Callable[[], None]) -> Tally:
        """Prepare; call `ready`, which returns when all workers are; work; return what was done."""


def work(workers: Sequence[Work]) -> Tally:
    """Run workers at the same time, a process each; return what they did together."""
    context = multiprocessing.get_context("spawn")
    running: list[tuple[BaseProcess, Connection]] = []
    try:
        for worker in workers:
            ours, theirs = context.Pipe()
            process: BaseProcess = context.Process(target=_run, args=(worker, theirs), daemon=True)
            process.start()
            theirs.close()
            running.append((process, ours))
        for _, pipe in running:
            _expect(pipe, "ready")
        for _, pipe in running:
            pipe.send("go")
        tallies = [_expect(pipe, "done") for _, pipe in running]
    finally:
        for process, pipe in running:
            process.terminate()
            process.join()
            pipe.close()
    return merge(tallies)


def merge(tallies: Sequence[Tally]) -> Tally:
    """Add up what was done at the same time."""
    errors: dict[str, int] = {}
    for tally in tallies:
        for kind, count in tally.errors.items():
            errors[kind] = errors.get(kind, 0) + count
    return Tally(
        messages=sum(tally.messages for tally in tallies),
        calls=sum(tally.calls for tally in tallies),
        seconds=max(tally.seconds for tally in tallies),
        cpu_seconds=sum(tally.cpu_seconds for tally in tallies),
        errors=errors,
        latencies_ms=[taken for tally in tallies for taken in tally.latencies_ms],
    )


def _run(worker: Work, pipe: Connection) -> None:
    began = (0.0, 0.0)

    def ready() -> None:
        nonlocal began
        pipe.send(("ready", Tally()))
        pipe.recv()
        began = (time.perf_counter(), time.process_time())

    try:
        tally = worker.run(ready)
        tally.seconds = time.perf_counter() - began[0]
        tally.cpu_seconds = time.process_time() - began[1]
        pipe.send(("done", tally))
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", Tally()))


def _expect(pipe: Connection, wanted: str) -> Tally:
    try:
        said, tally = pipe.recv()
    except EOFError:
        said = "it ended"
    if said != wanted:
        raise RuntimeError(f"a worker failed: {said}")
    assert isinstance(tally, Tally)
    return tally
