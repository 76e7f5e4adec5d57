"""A standby whose clock is an hour ahead, or behind, takes over: docs/operations.md says what that means.

The server goes by libfaketime, which reads from a file by how much its clock is wrong. Clients are at work all the
time, with idempotency keys that are remembered for longer than the step.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from brokers import answer, call
from pair import Pair, folder_for_servers
from parts import Options, Result, Say
from under_load import QUEUE, at_work, judge

HOUR = 3600
WINDOW_SECONDS = 3 * HOUR
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


async def run(options: Options, say: Say) -> AsyncIterator[Result]:
    for seconds in (HOUR, -HOUR):
        result = Result(f"clock {seconds:+d} s at a failover")
        if LIBRARY is None:
            result.skipped = "needs libfaketime: apt-get install libfaketime"
        else:
            await fail_over_to_another_time(seconds, result, options)
        yield result


class Probe:
    """A message that is leased for ten minutes before the step, and one that is ready."""

    def __init__(self, http: aiohttp.ClientSession, url: str) -> None:
        self._http = http
        self._url = url
        self._receipt = ""

    async def prepare(self) -> None:
        for queue in ("held", "ready"):
            await self._call("create_queue", queue=queue, visibility_timeout=LEASE_SECONDS)
            await self.send(queue, "before")
        [held] = await self._take("held")
        self._receipt = held["receipt"]

    async def send(self, queue: str, body: str, **how: Any) -> Any:
        return await self._call("enqueue", queue=queue, body=body, **how)

    async def bodies(self, queue: str) -> list[tuple[str, int]]:
        """Take all there is; return bodies and how often each was delivered."""
        return [(message["body"], message["receive_count"]) for message in await self._take(queue)]

    async def delete_held(self) -> str:
        """Delete by the receipt from before the step; return what was answered."""
        answered = await answer(self._http, self._url, "delete", receipt=self._receipt)
        return "deleted" if "result" in answered else str(answered["error"]["data"]["type"])

    async def _call(self, method: str, **params: Any) -> Any:
        return await call(self._http, self._url, method, **params)

    async def _take(self, queue: str) -> Any:
        delivery = await self._call("dequeue", queue=queue, max_messages=10)
        return delivery["messages"]


async def fail_over_to_another_time(seconds: int, result: Result, options: Options) -> None:
    with folder_for_servers() as folder:
        clock = folder / "clock"
        pair = Pair(folder)
        pair.standby.variables = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        set_clock(clock, seconds)
        try:
            await pair.start()
            async with (
                at_work(folder, pair.nodes, options.seed, brokers=2) as (brokers, load),
                aiohttp.ClientSession() as http,
            ):
                probe = Probe(http, brokers[0].url)
                await call(http, brokers[0].url, "update_queue", queue=QUEUE, idempotency_window=WINDOW_SECONDS)
                await probe.prepare()
                await probe.send("ready", "keyed", idempotency_key="key")
                await load.works()
                await pair.primary.kill()
                await pair.fail_over()
                await load.works()
                await pair.rejoin()
                await load.works()
                [(now,)] = await pair.primary.query("SELECT extract(epoch FROM clock_timestamp())::float8")
                off = round(now - time.time())
                result.expect(abs(off - seconds) < HOUR / 2, f"the clock of the new primary is off by {off} s")
                await (after_a_step_forward if seconds > 0 else after_a_step_back)(probe, result)
                if seconds < 0:
                    # What was ready before the step comes; what was leased since then has had its ten minutes.
                    set_clock(clock, 0)
                    await load.works()
                    came = sorted(await probe.bodies("ready"))
                    expected = [("after", 2), ("before", 1), ("keyed", 1)]
                    result.expect(came == expected, f"when the clock was right again came {came}")
                await judge(result, pair.primary, brokers, load)
        finally:
            await pair.close()


async def after_a_step_forward(probe: Probe, result: Result) -> None:
    """Leases and idempotency windows have ended early."""
    result.expect(await probe.bodies("held") == [("before", 2)], "a lease has not ended by the new clock")
    result.expect(await probe.delete_held() == "lease_lost", "the lease that has ended is good for a delete")
    again = await probe.send("ready", "keyed", idempotency_key="key")
    result.expect(not again["duplicate"], "the idempotency window has not ended by the new clock")


async def after_a_step_back(probe: Probe, result: Result) -> None:
    """What was ready is invisible, leases last; what is sent now comes."""
    result.expect(await probe.bodies("held") == [], "a lease that lasts was given to somebody else")
    result.expect(await probe.bodies("ready") == [], "what was ready is visible before its time")
    again = await probe.send("ready", "keyed", idempotency_key="key")
    result.expect(again["duplicate"], "a key was forgotten")
    await probe.send("ready", "after")
    result.expect(await probe.bodies("ready") == [("after", 1)], "what is sent after the step does not come")
    result.expect(await probe.delete_held() == "deleted", "its holder cannot delete a message after the step")


def set_clock(file: Path, seconds: int) -> None:
    new = file.with_suffix(".new")
    new.write_text(f"{seconds:+d}\n")
    new.chmod(0o644)
    new.replace(file)
