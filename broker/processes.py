"""Several server processes on one port: a supervisor, which is the process that was started, and its workers.

The supervisor owns what there is once: the embedded PostgreSQL, the migration of the database, the port. It starts
the workers, which serve, and starts one again that dies; no request passes through it. They end together: told to
stop, they drain at the same time, and none closes the port before all are idle; should the supervisor be killed, they
end by themselves.

`sharing` says how the port is shared, `worker` how the processes talk, `metrics` how their counts are summed.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any

from broker.server import DRAIN_SECONDS, run_to_end, serve
from broker.settings import Settings
from broker.sharing import BACKLOG, Scoreboard
from broker.starting import (
    LONG_LIFE_SECONDS,
    MAX_CRASHES,
    StartError,
    Stopped,
    announce,
    cannot_listen,
    migrated_database,
    stop_on_signals,
    unless_stopped,
    url_of,
)
from broker.worker import IDLE, READY, SCOREBOARD, STOP, Job

log = logging.getLogger("broker.processes")

# What workers that have drained may take for the rest of their stop; one that hangs is killed then.
END_SECONDS = 3.5
# Not on a disk where that can be; also to be had where all of the file system is read only, as in a container.
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - what is made there is private


def run(settings: Settings) -> int:
    """Serve by as many processes as the settings say; return the exit code."""
    return run_to_end(serve(settings) if settings.processes == 1 else supervise(settings))


async def supervise(settings: Settings) -> None:
    """Serve by several processes until SIGTERM or SIGINT.

    Raises StartError, EmbeddedError or MigrationError where it cannot start, and StartError where a worker dies again
    and again.
    """
    stop = stop_on_signals()
    with contextlib.suppress(Stopped):
        async with migrated_database(settings, stop) as conninfo, listening(settings) as listeners:
            with shared_folder() as folder:
                scoreboard = Scoreboard(folder / SCOREBOARD, settings.processes)
                descriptors = [each.fileno() for each in listeners]
                jobs = [Job(settings, conninfo, each, descriptors, folder) for each in range(settings.processes)]
                workers = [Worker(job, scoreboard) for job in jobs]
                try:
                    await unless_stopped(stop, all_of(worker.start() for worker in workers))
                    announce(url_of(listeners[0].getsockname(), settings))
                    await unless_stopped(stop, all_of(worker.keep_running() for worker in workers))
                finally:
                    log.info("stopping")
                    for each in listeners:
                        each.close()
                    await end(workers)


@contextlib.asynccontextmanager
async def listening(settings: Settings) -> AsyncIterator[list[socket.socket]]:
    """Yield sockets that listen where one process would. Raises StartError where the port is not to be had."""
    with contextlib.ExitStack() as stack:
        try:
            server = await asyncio.get_running_loop().create_server(
                asyncio.Protocol, settings.host, settings.port, start_serving=False
            )
            listeners = [stack.enter_context(socket.socket(fileno=os.dup(each.fileno()))) for each in server.sockets]
            server.close()
            for each in listeners:
                each.setblocking(False)
                each.listen(BACKLOG)
        except OSError as error:
            raise cannot_listen(settings, error) from error
        yield listeners


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """Yield a private folder for what the workers count together."""
    try:
        folder = tempfile.mkdtemp(prefix="wonderq-", dir=SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else None)
    except OSError as error:
        raise StartError(
            f"There is no folder for what several processes count together: {error.strerror}. Name one that can be"
            " written by TMPDIR, or say --processes 1."
        ) from error
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """One place among the workers, and the process that fills it now."""

    def __init__(self, job: Job, scoreboard: Scoreboard) -> None:
        self._job = job
        self._scoreboard = scoreboard
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start a process and wait until it serves. Raises StartError, for its reasons."""
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "broker.worker"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=self._job.listeners,
            # Out of the reach of Ctrl-C in a terminal.
            start_new_session=True,
            # What is imported here is imported there, however this process was started.
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self._tell(self._job.to_line())
        assert process.stdout is not None
        answer = await process.stdout.readline()
        if answer != READY:
            raise StartError(answer.decode().strip() or "A worker ended while it was starting: the log may say why.")
        log.info("worker serves worker=%d pid=%d", self._job.worker, process.pid)

    async def keep_running(self) -> None:
        """Start a process again whenever it has ended. Raises StartError where that does not help."""
        crashes = 0
        while True:
            began_at = time.monotonic()
            assert self._process is not None
            code = await self._process.wait()
            self._scoreboard.leave(self._job.worker)
            crashes = 1 if time.monotonic() - began_at > LONG_LIFE_SECONDS else crashes + 1
            if crashes > MAX_CRASHES:
                raise StartError("A worker ends again and again: the log may say why.")
            log.error("worker has ended and is started again worker=%d exit_code=%s", self._job.worker, code)
            try:
                await self.start()
            except StartError as error:
                log.error("worker does not start worker=%d reason=%s", self._job.worker, error)

    def drain(self) -> None:
        """Tell it to refuse what is new and to finish what is under way."""
        self._tell(STOP)

    async def idle(self) -> None:
        """Wait until nothing is under way any more, or it has ended."""
        if self._process is not None and self._process.stdout is not None:
            while await self._process.stdout.readline() not in (IDLE, b""):
                pass

    def close_port(self) -> None:
        """Tell it that all are idle."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def ended(self) -> None:
        """Wait until it has ended."""
        if self._process is not None:
            await self._process.wait()

    def kill(self) -> None:
        """End it where it has not ended."""
        if self._process is not None and self._process.returncode is None:
            log.error("worker hangs and is killed worker=%d", self._job.worker)
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _tell(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None and not self._process.stdin.is_closing():
            self._process.stdin.write(line)


async def end(workers: list[Worker]) -> None:
    """Stop all workers within DRAIN_SECONDS and END_SECONDS."""
    for worker in workers:
        worker.drain()
    await within(DRAIN_SECONDS, [worker.idle() for worker in workers])
    for worker in workers:
        worker.close_port()
    await within(END_SECONDS, [worker.ended() for worker in workers])
    for worker in workers:
        worker.kill()
    await all_of(worker.ended() for worker in workers)


async def within(seconds: float, works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of this at the same time; give up what is not done in time."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await all_of(works)


async def all_of(works: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of this at the same time; where one fails, give up the others and raise its error."""
    tasks = [asyncio.create_task(each) for each in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
