"""Three servers under Patroni and etcd: their primary dies, their primary's machine dies or hangs, etcd hangs.

Patroni is installed into an environment of its own, and etcd is unpacked beside it, in a folder that goes away. Two
brokers, which are never started again, know all three servers and find the one that takes writes.

Then a primary is cut off from etcd and from the other servers, while clients still reach it: in a network of its own
(`network.py`) each server and etcd are a host, and brokers and clients are in the hub. Besides the brokers that know
all servers one knows this primary alone, and one the next: whatever either would confirm is heard of. Clients of all of
them write what nobody takes, each message once, and note what they are told. When the network has healed and the old
primary follows the new one, this must have all that was acknowledged, and nothing of which nobody was told that it may
be there; and what producers and consumers did meanwhile must fit, as before. Cut off once more, with Patroni beside it
hung, a primary goes on while another one is made: two take writes, and still nothing may be lost. The control cuts off
one whose commits wait for no standby: then something must be lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psycopg

from brokers import Broker, answer, call, running_brokers
from load import Load
from network import CannotBeMade, Network, private_network
from packages import CannotInstall
from pair import Node, folder_for_servers
from parts import Options, Result, Say
from patroni_cluster import (
    MEMBERS,
    PATIENCE,
    TTL_SECONDS,
    Cluster,
    Member,
    adopting_orphans,
    fetch_programs,
    running_cluster,
)
from under_load import at_work, judge

KILLS = 10
QUICK_KILLS = 3
PROBES = "probes"
DCS_OUTAGE_SECONDS = 15
# What the old primary has told etcd of itself is forgotten by then, and the new one at work.
CUT_SECONDS = TTL_SECONDS + 15
# Of those that write all the time while it lasts, for each broker.
CLIENTS_EACH = 3
STORED_PROBES = """
SELECT m.body #>> '{}'
FROM broker.messages m
JOIN broker.queues q ON q.id = m.queue_id
WHERE q.name = %s AND starts_with(m.body #>> '{}', %s || ' ')
"""
# What is aimed at; a machine that does other things too is granted twice as much.
AIMS = {
    "primary killed": 5.0,
    "machine killed": TTL_SECONDS + 5.0,
    "machine hung": TTL_SECONDS + 10.0,
    "etcd hung": 1.0,
    "primary cut off": TTL_SECONDS + 10.0,
}


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    with folder_for_servers() as programs:
        try:
            await asyncio.to_thread(fetch_programs, programs)
        except CannotInstall as error:
            yield Result("Patroni", skipped=str(error))
            return
        async with adopting_orphans():
            with folder_for_servers() as folder:
                async with running_cluster(folder, programs) as cluster:
                    say("three servers are up, one of them a synchronous standby")
                    async with at_work(folder, cluster.members, options.seed, brokers=2) as (brokers, load):
                        async with aiohttp.ClientSession() as http:
                            await call(http, brokers[0].url, "create_queue", queue=PROBES)
                            async for result in faults(cluster, brokers, load, http, options, say):
                                yield result
                        everything = Result("all of these")
                        leader = await cluster.leader()
                        await judge(everything, leader, brokers, load)
                        yield everything
            async for result in in_a_network_that_is_parted(programs, options, say):
                yield result


async def faults(
    cluster: Cluster, brokers: list[Broker], load: Load, http: aiohttp.ClientSession, options: Options, say: Say
) -> AsyncIterator[Result]:
    kills = options.number(KILLS, QUICK_KILLS)
    for name, times in (("primary killed", kills), ("machine killed", 1), ("machine hung", 1), ("etcd hung", 1)):
        result = Result(f"{name}, {times} times")
        seconds = []
        for n in range(times):
            await cluster.is_healthy()
            await load.works()
            seconds.append(await HAPPENINGS[name](cluster, Probe(http, brokers, f"{name} {n}")))
            say(f"{name}: acknowledged again after {seconds[-1]:.2f} s")
        result.figures = {"first_acknowledged_after_seconds": [round(each, 2) for each in seconds], "aim": AIMS[name]}
        result.expect(max(seconds) <= 2 * AIMS[name] + 3, f"nothing was acknowledged for {max(seconds):.1f} s")
        yield result


class Probe:
    """Clients that send messages of their own until one is acknowledged, through every broker."""

    def __init__(self, http: aiohttp.ClientSession, brokers: list[Broker], name: str) -> None:
        self._http = http
        self._urls = [broker.url for broker in brokers] * 3
        self._name = name

    async def seconds(self) -> float:
        """Return after how long one of them is acknowledged."""
        began_at = time.monotonic()
        asking = [asyncio.create_task(self._ask(url, n)) for n, url in enumerate(self._urls)]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED, timeout=PATIENCE)
        seconds = time.monotonic() - began_at
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        return seconds

    async def _ask(self, url: str, number: int) -> None:
        await asyncio.sleep(number * 0.1)
        message: dict[str, Any] = {"queue": PROBES, "body": self._name, "idempotency_key": f"{self._name} {number}"}
        while "error" in await answer(self._http, url, "enqueue", **message):
            await asyncio.sleep(0.02)


async def primary_killed(cluster: Cluster, probe: Probe) -> float:
    await (await cluster.leader()).kill()
    return await probe.seconds()


async def machine_killed(cluster: Cluster, probe: Probe) -> float:
    leader = await cluster.leader()
    leader.kill_agent()
    await leader.kill()
    seconds = await probe.seconds()
    leader.start_agent()
    return seconds


async def machine_hung(cluster: Cluster, probe: Probe) -> float:
    leader = await cluster.leader()
    leader.pause()
    seconds = await probe.seconds()
    leader.resume()
    return seconds


async def etcd_hung(cluster: Cluster, probe: Probe) -> float:
    """Return the longest time for which nothing was acknowledged while it hung."""
    cluster.etcd.send_signal(signal.SIGSTOP)
    until = time.monotonic() + DCS_OUTAGE_SECONDS
    longest = 0.0
    try:
        while time.monotonic() < until:
            longest = max(longest, await probe.seconds())
            await asyncio.sleep(0.05)
    finally:
        cluster.etcd.send_signal(signal.SIGCONT)
    return longest


HAPPENINGS = {
    "primary killed": primary_killed,
    "machine killed": machine_killed,
    "machine hung": machine_hung,
    "etcd hung": etcd_hung,
}


async def in_a_network_that_is_parted(programs: Path, options: Options, say: Say) -> AsyncIterator[Result]:
    result = Result("primary cut off")
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(folder_for_servers())
        try:
            network = stack.enter_context(private_network())
            hosts = [network.add_host() for _ in range(MEMBERS + 1)]
        except CannotBeMade as error:
            result.skipped = str(error)
            yield result
            return
        async with (
            running_cluster(folder, programs, hosts) as cluster,
            at_work(folder, cluster.members, options.seed, brokers=2) as (brokers, load),
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
        ):
            say("three servers are up, each on a host of its own")
            await call(http, brokers[0].url, "create_queue", queue=PROBES)
            parted = Parted(cluster, network, folder, [broker.url for broker in brokers], http)

            await parted.cut_off_primary(result)
            seconds, aim = result.figures["first_acknowledged_after_seconds"], AIMS[result.case]
            result.figures["aim"] = aim
            result.expect(seconds <= 2 * aim + 3, f"nothing was acknowledged for {seconds:.1f} s")
            expect_all_to_be_there(result)
            yield result

            await load.works()
            result = Result("primary cut off, Patroni beside it hung")
            await parted.cut_off_primary(result, is_agent_hung=True)
            result.expect(result.figures["two_took_writes_for_seconds"], "there were never two primaries")
            expect_all_to_be_there(result)
            yield result

            result = Result("all of these, in a network that was parted")
            await judge(result, await cluster.leader(), brokers, load)
            yield result

            result = Result("control: cut off while no commit waits")
            await cluster.run_asynchronously()
            await parted.cut_off_primary(result)
            result.expect(result.figures["written_and_lost"], "nothing was lost")
            yield result


def expect_all_to_be_there(result: Result) -> None:
    result.expect(not result.figures["written_and_lost"], "what clients were told is stored is not there")
    result.expect(not result.figures["unexpected"], "there is what nobody was told may be there")


class Parted:
    """A cluster in a network that can be parted, and brokers that know all of its members."""

    def __init__(
        self, cluster: Cluster, network: Network, folder: Path, urls: list[str], http: aiohttp.ClientSession
    ) -> None:
        self._cluster = cluster
        self._network = network
        self._folder = folder
        self._urls = urls
        self._http = http

    async def cut_off_primary(self, result: Result, *, is_agent_hung: bool = False) -> None:
        """Cut the primary off while clients write, and heal the network; note what is on the true one afterwards."""
        old = await self._cluster.leader()
        async with self._broker(result, old) as here, Witness(old).at_work() as witness:
            ledger = Ledger(self._http, result.case)
            async with ledger.at_work([*self._urls, here.url]):
                await ledger.hears_of_another()
                self._network.cut_off(old.host)
                cut_at = time.monotonic()
                try:
                    if is_agent_hung:
                        old.pause_agent()
                    new = await self._next_leader(old)
                    led_at = time.monotonic()
                    async with self._broker(result, new) as there, ledger.at_work([there.url]):
                        await ledger.hears_of_another(there.url)
                        await asyncio.sleep(max(0.0, cut_at + CUT_SECONDS - time.monotonic()))
                finally:
                    healed_at = time.monotonic()
                    self._network.heal()
                    old.resume_agent()
                await self._cluster.is_healthy(but=old)
                await ledger.hears_of_another(self._urls[0])
        await ledger.compare(result, await self._cluster.leader(but=old))
        # A call that was under way at the cut may hold those back that come after it.
        sent = sum(each.url == here.url and each.outcome != "none" for each in ledger.told if each.ended_at > cut_at)
        first = min(each.ended_at for each in ledger.told_since(cut_at) if each.outcome == "stored")
        result.figures |= {
            "first_acknowledged_after_seconds": round(first - cut_at, 2),
            "two_took_writes_for_seconds": round(max(0.0, witness.saw_writes_until(healed_at) - led_at), 2),
            "sent_to_the_old_one": sent,
        }
        result.expect(witness.answers(cut_at, healed_at), "the old primary could not be reached")
        result.expect(sent, "the old primary was sent nothing")

    @contextlib.asynccontextmanager
    async def _broker(self, result: Result, node: Node) -> AsyncIterator[Broker]:
        """Yield a broker that knows only this server."""
        folder = self._folder / f"{result.case}, {node.name}"
        folder.mkdir()
        async with running_brokers(folder, [node], 1) as [broker]:
            yield broker
            result.violations += broker.bad_signs()
            result.expect(broker.is_running, f"the broker of {node.name} has ended")

    async def _next_leader(self, old: Member) -> Member:
        async with asyncio.timeout(PATIENCE):
            while (leader := await self._cluster.leader(but=old)) is old:
                await asyncio.sleep(0.1)
        return leader


class Told(NamedTuple):
    """What a client was told of one message: "stored", or an outcome."""

    url: str
    body: str
    began_at: float
    ended_at: float
    outcome: str


class Ledger:
    """Clients that write what nobody takes, each message once, and note what they are told."""

    def __init__(self, http: aiohttp.ClientSession, name: str) -> None:
        self._http = http
        self._name = name
        self._numbers = itertools.count()
        self.told: list[Told] = []

    @contextlib.asynccontextmanager
    async def at_work(self, urls: list[str]) -> AsyncIterator[None]:
        """Let clients of these brokers work until the block ends and each has its last answer."""
        is_over = asyncio.Event()
        tasks = [asyncio.create_task(self._write(url, is_over)) for url in urls * CLIENTS_EACH]
        try:
            yield
        finally:
            is_over.set()
            await asyncio.gather(*tasks)

    def told_since(self, at: float) -> list[Told]:
        """Return what was told of messages that were sent later than this."""
        return [each for each in self.told if each.began_at > at]

    async def hears_of_another(self, url: str | None = None) -> None:
        """Return when a message is acknowledged that is sent from now on, by this broker or by any."""
        at = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            while not any(each.outcome == "stored" and url in (None, each.url) for each in self.told_since(at)):
                await asyncio.sleep(0.05)

    async def compare(self, result: Result, node: Node) -> None:
        """Note what a server lacks of what was acknowledged, and what it has that nobody was told may be there."""
        found = {body for (body,) in await node.query(STORED_PROBES, [PROBES, self._name])}
        stored, unknown = (
            {each.body for each in self.told if each.outcome == outcome} for outcome in ("stored", "unknown")
        )
        result.figures |= {
            "written": len(stored),
            "written_and_lost": len(stored - found),
            "unexpected": len(found - stored - unknown),
        }

    async def _write(self, url: str, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            body, began_at = f"{self._name} {next(self._numbers)}", time.monotonic()
            answered = await answer(self._http, url, "enqueue", queue=PROBES, body=body)
            outcome = answered["error"]["data"]["outcome"] if "error" in answered else "stored"
            self.told.append(Told(url, body, began_at, time.monotonic(), outcome))
            await asyncio.sleep(0.05)


class Witness:
    """Asks a server again and again, by the way that clients have to it, whether it takes writes."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._seen: list[tuple[float, bool]] = []

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[Witness]:
        looking = asyncio.create_task(self._look())
        try:
            yield self
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)

    def answers(self, since: float, until: float) -> int:
        """Return how often it answered what it was asked in this time."""
        return sum(since < at < until for at, _ in self._seen)

    def saw_writes_until(self, until: float) -> float:
        """Return when it was last seen to take writes, before `until`."""
        return max(at for at, takes_writes in self._seen if takes_writes and at < until)

    async def _look(self) -> None:
        while True:
            at = time.monotonic()
            with contextlib.suppress(psycopg.OperationalError):
                [(takes_writes,)] = await self._node.query("SELECT NOT pg_is_in_recovery()")
                self._seen.append((at, takes_writes))
            await asyncio.sleep(0.1)
