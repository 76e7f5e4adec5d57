"""A consumer of the demo: reads the files that messages name and reports what it found.

It sends its report, as a message, before the task is deleted. So if it dies in between there is a report
too many, never one too few; reports carry the task's message_id, by which the one too many is known.
"""

import argparse
import asyncio
import os
from pathlib import Path

from broker.client import Client, Message, NewMessage

from . import FAULTS, FILES, RESULTS, VISIBILITY_TIMEOUT
from .files import read_file

AT_A_TIME = 50


class Worker:
    """What handles the tasks, with a fault of which the demo must notice."""

    def __init__(self, client: Client, sender: str, directory: Path, fault: str) -> None:
        self._client = client
        self._sender = sender
        self._directory = directory
        self._fault = fault
        self._held = 0

    async def handle(self, task: Message) -> None:
        report = await asyncio.to_thread(report_on, task, self._sender, self._directory)
        fault, self._fault = self._fault, self._fault if self._fault == "stall" else ""
        if fault == "wrong":
            report["body"]["sha256"] = "0" * 64
        self._held += 1
        # One that stalls is killed at the worst moment: half of the work is reported, none of it deleted.
        if fault != "missing" and not (fault == "stall" and self._held % 2):
            await self._client.enqueue(RESULTS, **report)
        if fault == "stall":
            print("holding", task.message_id, flush=True)
            await asyncio.Event().wait()


def report_on(task: Message, sender: str, directory: Path) -> NewMessage:
    """Read the file; return the report."""
    name = task.body["name"]
    about = {"run": task.body["run"], "task": task.message_id, "receive_count": task.receive_count}
    return NewMessage(body={**about, "name": name, **read_file(directory, name)}, sender=sender)


async def main(url: str, sender: str, directory: Path, fault: str) -> None:
    async with Client(url, os.environ.get("BROKER_TOKEN")) as client:
        print("ready", flush=True)
        worker = Worker(client, sender, directory, fault)
        # However large the files are: the loop keeps others off a task for as long as the work takes.
        await client.consume(FILES, worker.handle, concurrency=AT_A_TIME, visibility_timeout=VISIBILITY_TIMEOUT)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sender", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--fault", choices=["stall", *FAULTS], default="")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.url, arguments.sender, arguments.directory, arguments.fault))
