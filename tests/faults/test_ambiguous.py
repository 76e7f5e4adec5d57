"""A statement whose answer, or which itself, is lost on the way: nobody can know, so the outcome is unknown.

Repeating the call has the effect once. A call that was not sent, because the broker spares a database that fails,
may say "none"; then it is sent again until its statement is cut off.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from brokers import Broker, answer, running_brokers
from pair import Node, folder_for_servers
from proxy import Lost

TIMES: list[tuple[Lost, int]] = [("reply", 200), ("request", 50)]
LEASE_SECONDS = 600
CALLERS = 8
ROUNDS = 25


class Bench:
    """One broker on one server, with a proxy between them."""

    def __init__(self, node: Node, broker: Broker, http: aiohttp.ClientSession) -> None:
        self.node = node
        [self.proxy] = broker.proxies
        self._url = broker.url
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

    async def attempt(self, method: str, /, **params: Any) -> None:
        """Call a method once, whatever comes of it."""
        await answer(self._http, self._url, method, **params)

    async def stored(self) -> list[tuple[Any, ...]]:
        """Return body, receive_count and whether it is leased of each message, in order."""
        return await self.node.query(
            "SELECT body #>> '{}', receive_count, visible_at > now() FROM broker.messages ORDER BY id"
        )

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
            async with running_brokers(folder, [node], 1) as [broker], aiohttp.ClientSession() as http:
                yield Bench(node, broker, http)
                assert broker.bad_signs() == [], broker.log[-5000:]
        finally:
            await node.close()


@pytest.mark.parametrize(("lost", "times"), TIMES)
async def test_a_message_whose_enqueue_was_cut_off_and_repeated_is_stored_once(lost: Lost, times: int) -> None:
    async with bench() as made:
        for n in range(times):
            message = {"body": str(n), "idempotency_key": f"key {n}"}
            await made.call_cut_off(lost, "enqueue", "enqueue", **message)
            assert len(await made.stored()) == n + (lost == "reply")
            again = await made.call("enqueue", **message)
            assert again["duplicate"] is (lost == "reply")
        assert await made.stored() == [(str(n), 0, False) for n in range(times)]


@pytest.mark.parametrize("lost", ["reply", "request"])
async def test_what_has_no_key_is_sent_once(lost: Lost) -> None:
    """The broker must not repeat by itself what may have been done."""
    async with bench() as made:
        for n in range(20):
            await made.call_cut_off(lost, "enqueue", "enqueue", body=str(n))
        assert await made.stored() == ([(str(n), 0, False) for n in range(20)] if lost == "reply" else [])


@pytest.mark.parametrize(("lost", "times"), TIMES)
async def test_a_batch_that_was_cut_off_and_repeated_is_stored_once(lost: Lost, times: int) -> None:
    async with bench() as made:
        for n in range(times):
            messages = [{"body": f"{n} {m}", "idempotency_key": f"key {n} {m}"} for m in range(3)]
            await made.call_cut_off(lost, "enqueue", "enqueue_batch", messages=messages)
            again = await made.call("enqueue_batch", messages=messages)
            assert [one["duplicate"] for one in again["messages"]] == [lost == "reply"] * 3
        assert await made.stored() == [(f"{n} {m}", 0, False) for n in range(times) for m in range(3)]


@pytest.mark.parametrize(("lost", "times"), TIMES)
async def test_a_delete_that_was_cut_off_and_repeated_removes_one_message(lost: Lost, times: int) -> None:
    async with bench() as made:
        for n, receipt in enumerate(await made.leased(times)):
            await made.call_cut_off(lost, "delete", "delete", receipt=receipt)
            left = await made.stored()
            assert len(left) == times - n - (lost == "reply")
            assert await made.call("delete", receipt=receipt) == {"deleted": lost == "request"}
            assert await made.stored() == [(str(m), 1, True) for m in range(n + 1, times)]


@pytest.mark.parametrize(("lost", "times"), TIMES)
async def test_an_extension_that_was_cut_off_and_repeated_leaves_its_lease_to_the_holder(
    lost: Lost, times: int
) -> None:
    ends = "SELECT visible_at > now() + %s * interval '1.5 seconds' FROM broker.messages ORDER BY id OFFSET %s LIMIT 1"
    async with bench() as made:
        receipts = await made.leased(times)
        for n, receipt in enumerate(receipts):
            longer = {"receipt": receipt, "visibility_timeout": 2 * LEASE_SECONDS}
            await made.call_cut_off(lost, "extend_visibility", "extend_visibility", **longer)
            assert await made.node.query(ends, [LEASE_SECONDS, n]) == [(lost == "reply",)]
            await made.call("extend_visibility", **longer)
            assert await made.node.query(ends, [LEASE_SECONDS, n]) == [(True,)]
        assert await made.stored() == [(str(n), 1, True) for n in range(times)]
        assert await made.call("delete_batch", receipts=receipts) == {"results": [{"deleted": True}] * times}


@pytest.mark.parametrize("lost", ["reply", "request"])
async def test_of_calls_that_share_a_statement_each_has_its_effect_once(lost: Lost) -> None:
    async with bench() as made:
        for turn in range(ROUNDS):
            messages = [{"body": f"{turn} {n}", "idempotency_key": f"key {turn} {n}"} for n in range(CALLERS)]
            cut = made.proxy.cut("/* enqueue */", lost=lost)
            while not cut.done:
                await asyncio.gather(*(made.attempt("enqueue", **message) for message in messages))
            await asyncio.gather(*(made.call("enqueue", **message) for message in messages))
        expected = {(f"{turn} {n}", 0, False) for turn in range(ROUNDS) for n in range(CALLERS)}
        stored = await made.stored()
        assert set(stored) == expected
        assert len(stored) == len(expected)
