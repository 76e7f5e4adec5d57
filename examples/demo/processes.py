"""The processes of a demo: started, and stopped again however the demo ends."""

import asyncio
import io
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO

from broker.client import BrokerError

PROJECT = Path(__file__).resolve().parents[2]
START_TIMEOUT = 120.0
STOP_TIMEOUT = 30.0


class DemoFailed(Exception):
    """The demo cannot go on; the text says why."""


async def in_good_order(demo: Coroutine[None, None, bool]) -> int:
    """Run a demo so that Ctrl-C and SIGTERM end it in good order; return the exit code."""
    # The demo may be reading Python's own directory: nothing is to be written there meanwhile.
    sys.dont_write_bytecode = True
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # The directory's name need not be UTF-8 either.
    task = asyncio.create_task(demo)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        # Only once: a second Ctrl-C must not interrupt the stopping of the processes.
        asyncio.get_running_loop().add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    try:
        return 0 if await task else 1
    except (DemoFailed, BrokerError) as error:
        print(error, file=sys.stderr)
        return 1
    except asyncio.CancelledError:
        print("interrupted; everything is stopped", file=sys.stderr)
        return 130


def find_data_dir() -> Path:
    """Return where a demo's own broker keeps its data: what DEMO_DATA_DIR says, or `.demo`.

    For root below a closed folder, where PostgreSQL's own account cannot go, it is another one.
    """
    is_closed = any(not folder.stat().st_mode & 0o001 for folder in (Path.cwd(), *Path.cwd().parents))
    default = "/var/lib/wonderq-demo" if os.geteuid() == 0 and is_closed else ".demo"
    return Path(os.environ.get("DEMO_DATA_DIR") or default).resolve()


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
            async with asyncio.timeout(STOP_TIMEOUT):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


@asynccontextmanager
async def own_broker(data_dir: Path, *options: str) -> AsyncIterator[str]:
    """Run a broker on a free port; give its URL; see that it ends with exit code 0."""
    with tempfile.TemporaryFile() as log:
        try:
            command = ("broker", "serve", "--port", "0", "--data-dir")
            async with running(*command, data_dir, *options, stderr=log) as process:
                line = await read_line(process, "The broker")
                yield line.removeprefix("listening on ")
            if process.returncode != 0:
                raise DemoFailed(f"The broker ended with exit code {process.returncode}.")
        except Exception:
            log.seek(0)
            print(*log.read().decode(errors="replace").splitlines()[-20:], sep="\n", file=sys.stderr)
            raise


async def read_line(process: Process, who: str, timeout: float = START_TIMEOUT) -> str:
    """Return the next line that a process prints."""
    assert process.stdout is not None
    try:
        # wait_for() of Python 3.11 loses a Ctrl-C that comes at the moment of the line.
        async with asyncio.timeout(timeout):
            line = await process.stdout.readline()
    except TimeoutError:
        raise DemoFailed(f"{who} said nothing for {timeout:.0f} s.") from None
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
