"""The processes of the demo: started, and stopped again however the demo ends."""

import asyncio
import os
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

PROJECT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 120.0
STOP_TIMEOUT = 30.0


class DemoFailed(Exception):
    """The demo cannot go on; the text says why."""


@asynccontextmanager
async def running(*arguments: str | Path, stderr: IO[bytes] | None = None) -> AsyncIterator[Process]:
    """Run `python -m …`; at the end of the block send SIGTERM and wait, at last SIGKILL."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *arguments),
        stdin=PIPE,
        stdout=PIPE,
        stderr=stderr,
        cwd=PROJECT,
        # The demo reads Python's own directory; meanwhile nothing should be written there.
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        # Ctrl-C goes to the foreground processes of a terminal; the demo alone is to get it.
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT)
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def own_broker(data_dir: Path) -> AsyncIterator[str]:
    """Run a broker on a free port; give its URL; see that it ends with exit code 0."""
    with tempfile.TemporaryFile() as log:
        try:
            command = ("broker", "serve", "--port", "0", "--data-dir", data_dir)
            async with running(*command, stderr=log) as process:
                line = await read_line(process, "The broker")
                yield line.removeprefix("listening on ")
            if process.returncode != 0:
                raise DemoFailed(f"The broker ended with exit code {process.returncode}.")
        except Exception:
            log.seek(0)
            print(*log.read().decode(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr)
            raise


async def read_line(process: Process, who: str) -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT)
    except TimeoutError:
        raise DemoFailed(f"{who} said nothing for {START_TIMEOUT:.0f} s.") from None
    if not line:
        raise DemoFailed(f"{who} ended before it was ready.")
    return line.decode().strip()


async def feed(process: Process, text: str) -> None:
    """Write a process's standard input to its end; that it died shows in its exit code."""
    assert process.stdin is not None
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(text.encode())
        await process.stdin.drain()
    process.stdin.close()
