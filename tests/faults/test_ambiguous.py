"""A statement whose answer, or which itself, is lost on the way: nobody can know, so the outcome is unknown.

Repeating the call has the effect once. A call that was not sent, because the broker spares a database that fails,
may say "none"; then it is sent again until its statement is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, LiteralString

import aiohttp
import psycopg
import pytest

from brokers import Broker, answer, running_brokers
from pair import Node, folder_for_servers
from proxy import Lost

Connection = psycopg.AsyncConnection[tuple[Any, ...]]

# What is lost in each turn: 200 replies, and 50 requests among them.
TURNS: list[Lost] = ["reply", "reply", "request", "reply", "reply"] * 50
LEASE_SECONDS = 600
CALLERS = 8
ROUNDS = 25


class Bench:
    """One broker on one server, with a proxy between them."""

    def __init__(self, broker: Broker, direct: Connection, http: aiohttp.ClientSession) -> None:
        [self.proxy] = broker.proxies
        self._url = broker.url
        self._direct = direct
        self._http = http

    async def call(self, method: str, /, **params: Any) -> Any:
        """Call a method, again as long as the database is spared; return its result."""
        while True:
            answered = await answer(self._http, self._url, method, **params)
            if "result" in answered:
                return answered["result"]
            assert answered["error"]["data"]["outcome"] == "none", answered
            await asyncio.sleep(0.01)

    async def call_cut_off(self, lost: Lost, statement: str, method: str, /, **params: Any) -> None:
        """Call a method while its statement is cut off; check that nothing is said to be certain which is not."""
        cut = self.proxy.cut(f"/* {statement} */", lost=lost)
        while not cut.done:
            answered = await answer(self._http, self._url, method, **params)
            outcome = answered["error"]["data"]["outcome"] if "error" in answered else "done"
            # A broker that repeats by itself what is safe to repeat may have done it.
            assert outcome in (("unknown", "done") if cut.done else ("none",)), answered
            await asyncio.sleep(0)

    async def outcomes(self, method: str, calls: list[dict[str, Any]]) -> list[str]:
        """Make calls at the same time, once; return what is said of each: "done", "none" or "unknown"."""
        answers = await asyncio.gather(*(answer(self._http, self._url, method, **params) for params in calls))
        return [one["error"]["data"]["outcome"] if "error" in one else "done" for one in answers]

    async def stored(self) -> list[tuple[Any, ...]]:
        """Return body, receive_count and whether it is leased of each message, in order."""
        return await self.query(
            "SELECT body #>> '{}', receive_count, visible_at > now() FROM broker.messages ORDER BY id"
        )

    async def is_stored(self, body: str) -> bool:
        return bool(await self.query("SELECT 1 FROM broker.messages WHERE body #>> '{}' = %s", [body]))

    async def query(self, statement: LiteralString, params: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Ask the server past broker and proxy."""
        return await (await self._direct.execute(statement, params)).fetchall()

    async def leased(self, number: int) -> list[str]:
        """Store so many messages and lease them; return the receipts."""
        messages = [{"body": str(n)} for n in range(number)]
        await self.call("enqueue_batch", messages=messages)
        delivery = await self.call("dequeue", max_messages=number, visibility_timeout=LEASE_SECONDS)
        return [message["receipt"] for message in delivery["messages"]]


@asynccontextmanager
async def bench() -> AsyncIterator[Bench]:
    with folder_for_servers() as folder:
        node = Node(folder, "single")
        try:
            await node.make()
            await node.start()
            async with (
                running_brokers(folder, [node], 1) as [broker],
                await psycopg.AsyncConnection.connect(node.conninfo, autocommit=True) as direct,
                aiohttp.ClientSession() as http,
            ):
                yield Bench(broker, direct, http)
                assert broker.bad_signs() == [], broker.log[-5000:]
        finally:
            await node.close()


async def test_a_message_whose_enqueue_was_cut_off_and_repeated_is_stored_once() -> None:
    async with bench() as made:
        for n, lost in enumerate(TURNS):
            message = {"body": str(n), "idempotency_key": f"key {n}"}
            await made.call_cut_off(lost, "enqueue", "enqueue", **message)
            assert await made.is_stored(str(n)) is (lost == "reply")
            again = await made.call("enqueue", **message)
            assert again["duplicate"] is (lost == "reply")
        assert await made.stored() == [(str(n), 0, False) for n in range(len(TURNS))]


@pytest.mark.parametrize("lost", ["reply", "request"])
async def test_what_has_no_key_is_sent_once(lost: Lost) -> None:
    """The broker must not repeat by itself what may have been done."""
    async with bench() as made:
        for n in range(20):
            await made.call_cut_off(lost, "enqueue", "enqueue", body=str(n))
        assert await made.stored() == ([(str(n), 0, False) for n in range(20)] if lost == "reply" else [])


async def test_a_batch_that_was_cut_off_and_repeated_is_stored_once() -> None:
    async with bench() as made:
        for n, lost in enumerate(TURNS):
            messages = [{"body": f"{n} {m}", "idempotency_key": f"key {n} {m}"} for m in range(3)]
            await made.call_cut_off(lost, "enqueue", "enqueue_batch", messages=messages)
            again = await made.call("enqueue_batch", messages=messages)
            assert [one["duplicate"] for one in again["messages"]] == [lost == "reply"] * 3
        assert await made.stored() == [(f"{n} {m}", 0, False) for n in range(len(TURNS)) for m in range(3)]


async def test_a_delete_that_was_cut_off_and_repeated_removes_one_message() -> None:
    async with bench() as made:
        receipts = await made.leased(len(TURNS))
        for n, lost in enumerate(TURNS):
            await made.call_cut_off(lost, "delete", "delete", receipt=receipts[n])
            assert await made.is_stored(str(n)) is (lost == "request")
            assert await made.call("delete", receipt=receipts[n]) == {"deleted": lost == "request"}
            assert await made.query("SELECT count(*) FROM broker.messages") == [(len(TURNS) - n - 1,)]


async def test_an_extension_that_was_cut_off_and_repeated_leaves_its_lease_to_the_holder() -> None:
    extended = "SELECT count(*) FROM broker.messages WHERE visible_at > now() + %s * interval '1.5 s'"
    async with bench() as made:
        receipts = await made.leased(len(TURNS))
        for n, lost in enumerate(TURNS):
            longer = {"receipt": receipts[n], "visibility_timeout": 2 * LEASE_SECONDS}
            await made.call_cut_off(lost, "extend_visibility", "extend_visibility", **longer)
            assert await made.query(extended, [LEASE_SECONDS]) == [(n + (lost == "reply"),)]
            await made.call("extend_visibility", **longer)
            assert await made.query(extended, [LEASE_SECONDS]) == [(n + 1,)]
        assert await made.stored() == [(str(n), 1, True) for n in range(len(TURNS))]
        assert await made.call("delete_batch", receipts=receipts) == {"results": [{"deleted": True}] * len(TURNS)}


async def test_of_calls_that_share_a_statement_each_is_told_the_truth_and_has_its_effect_once() -> None:
    async with bench() as made:
        for turn, lost in enumerate(TURNS[:ROUNDS]):
            messages = [{"body": f"{turn} {n}", "idempotency_key": f"key {turn} {n}"} for n in range(CALLERS)]
            cut = made.proxy.cut("/* enqueue */", lost=lost)
            outcomes: dict[str, set[str]] = {message["body"]: set() for message in messages}
            while not cut.done:
                for message, outcome in zip(messages, await made.outcomes("enqueue", messages), strict=True):
                    outcomes[message["body"]].add(outcome)
            stored = {body for body, *_ in await made.stored()}
            assert {body for body, told in outcomes.items() if "done" in told} <= stored
            assert not {body for body, told in outcomes.items() if told == {"none"}} & stored
            assert any("unknown" in told for told in outcomes.values())
            await asyncio.gather(*(made.call("enqueue", **message) for message in messages))
        bodies = [body for body, *_ in await made.stored()]
        assert sorted(bodies) == sorted(f"{turn} {n}" for turn in range(ROUNDS) for n in range(CALLERS))
