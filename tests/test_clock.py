"""A database whose clock is really set back, and forward again, under brokers that are at work.

Method: the server goes by libfaketime. It reads its clock's offset from a file whenever it asks for the time, so a step
reaches all of its processes at once; the brokers, in this process, keep the true time. What nobody must get is asked
for until the brokers have looked from the very beginning twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest

from broker import draining
from broker.embedded import EmbeddedPostgres
from broker.storage import low_water, sessions
from conftest import Broker, Connect, StartBroker, private_server, with_template

HOUR = 3600.0
# The look from the very beginning comes this often here, once a minute otherwise.
LOOK_SECONDS = 0.5
# What a busy machine is granted beyond what is promised.
PATIENCE = 10.0
LEASE_SECONDS = 600

# Debian's folder, Fedora's, and that of its own Makefile.
LIBRARY = next(
    (
        path
        for pattern in ("lib/*", "lib64", "local/lib*")
        for path in Path("/usr").glob(f"{pattern}/faketime/libfaketime.so.1")
    ),
    None,
)

pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime: apt-get install libfaketime")


class Clock:
    """The clock of this module's PostgreSQL."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.set(0)

    def set(self, seconds: float) -> None:
        """Set it to so many seconds after the true time, or before it where they are negative."""
        new = self.file.with_suffix(".new")
        new.write_text(f"{seconds:+f}\n")
        new.chmod(0o644)  # the server may run as another account
        new.replace(self.file)


class FakedPostgres(EmbeddedPostgres):
    """A PostgreSQL that goes by a `Clock`."""

    def __init__(self, *arguments: Any, clock: Clock, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._clock = clock

    def _spawn(self, account: Any, command: Sequence[str], stdin: int = subprocess.DEVNULL) -> subprocess.Popen[bytes]:
        # Not in the environment of what begins as root: the library makes semaphores that are its account's alone.
        if Path(command[0]).name == "postgres":
            settings = {
                "LD_PRELOAD": LIBRARY,
                "FAKETIME_TIMESTAMP_FILE": self._clock.file,
                "FAKETIME_NO_CACHE": 1,
                "FAKETIME_DONT_FAKE_MONOTONIC": 1,
            }
            command = ["/usr/bin/env", *(f"{name}={value}" for name, value in settings.items()), *command]
        return super()._spawn(account, command, stdin)


@pytest.fixture(scope="module")
def server_clock() -> Iterator[Clock]:
    with tempfile.TemporaryDirectory(prefix="wonderq-clock-") as folder:
        os.chmod(folder, 0o755)
        yield Clock(Path(folder) / "clock")


@pytest.fixture(scope="module")
def test_server(server_clock: Clock) -> Iterator[str]:
    """What the fixtures of conftest.py make their databases on, here with a clock of its own."""
    with private_server(partial(FakedPostgres, clock=server_clock)) as server, with_template(server) as conninfo:
        yield conninfo


@pytest.fixture
def clock(server_clock: Clock) -> Iterator[Clock]:
    yield server_clock
    server_clock.set(0)


@pytest.fixture(autouse=True)
def brokers_of_this_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_water, "LOOK_FROM_THE_BEGINNING_SECONDS", LOOK_SECONDS)
    monkeypatch.setattr(draining, "QUIET_TIME", 0.02)
    # PostgreSQL looks at the clock when an alarm interrupts it; reading a file is nothing to be interrupted in.
    monkeypatch.setitem(sessions.SESSION_SETTINGS, "client_connection_check_interval", "0")


async def time_of(connection: Any) -> datetime:
    row = await (await connection.execute("SELECT clock_timestamp()")).fetchone()
    moment: datetime = row[0]
    return moment


def hints(broker: Broker) -> list[datetime]:
    return [hint for hint in broker.server.calls.low_water.floors("default") if hint is not None]


async def raise_hints(broker: Broker, since: datetime) -> None:
    """Send and take until both hints have passed a time."""
    async with asyncio.timeout(PATIENCE):
        while len(hints(broker)) < 2 or min(hints(broker)) < since:
            await send(broker, -1)
            assert await delete(broker, await take(broker)) == [True]


@pytest.fixture
async def pair(clock: Clock, start_broker: StartBroker, connect: Connect) -> tuple[Broker, Broker]:
    """Two brokers on one database, with the hints that they have at present."""
    pair = await start_broker(), await start_broker()
    since = await time_of(await connect())
    for broker in pair:
        await raise_hints(broker, since)
    return pair


async def send(broker: Broker, *bodies: int) -> None:
    await broker.call("enqueue_batch", messages=[{"body": body} for body in bodies])


async def take(broker: Broker, max_messages: int = 1, **how: Any) -> list[dict[str, Any]]:
    """Lease what is there for LEASE_SECONDS."""
    how = {"visibility_timeout": LEASE_SECONDS, **how}
    messages: list[dict[str, Any]] = (await broker.call("dequeue", max_messages=max_messages, **how))["messages"]
    return messages


def bodies(messages: Sequence[dict[str, Any]]) -> list[int]:
    return [message["body"] for message in messages]


async def take_by_turns(pair: Sequence[Broker], count: int, seconds: float) -> list[dict[str, Any]]:
    """Take so many messages, from each broker in turn. Raises TimeoutError where they do not come in time."""
    taken: list[dict[str, Any]] = []
    brokers = cycle(pair)
    async with asyncio.timeout(seconds):
        while len(taken) < count:
            taken += await take(next(brokers), 3)
    return taken


async def delete(broker: Broker, messages: Sequence[dict[str, Any]]) -> list[Any]:
    """Delete messages; return for each True, False or the type of the error."""
    answer = await broker.call("delete_batch", receipts=[message["receipt"] for message in messages])
    return [
        result["deleted"] if "deleted" in result else result["error"]["data"]["type"] for result in answer["results"]
    ]


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not fact():
            await asyncio.sleep(0.005)


async def nothing_comes(pair: Sequence[Broker]) -> bool:
    """Whether neither broker has a message, until both have looked from the very beginning twice."""
    loop = asyncio.get_running_loop()
    end = loop.time() + 2 * LOOK_SECONDS
    while loop.time() < end:
        for broker in pair:
            if await take(broker, 10):
                return False
        await asyncio.sleep(0.05)
    return True


async def test_what_is_sent_after_the_clock_was_set_back_comes_from_each_broker_in_order_and_once(
    pair: tuple[Broker, Broker], clock: Clock, connect: Connect
) -> None:
    clock.set(-HOUR)
    assert min(hints(pair[0]) + hints(pair[1])) > await time_of(await connect())
    for n in range(10):
        await send(pair[n % 2], 2 * n, 2 * n + 1)
    taken = await take_by_turns(pair, 20, LOOK_SECONDS + PATIENCE)
    assert bodies(taken) == list(range(20))
    assert await nothing_comes(pair)
    assert await delete(pair[0], taken) == [True] * 20


async def test_what_waited_when_the_clock_was_set_back_comes_when_its_time_has_come_again(
    pair: tuple[Broker, Broker], clock: Clock
) -> None:
    """Until then it lies in the future; what is sent meanwhile does not wait for it."""
    await send(pair[0], *range(5))
    clock.set(-HOUR)
    await send(pair[1], *range(5, 10))
    first = await take_by_turns(pair, 5, LOOK_SECONDS + PATIENCE)
    assert bodies(first) == [5, 6, 7, 8, 9]
    clock.set(1)
    second = await take_by_turns(pair, 10, LOOK_SECONDS + PATIENCE)
    assert Counter(bodies(second)) == Counter(range(10))
    assert [message["receive_count"] for message in sorted(second, key=lambda m: m["body"])] == [1] * 5 + [2] * 5


async def test_leases_end_by_the_clock_that_there_is(pair: tuple[Broker, Broker], clock: Clock) -> None:
    """Those from before the step last an hour longer; those from after it end when the clock is put right."""
    one, two = pair
    await send(one, *range(5))
    before = await take(one, 5)
    clock.set(-HOUR)
    await send(two, *range(5, 10))
    during = await take_by_turns(pair, 5, LOOK_SECONDS + PATIENCE)
    assert bodies(during) == [5, 6, 7, 8, 9]
    assert await nothing_comes(pair)
    clock.set(0)
    again = await take_by_turns(pair, 5, LOOK_SECONDS + PATIENCE)
    assert sorted(bodies(again)) == [5, 6, 7, 8, 9]
    assert [message["receive_count"] for message in again] == [2] * 5
    assert await nothing_comes(pair)
    assert await delete(one, during) == ["lease_lost"] * 5
    assert await delete(one, again) == [True] * 5
    assert await delete(two, before) == [True] * 5


@pytest.fixture
def no_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the look from the very beginning."""
    monkeypatch.setattr(low_water, "LOOK_FROM_THE_BEGINNING_SECONDS", HOUR)


async def test_a_broker_that_notices_the_step_needs_no_look_from_the_beginning(
    no_doubt: None, no_looks: None, pair: tuple[Broker, Broker], clock: Clock
) -> None:
    """Whether it finds something or not, its first statement tells it the time."""
    clock.set(-HOUR)
    for n, broker in enumerate(pair):
        await send(pair[0], n)
        assert bodies(await take(broker) or await take(broker)) == [n]


async def send_in_the_past(pair: Sequence[Broker], clock: Clock, connect: Connect) -> None:
    """Send a message of 77 while the clock is wrong for a moment, of which the first broker sees nothing."""
    clock.set(-HOUR)
    await send(pair[1], 77)
    clock.set(0)
    row = await (await (await connect()).execute("SELECT visible_at FROM broker.messages")).fetchone()
    assert row[0] < min(hints(pair[0]))


async def test_what_was_sent_during_a_step_that_a_broker_did_not_see_is_found_where_its_queue_seems_empty(
    no_looks: None, pair: tuple[Broker, Broker], clock: Clock, connect: Connect
) -> None:
    await send_in_the_past(pair, clock, connect)
    assert bodies(await take(pair[0])) == [77]


async def test_what_was_sent_during_a_step_that_a_busy_broker_did_not_see_is_found_by_its_look_from_the_beginning(
    no_looks: None, pair: tuple[Broker, Broker], clock: Clock, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    await send_in_the_past(pair, clock, connect)
    await send(pair[0], *range(50))
    assert bodies(await take(pair[0], 10)) == list(range(10))
    monkeypatch.setattr(low_water, "LOOK_FROM_THE_BEGINNING_SECONDS", 0.1)
    looking = asyncio.create_task(pair[0].server.calls.low_water.run())
    async with asyncio.timeout(PATIENCE):
        while 77 not in (taken := bodies(await take(pair[0]))):
            await send(pair[0], *taken)  # so that it never seems empty
    looking.cancel()


@pytest.mark.parametrize("seconds", [-HOUR, HOUR])
async def test_who_waits_hears_of_messages_whatever_became_of_the_clock(
    pair: tuple[Broker, Broker], clock: Clock, seconds: float
) -> None:
    one, two = pair
    waiting = asyncio.create_task(take(one, wait=2 * PATIENCE))
    await until(lambda: one.server.waiting.waiting == 1)
    clock.set(seconds)
    await send(two, 1)
    async with asyncio.timeout(LOOK_SECONDS + PATIENCE):
        assert bodies(await waiting) == [1]


async def test_who_waits_gets_what_a_step_forward_has_made_ready(pair: tuple[Broker, Broker], clock: Clock) -> None:
    """A message that was delayed, and one whose lease has ended; no timer of a broker knows of that."""
    one, two = pair
    await send(one, 1)
    assert bodies(await take(one)) == [1]
    await two.call("enqueue", body=2, delay=HOUR / 2)
    waiting = [asyncio.create_task(take(broker, wait=2 * PATIENCE)) for broker in pair]
    await until(lambda: all(broker.server.waiting.waiting == 1 for broker in pair))
    clock.set(HOUR)
    async with asyncio.timeout(LOOK_SECONDS + PATIENCE):
        taken = [message for each in waiting for message in await each]
    assert sorted((message["body"], message["receive_count"]) for message in taken) == [(1, 2), (2, 1)]


class Load:
    """What producers and consumers do to both brokers, and what came of it."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance
        self.sent = 0
        self.deleted: Counter[int] = Counter()
        self.deliveries: Counter[tuple[str, int]] = Counter()
        self.is_over = False

    async def produce(self, broker: Broker) -> None:
        while not self.is_over:
            first, self.sent = self.sent, self.sent + self.chance.randint(1, 8)
            delay = self.chance.choice((0, 0, 0.3))
            messages = [{"body": body, "delay": delay} for body in range(first, self.sent)]
            await broker.call("enqueue_batch", messages=messages)

    async def consume(self, broker: Broker) -> None:
        while not self.is_over:
            seconds = self.chance.choice((0.01, 0.3, LEASE_SECONDS))
            await self.take(broker, visibility_timeout=seconds, wait=0.1)

    async def take(self, broker: Broker, **how: Any) -> None:
        messages = await take(broker, self.chance.randint(1, 8), **how)
        self.deliveries.update((message["message_id"], message["receive_count"]) for message in messages)
        if messages and self.chance.random() < 0.7:
            results = await delete(broker, messages)
            self.deleted.update(n for n, result in zip(bodies(messages), results, strict=True) if result is True)

    async def move(self, clock: Clock, seconds: float) -> None:
        """Set the clock back and forth for a while."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            clock.set(self.chance.choice((-HOUR, -1, -0.3, 0, 0.3, HOUR)))
            await asyncio.sleep(self.chance.uniform(0.02, 0.3))
        self.is_over = True


async def test_under_load_every_message_is_deleted_exactly_once_whatever_the_clock_does(
    pair: tuple[Broker, Broker], clock: Clock
) -> None:
    """In the end the clock stands where everything is ready that is still there."""
    seed = random.randrange(2**32)
    print("seed", seed)
    load = Load(random.Random(seed))
    await asyncio.gather(
        load.move(clock, 3),
        *map(load.produce, pair),
        *map(load.consume, [*pair] * 3),
    )
    clock.set(2 * HOUR)
    async with asyncio.timeout(LOOK_SECONDS + 3 * PATIENCE):
        while (await pair[0].call("count_messages"))["total"]:
            await asyncio.gather(*(load.take(broker, visibility_timeout=0.01) for broker in [*pair] * 3))
    assert load.deleted == Counter(range(load.sent))
    assert set(load.deliveries.values()) == {1}, "of one message each delivery has another number"
    assert load.sent > 100
