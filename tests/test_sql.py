"""broker.enqueue: producers inside the database, whose messages are stored if and only if they commit."""

from __future__ import annotations

import asyncio
import json
from datetime import datetime
from typing import Any

import psycopg
import pytest
from psycopg import sql

from broker.storage.database import Connection
from conftest import Broker, Connect, StartBroker
from gate import wait_until_blocked
from test_concurrency import transaction
from test_messages import bodies, send, take


@pytest.fixture
async def producer(database_url: str) -> Any:
    """A connection as any program makes it, with none of the broker's settings."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        yield connection


async def enqueue(producer: Connection, body: str = "1", queue: str | None = "default", **how: Any) -> str:
    """Call the function; `how` are further arguments by name."""
    named = sql.SQL("").join(
        sql.SQL(", {} => {}").format(sql.Identifier(name), sql.Literal(value)) for name, value in how.items()
    )
    statement = sql.SQL("SELECT broker.enqueue({}, {}{})").format(sql.Literal(queue), sql.Literal(body), named)
    row = await (await producer.execute(statement)).fetchone()
    assert row is not None
    message_id: str = row[0]
    return message_id


async def refusal(producer: Connection, body: str = "1", queue: str | None = "default", **how: Any) -> psycopg.Error:
    with pytest.raises(psycopg.Error) as caught:
        await enqueue(producer, body, queue, **how)
    return caught.value


async def test_a_message_from_sql_is_as_any_other(broker: Broker, producer: Connection) -> None:
    message_id = await enqueue(
        producer, '{"any":  1.0, "any": "\\u0000"}', headers='{"h": "v"}', sender="me", delay=0, ttl=50
    )
    _, answer = await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"dequeue","params":{"queue":"default"}}')
    assert b'"body":{"any":  1.0, "any": "\\u0000"}' in answer
    (message,) = json.loads(answer)["result"]["messages"]
    assert (message["message_id"], message["headers"], message["sender"]) == (message_id, {"h": "v"}, "me")
    enqueued, expires = (datetime.fromisoformat(message[name]) for name in ("enqueued_at", "expires_at"))
    assert (expires - enqueued).total_seconds() == 50


async def test_the_queues_attributes_hold(broker: Broker, producer: Connection) -> None:
    await broker.call("create_queue", queue="q", delay=50, message_ttl=100)
    await enqueue(producer, queue="q")
    (message,) = (await broker.call("list_messages", queue="q"))["messages"]
    moments = [datetime.fromisoformat(message[name]) for name in ("enqueued_at", "visible_at", "expires_at")]
    assert [(moment - moments[0]).total_seconds() for moment in moments] == [0, 50, 100]


async def test_a_message_is_stored_if_and_only_if_its_transaction_commits(broker: Broker, producer: Connection) -> None:
    async with producer.transaction(force_rollback=True):
        await enqueue(producer, "1")
        assert await take(broker) == []
    async with producer.transaction():
        await enqueue(producer, "2")
        assert await take(broker) == []
    assert bodies(await take(broker, 10)) == [2]


async def test_a_waiting_consumer_gets_it_soon_on_every_broker(start_broker: StartBroker, producer: Connection) -> None:
    for broker in (await start_broker(), await start_broker()):
        task = asyncio.ensure_future(take(broker, wait=30))
        await asyncio.sleep(0)
        await enqueue(producer, '"x"')
        assert bodies(await task) == ["x"]


async def test_a_transaction_that_was_open_for_long_loses_nothing(
    start_broker: StartBroker, producer: Connection, no_doubt: None
) -> None:
    """Messages come and go meanwhile, and the low-water hint follows them as far as it may."""
    broker = await start_broker(sweep_interval=3600)
    async with producer.transaction():
        await enqueue(producer, '"old"')
        for n in range(300):
            await send(broker, n)
            assert bodies(await take(broker, delivery="at_most_once")) == [n]
    assert bodies(await take(broker, 10)) == ["old"]


async def test_a_key_is_one_and_the_same_in_sql_and_over_http(broker: Broker, producer: Connection) -> None:
    first = await enqueue(producer, '{"a": 1}', idempotency_key="k")
    assert await enqueue(producer, '{"a": 1}', idempotency_key="k") == first
    request = b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":{"a": 1},"idempotency_key":"k"}}'
    _, answer = await broker.post(request)
    assert json.loads(answer)["result"] == {"message_id": first, "duplicate": True}
    _, answer = await broker.post(request.replace(b'"a": 1', b'"a":1'))
    assert json.loads(answer)["error"]["code"] == 1007
    assert (await refusal(producer, '{"a":1}', idempotency_key="k")).sqlstate == "WQ007"
    sent = await broker.call("enqueue", body=5, idempotency_key="l")
    assert await enqueue(producer, "5", idempotency_key="l") == sent["message_id"]
    assert len(await take(broker, 10)) == 2


async def test_a_key_is_free_again_when_its_window_is_over(producer: Connection) -> None:
    first = await enqueue(producer, idempotency_key="k")
    await producer.execute("UPDATE broker.queues SET idempotency_window = 0.000001")
    assert await enqueue(producer, "2", idempotency_key="k") != first


async def test_two_producers_with_one_key_wait_for_each_other(producer: Connection, connect: Connect) -> None:
    other, observer = await connect(), await connect()
    async with transaction(other):
        first = await enqueue(other, idempotency_key="k")
        task = asyncio.ensure_future(enqueue(producer, idempotency_key="k"))
        await wait_until_blocked(observer, producer)
    assert await task == first


@pytest.mark.parametrize(
    ("how", "sqlstate"),
    [
        ({"queue": "nowhere"}, "WQ001"),
        ({"queue": None}, "WQ001"),
        ({"body": '"' + "x" * 4095 + '"'}, "WQ005"),
        ({"body": "{"}, "22P02"),
        ({"body": None}, "22004"),
        ({"delay": -1}, "22023"),
        ({"delay": 31_536_001}, "22023"),
        ({"delay": float("nan")}, "22023"),
        ({"ttl": 0}, "22023"),
        ({"ttl": float("inf")}, "22023"),
        ({"sender": "x" * 129}, "22023"),
        ({"idempotency_key": ""}, "22023"),
        ({"idempotency_key": "x" * 129}, "22023"),
        ({"headers": "[]"}, "22023"),
        ({"headers": '{"a": 1}'}, "22023"),
        ({"headers": json.dumps({"a": "x" * 4096})}, "22023"),
        ({"headers": json.dumps({str(n): "" for n in range(65)})}, "22023"),
    ],
)
async def test_what_the_rpc_refuses_is_refused_in_sql(producer: Connection, how: dict[str, Any], sqlstate: str) -> None:
    error = await refusal(producer, **how)
    assert error.sqlstate == sqlstate
    assert len(str(error)) > 15
    cursor = await producer.execute(
        "SELECT (SELECT count(*) FROM broker.messages) + (SELECT count(*) FROM broker.idempotency_keys)"
    )
    assert await cursor.fetchone() == (0,)


async def test_a_full_queue_refuses_and_a_duplicate_is_not_one_more(broker: Broker, producer: Connection) -> None:
    await broker.call("create_queue", queue="q", max_messages=1)
    first = await enqueue(producer, queue="q", idempotency_key="k")
    assert (await refusal(producer, queue="q")).sqlstate == "WQ014"
    assert await enqueue(producer, queue="q", idempotency_key="k") == first


async def test_who_may_call_it_needs_no_right_to_the_tables(producer: Connection, database_url: str) -> None:
    await producer.execute("DROP ROLE IF EXISTS wonderq_test_producer")
    await producer.execute("CREATE ROLE wonderq_test_producer")
    try:
        await producer.execute("GRANT USAGE ON SCHEMA broker TO wonderq_test_producer")
        await producer.execute("SET ROLE wonderq_test_producer")
        assert (await refusal(producer)).sqlstate == "42501"
        await producer.execute("RESET ROLE")
        await producer.execute("GRANT EXECUTE ON FUNCTION broker.enqueue TO wonderq_test_producer")
        await producer.execute("SET ROLE wonderq_test_producer")
        await enqueue(producer)
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            await producer.execute("SELECT FROM broker.messages")
    finally:
        await producer.execute("RESET ROLE")
        await producer.execute("DROP OWNED BY wonderq_test_producer")
        await producer.execute("DROP ROLE wonderq_test_producer")


async def test_it_minds_no_settings_of_the_session(broker: Broker, producer: Connection) -> None:
    await producer.execute("CREATE SCHEMA mine")
    await producer.execute(
        "CREATE FUNCTION mine.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS 'SELECT NULL::timestamptz'"
    )
    await producer.execute("SET search_path = mine, pg_catalog")
    await producer.execute("SET TimeZone = 'Asia/Kathmandu'")
    await producer.execute("SET DateStyle = 'German'")
    await enqueue(producer)
    assert bodies(await take(broker)) == [1]
