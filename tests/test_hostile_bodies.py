"""Bodies that are made to cost much are answered as the contract says, where tokens are asked for too.

How long each takes is a cell of `make bench`: hostile-bodies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from benchmarks import hostile
from benchmarks.hostile import Hostile
from broker.storage import tokens
from broker.storage.database import Connection
from broker.storage.tokens import Grant
from conftest import StartBroker
from outside import request, send


@pytest.mark.parametrize("kind", [hostile.deep, hostile.huge, hostile.broken, hostile.compressed])
async def test_a_body_that_is_made_to_cost_much_is_answered_as_any_other(
    start_broker: StartBroker, connection: Connection, kind: Callable[[], Iterator[Hostile]]
) -> None:
    broker = await start_broker(auth="required")
    token = await tokens.create(connection, "ada", Grant(["*"], ["*"], ["*"], admin=True), None)
    authorization = f"Authorization: Bearer {token}"
    wrong = []
    for each in kind():
        fields = [f"{name}: {value}" for name, value in each.headers]
        answer = await send(broker.url, request("POST", "/rpc", each.body, authorization, *fields))
        code = re.search(rb'"code":(-?\d+)', answer.body)
        found = (answer.status, int(code[1]) if code else None)
        if found != (each.status, each.code):
            wrong.append(f"{each.name}: {found} {answer.body[:200]!r}")
        if each.code == 1005:
            assert b'"limit":4096,"given":' in answer.body
    assert not wrong, "\n".join(wrong)
    answer = await send(broker.url, request("POST", "/rpc", hostile.enqueue(b"1"), authorization))
    assert b'"result"' in answer.body
    assert (await send(broker.url, request("POST", "/rpc", hostile.filled(b"[")))).status == 401
