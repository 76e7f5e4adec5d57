"""A consumer of the demo: reads the files that messages name and reports what it found.

It sends its report, as a message, before it deletes the task. So if it dies in between there is a report
too many, never one too few; reports carry the task's message_id, by which the one too many is known.
"""

import argparse
import asyncio
import os
from pathlib import Path

from broker.client import Client, Message, NewMessage

from . import FAULTS, FILES, RESULTS, VISIBILITY_TIMEOUT
from .files import read_file

BATCH = 50


async def consume(client: Client, sender: str, directory: Path, fault: str) -> None:
    """Work until the process is ended."""
    while True:
        tasks = await client.dequeue(FILES, max_messages=BATCH, wait=20)
        if not tasks:
            continue
        receipts = [task.receipt for task in tasks]
        keeper = asyncio.create_task(keep_leases(client, receipts))
        reports = await asyncio.to_thread(work, tasks, sender, directory)
        if fault == "stall":
            # The worst moment to be killed: half of the work is reported, none of it deleted.
            await client.enqueue_batch(RESULTS, reports[: (len(reports) + 1) // 2])
            print("holding", *(task.message_id for task in tasks), flush=True)
            await keeper
        if fault == "wrong":
            reports[0]["body"]["sha256"] = "0" * 64
        if fault == "missing":
            del reports[0]
        fault = ""
        if reports:
            await client.enqueue_batch(RESULTS, reports)
        await client.delete_batch(receipts)
        keeper.cancel()


async def keep_leases(client: Client, receipts: list[str | None]) -> None:
    """Keep others off the tasks for as long as the work takes, however large the files are."""
    while True:
        await asyncio.sleep(VISIBILITY_TIMEOUT / 4)
        await client.call("extend_visibility_batch", receipts=receipts, visibility_timeout=VISIBILITY_TIMEOUT)


def work(tasks: list[Message], sender: str, directory: Path) -> list[NewMessage]:
    """Read the files; return a report on each."""
    reports = []
    for task in tasks:
        name = task.body["name"]
        about = {"run": task.body["run"], "task": task.message_id, "receive_count": task.receive_count}
        body = {**about, "name": name, **read_file(directory, name)}
        reports.append(NewMessage(body=body, sender=sender))
    return reports


async def main(url: str, sender: str, directory: Path, fault: str) -> None:
    async with Client(url, os.environ.get("BROKER_TOKEN")) as client:
        print("ready", flush=True)
        await consume(client, sender, directory, fault)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--sender", required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--fault", choices=["stall", *FAULTS], default="")
    arguments = parser.parse_args()
    asyncio.run(main(arguments.url, arguments.sender, arguments.directory, arguments.fault))
