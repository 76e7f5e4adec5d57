"""The power fails: what the disk has is there, and what only the system's memory had is not.

PostgreSQL works on a file system of its own in an image file. All its processes are stopped, the image is copied as it
is at that moment, without what the kernel has not written to it yet, and the copy takes the place of the original.
Two controls, without fsync and without synchronous commits, must lose something, or the method would prove nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from pair import ACCOUNT, Node, folder_for_servers
from parts import Options, Result, Say
from under_load import acknowledged, at_work, command, judge, unmount, what_mounting_needs

CUTS = 20
QUICK_CUTS = 4
# A control may be lucky so often.
CONTROL_CUTS = 5
SECONDS_OF_LOAD = (0.5, 2.0)
IMAGE_SIZE = "800M"
SETTINGS = {"max_wal_size": "200MB"}
CONTROLS = {"fsync is off": {"fsync": "off"}, "synchronous_commit is off": {"synchronous_commit": "off"}}


class Disk:
    """A file system in an image, mounted at `folder`."""

    def __init__(self, folder: Path, images: Path) -> None:
        self.folder = folder
        self._image = images / "a"
        self._next_image = images / "b"
        command("truncate", "-s", IMAGE_SIZE, self._image)
        command("mkfs.ext4", "-q", "-F", self._image)
        self._mount()

    async def lose_power(self, node: Node) -> None:
        """Let the server die with the system under it, and come back with what the disk has."""
        node.pause()
        command("cp", "--sparse=always", self._image, self._next_image)
        await node.kill()
        unmount(self.folder)
        self._image, self._next_image = self._next_image, self._image
        self._mount()

    def write_everything(self) -> None:
        """Let the disk have all that was written so far."""
        command("sync", "-f", self.folder)

    def _mount(self) -> None:
        # The journal is not to be written by itself while a test lasts.
        command("mount", "-o", "loop,commit=600", self._image, self.folder)


@contextlib.contextmanager
def made_disk(folder: Path) -> Iterator[Disk]:
    folder.mkdir()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="wonderq-power-", dir=memory if memory.is_dir() else None) as images:
        try:
            yield Disk(folder, Path(images))
        finally:
            unmount(folder)


@contextlib.asynccontextmanager
async def node_on_a_disk(folder: Path, settings: dict[str, str]) -> AsyncIterator[tuple[Node, Disk]]:
    with made_disk(folder / "disk") as disk:
        home = disk.folder / "servers"
        home.mkdir()
        shutil.chown(home, ACCOUNT)
        node = Node(home, "single")
        node.settings = SETTINGS | settings
        try:
            await node.make()
            await node.start()
            disk.write_everything()
            yield node, disk
        finally:
            await node.close()


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    if missing := what_mounting_needs():
        yield Result("power cut", skipped=missing)
        return
    yield await durable(options, say)
    for name, settings in CONTROLS.items():
        yield await control(name, settings, options)


async def durable(options: Options, say: Say) -> Result:
    """Cut the power again and again under one broker, which stays; nothing may be lost."""
    cuts = options.number(CUTS, QUICK_CUTS)
    result = Result(f"{cuts} power cuts")
    chance = random.Random(options.seed)
    with folder_for_servers() as folder:
        async with node_on_a_disk(folder, {}) as (node, disk), at_work(folder, [node], options.seed) as (brokers, load):
            for n in range(cuts):
                await load.works()
                await asyncio.sleep(chance.uniform(*SECONDS_OF_LOAD))
                await disk.lose_power(node)
                await node.start()
                say(f"power cut {n + 1}/{cuts}: {len(acknowledged(load))} acknowledged")
            await judge(result, node, brokers, load)
    return result


async def control(name: str, settings: dict[str, str], options: Options) -> Result:
    """Cut the power of a server that is set to lose messages; something must be lost."""
    result = Result(f"control: {name}")
    lost = cuts = 0
    with folder_for_servers() as folder:
        async with (
            node_on_a_disk(folder, settings) as (node, disk),
            at_work(folder, [node], options.seed, "--allow-data-loss", consumers=0) as (_, load),
        ):
            while not lost and cuts < CONTROL_CUTS:
                await asyncio.sleep(SECONDS_OF_LOAD[1])
                cuts += 1
                await disk.lose_power(node)
                told = acknowledged(load)
                lost = len(told - await found(node))
            result.figures = {"cuts": cuts, "acknowledged": len(told), "lost": lost}
    result.expect(lost, "nothing was lost, so the method does not show what a power cut does")
    return result


async def found(node: Node) -> set[str]:
    """Start a server after the cut; return the messages that it has, none where it cannot be started any more."""
    try:
        await node.start()
        return {value for (value,) in await node.query("SELECT body #>> '{}' FROM broker.messages")}
    except Exception:
        return set()
