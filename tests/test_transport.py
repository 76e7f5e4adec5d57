"""HTTP as the contract has it, through raw sockets: statuses, headers, pages, and bodies that keep their bytes."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from msgspec import Raw

import broker as package
from broker.server import Server
from broker.settings import Settings
from conftest import Broker, StartBroker
from outside import Answer, blocked_enqueues, eventually, locked, request, send, without_database

DOCUMENT = json.loads((Path(package.__file__).parent / "rpc_schema.json").read_text("utf-8"))
PAGES = ["/", "/livez", "/readyz", "/healthz", "/metrics", "/openrpc.json"]

LIVES = b'{"jsonrpc":"2.0","method":"count_messages","id":1}'
NOTIFICATION = b'{"jsonrpc":"2.0","method":"count_messages"}'


async def post(broker: Broker, body: bytes, *fields: str, **options: Any) -> Answer:
    return await send(broker.url, request("POST", "/rpc", body, *fields, **options))


# Statuses


@pytest.mark.parametrize(
    "body",
    [
        LIVES,
        b"[" + LIVES + b"," + NOTIFICATION + b"]",
        b'{"jsonrpc":"2.0","method":"nothing","id":1}',
        b'{"jsonrpc":"2.0","method":"get_queue","params":{"queue":"nowhere"},"id":1}',
        b"{}",
        b"[]",
        b"not JSON",
        b"",
    ],
)
async def test_any_json_rpc_answer_is_200_errors_too(standing_broker: Broker, body: bytes) -> None:
    answer = await post(standing_broker, body)
    assert answer.status == 200
    assert answer.headers["content-type"].split(";")[0] == "application/json"
    assert json.loads(answer.body)
    assert int(answer.headers["content-length"]) == len(answer.body)


@pytest.mark.parametrize("body", [NOTIFICATION, b"[" + NOTIFICATION + b"," + NOTIFICATION + b"]"])
async def test_nothing_but_notifications_is_204_and_empty(standing_broker: Broker, body: bytes) -> None:
    answer = await post(standing_broker, body)
    assert (answer.status, answer.body) == (204, b"")


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
async def test_another_method_than_post_is_405_and_told_which_is_allowed(standing_broker: Broker, method: str) -> None:
    answer = await send(standing_broker.url, request(method, "/rpc", LIVES))
    assert answer.status == 405
    assert answer.headers["allow"] == "POST"
    if method == "HEAD":
        assert answer.body == b""
    else:
        assert (answer.error["code"], answer.error["data"]["outcome"]) == (-32600, "none")


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_a_page_is_405_for_all_but_get_and_head(standing_broker: Broker, path: str, method: str) -> None:
    answer = await send(standing_broker.url, request(method, path, b"{}"))
    assert answer.status == 405
    assert {name.strip() for name in answer.headers["allow"].split(",")} == {"GET", "HEAD"}
    assert answer.error["code"] == -32600


@pytest.mark.parametrize("path", ["/nothing", "/rpc/", "/rpc/x", "/RPC", "/%2e%2e/etc/passwd", "//rpc", "/livez/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_an_address_where_nothing_is_is_404(standing_broker: Broker, path: str, method: str) -> None:
    answer = await send(standing_broker.url, request(method, path, LIVES))
    assert answer.status == 404
    assert answer.error["code"] == -32600
    assert "POST /rpc" in answer.error["message"]


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "Application/JSON",
        "application/json;charset=utf-8",
        "application/json; charset=UTF-8",
        'application/json ; charset="utf-8"',
        "application/json;",
    ],
)
async def test_json_in_utf8_is_taken_however_it_is_said(standing_broker: Broker, content_type: str) -> None:
    assert (await post(standing_broker, LIVES, content_type=content_type)).status == 200


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json-rpc",
        "application/jsonx",
        "application/json, text/plain",
        "text/plain; application/json",
        "application/json; charset=iso-8859-1",
        "application/json; charset=utf-16",
        "application/json; charset=utf-8; charset=latin-1",
    ],
)
async def test_another_content_type_or_charset_is_415(standing_broker: Broker, content_type: str | None) -> None:
    answer = await post(standing_broker, LIVES, content_type=content_type)
    assert answer.status == 415
    assert (answer.error["code"], answer.error["data"]["type"]) == (-32600, "invalid_request")
    assert "application/json" in answer.error["message"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "x", "identity, gzip", "gzip, identity"])
async def test_an_encoded_body_is_415(standing_broker: Broker, encoding: str) -> None:
    answer = await post(standing_broker, gzip.compress(LIVES), f"Content-Encoding: {encoding}")
    assert answer.status == 415
    assert "Content-Encoding" in answer.error["message"]


async def test_an_encoding_in_a_second_header_is_415_too(standing_broker: Broker) -> None:
    assert (await post(standing_broker, LIVES, "Content-Encoding: identity", "Content-Encoding: gzip")).status == 415


async def test_a_second_content_type_does_not_hide_behind_json(standing_broker: Broker) -> None:
    assert (await post(standing_broker, LIVES, "Content-Type: text/plain")).status in (400, 415)


@pytest.mark.parametrize("encoding", ["identity", "Identity"])
async def test_the_identity_encoding_is_none(standing_broker: Broker, encoding: str) -> None:
    assert (await post(standing_broker, LIVES, f"Content-Encoding: {encoding}")).status == 200


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


async def test_a_body_may_be_as_long_as_the_limit_and_not_a_byte_longer(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker(max_request_bytes=2000)
    at_limit, over = LIVES.ljust(2000), LIVES.ljust(2001)
    head = request("POST", "/rpc", None, "Transfer-Encoding: chunked")
    sizes = (1, 7, 1000, 100_000)
    for good in (request(body=at_limit), *(head + chunked(at_limit, size) for size in sizes)):
        assert (await send(broker.url, good)).status == 200
    for bad in (request(body=over), *(head + chunked(over, size) for size in sizes)):
        answer = await send(broker.url, bad)
        assert answer.status == 413
        assert (answer.error["code"], answer.error["data"]["outcome"]) == (-32600, "none")


async def test_8_mib_are_taken_and_a_byte_more_is_413_by_its_announcement_alone(standing_broker: Broker) -> None:
    assert (await post(standing_broker, LIVES.ljust(8 * 2**20))).status == 200
    answer = await send(standing_broker.url, request("POST", "/rpc", None, f"Content-Length: {8 * 2**20 + 1}"))
    assert answer.status == 413
    assert answer.error["code"] == -32600


OWN_NAMES = ["localhost", "localhost:8080", "LocalHost", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:80"]
FOREIGN_NAMES = [
    *("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "localhost.evil.example", "notlocalhost"),
    *("10.0.0.1", "[::2]:8080", "0.0.0.0", "evil.example:localhost", "localhost@evil.example", "", ":8080"),
]


@pytest.mark.parametrize("host", OWN_NAMES)
async def test_the_names_of_this_machine_may_stand_in_host(standing_broker: Broker, host: str) -> None:
    assert (await post(standing_broker, LIVES, host=host)).status == 200


@pytest.mark.parametrize("host", FOREIGN_NAMES)
async def test_a_foreign_name_in_host_is_421(standing_broker: Broker, host: str) -> None:
    answer = await post(standing_broker, LIVES, host=host)
    assert answer.status == 421
    assert answer.error["code"] == -32600
    assert "--allowed-host" in answer.error["message"]


async def test_a_foreign_name_is_421_at_every_address(standing_broker: Broker) -> None:
    for path in [*PAGES, "/nothing"]:
        assert (await send(standing_broker.url, request("GET", path, host="evil.example"))).status == 421, path


async def test_a_second_host_does_not_hide_a_foreign_one(standing_broker: Broker) -> None:
    for hosts in (("localhost", "evil.example"), ("evil.example", "localhost")):
        answer = await send(standing_broker.url, request("GET", "/livez", b"", f"Host: {hosts[1]}", host=hosts[0]))
        assert answer.status in (400, 421)


async def test_allowed_hosts_may_stand_in_host_and_no_others(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker(allowed_host=("Queue.Example", "other"))
    for host in ("queue.example", "QUEUE.example:80", "other:1", "localhost"):
        assert (await post(broker, LIVES, host=host)).status == 200, host
    for host in ("x.queue.example", "evil.example", "other.example"):
        assert (await post(broker, LIVES, host=host)).status == 421, host


async def test_bound_to_more_than_loopback_any_host_will_do(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker(host="0.0.0.0", auth="off")
    assert (await post(broker, LIVES, host="queue.example")).status == 200


async def test_a_draining_server_refuses_what_is_new_and_answers_what_is_under_way(database_url: str) -> None:
    server = Server(database_url, Settings(port=0))
    await server.__aenter__()
    dequeue = b'{"jsonrpc":"2.0","method":"dequeue","params":{"wait":60},"id":"parked"}'
    enqueue = b'{"jsonrpc":"2.0","method":"enqueue","params":{"body":1},"id":"under way"}'

    async def answers(path: str = "/rpc") -> Answer:
        return await send(server.url, request("GET" if path != "/rpc" else "POST", path, LIVES))

    async def parked() -> bool:
        return server.waiting.waiting == 1

    try:
        parked_consumer = asyncio.create_task(send(server.url, request(body=dequeue)))
        await eventually(parked)
        async with locked(database_url, "broker.queues") as connection:
            under_way = asyncio.create_task(send(server.url, request(body=enqueue)))
            await eventually(lambda: blocked_enqueues(connection))
            stopping = asyncio.create_task(server.__aexit__())

            async def is_draining() -> bool:
                return server.runner.is_draining

            await eventually(is_draining)
            for path in ("/rpc", "/readyz", "/healthz"):
                answer = await answers(path)
                assert answer.status == 503, path
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.headers["connection"] == "close"
                assert answer.error["data"]["retryable"] is True
                assert answer.error["data"]["outcome"] == "none"
            assert (await answers("/livez")).status == 200
            assert not under_way.done()
        assert "result" in (await under_way).json
        assert (await parked_consumer).json["result"] == {"messages": []}
    finally:
        await stopping


# Pages


async def get(broker: Broker, path: str, method: str = "GET") -> Answer:
    return await send(broker.url, request(method, path, b"", content_type=None))


@pytest.mark.parametrize("path", PAGES)
async def test_a_page_is_served_to_get_and_its_head_to_head(standing_broker: Broker, path: str) -> None:
    page = await get(standing_broker, path)
    head = await get(standing_broker, path, "HEAD")
    assert (page.status, head.status) == (200, 200)
    assert page.body
    assert head.body == b""
    assert head.headers["content-type"] == page.headers["content-type"]


async def test_livez_says_that_the_process_lives(standing_broker: Broker) -> None:
    assert (await get(standing_broker, "/livez")).json["status"] == "alive"


@pytest.mark.parametrize("path", ["/readyz", "/healthz"])
async def test_readiness_says_what_it_rests_on(standing_broker: Broker, path: str) -> None:
    ready = (await get(standing_broker, path)).json
    assert (ready["status"], ready["database"], ready["draining"]) == ("ready", "ok", False)
    assert ready["migrations"]
    assert ready["durability"] in ("replicated", "durable", "at_risk")


async def test_without_its_database_the_process_lives_and_is_not_ready_until_it_is_back(
    start_broker: StartBroker, test_server: str, database_url: str
) -> None:
    broker: Broker = await start_broker(request_timeout=0.3)
    with without_database(test_server, database_url):
        for path in ("/readyz", "/healthz"):
            answer = await get(broker, path)
            assert answer.status == 503, path
            assert int(answer.headers["retry-after"]) >= 1
            assert (answer.error["code"], answer.error["data"]["type"]) == (-32001, "unavailable")
        for path in ("/livez", "/metrics", "/openrpc.json", "/"):
            assert (await get(broker, path)).status == 200, path

    async def is_ready() -> bool:
        return (await get(broker, "/readyz")).status == 200

    await eventually(is_ready)
    assert (await broker.call("enqueue", body=1))["message_id"]


async def test_a_database_with_an_older_schema_is_not_ready(broker: Broker, database_url: str) -> None:
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        await connection.execute("DELETE FROM broker.migrations")
    answer = await get(broker, "/readyz")
    assert answer.status == 503
    assert "migrat" in answer.error["message"]


async def test_metrics_count_calls_and_messages(broker: Broker) -> None:
    await broker.call("enqueue", body=1)
    await broker.call("enqueue", body=2, delay=100)
    await broker.error("enqueue", body=3, queue="nowhere")
    await broker.post(b"not JSON")
    await broker.call("dequeue")
    answer = await get(broker, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    for line in (
        'wonderq_calls_total{method="enqueue",outcome="ok"} 2.0',
        'wonderq_calls_total{method="enqueue",outcome="queue_not_found"} 1.0',
        "wonderq_messages_enqueued_total 2.0",
        "wonderq_messages_delivered_total 1.0",
        'wonderq_queue_messages{queue="default",status="ready"} 0.0',
        'wonderq_queue_messages{queue="default",status="delayed"} 1.0',
        'wonderq_queue_messages{queue="default",status="leased"} 1.0',
    ):
        assert line in text, line


async def test_the_schema_is_one_whether_file_page_or_rpc_discover(broker: Broker) -> None:
    assert await broker.call("rpc.discover") == DOCUMENT
    assert (await get(broker, "/openrpc.json")).json == DOCUMENT


# Bodies keep their bytes

BODIES = [
    *(b"1.0", b"1.00", b"-0", b"0.0", b"1e400", b"-1E+400", b"1e-400", b"1E5", b"123456789012345678901234567890"),
    *(b"null", b"true", b'""', b"[]", b"{}", b'{"a":1,"a":2,"a":3}', b'{ "b" :\t1 ,\r\n "a" : [ 1 , 2 ] }'),
    *(b'{"z":1,"a":{"y":1,"b":2}}', b'"\\u0000"', b'{"\\u0000":"a\\u0000b"}', b'"\\u0041\\u00e9\\/"'),
    *(b'"\\ud83d\\ude00\\uD83D\\uDE00"', '"ünïcödé \U0001f600 \u2028 \x7f"'.encode(), b'"\\"\\\\\\b\\f\\n\\r\\t"'),
    *(b'"</script>"', b"[" * 100 + b"]" * 100, b'{"receipt":null},'[:-1], b'"' + b"x" * 4094 + b'"'),
]


class Shown(msgspec.Struct):
    """Of a message, its id and the bytes of its body."""

    message_id: str
    body: Raw
    receipt: str | None = None


class Page(msgspec.Struct):
    messages: list[Shown]


async def ask(broker: Broker, method: str, params: bytes, kind: Any) -> Any:
    """Call a method with params as they are written here; return its result, of which a body is bytes."""
    status, answer = await broker.post(
        b'{"jsonrpc":"2.0","id":1,"method":"%s","params":%s}' % (method.encode(), params)
    )
    assert status == 200
    decoded = msgspec.json.decode(answer, type=dict[str, Raw])
    assert "error" not in decoded, answer
    return msgspec.json.decode(decoded["result"], type=kind)


def bodies(page: Page) -> list[bytes]:
    return [bytes(each.body) for each in page.messages]


async def assert_shown_and_delivered(broker: Broker, expected: Sequence[bytes]) -> None:
    """The same bytes come from list_messages, get_message, a lease, and a delivery at most once."""
    listed = await ask(broker, "list_messages", b'{"queue":"default","limit":1000}', Page)
    assert bodies(listed) == list(expected)
    for message in listed.messages[:3]:
        params = json.dumps({"queue": "default", "message_id": message.message_id}).encode()
        assert bytes((await ask(broker, "get_message", params, Shown)).body) == bytes(message.body)
    leased = await ask(broker, "dequeue", b'{"max_messages":1000}', Page)
    assert bodies(leased) == list(expected)
    receipts = json.dumps({"receipts": [each.receipt for each in leased.messages], "visibility_timeout": 0})
    await ask(broker, "extend_visibility_batch", receipts.encode(), Any)
    removed = await ask(broker, "dequeue", b'{"max_messages":1000,"delivery":"at_most_once"}', Page)
    assert sorted(bodies(removed)) == sorted(expected)


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:25]))
async def test_a_body_comes_back_as_the_very_bytes_that_were_sent(standing_broker: Broker, body: bytes) -> None:
    await ask(standing_broker, "enqueue", b'{"sender" : "me" , "body" :\n\t ' + body + b' \r\n , "headers":{}}', Any)
    await assert_shown_and_delivered(standing_broker, [body])


async def test_the_bodies_of_an_enqueue_batch_come_back_as_the_very_bytes(broker: Broker) -> None:
    messages = b" , ".join(b'{"body": ' + body + b' ,"sender":null}' for body in BODIES)
    await ask(broker, "enqueue_batch", b'{"messages":[' + messages + b"]}", Any)
    await assert_shown_and_delivered(broker, BODIES)


async def test_the_bodies_of_a_batch_of_calls_come_back_as_the_very_bytes(broker: Broker) -> None:
    calls = [b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body": ' + body + b" }}" for body in BODIES]
    status, answer = await broker.post(b"[" + b" , ".join(calls) + b"]")
    assert status == 200
    assert b"error" not in answer
    listed = await ask(broker, "list_messages", b'{"queue":"default"}', Page)
    assert sorted(bodies(listed)) == sorted(BODIES)
    take = b'{"jsonrpc":"2.0","id":1,"method":"dequeue","params":{"max_messages":7}}'
    status, answer = await broker.post(b"[" + b",".join([take] * 5) + b"]")
    results = msgspec.json.decode(answer, type=list[dict[str, Raw]])
    taken = [body for each in results for body in bodies(msgspec.json.decode(each["result"], type=Page))]
    assert sorted(taken) == sorted(BODIES)


async def test_an_updated_body_comes_back_as_the_very_bytes(broker: Broker) -> None:
    message_id = (await broker.call("enqueue", body="before"))["message_id"]
    for body in BODIES:
        params = b'{"queue":"default","message_id":"%s","body": %s }' % (message_id.encode(), body)
        assert bytes((await ask(broker, "update_message", params, Shown)).body) == body
        listed = await ask(broker, "list_messages", b'{"queue":"default"}', Page)
        assert bodies(listed) == [body]
    await assert_shown_and_delivered(broker, [BODIES[-1]])


async def test_headers_and_sender_come_back_with_the_same_meaning(broker: Broker) -> None:
    headers = {"": "", "a b": '\n\t"\\', "ünï": "\U0001f600", "</script>": "\x7f\x01"}
    await broker.call("enqueue", body=1, headers=headers, sender="\U0001f600" * 128)
    (message,) = (await broker.call("dequeue"))["messages"]
    assert (message["headers"], message["sender"]) == (headers, "\U0001f600" * 128)
