"""The demo's orchestrator: starts the processes, kills one, collects the reports and judges them."""

import asyncio
import os
import sys
import sysconfig
import time
import uuid
from asyncio.subprocess import Process
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from broker.client import BrokerError, Client

from . import FAULTS, FILES, RESULTS, VISIBILITY_TIMEOUT
from .files import list_files
from .processes import DemoFailed, feed, find_data_dir, in_good_order, own_broker, read_line, running
from .progress import progress
from .verdict import Report, judge

# Seconds without any report after which something must hang; a consumer may need long for large files.
PATIENCE = 120.0


async def run_demo() -> bool:
    """Run the demo; return whether all went well."""
    started = time.time()
    fault = os.environ.get("DEMO_FAULT", "")
    if fault not in FAULTS:
        raise DemoFailed(f"DEMO_FAULT is {fault!r}; it may be {', '.join(FAULTS[1:])}.")
    data_dir, directory, names = find_directories()
    run = uuid.uuid4().hex
    async with AsyncExitStack() as stack:
        url = os.environ.get("BROKER_URL", "")
        if not url:
            url = await stack.enter_async_context(own_broker(data_dir))
        client = await stack.enter_async_context(Client(url, os.environ.get("BROKER_TOKEN")))
        await make_queues(client)
        print(f"{len(names)} files below {directory}, broker at {url}", flush=True)
        async with AsyncExitStack() as workers:
            producers, consumers, held = await start_workers(workers, url, run, directory, names, fault)
            with progress(len(names), "files") as show:
                reports = await collect(client, run, producers, consumers, show)
        text, is_well = await asyncio.to_thread(judge, directory, names, reports, held, started)
    print(text)
    print(f"time          {time.time() - started:.1f} s")
    return is_well


def find_directories() -> tuple[Path, Path, list[str]]:
    """Return where an own broker keeps its data, the directory to work on and the files below it."""
    data_dir = find_data_dir()
    left_out = {os.fsencode(data_dir)}
    if given := os.environ.get("DEMO_DIR"):
        directory = Path(given).resolve()
    else:
        directory = Path(sysconfig.get_path("stdlib")).resolve()
        left_out |= {b"site-packages", b"dist-packages"}
    names = list_files(directory, left_out)
    if not names:
        raise DemoFailed(f"There are no files below {directory}: set DEMO_DIR to a directory with some.")
    return data_dir, directory, names


async def make_queues(client: Client) -> None:
    """Make the demo's queues anew; an earlier run may have been interrupted half-way."""
    for queue in (FILES, RESULTS):
        try:
            while not (await client.call("delete_queue", queue=queue))["complete"]:
                pass
        except BrokerError as error:
            if error.type != "queue_not_found":
                raise
        # A name may be 4 KiB long, and three times that when it is percent-encoded.
        await client.create_queue(queue, visibility_timeout=VISIBILITY_TIMEOUT, max_message_bytes=2**16)


async def start_workers(
    stack: AsyncExitStack, url: str, run: str, directory: Path, names: list[str], fault: str
) -> tuple[list[Process], list[Process], set[str]]:
    """Start two producers and three consumers, and kill one consumer while it holds messages.

    Returns the producers, the consumers that are left, and the message_ids that the killed one held.
    """

    async def start(role: str, number: int, *options: str | Path) -> Process:
        common = (f"{__package__}.{role}", "--url", url, "--sender", f"{role}-{number}")
        return await stack.enter_async_context(running(*common, *options))

    async def start_consumer(number: int, fault: str) -> Process:
        return await start("consumer", number, "--directory", directory, "--fault", fault)

    victim = await start_consumer(1, "stall")
    producers = [await start("producer", number, "--run", run, "--fault", fault) for number in (1, 2)]
    for number, producer in enumerate(producers):
        await feed(producer, "\n".join(names[number::2]))
    await read_line(victim, "consumer-1")  # It is ready.
    first = await read_line(victim, "consumer-1")
    consumers = [await start_consumer(number, fault) for number in (2, 3)]
    for consumer in consumers:
        await read_line(consumer, "A consumer")
    # It says what it holds and keeps it until this moment.
    victim.kill()
    assert victim.stdout is not None
    rest = (await victim.stdout.read()).decode().split("\n")[:-1]  # The last may not be whole.
    held = {line.removeprefix("holding ") for line in (first, *rest)}
    print(f"consumer-1 killed while it held {len(held)} messages", flush=True)
    return producers, consumers, held


async def collect(
    client: Client,
    run: str,
    producers: list[Process],
    consumers: list[Process],
    show: Callable[[int], None],
) -> list[Report]:
    """Receive the consumers' reports until all tasks are done."""
    reports: list[Report] = []
    seen: set[str] = set()
    last = time.monotonic()
    while time.monotonic() < last + PATIENCE:
        exit_codes = [producer.returncode for producer in producers]
        if any(exit_codes) or any(consumer.returncode is not None for consumer in consumers):
            raise DemoFailed("A producer or a consumer failed.")
        messages = await client.dequeue(RESULTS, max_messages=500, wait=0.5)
        for message in messages:
            body = message.body
            if body.pop("run") == run:
                task, receive_count, name = body.pop("task"), body.pop("receive_count"), body.pop("name")
                reports.append(Report(task, receive_count, name, found=body, sender=message.sender or ""))
                seen.add(name)
        if messages:
            await client.delete_batch(message.receipt for message in messages)
            show(len(seen))
            last = time.monotonic()
        # Reports are sent before their tasks are deleted: with no task left there is no report to come.
        elif None not in exit_codes and await is_empty(client, FILES) and await is_empty(client, RESULTS):
            return reports
    counts = await client.count_messages(FILES)
    raise DemoFailed(f"No report for {PATIENCE:.0f} s, and these tasks are left: {counts}.")


async def is_empty(client: Client, queue: str) -> bool:
    """Tell whether a queue holds nothing, leased messages included."""
    return int((await client.count_messages(queue))["total"]) == 0


if __name__ == "__main__":
    sys.exit(asyncio.run(in_good_order(run_demo())))
