"""The log, a line an event, and the id of a request in it, in its answer and in its errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import aiohttp
import psycopg
import pytest

from broker import requests
from broker.requests import HEADER
from broker.storage import tokens
from broker.storage.database import Connection
from broker.storage.group_commit import GroupCommit
from broker.storage.tokens import Grant
from broker_process import Process, Start
from conftest import Broker, StartBroker
from outside import request, send

CALL = b'{"jsonrpc":"2.0","id":1,"method":"%s","params":{%s}}'
OURS = re.compile(r"[0-9a-f]{10}-[0-9a-f]+")


def lines_of(process: Process) -> list[dict[str, Any]]:
    """Return what a process has logged, an object for each line: every line is one."""
    return [json.loads(line) for line in process.log.splitlines()]


async def post(url: str, text: bytes, **headers: str) -> tuple[Mapping[str, str], Any]:
    """POST a text to /rpc; return the headers of the answer and the answer."""
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"{url}/rpc", data=text, headers={"Content-Type": "application/json"} | headers) as response,
    ):
        return response.headers, await response.json()


# ------------------------------------------------------------------------------------------------ the answer

WELL_FORMED = {
    "a call": request(body=CALL % (b"get_queue", b'"queue":"default"')),
    "an error": request(body=CALL % (b"get_queue", b'"queue":"nowhere"')),
    "no JSON": request(body=b"{"),
    "a notification": request(body=b'{"jsonrpc":"2.0","method":"dequeue"}'),
    "no such page": request("GET", "/nowhere", None),
    "a page": request("GET", "/livez", None),
    "metrics": request("GET", "/metrics", None),
    "another method": request("GET", "/rpc", None),
    "another type": request(content_type="text/plain"),
    "another host": request("GET", "/livez", None, host="evil.example"),
    "too much": request("POST", "/rpc", None, f"Content-Length: {2**30}"),
    "no HTTP": b"GET / \r\n\r\n",
}


@pytest.mark.parametrize("sent", WELL_FORMED.values(), ids=WELL_FORMED)
async def test_every_answer_has_an_id_and_every_error_the_same(standing_broker: Broker, sent: bytes) -> None:
    answer = await send(standing_broker.url, sent)
    request_id = answer.headers[HEADER.lower()]
    assert OURS.fullmatch(request_id)
    if b'"error"' in answer.body:
        assert answer.json["error"]["data"]["request_id"] == request_id


async def test_all_errors_of_a_batch_name_the_one_request(standing_broker: Broker) -> None:
    headers, answers = await post(standing_broker.url, b'[1,{"jsonrpc":"2.0","id":1,"method":"nothing"}]')
    assert [each["error"]["data"]["request_id"] for each in answers] == [headers[HEADER]] * 2


async def test_no_two_requests_have_one_id_even_on_one_connection(standing_broker: Broker) -> None:
    one = request("GET", "/livez", None).replace(b"Connection: close", b"Connection: keep-alive")
    call = request(body=CALL % (b"get_queue", b'"queue":"default"'))
    call = call.replace(b"Connection: close", b"Connection: keep-alive")
    answer = await send(standing_broker.url, one + call + one + call + WELL_FORMED["a page"])
    whole = str(answer.headers).encode() + answer.body
    found = re.findall(rb"(?i)%s(?:: |': ')([^\r']+)" % HEADER.encode(), whole)
    assert len(found) == len(set(found)) == 5


@pytest.mark.parametrize("given", ["a", "4bf92f3577b34da6a3ce929d0e0e4736", "A.b_c-9" * 9])
async def test_an_id_that_the_client_gives_is_kept(standing_broker: Broker, given: str) -> None:
    headers, answer = await post(standing_broker.url, CALL % (b"nothing", b""), **{HEADER: given})
    assert headers[HEADER] == answer["error"]["data"]["request_id"] == given


@pytest.mark.parametrize("given", ["", " ", "a b", "x" * 65, "a\tb", '"', "é", "a,b", "{}", "a\x1b[31m"])
async def test_an_id_that_could_do_harm_is_replaced(standing_broker: Broker, given: str) -> None:
    sent = request("GET", "/livez", None, f"{HEADER}: {given}")
    answer = await send(standing_broker.url, sent)
    assert OURS.fullmatch(answer.headers[HEADER.lower()])


# ------------------------------------------------------------------------------------------------ the log


async def test_a_failure_inside_is_in_the_log_under_the_id_that_the_client_has(start: Start, database_url: str) -> None:
    """The statement that fails carries the calls of several clients, and says so under an id of its own."""
    broker = await (await start(DATABASE_URL=database_url)).ready()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE broker.messages RENAME COLUMN sender TO somebody")
    headers, answer = await post(broker.url, CALL % (b"enqueue", b'"body":1'), **{HEADER: "mine-7"})
    error = answer["error"]
    assert (error["code"], headers[HEADER], error["data"]["request_id"]) == (-32603, "mine-7", "mine-7")
    assert "mine-7" in error["message"]
    await broker.says("call failed")
    lines = lines_of(broker)
    (ours,) = [line for line in lines if line.get("request_id") == "mine-7"]
    assert (ours["level"], ours["logger"]) == ("error", "broker.rpc")
    assert (ours["event"], ours["method"]) == ("call failed", "enqueue")
    (cause,) = [line for line in lines if line.get("request_id") == ours["failure"]]
    assert cause["level"] == "error"
    assert "UndefinedColumn" in cause["exception"]


async def test_a_failure_of_a_statement_of_one_request_is_under_its_id(start: Start, database_url: str) -> None:
    broker = await (await start(DATABASE_URL=database_url)).ready()
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP TABLE broker.statistics")
    _, answer = await post(broker.url, CALL % (b"get_stats", b""), **{HEADER: "mine-8"})
    assert answer["error"]["data"]["request_id"] == "mine-8"
    await broker.says("mine-8")
    assert "call failed" not in broker.log
    assert "UndefinedTable" in str([line for line in lines_of(broker) if line.get("request_id") == "mine-8"])


async def test_the_audit_log_says_which_request_it_was(start: Start, database_url: str) -> None:
    broker = await (await start(DATABASE_URL=database_url)).ready()
    await post(broker.url, CALL % (b"create_queue", b'"queue":"mail"'), **{HEADER: "mine-9"})
    await broker.says("create_queue")
    (line,) = [line for line in lines_of(broker) if line["logger"] == "broker.audit"]
    assert line["request_id"] == "mine-9"
    assert line["event"] == "create_queue"
    assert (line["caller"], line["address"], line["queue"], line["outcome"]) == ("-", "127.0.0.1", "mail", "ok")


async def test_what_a_client_says_makes_no_field_of_the_log(start: Start, database_url: str) -> None:
    broker = await (await start(DATABASE_URL=database_url)).ready()
    message_id = b"1 outcome=forged caller=%(name)s\\n\\u001b[31m"
    await post(broker.url, CALL % (b"delete_message", b'"queue":"default","message_id":"%s"' % message_id))
    await broker.says("delete_message")
    (line,) = [line for line in lines_of(broker) if line["logger"] == "broker.audit"]
    assert line["message_id"] == "1 outcome=forged caller=%(name)s\n\x1b[31m"
    assert (line["event"], line["caller"]) == ("delete_message", "-")
    assert line["outcome"] == "ok"
    assert "\x1b" not in broker.log


async def test_numbers_in_the_log_are_numbers(start: Start, database_url: str) -> None:
    broker = await (await start("--processes", "2", DATABASE_URL=database_url)).ready()
    (line,) = [line for line in lines_of(broker) if line["event"] == "worker serves" and line["worker"] == 1]
    assert isinstance(line["pid"], int)


@pytest.mark.parametrize(("level", "is_said"), [("info", True), ("error", False)])
async def test_only_what_is_as_bad_as_the_level_is_logged(
    start: Start, database_url: str, level: str, is_said: bool
) -> None:
    broker = await (await start("--log-level", level, "--processes", "2", DATABASE_URL=database_url)).ready()
    await post(broker.url, CALL % (b"create_queue", b'"queue":"mail"'))
    broker.signal(15)
    assert await broker.ended() == 0
    assert ("create_queue" in broker.log) is is_said
    assert ("ACKNOWLEDGED MESSAGES CAN BE LOST" in broker.log) is is_said
    assert ("worker serves" in broker.log) is is_said


async def test_refused_access_is_a_warning_and_what_is_said_of_a_token_are_fields(
    start: Start, database_url: str, connection: Connection
) -> None:
    flags = ("--auth", "required", "--log-level")
    quiet = await (await start(*flags, "warning", DATABASE_URL=database_url)).ready()
    broker = await (await start(*flags, "info", DATABASE_URL=database_url)).ready()
    token = await tokens.create(connection, "ada", Grant(manage=["own"]), None)
    for each in (quiet, broker):
        for queue in (b'"queue":"own"', b'"queue":"others"'):
            await post(each.url, CALL % (b"create_queue", queue), Authorization=f"Bearer {token}")
        await each.says("others")
    (line,) = [line for line in lines_of(quiet) if line["logger"] == "broker.audit"]
    assert (line["level"], line["event"], line["outcome"]) == ("warning", "create_queue", "forbidden")
    await broker.says("token_counts")
    (line,) = [line for line in lines_of(broker) if line["event"] == "token_counts"]
    assert (line["name"], line["token_id"], line["outcome"]) == ("ada", token[3:19], "ok")


async def test_what_is_done_for_several_requests_is_under_the_id_of_none(
    start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker: Broker = await start_broker()
    seen = []
    carry_out = GroupCommit._carry_out

    async def look(self: Any, *rest: Any, **more: Any) -> None:
        seen.append(requests.current.get())
        await carry_out(self, *rest, **more)

    monkeypatch.setattr(GroupCommit, "_carry_out", look)
    await broker.call("enqueue", body=1)
    assert seen == [None]
