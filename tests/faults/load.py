"""Producers, consumers, publishers, receivers and who broadcasts as processes, and the history that they leave."""

from __future__ import annotations

import asyncio
import itertools
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from history import AnyEvent, read
from pair import DIES_WITH_US, PATIENCE

ALL = ("produce", "publish", "broadcast", "consume", "receive")
ACTORS = Path(__file__).with_name("actors.py")


class Actor:
    """A process of `actors.py`."""

    def __init__(
        self, what: str, target: str, more: Sequence[object], name: str, process: subprocess.Popen[bytes], history: Path
    ) -> None:
        self.what = what
        self.target = target
        self.more = more
        self.name = name
        self.history = history
        self.process = process
        self.was_killed = False

    async def kill(self) -> None:
        self.was_killed = True
        self.process.kill()
        await self.ended()

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def ended(self) -> None:
        async with asyncio.timeout(PATIENCE):
            while self.process.poll() is None:
                await asyncio.sleep(0.01)


class Load:
    """All actors; to be closed when nothing more is wanted of them. `queue` is for those of whom no other is said."""

    def __init__(self, folder: Path, urls: Sequence[str], *, seed: int, lease_seconds: float, queue: str) -> None:
        self._folder = folder
        self._urls = urls
        self._seed = seed
        self._lease_seconds = lease_seconds
        self._queue = queue
        self._names = itertools.count(1)
        self._actors: list[Actor] = []

    def start(self, what: str, target: str | None = None, *more: object) -> None:
        """Start one more that will "produce", "consume", "publish" to or "broadcast" a topic, or "receive" pushes."""
        target = target or self._queue
        name = f"{what}-{next(self._names)}"
        history = self._folder / f"{name}.history"
        history.touch()
        words = [what, name, ",".join(self._urls), target, str(self._seed), str(history), *map(str, more)]
        if what == "consume":
            words.append(str(self._lease_seconds))
        with (self._folder / f"{name}.err").open("wb") as errors:
            # It takes note of what it is told when it is ready, also where that is before it has begun.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                process = subprocess.Popen(
                    [*DIES_WITH_US, sys.executable, "-I", "-S", str(ACTORS), *words],
                    stdin=subprocess.DEVNULL,
                    stderr=errors,
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._actors.append(Actor(what, target, more, name, process, history))

    def start_again(self, actor: Actor) -> None:
        """Start one more like this one."""
        self.start(actor.what, actor.target, *actor.more)

    def living(self, *whats: str) -> list[Actor]:
        """Return those of these kinds that have not ended."""
        return [actor for actor in self._actors if actor.what in whats and actor.process.poll() is None]

    async def works(self) -> None:
        """Return when producers have been acknowledged twenty times more: there is load, and it gets through."""
        before = self._acknowledgements()
        async with asyncio.timeout(PATIENCE):
            while self._acknowledgements() < before + 20:
                await asyncio.sleep(0.02)

    async def finish(self, *whats: str) -> None:
        """Let all of these kinds finish what they have begun, and end."""
        actors = self.living(*whats)
        for actor in actors:
            actor.process.terminate()
        await asyncio.gather(*(actor.ended() for actor in actors))

    async def close(self) -> None:
        """Kill those that live."""
        await asyncio.gather(*(actor.kill() for actor in self.living(*ALL)))

    def events(self, *targets: str) -> list[AnyEvent]:
        """Return what all have noted so far, or those of these queues and topics; those that were killed too."""
        return [
            event
            for actor in self._actors
            if not targets or actor.target in targets
            for event in read(actor.history.read_bytes())
        ]

    def accidents(self) -> list[str]:
        """Return those that ended with an error of their own, and its last line."""
        return [
            f"{actor.name}: {(self._folder / f'{actor.name}.err').read_text().strip()[-300:]}"
            for actor in self._actors
            if not actor.was_killed and actor.process.poll() not in (None, 0)
        ]

    def _acknowledgements(self) -> int:
        return sum(actor.history.read_bytes().count(b'"acknowledged"') for actor in self._actors)
