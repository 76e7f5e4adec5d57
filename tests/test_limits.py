"""Everything that a client can send or hold open has a limit; who is over is told so, and counted.

Each limit is set low, reached and left by one. How slow clients are answered is in test_connections.py.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker.envelopes import MAX_BATCH
from broker.metrics import LIMITS
from broker.settings import Settings, settings_table
from broker.storage import tokens
from broker.storage.database import Connection
from broker.storage.tokens import Grant
from conftest import PATIENCE, Broker, StartBroker

EVERYTHING = Grant(["*"], ["*"], ["*"], admin=True)


def refused(broker: Broker) -> dict[str, int]:
    """Return how often which limit was reached, as /metrics says it."""
    found = re.findall(r'^wonderq_refused_total\{limit="(\w+)"\} (\S+)$', broker.server.metrics.text().decode(), re.M)
    assert [name for name, _ in found] == list(LIMITS), "every limit is shown from the beginning"
    return {name: int(float(number)) for name, number in found if float(number)}


def request(method: str, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}


async def eventually(fact: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not fact():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def waiting(broker: Broker, number: int) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """So many consumers that wait, until it is over."""
    consumers = [asyncio.create_task(broker.call("dequeue", wait=60)) for _ in range(number)]
    await eventually(lambda: broker.server.waiting.waiting == number)
    yield consumers
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(number)])
    assert sum(len(each["messages"]) for each in await asyncio.gather(*consumers)) == number


def overloaded(answer: dict[str, Any], limit: int) -> bool:
    error = answer.get("error", {"data": {}})
    if "error" in answer:
        assert (error["code"], error["data"]["type"], error["data"]["limit"]) == (-32002, "overloaded", limit)
        assert error["data"]["retry_after"] > 0
        assert error["data"]["outcome"] == "none"
    return "error" in answer


async def test_calls_in_flight_of_all_clients_are_limited_those_that_wait_too(start_broker: StartBroker) -> None:
    broker = await start_broker(max_calls_in_flight=3)
    async with waiting(broker, 2):
        assert not overloaded(await broker.answer("enqueue", queue="default", body=1, delay=60), 3)
        batch = [request("list_queues") | {"id": n} for n in range(4)]
        status, body = await broker.post(json.dumps(batch).encode())
        assert status == 200
        assert [overloaded(each, 3) for each in json.loads(body)] == [False, True, True, True]
    assert refused(broker) == {"calls_in_flight": 3}
    assert "result" in await broker.answer("get_server"), "what was refused is not in flight"


async def test_waiting_consumers_are_limited(start_broker: StartBroker) -> None:
    broker = await start_broker(max_waiting_consumers=2)
    async with waiting(broker, 2):
        assert overloaded(await broker.answer("dequeue", wait=60), 2)
    assert refused(broker) == {"waiting_consumers": 1}


async def test_calls_of_one_token_are_limited_at_one_time_and_in_a_second(
    start_broker: StartBroker, connection: Connection
) -> None:
    token = await tokens.create(connection, "ada", EVERYTHING, None)
    batch = json.dumps([request("list_queues")] * 30).encode()

    async def answers(broker: Broker) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((await broker.post(batch, Authorization=f"Bearer {token}"))[1])
        return found

    one = await start_broker(auth="required", max_calls_per_token=1)
    assert [overloaded(each, 1) for each in await answers(one)] == [False] + [True] * 29
    assert refused(one) == {"calls_per_token": 29}
    slow = await start_broker(auth="required", max_call_rate_per_token=20.0)
    assert [overloaded(each, 20) for each in await answers(slow)] == [False] * 20 + [True] * 10
    assert refused(slow) == {"call_rate_per_token": 10}


async def test_a_batch_and_the_nesting_of_a_call_are_limited(start_broker: StartBroker) -> None:
    broker = await start_broker(max_nesting=8)
    deepest = "[" * 5 + "]" * 5  # the call and its params are two levels, and the body's element one
    body = f'{{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{{"body":[{deepest}]}}}}'
    assert "result" in json.loads((await broker.post(body.encode()))[1])
    for text in (body.replace("[]", "[[]]"), f"[{body.replace('[]', '[[]]')}]"):
        answered = json.loads((await broker.post(text.encode()))[1])
        error = (answered[0] if isinstance(answered, list) else answered)["error"]
        assert (error["code"], error["message"].rstrip(".")[-1]) == (-32600, "8")
    assert refused(broker) == {"nesting": 2}
    for batch in ([1] * (MAX_BATCH + 1), [request("list_queues")] * (MAX_BATCH + 1)):
        answered = json.loads((await broker.post(json.dumps(batch).encode()))[1])
        assert answered["error"]["code"] == -32600
    assert refused(broker) == {"nesting": 2, "batch": 2}


async def test_as_deep_as_the_deepest_setting_allows_is_taken_and_given_back(start_broker: StartBroker) -> None:
    deepest = next(about.maximum for name, about, _ in settings_table() if name == "max_nesting")
    assert deepest is not None
    broker = await start_broker(max_nesting=int(deepest))
    depth = int(deepest) - 2
    body = "[" * depth + "]" * depth
    text = f'{{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{{"body":{body}}}}}'
    assert "result" in json.loads((await broker.post(text.encode()))[1])
    _, answer = await broker.post(json.dumps(request("dequeue")).encode())
    assert f'"body":{body}'.encode() in answer
    assert (await broker.post(text.replace("[]", "[[]]").encode()))[1].find(b"-32600") > 0


async def test_bytes_of_a_request_are_limited(start_broker: StartBroker) -> None:
    broker = await start_broker(max_request_bytes=1024)
    assert (await broker.post(b" " * 1025))[0] == 413
    assert refused(broker) == {"request_bytes": 1}


async def say(broker: Broker, *pieces: bytes) -> bytes:
    """Say these on a new connection; return all that comes until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.server.runner.addresses[0][1])
    try:
        for piece in pieces:
            writer.write(piece)
        return await asyncio.wait_for(reader.read(), PATIENCE)
    finally:
        writer.close()


HEAD = b"POST /rpc HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"


@pytest.mark.parametrize(
    ("short", "said", "status", "limit"),
    [
        ({"header_timeout": 0.2}, b"", b"", "header_time"),
        ({"header_timeout": 1.0}, b"POST /", b"408", "header_time"),
        ({"body_timeout": 0.2}, HEAD + b"12", b"408", "body_time"),
        ({"body_stall_timeout": 0.2}, HEAD, b"408", "body_time"),
    ],
)
async def test_times_for_head_and_body_are_settings(
    start_broker: StartBroker, short: dict[str, float], said: bytes, status: bytes, limit: str
) -> None:
    broker = await start_broker(**short)
    assert (await say(broker, said))[9:12] == status
    assert refused(broker) == {limit: 1}


async def test_a_connection_that_idles_is_closed_and_that_is_no_refusal(start_broker: StartBroker) -> None:
    broker = await start_broker(keepalive_timeout=0.2)
    answer = await say(broker, b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert refused(broker) == {}


async def test_connections_are_limited(start_broker: StartBroker) -> None:
    broker = await start_broker(max_connections=1)
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.server.runner.addresses[0][1])
    await eventually(lambda: len(broker.server.runner.connections) == 1)
    answer = await say(broker)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"Retry-After: 1" in answer
    writer.close()
    assert refused(broker) == {"connections": 1}
    assert await reader.read() == b""


async def test_failed_logins_are_limited(start_broker: StartBroker) -> None:
    broker = await start_broker(auth="required", max_failed_logins=1)
    assert [(await broker.post(b"{}"))[0] for _ in range(2)] == [401, 429]
    assert refused(broker) == {"failed_logins": 1}


async def test_get_server_shows_every_limit_in_force(start_broker: StartBroker) -> None:
    broker = await start_broker(max_nesting=99, webhook_total=7, max_calls_per_token=3, header_timeout=1.5)
    shown = (await broker.call("get_server"))["limits"]
    numbers = {name for name, about, default in settings_table() if isinstance(default, int | float)}
    no_limits = {"port", "processes", "sweep_interval", "startup_timeout", "allow_data_loss"}
    assert set(shown) == numbers - no_limits, "a new setting is a limit, or is none: say so here and in the table"
    given = {"max_nesting": 99, "webhook_total": 7, "max_calls_per_token": 3, "header_timeout": 1.5}
    assert shown == {name: getattr(Settings(), name) for name in shown} | given
