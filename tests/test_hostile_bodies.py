"""Bodies that are made to cost much are answered as the contract says, where tokens are asked for too.

How long each takes is a cell of `make bench`: hostile-bodies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.mark.parametrize("method", ["enqueue", "enqueue with a key", "enqueue_batch", "publish", "update_message"])
async def test_a_body_that_no_queue_takes_is_refused_with_its_size_by_every_method_that_takes_one(
    start_broker: StartBroker, method: str
) -> None:
    broker = await start_broker()
    await broker.call("create_topic", topic="t", delivery="immediate")
    await broker.call("subscribe", topic="t", name="s", queue="default")
    message_id = (await broker.call("enqueue", body=1))["message_id"]
    body = "x" * 2**20
    calls: dict[str, dict[str, Any]] = {
        "enqueue": {"body": body},
        "enqueue with a key": {"body": body, "idempotency_key": "k"},
        "enqueue_batch": {"messages": [{"body": 1}, {"body": body}]},
        "publish": {"topic": "t", "body": body},
        "update_message": {"queue": "default", "message_id": message_id, "body": body},
    }
    call = {"jsonrpc": "2.0", "id": 1, "method": method.split()[0], "params": calls[method]}
    error = json.loads((await send(broker.url, request("POST", "/rpc", json.dumps(call).encode()))).body)["error"]
    assert error["code"] == 1005
    assert (error["data"]["limit"], error["data"]["given"]) == (4096, 2**20 + 2)
