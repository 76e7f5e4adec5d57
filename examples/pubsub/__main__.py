"""The demo's orchestrator: starts the processes, kills a subscriber and brings it back, broadcasts, and judges."""

import asyncio
import json
import os
import sys
import time
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp

from broker.client import Broadcast, BrokerError, Client
from examples.demo.processes import DemoFailed, feed, find_data_dir, in_good_order, own_broker, read_line, running
from examples.demo.progress import progress

from . import FAULTS, MODULES, PACKAGES
from .ledger import Ledger
from .modules import Module, filter_of_lines, find_modules, is_wanted
from .verdict import Course, judge

# Seconds without any progress after which something must hang.
PATIENCE = 120.0
# How long the killed subscriber stays away at least.
DOWN_SECONDS = 2.0
# It is killed so long after it has begun to hold messages.
HOLD_SECONDS = 0.2
LOOK_SECONDS = 0.1
TOPICS = {MODULES: "immediate", PACKAGES: "on_broadcast"}


@dataclass
class Subscriber:
    """A subscriber as the demo sees it. `port` stays the same when the process is started again."""

    name: str
    ledger: Ledger
    ledger_path: Path
    process: Process
    port: int


@dataclass
class Demo:
    """One run of the demo: `wanted` are by subscriber the modules that it is to get."""

    client: Client
    url: str
    stack: AsyncExitStack
    folder: Path
    directory: Path
    modules: list[Module]
    faults: list[str]
    packages: Counter[str]
    filter: dict[str, list[str]]
    wanted: dict[str, list[Module]]
    subscribers: list[Subscriber] = field(default_factory=list)

    @property
    def patience(self) -> float:
        """For how many seconds those may be silent who have all modules to work on."""
        return PATIENCE + len(self.modules) / 10

    @property
    def expected(self) -> int:
        """How many messages are to be handled in all."""
        return sum(map(len, self.wanted.values())) + len(self.wanted) * len(self.packages)

    async def go(self) -> Course:
        """Let everything happen; return what did."""
        for topic, delivery in TOPICS.items():
            await self.client.create_topic(topic, delivery)
        index = await self.start("index", stall_after=len(self.modules) // 5)
        lines = await self.start("lines", faults=self.faults)
        await self.subscribe(MODULES, index)
        await self.subscribe(MODULES, lines, self.filter)
        publishers = [await self.publisher(number) for number in (1, 2)]
        held = await self.kill(index)
        killed_at, handled = time.monotonic(), index.ledger.count()
        print(f"index killed while it held {len(held)} messages, after {handled} modules", flush=True)
        copies = sum([int(await read_line(publisher, "A publisher", self.patience)) for publisher in publishers])
        queue = await self.failing(index)
        await asyncio.sleep(max(0.0, killed_at + DOWN_SECONDS - time.monotonic()))
        waited, others = int((await self.client.count_messages(queue))["total"]), lines.ledger.count()
        print(f"its subscription is failing, {waited} messages wait for it; lines has handled {others}", flush=True)
        back_at = time.monotonic()
        await self.restart(index)
        await self.settle()
        caught_up = time.monotonic() - back_at
        print(f"index is back, and has caught up after {caught_up:.1f} s", flush=True)
        stored, given_out = await self.broadcast()
        return Course(
            held=held,
            handled=handled,
            down=back_at - killed_at,
            waited=waited,
            others=others,
            caught_up=caught_up,
            copies=copies,
            stored=stored,
            broadcast=given_out,
            refused=await self.forge(),
        )

    async def start(self, name: str, *, stall_after: int | None = None, faults: list[str] | None = None) -> Subscriber:
        """Start a subscriber."""
        path = self.folder / f"{name}.sqlite"
        ledger = self.stack.enter_context(Ledger(path))
        options = [f"--fault={fault}" for fault in faults or ()]
        if stall_after is not None:
            options.append(f"--stall-after={stall_after}")
        process, port = await self.process_of(name, path, 0, options)
        subscriber = Subscriber(name, ledger, path, process, port)
        self.subscribers.append(subscriber)
        return subscriber

    async def kill(self, subscriber: Subscriber) -> set[str]:
        """Kill a subscriber that stalls, when it holds some; return the messages that it held."""
        first = await read_line(subscriber.process, subscriber.name, self.patience)
        await asyncio.sleep(HOLD_SECONDS)
        subscriber.process.kill()
        assert subscriber.process.stdout is not None
        rest = (await subscriber.process.stdout.read()).decode().split("\n")[:-1]  # The last may not be whole.
        return {line.removeprefix("holding ") for line in (first, *rest)}

    async def restart(self, subscriber: Subscriber) -> None:
        """Start a subscriber that was killed: where it was, with its ledger."""
        subscriber.process, _ = await self.process_of(subscriber.name, subscriber.ledger_path, subscriber.port, [])

    async def process_of(self, name: str, ledger: Path, port: int, options: list[str]) -> tuple[Process, int]:
        command = (f"{__package__}.subscriber", "--name", name, "--directory", self.directory, "--ledger", ledger)
        process = await self.stack.enter_async_context(running(*command, "--port", str(port), *options))
        return process, int(await read_line(process, name))

    async def subscribe(self, topic: str, subscriber: Subscriber, wanted: dict[str, list[str]] | None = None) -> None:
        """Let a subscriber be pushed to; it gets the secret by which it knows who does."""
        url = f"http://127.0.0.1:{subscriber.port}/{topic}"
        subscription = await self.client.subscribe(topic, subscriber.name, url=url, filter=wanted)
        assert subscription.secret is not None, "the subscription is new"
        subscriber.ledger.keep_secret(topic, subscription.secret)

    async def publisher(self, number: int) -> Process:
        """Start one of the two publishers, and give it every other package."""
        packages = sorted(self.packages)[number - 1 :: 2]
        messages: list[dict[str, Any]] = [
            {"topic": MODULES, "body": {"name": module.name}, "headers": module.headers}
            for module in self.modules
            if module.package in packages
        ]
        messages += [
            {"topic": PACKAGES, "body": {"package": package, "modules": self.packages[package]}, "headers": {}}
            for package in packages
        ]
        options = [f"--fault={fault}" for fault in self.faults if number == 1]
        command = (f"{__package__}.publisher", "--url", self.url, "--sender", f"publisher-{number}", *options)
        process = await self.stack.enter_async_context(running(*command))
        await feed(process, "\n".join(map(json.dumps, messages)))
        return process

    async def failing(self, subscriber: Subscriber) -> str:
        """Wait until the broker knows that a subscriber is away; return the queue that its messages wait in."""
        last = time.monotonic()
        while time.monotonic() < last + PATIENCE:
            for each in (await self.client.call("list_subscriptions", topic=MODULES))["subscriptions"]:
                if each["name"] == subscriber.name and each["state"] == "failing":
                    return str(each["queue"])
            await asyncio.sleep(LOOK_SECONDS)
        raise DemoFailed(f"The broker did not notice within {PATIENCE:.0f} s that {subscriber.name} is away.")

    async def settle(self) -> None:
        """Wait until nothing waits to be pushed any more."""
        subscriptions = (await self.client.call("list_subscriptions"))["subscriptions"]
        queues = {each["queue"] for each in subscriptions if each["topic"] in TOPICS}
        left, last = -1, time.monotonic()
        while time.monotonic() < last + PATIENCE:
            if any(subscriber.process.returncode is not None for subscriber in self.subscribers):
                raise DemoFailed("A subscriber failed.")
            now = sum([int((await self.client.count_messages(queue))["total"]) for queue in queues])
            if now == 0:
                return
            if now != left:
                left, last = now, time.monotonic()
            await asyncio.sleep(LOOK_SECONDS)
        raise DemoFailed(f"Nothing was delivered for {PATIENCE:.0f} s, and {left} messages are left.")

    async def broadcast(self) -> tuple[int, Broadcast]:
        """Subscribe to what was published before anybody had; return how many messages were stored, and given out."""
        topics = (await self.client.call("list_topics", prefix=PACKAGES, counts=True))["topics"]
        for subscriber in self.subscribers:
            await self.subscribe(PACKAGES, subscriber)
        given_out = await self.client.broadcast(PACKAGES)
        await self.settle()
        return int(topics[0]["messages"]), given_out

    async def forge(self) -> int:
        """Send each subscriber a message that the broker has not signed; return how many refuse it."""
        headers = {"webhook-id": "forged", "webhook-timestamp": f"{time.time():.0f}", "webhook-signature": "v1,AAAA"}
        refused = 0
        async with aiohttp.ClientSession() as session:
            for subscriber in self.subscribers:
                url = f"http://127.0.0.1:{subscriber.port}/{PACKAGES}"
                async with session.post(url, json={"package": "forged"}, headers=headers) as response:
                    refused += response.status == 401
        return refused

    @asynccontextmanager
    async def shown(self, show: Callable[[int], None]) -> AsyncIterator[None]:
        """Show meanwhile how much the subscribers have handled."""

        def look() -> None:
            show(sum(each.ledger.count() for each in self.subscribers))

        async def watch() -> None:
            while True:
                look()
                await asyncio.sleep(LOOK_SECONDS)

        watching = asyncio.create_task(watch())
        try:
            yield
            look()
        finally:
            watching.cancel()


async def run_demo() -> bool:
    """Run the demo; return whether all went well."""
    started = time.time()
    faults = [fault for fault in os.environ.get("DEMO_FAULT", "").split(",") if fault]
    if not set(faults) <= set(FAULTS):
        raise DemoFailed(f"DEMO_FAULT is {','.join(faults)!r}; it may name {', '.join(FAULTS)}.")
    data_dir = find_data_dir()
    directory, modules = find_modules(data_dir)
    if not modules:
        raise DemoFailed(f"There are no modules below {directory}: set DEMO_DIR to a directory with some.")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="wonderq-demo-")))
        url = os.environ.get("BROKER_URL", "")
        if not url:
            url = await stack.enter_async_context(own_broker(data_dir, "--webhook-allow", "127.0.0.0/8"))
        client = await stack.enter_async_context(Client(url, os.environ.get("BROKER_TOKEN")))
        await delete_topics(client)
        print(f"{len(modules)} modules below {directory}, broker at {url}", flush=True)
        async with AsyncExitStack() as processes:
            packages, chosen = Counter(module.package for module in modules), filter_of_lines(modules)
            wanted = {"index": modules, "lines": [module for module in modules if is_wanted(module, chosen)]}
            demo = Demo(client, url, processes, folder, directory, modules, faults, packages, chosen, wanted)
            with progress(demo.expected, "messages") as show:
                async with demo.shown(show):
                    course = await demo.go()
            entries = {each.name: each.ledger.entries() for each in demo.subscribers}
            text, is_well = await asyncio.to_thread(judge, directory, wanted, packages, entries, course, started)
        with suppress(BrokerError):
            await delete_topics(client)  # or a broker that goes on would push to nobody
    print(text)
    print(f"time          {time.time() - started:.1f} s")
    return is_well


async def delete_topics(client: Client) -> None:
    """Delete the demo's topics and whatever belongs to them; an earlier run may have been interrupted half-way."""
    for topic in TOPICS:
        try:
            while not (await client.call("delete_topic", topic=topic))["complete"]:
                pass
        except BrokerError as error:
            if error.type != "topic_not_found":
                raise


if __name__ == "__main__":
    sys.exit(asyncio.run(in_good_order(run_demo())))
