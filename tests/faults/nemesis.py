"""Faults, one after the other, as a seed decides; each is over, and what it broke is mended, before the next one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from brokers import Broker, Deployment
from load import Actor, Load
from proxy import Lost

# A part that is paused goes on while others still wait for it, or after they have given it up.
PAUSE_SECONDS = (0.3, 3.0)
NETWORK_SECONDS = (0.3, 2.0)
DELAY_SECONDS = 0.2
CUTS = 3
STATEMENTS = (
    "/* enqueue */",
    "/* publish */",
    "/* broadcast */",
    "/* dequeue */",
    "/* delete */",
    "/* extend_visibility */",
)
# Who counts as a producer, to be killed or paused.
SENDERS = ("produce", "publish", "broadcast")
# Of the primaries whose backends were ended while they waited for the standby, as many die before it has what they
# had committed.
KILLED_UNREPLICATED_SHARE = 0.7


class Nemesis:
    """Does harm to a deployment and its load."""

    def __init__(self, deployment: Deployment, load: Load, seed: int) -> None:
        self._pair = deployment.pair
        self._brokers = deployment.brokers
        self._load = load
        self._random = random.Random(seed)
        self._deck: list[str] = []
        self._faults: dict[str, Callable[[], Awaitable[str]]] = {
            "kill broker": self._kill_broker,
            "pause broker": self._pause_broker,
            "kill producer": lambda: self._kill_actor(*SENDERS),
            "kill consumer": lambda: self._kill_actor("consume"),
            "pause producer": lambda: self._pause_actor(*SENDERS),
            "pause consumer": lambda: self._pause_actor("consume"),
            "kill receiver": lambda: self._kill_actor("receive"),
            "pause receiver": lambda: self._pause_actor("receive"),
            "kill primary": self._kill_primary,
            "pause primary": self._pause_primary,
            "kill standby": self._kill_standby,
            "pause standby": self._pause_standby,
            "reset connections": self._reset_connections,
            "delay network": self._delay_network,
            "black hole": self._black_hole,
            "refuse connections": self._refuse_connections,
            "cut replies": lambda: self._cut("reply"),
            "cut requests": lambda: self._cut("request"),
            "cancel backends": lambda: self._end_backends("pg_cancel_backend"),
            "terminate backends": lambda: self._end_backends("pg_terminate_backend"),
        }

    async def strike(self) -> tuple[str, str]:
        """Let one fault happen and mend it; return its kind and more about it.

        Each kind comes once before any comes again.
        """
        if not self._deck:
            self._deck = self._random.sample(list(self._faults), len(self._faults))
        name = self._deck.pop()
        return name, await self._faults[name]()

    async def _kill_broker(self) -> str:
        broker = self._any_broker()
        await broker.kill()
        await self._sleep(0, 0.5)
        await broker.start()
        return broker.name

    async def _pause_broker(self) -> str:
        broker = self._any_broker()
        broker.pause()
        seconds = await self._sleep(*PAUSE_SECONDS)
        broker.resume()
        return f"{broker.name} for {seconds:.1f} s"

    async def _kill_actor(self, *whats: str) -> str:
        actor = self._any_actor(*whats)
        await actor.kill()
        self._load.start_again(actor)
        return actor.name

    async def _pause_actor(self, *whats: str) -> str:
        actor = self._any_actor(*whats)
        actor.pause()
        seconds = await self._sleep(*PAUSE_SECONDS)
        actor.resume()
        return f"{actor.name} for {seconds:.1f} s"

    async def _kill_primary(self) -> str:
        await self._pair.primary.kill()
        await self._pair.fail_over()
        await self._pair.rejoin()
        return f"and promote {self._pair.primary.name}"

    async def _pause_primary(self) -> str:
        self._pair.primary.pause()
        seconds = await self._sleep(*PAUSE_SECONDS)
        self._pair.primary.resume()
        return f"for {seconds:.1f} s"

    async def _kill_standby(self) -> str:
        await self._pair.standby.kill()
        await self._sleep(0, 0.5)
        await self._pair.standby.start()
        await self._pair.synchronise()
        return ""

    async def _pause_standby(self) -> str:
        self._pair.standby.pause()
        seconds = await self._sleep(*PAUSE_SECONDS)
        self._pair.standby.resume()
        await self._pair.synchronise()
        return f"for {seconds:.1f} s"

    async def _reset_connections(self) -> str:
        broker = self._any_broker()
        for proxy in broker.proxies:
            proxy.reset()
        return f"of {broker.name}"

    async def _delay_network(self) -> str:
        broker = self._any_broker()
        for proxy in broker.proxies:
            proxy.delay(DELAY_SECONDS)
        return f"of {broker.name} by {DELAY_SECONDS} s for {await self._network_heals(broker):.1f} s"

    async def _black_hole(self) -> str:
        broker = self._any_broker()
        requests, replies = self._random.choice([(True, True), (True, False), (False, True)])
        for proxy in broker.proxies:
            proxy.swallow(requests=requests, replies=replies)
        what = " and ".join(["requests"] * requests + ["replies"] * replies)
        return f"for {what} of {broker.name} for {await self._network_heals(broker, PAUSE_SECONDS):.1f} s"

    async def _refuse_connections(self) -> str:
        broker = self._any_broker()
        for proxy in broker.proxies:
            proxy.refuse()
            proxy.reset()
        return f"of {broker.name} for {await self._network_heals(broker):.1f} s"

    async def _cut(self, lost: Lost) -> str:
        broker = self._any_broker()
        cuts = [proxy.cut(statement, lost=lost, times=CUTS) for statement in STATEMENTS for proxy in broker.proxies]
        await self._network_heals(broker)
        done = sum(cut.done for cut in cuts)
        return f"of {broker.name}, {done} times"

    async def _end_backends(self, function: str) -> str:
        """End all statements while the standby is away: they are committed on the primary, and nowhere else.

        Who takes that for done loses it when the primary dies now.
        """
        pair = self._pair
        pair.standby.pause()
        await self._sleep(0.2, 0.4)
        await pair.primary.query(
            f"SELECT {function}(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
            " AND pid <> pg_backend_pid()"
        )
        await self._sleep(0.2, 0.4)
        if self._random.random() >= KILLED_UNREPLICATED_SHARE:
            pair.standby.resume()
            await pair.synchronise()
            return ""
        await pair.primary.kill()
        await pair.standby.kill()  # with what its system had received and it had not
        await pair.standby.start()
        await pair.fail_over()
        await pair.rejoin()
        return f"waiting for the standby, then promote {pair.primary.name}"

    async def _network_heals(self, broker: Broker, within: tuple[float, float] = NETWORK_SECONDS) -> float:
        seconds = await self._sleep(*within)
        for proxy in broker.proxies:
            proxy.heal()
        return seconds

    async def _sleep(self, low: float, high: float) -> float:
        seconds = self._random.uniform(low, high)
        await asyncio.sleep(seconds)
        return seconds

    def _any_broker(self) -> Broker:
        return self._random.choice(self._brokers)

    def _any_actor(self, *whats: str) -> Actor:
        return self._random.choice(self._load.living(*whats))
