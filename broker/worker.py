"""One of several server processes, started by their supervisor (`processes`) as `python -m broker.worker`.

They talk over standard input and output, a line at a time:

    supervisor                              worker
    the job, as JSON
                                            "ready", or why it cannot start
    "stop"
                                            "idle": no request is under way any more
    the end: all are idle

An end that comes without a "stop" means that the supervisor is dead. The worker then leaves the port at once, so
that the next broker can have it, answers what is under way, and ends. It takes no signals: Ctrl-C and some service
managers send them to every process, and the supervisor says when to stop.
"""

import asyncio
import logging
import os
import shutil
import signal
import socket
import sys
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from broker.errors import BrokerError
from broker.logs import configure_logs
from broker.metrics import share_metrics
from broker.server import Server, run_to_end, spend_less_on_memory
from broker.settings import Settings
from broker.sharing import Scoreboard, Share
from broker.starting import StartError, Stopped, unless_stopped

log = logging.getLogger("broker.worker")

READY = b"ready\n"
STOP = b"stop\n"
IDLE = b"idle\n"
SCOREBOARD = "connections"


@dataclass(frozen=True)
class Job:
    """What a worker is told when it starts. `folder` is private to the broker and shared by its workers."""

    settings: Settings
    conninfo: str
    worker: int
    listeners: list[int]
    folder: Path

    def to_line(self) -> bytes:
        return msgspec.json.encode(self, enc_hook=str) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> "Job":
        return msgspec.json.decode(line, type=cls, dec_hook=lambda kind, text: kind(text))


async def work() -> None:
    """Serve as one worker until told to stop."""
    orders = await standard_input()
    line = await orders.readline()
    if not line:  # The supervisor died before it could say more.
        return
    job = Job.from_line(line)
    configure_logs(job.settings.log_format, job.settings.log_level)
    share_metrics(job.folder, job.worker)
    stop = asyncio.Event()
    order = asyncio.create_task(orders.readline())
    order.add_done_callback(lambda _: stop.set())

    async def all_are_idle() -> None:
        say(IDLE)
        await orders.read()

    share = Share(
        worker=job.worker,
        listeners=[socket.socket(fileno=number) for number in job.listeners],
        scoreboard=Scoreboard(job.folder / SCOREBOARD, job.settings.processes),
        metrics_folder=job.folder,
        all_are_idle=all_are_idle,
    )
    with suppress(Stopped):
        async with AsyncExitStack() as stack:
            try:
                server = Server(job.conninfo, job.settings, share)
                await unless_stopped(stop, stack.enter_async_context(server))
            except (StartError, BrokerError) as error:
                say(f"{error}\n".encode())
                return
            spend_less_on_memory()
            say(READY)
            await stop.wait()
            if order.result() != STOP:
                log.error("the supervisor has died, so this worker ends worker=%d", job.worker)
                await server.leave_port()
    if order.result() != STOP:
        shutil.rmtree(job.folder, ignore_errors=True)


async def standard_input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=2**20)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def say(line: bytes) -> None:
    """Tell the supervisor, if there is one."""
    with suppress(OSError):
        os.write(sys.stdout.fileno(), line)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.exit(run_to_end(work()))
