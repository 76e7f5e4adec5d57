"""JSON-RPC 2.0, spoken to methods of our own: the examples of its specification, ids, batches, notifications.

Where the product's own methods are not the point, an `Rpc` with small schemas is asked directly, or over HTTP
where the answer has a status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from broker.bodies import ConnectionLimits
from broker.connections import ConnectionRunner
from broker.errors import QueueNotFound
from broker.methods import Methods
from broker.rpc import Call, Method, Rpc, check_methods
from broker.schema import MethodSchema, SchemaError, compile_methods, load_document
from conftest import Broker

PATIENCE = 20.0
LIMITS = ConnectionLimits()

NUMBER = {"type": "number"}
ANY: dict[str, Any] = {}


def schemas(**methods: Mapping[str, Any]) -> dict[str, MethodSchema]:
    """Compile schemas of methods, each written as {param: schema}; a param without a default is required."""
    return compile_methods(
        {
            "methods": [
                {
                    "name": name,
                    "x-permission": "free",
                    "params": [
                        {"name": param, "schema": schema, "required": "default" not in schema}
                        for param, schema in params.items()
                    ],
                }
                for name, params in methods.items()
            ]
        }
    )


class Example:
    """The methods that the specification's examples call; they remember what they were called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    async def subtract(self, call: Call, minuend: float, subtrahend: float) -> float:
        self.calls.append(("subtract", minuend, subtrahend))
        return minuend - subtrahend

    async def update(self, call: Call, value: float) -> None:
        self.calls.append(("update", value))

    async def sum(self, call: Call, a: float, b: float) -> float:
        self.calls.append(("sum", a, b))
        return a + b

    async def notify_hello(self, call: Call, number: float) -> None:
        self.calls.append(("notify_hello", number))

    async def get_data(self, call: Call) -> list[Any]:
        self.calls.append(("get_data",))
        return ["hello", 5]

    def rpc(self) -> Rpc:
        return Rpc(
            schemas(
                subtract={"minuend": NUMBER, "subtrahend": NUMBER},
                update={"value": NUMBER},
                sum={"a": NUMBER, "b": NUMBER},
                notify_hello={"number": NUMBER},
                get_data={},
            ),
            {
                "subtract": self.subtract,
                "update": self.update,
                "sum": self.sum,
                "notify_hello": self.notify_hello,
                "get_data": self.get_data,
            },
            LIMITS,
        )


@contextlib.asynccontextmanager
async def serve(rpc: Rpc) -> AsyncIterator[str]:
    """Serve an Rpc over HTTP; yield its URL."""
    application = web.Application()
    application.add_routes([web.post("/rpc", rpc.handle)])
    runner = ConnectionRunner(application, limits=LIMITS, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site.port}/rpc"
    finally:
        await runner.cleanup()


async def post(url: str, text: str) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"}
    async with aiohttp.ClientSession() as http, http.post(url, data=text.encode(), headers=headers) as response:
        return response.status, await response.read()


async def ask(rpc: Rpc, text: str) -> Any:
    """Return the answer as JSON, None where there is none."""
    answer = await asyncio.wait_for(rpc.answer(text.encode(), []), PATIENCE)
    return None if answer is None else json.loads(answer)


def gist(answer: Any) -> Any:
    """Return of an answer what the specification prints and the contract keeps: (id, code or result)."""
    if isinstance(answer, list):
        return [gist(each) for each in answer]
    assert answer["jsonrpc"] == "2.0"
    if "error" in answer:
        assert set(answer) == {"jsonrpc", "error", "id"}
        assert_is_error(answer["error"])
        return (answer["id"], answer["error"]["code"])
    assert set(answer) == {"jsonrpc", "result", "id"}
    return (answer["id"], answer["result"])


def assert_is_error(error: dict[str, Any]) -> None:
    assert set(error) == {"code", "message", "data"}
    assert isinstance(error["message"], str)
    assert len(error["message"]) > 10
    assert error["data"]["type"]
    assert error["data"]["retryable"] in (True, False)
    assert error["data"]["outcome"] in ("none", "unknown")


# Section 7 of the specification. None: not answered. Positional params are -32602 here where the specification
# prints a result; the number, the order and the ids of the answers are as printed there.
SPECIFICATION: dict[str, tuple[str, Any]] = {
    "positional parameters": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [42, 23], "id": 1}',
        (1, -32602),
    ),
    "positional parameters in another order": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": [23, 42], "id": 2}',
        (2, -32602),
    ),
    "named parameters": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"subtrahend": 23, "minuend": 42}, "id": 3}',
        (3, 19),
    ),
    "named parameters in another order": (
        '{"jsonrpc": "2.0", "method": "subtract", "params": {"minuend": 42, "subtrahend": 23}, "id": 4}',
        (4, 19),
    ),
    "a notification": ('{"jsonrpc": "2.0", "method": "update", "params": [1,2,3,4,5]}', None),
    "a notification of a method that does not exist": ('{"jsonrpc": "2.0", "method": "foobar"}', None),
    "a method that does not exist": ('{"jsonrpc": "2.0", "method": "foobar", "id": "1"}', ("1", -32601)),
    "invalid JSON": ('{"jsonrpc": "2.0", "method": "foobar, "params": "bar", "baz]', (None, -32700)),
    "an invalid request object": ('{"jsonrpc": "2.0", "method": 1, "params": "bar"}', (None, -32600)),
    "a batch of invalid JSON": (
        """[
  {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
  {"jsonrpc": "2.0", "method"
]""",
        (None, -32700),
    ),
    "an empty array": ("[]", (None, -32600)),
    "an invalid batch that is not empty": ("[1]", [(None, -32600)]),
    "an invalid batch": ("[1,2,3]", [(None, -32600)] * 3),
    "a batch": (
        """[
        {"jsonrpc": "2.0", "method": "sum", "params": [1,2,4], "id": "1"},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]},
        {"jsonrpc": "2.0", "method": "subtract", "params": [42,23], "id": "2"},
        {"foo": "boo"},
        {"jsonrpc": "2.0", "method": "foo.get", "params": {"name": "myself"}, "id": "5"},
        {"jsonrpc": "2.0", "method": "get_data", "id": "9"}
    ]""",
        [("1", -32602), ("2", -32602), (None, -32600), ("5", -32601), ("9", ["hello", 5])],
    ),
    "a batch of notifications": (
        """[
        {"jsonrpc": "2.0", "method": "notify_sum", "params": [1,2,4]},
        {"jsonrpc": "2.0", "method": "notify_hello", "params": [7]}
    ]""",
        None,
    ),
}


@pytest.mark.parametrize(("request_text", "expected"), SPECIFICATION.values(), ids=SPECIFICATION)
async def test_an_example_of_the_specification_is_answered_as_printed_there(request_text: str, expected: Any) -> None:
    async with serve(Example().rpc()) as url:
        status, answer = await post(url, request_text)
    if expected is None:
        assert (status, answer) == (204, b"")
    else:
        assert status == 200
        assert gist(json.loads(answer)) == expected


# Ids

IDS = [
    *("0", "1", "-1", "-0", "1.0", "1.50", "1e400", "-1E-400", "123456789012345678901234567890"),
    *(
        '""',
        '"a"',
        r'"\u0041"',
        r'"\u0000"',
        r'"\ud83d\ude00"',
        '"\U0001f600"',
        r'"\/"',
        r'"\""',
        '"' + "x" * 5000 + '"',
    ),
    "null",
]


@pytest.mark.parametrize("call_id", IDS, ids=lambda each: each[:20])
@pytest.mark.parametrize("method", ["get_data", "no_such_method", "subtract"])
async def test_an_id_comes_back_exactly_as_it_was_sent(call_id: str, method: str) -> None:
    rpc = Example().rpc()
    text = f'{{"jsonrpc":"2.0","id": {call_id} ,"method":"{method}"}}'.encode()
    single = await rpc.answer(text, [])
    assert single is not None
    assert single.endswith(b'"id":' + call_id.encode() + b"}")
    assert await rpc.answer(b" [" + text + b" , " + text + b" ] ", []) == b"[" + single + b"," + single + b"]"


@pytest.mark.parametrize("call_id", ["true", "false", "[]", "{}", "[1]", '{"a":1}'])
async def test_an_id_of_another_type_is_an_invalid_request_and_answered_with_null(call_id: str) -> None:
    example = Example()
    answer = await ask(example.rpc(), f'{{"jsonrpc":"2.0","id":{call_id},"method":"get_data"}}')
    assert gist(answer) == (None, -32600)
    assert "`id`" in answer["error"]["message"]
    assert example.calls == []


async def test_an_id_of_null_is_a_call_and_not_a_notification() -> None:
    assert gist(await ask(Example().rpc(), '{"jsonrpc":"2.0","id":null,"method":"get_data"}')) == (None, ["hello", 5])


# The envelope

INVALID_REQUESTS = {
    "a number": "1",
    "a string": '"get_data"',
    "null": "null",
    "true": "true",
    "an empty object": "{}",
    "no version": '{"method":"get_data"}',
    "another version": '{"jsonrpc":"1.0","method":"get_data"}',
    "a version that is a number": '{"jsonrpc":2.0,"method":"get_data"}',
    "a version that is null": '{"jsonrpc":null,"method":"get_data"}',
    "no method": '{"jsonrpc":"2.0"}',
    "a method that is null": '{"jsonrpc":"2.0","method":null}',
    "a method that is an array": '{"jsonrpc":"2.0","method":["get_data"]}',
    "params that are null": '{"jsonrpc":"2.0","method":"get_data","params":null}',
    "params that are a string": '{"jsonrpc":"2.0","method":"get_data","params":"x"}',
    "params that are a number": '{"jsonrpc":"2.0","method":"get_data","params":1}',
    "names in capitals": '{"JSONRPC":"2.0","METHOD":"get_data"}',
}


@pytest.mark.parametrize("text", INVALID_REQUESTS.values(), ids=INVALID_REQUESTS)
async def test_what_is_no_request_is_answered_with_an_id_of_null(text: str) -> None:
    """Also where it has no id: nobody can say whether it was meant as a notification."""
    example = Example()
    assert gist(await ask(example.rpc(), text)) == (None, -32600)
    assert gist(await ask(example.rpc(), f"[{text}]")) == [(None, -32600)]
    assert example.calls == []


async def test_an_invalid_request_whose_id_can_be_read_is_answered_with_it() -> None:
    assert gist(await ask(Example().rpc(), '{"jsonrpc":"2.0","method":1,"id":"mine"}')) == ("mine", -32600)


async def test_names_and_version_may_be_written_with_escapes_and_unknown_members_do_no_harm() -> None:
    text = r'{"\u006asonrpc":"\u0032.0","m\u0065thod":"get\u005fdata","x":[{}],"i\u0064":7}'
    assert gist(await ask(Example().rpc(), text)) == (7, ["hello", 5])


async def test_a_call_without_params_or_with_empty_ones_is_the_same() -> None:
    rpc = Example().rpc()
    without = await ask(rpc, '{"jsonrpc":"2.0","method":"get_data","id":1}')
    assert without == await ask(rpc, '{"jsonrpc":"2.0","method":"get_data","params":{},"id":1}')
    assert gist(await ask(rpc, '{"jsonrpc":"2.0","method":"get_data","params":[],"id":1}')) == (1, -32602)


UNKNOWN_PARAMS = [
    "extra",
    "",
    "with space",
    "back`tick",
    "line\nbreak",
    'quo"te',
    "value[3]",
    "a.b",
    "` - at `$.value`",
    "nul\x00",
    "ünïcödé \U0001f600",
]


@pytest.mark.parametrize("name", UNKNOWN_PARAMS)
async def test_an_unknown_param_is_refused_and_named(name: str) -> None:
    example = Example()
    call = {"jsonrpc": "2.0", "id": 1, "method": "update", "params": {"value": 1, name: 2}}
    answer = await ask(example.rpc(), json.dumps(call))
    assert gist(answer) == (1, -32602)
    assert answer["error"]["data"]["param"] == name
    assert name in answer["error"]["message"]
    assert "value" in answer["error"]["message"], "it says what is known"
    assert "index" not in answer["error"]["data"]
    assert example.calls == []


async def test_an_unknown_param_with_a_long_name_is_not_repeated_in_full() -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "update", "params": {"value": 1, "x" * 1_000_000: 2}}
    answer = await ask(Example().rpc(), json.dumps(call))
    assert gist(answer) == (1, -32602)
    assert len(json.dumps(answer)) < 2000
    assert answer["error"]["data"]["param"].startswith("xxxxx")


async def test_the_name_of_a_method_that_does_not_exist_is_shown_cut() -> None:
    call = {"jsonrpc": "2.0", "id": 1, "method": "x" * 1_000_000}
    answer = await ask(Example().rpc(), json.dumps(call))
    assert gist(answer) == (1, -32601)
    assert len(json.dumps(answer)) < 2000


# Notifications

NOTIFY = '{"jsonrpc":"2.0","method":"notify_hello","params":{"number":7}}'


async def test_a_notification_is_carried_out_and_not_answered() -> None:
    example = Example()
    async with serve(example.rpc()) as url:
        assert await post(url, NOTIFY) == (204, b"")
        assert await post(url, f"[{NOTIFY},{NOTIFY}]") == (204, b"")
    assert example.calls == [("notify_hello", 7)] * 3


@pytest.mark.parametrize(
    "text",
    [
        '{"jsonrpc":"2.0","method":"notify_hello"}',
        '{"jsonrpc":"2.0","method":"notify_hello","params":{"number":"7"}}',
        '{"jsonrpc":"2.0","method":"notify_hello","params":{"number":7,"other":8}}',
        '{"jsonrpc":"2.0","method":"notify_hello","params":[7]}',
        '{"jsonrpc":"2.0","method":"nothing"}',
    ],
)
async def test_a_notification_that_cannot_be_carried_out_is_not_answered_either(text: str) -> None:
    example = Example()
    async with serve(example.rpc()) as url:
        assert await post(url, text) == (204, b"")
    assert example.calls == []


async def test_a_notification_whose_method_fails_is_not_answered() -> None:
    async def fails(call: Call) -> None:
        raise QueueNotFound(queue="q")

    rpc = Rpc(schemas(fails={}), {"fails": fails}, LIMITS)
    assert await ask(rpc, '{"jsonrpc":"2.0","method":"fails"}') is None


async def test_a_notification_to_enqueue_stores_the_message(broker: Broker) -> None:
    text = b'{"jsonrpc":"2.0","method":"enqueue","params":{"body":1}}'
    assert await broker.post(text) == (204, b"")
    assert (await broker.call("count_messages", queue="default"))["ready"] == 1


async def test_a_notification_to_dequeue_does_nothing(broker: Broker) -> None:
    await broker.call("enqueue", body=1)
    for params in (b"{}", b'{"delivery":"at_most_once"}', b'{"wait":60,"max_messages":10}'):
        text = b'{"jsonrpc":"2.0","method":"dequeue","params":' + params + b"}"
        assert await broker.post(text) == (204, b"")
        assert await broker.post(b"[" + text + b"," + text + b"]") == (204, b"")
    (message,) = (await broker.call("list_messages", queue="default"))["messages"]
    assert (message["status"], message["receive_count"]) == ("ready", 0)


# Batches


async def test_a_batch_holds_1000_calls_and_not_one_more() -> None:
    example = Example()
    rpc = example.rpc()

    def batch(size: int) -> str:
        call = '{{"jsonrpc":"2.0","method":"sum","params":{{"a":{0},"b":1}},"id":{0}}}'
        return "[" + ",".join(call.format(n) for n in range(size)) + "]"

    assert gist(await ask(rpc, batch(1))) == [(0, 1)]
    assert gist(await ask(rpc, batch(1000))) == [(n, n + 1) for n in range(1000)]
    example.calls.clear()
    too_many = await ask(rpc, batch(1001))
    assert gist(too_many) == (None, -32600)
    assert "1000" in too_many["error"]["message"]
    assert gist(await ask(rpc, " [ \n ] ")) == (None, -32600)
    assert example.calls == []


@pytest.mark.parametrize("element", ["1", '"x"', "[]", "{}", "[1]", '{"a":1}', r'"\n"', NOTIFY])
async def test_more_than_1000_elements_are_one_invalid_request_whatever_they_are(element: str) -> None:
    example = Example()
    assert gist(await ask(example.rpc(), f"[{','.join([element] * 1001)}]")) == (None, -32600)
    assert example.calls == []
    assert len(await ask(example.rpc(), f"[{','.join(['1'] * 1000)}]")) == 1000


async def test_too_long_a_batch_of_invalid_json_is_a_parse_error() -> None:
    for broken in ("nope", "1,", '"', "[", "]"):
        text = f"[{'1,' * 2000}{broken}]"
        assert gist(await ask(Example().rpc(), text)) == (None, -32700), broken


async def test_a_batch_runs_concurrently_and_is_answered_in_the_order_of_its_calls() -> None:
    """Each call waits for all the others; then they end in the opposite order."""
    size = 5
    barrier = asyncio.Barrier(size)
    may_end = [asyncio.Event() for _ in range(size + 1)]
    may_end[size].set()
    ended: list[int] = []

    async def meet(call: Call, n: int) -> int:
        await barrier.wait()
        await may_end[n + 1].wait()
        ended.append(n)
        may_end[n].set()
        return n

    rpc = Rpc(schemas(meet={"n": {"type": "integer"}}), {"meet": meet}, LIMITS)
    calls = [{"jsonrpc": "2.0", "id": f"id {n}", "method": "meet", "params": {"n": n}} for n in range(size)]
    assert gist(await ask(rpc, json.dumps(calls))) == [(f"id {n}", n) for n in range(size)]
    assert ended == [4, 3, 2, 1, 0]


async def test_one_bad_element_never_spoils_its_neighbours() -> None:
    good = '{"jsonrpc":"2.0","method":"get_data","id":"good"}'
    deep = "[" * 500 + "]" * 500
    bad = {
        "1": (None, -32600),
        "null": (None, -32600),
        '"x"': (None, -32600),
        "[]": (None, -32600),
        f"[{good}]": (None, -32600),
        "{}": (None, -32600),
        deep: (None, -32600),
        f'{{"jsonrpc":"2.0","method":"update","params":{{"value":{deep}}},"id":1}}': (None, -32600),
        f'{{"jsonrpc":"2.0","method":"get_data","id":{deep}}}': (None, -32600),
        '{"jsonrpc":"2.0","method":"get_data","id":[]}': (None, -32600),
        '{"jsonrpc":"2.0","method":"nothing","id":1}': (1, -32601),
        r'{"jsonrpc":"2.0","method":"\u0000","id":1}': (1, -32601),
        '{"jsonrpc":"2.0","method":"update","params":{"value":1e400},"id":1}': (1, -32602),
        '{"jsonrpc":"2.0","method":"update","params":[1],"id":1}': (1, -32602),
    }
    for element, expected in bad.items():
        assert gist(await ask(Example().rpc(), f"[{good},{element},{good}]")) == [
            ("good", ["hello", 5]),
            expected,
            ("good", ["hello", 5]),
        ], element[:60]


async def test_a_method_that_fails_does_not_spoil_its_neighbours(broker: Broker) -> None:
    calls = [
        {"jsonrpc": "2.0", "id": 1, "method": "enqueue", "params": {"body": 1}},
        {"jsonrpc": "2.0", "id": 2, "method": "enqueue", "params": {"body": 1, "queue": "nowhere"}},
        {"jsonrpc": "2.0", "id": 3, "method": "enqueue", "params": {"body": "x" * 5000}},
        {"jsonrpc": "2.0", "id": 4, "method": "enqueue", "params": {"body": 2}},
    ]
    status, answer = await broker.post(json.dumps(calls).encode())
    assert status == 200
    codes = [(each["id"], each.get("error", {}).get("code")) for each in json.loads(answer)]
    assert codes == [(1, None), (2, 1001), (3, 1005), (4, None)]
    assert (await broker.call("count_messages", queue="default"))["ready"] == 2


# Failures inside

SECRET = "swordfish"


async def test_an_exception_in_a_method_says_nothing_of_the_inside_and_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails(call: Call) -> None:
        raise ZeroDivisionError(f"password={SECRET}")

    async def works(call: Call) -> int:
        return 1

    rpc = Rpc(schemas(fails={}, works={}), {"fails": fails, "works": works}, LIMITS)
    with caplog.at_level(logging.ERROR):
        answers = await ask(
            rpc, '[{"jsonrpc":"2.0","method":"fails","id":1},{"jsonrpc":"2.0","method":"works","id":2}]'
        )
    assert gist(answers) == [(1, -32603), (2, 1)]
    said = json.dumps(answers)
    for inside in (SECRET, "ZeroDivisionError", "Traceback", "test_rpc", ".py"):
        assert inside not in said
    data = answers[0]["error"]["data"]
    assert (data["type"], data["retryable"], data["outcome"]) == ("internal_error", False, "unknown")
    assert data["request_id"] in answers[0]["error"]["message"]
    assert data["request_id"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    "result", [object(), {1j: 2}, {"a": {"b": object()}}, "\ud800"], ids=["an object", "a key", "inside", "a surrogate"]
)
async def test_a_result_that_is_no_json_is_an_internal_error_of_this_call_alone(
    result: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def odd(call: Call) -> Any:
        return result

    async def works(call: Call) -> int:
        return 1

    rpc = Rpc(schemas(odd={}, works={}), {"odd": odd, "works": works}, LIMITS)
    text = '[{"jsonrpc":"2.0","method":"odd","id":1},{"jsonrpc":"2.0","method":"works","id":2}]'
    assert gist(await ask(rpc, text)) == [(1, -32603), (2, 1)]
    assert await ask(rpc, '{"jsonrpc":"2.0","method":"odd"}') is None
    assert any(record.levelno == logging.ERROR for record in caplog.records)


async def test_an_error_of_the_contract_keeps_its_code_and_data() -> None:
    async def fails(call: Call) -> None:
        raise QueueNotFound(queue="q")

    rpc = Rpc(schemas(fails={}), {"fails": fails}, LIMITS)
    answer = await ask(rpc, '{"jsonrpc":"2.0","method":"fails","id":1}')
    assert gist(answer) == (1, 1001)
    assert answer["error"]["data"] == {"type": "queue_not_found", "retryable": False, "outcome": "none", "queue": "q"}


async def test_every_call_is_counted_by_method_and_outcome_and_what_clients_invent_under_one_name() -> None:
    counted: list[tuple[str, str]] = []

    class Watcher:
        def call_ended(self, method: str, outcome: str, seconds: float) -> None:
            assert seconds >= 0
            counted.append((method, outcome))

        def over_limit(self, limit: str) -> None:
            raise AssertionError(limit)

    async def works(call: Call) -> int:
        return 1

    rpc = Rpc(schemas(works={}), {"works": works}, LIMITS, Watcher())
    for method in ("works", "invented-1", "invented-2"):
        await ask(rpc, f'{{"jsonrpc":"2.0","method":"{method}","id":1}}')
    await ask(rpc, '{"jsonrpc":"2.0","method":"works","params":{"a":1}}')
    assert counted == [
        ("works", "ok"),
        ("invalid", "method_not_found"),
        ("invalid", "method_not_found"),
        ("works", "invalid_params"),
    ]


# The schema and the functions


def test_a_method_without_a_function_is_refused_by_name() -> None:
    with pytest.raises(SchemaError, match="lonely"):
        check_methods(schemas(lonely={}), {})


def test_a_function_without_a_schema_is_refused_by_name() -> None:
    async def stray(call: Call) -> None: ...

    with pytest.raises(SchemaError, match="stray"):
        check_methods({}, {"stray": stray})


async def _takes_a(call: Call, a: int) -> None: ...
async def _takes_a_b(call: Call, a: int, b: int) -> None: ...
async def _takes_b_a(call: Call, b: int, a: int) -> None: ...
async def _takes_a_and_more(call: Call, a: int, **more: int) -> None: ...
async def _takes_nothing(call: Call) -> None: ...


@pytest.mark.parametrize("function", [_takes_a, _takes_b_a, _takes_nothing])
def test_a_function_whose_params_are_not_those_of_the_schema_is_refused_by_name(function: Method) -> None:
    with pytest.raises(SchemaError, match="add_up"):
        Rpc(schemas(add_up={"a": NUMBER, "b": NUMBER}), {"add_up": function}, LIMITS)


def test_a_function_with_a_param_that_the_schema_lacks_is_refused_by_name() -> None:
    with pytest.raises(SchemaError, match="add_up"):
        Rpc(schemas(add_up={"a": NUMBER}), {"add_up": _takes_a_b}, LIMITS)


@pytest.mark.parametrize("function", [_takes_a_b, _takes_a_and_more])
def test_a_function_whose_params_are_those_of_the_schema_is_taken(function: Method) -> None:
    Rpc(schemas(add_up={"a": NUMBER, "b": NUMBER}), {"add_up": function}, LIMITS)


@pytest.mark.parametrize(
    ("schema", "culprit"),
    [
        ({"type": "text"}, "text"),
        ({"type": "number", "multipleOf": 2}, "multipleOf"),
        ({"$ref": "#/components/schemas/Nowhere"}, "Nowhere"),
        ({"anyOf": [{"type": "string"}, {"type": "number"}]}, "anyOf"),
    ],
)
def test_a_schema_that_is_not_understood_is_refused_with_the_method_and_the_reason(
    schema: dict[str, Any], culprit: str
) -> None:
    with pytest.raises(SchemaError, match=f"(?s)odd_one.*{culprit}"):
        schemas(odd_one={"a": schema})


def test_each_function_of_the_product_has_its_schema_and_the_other_way_round() -> None:
    methods = Methods(*[None] * 9)  # type: ignore[arg-type]
    compiled = compile_methods(load_document())
    check_methods(compiled, methods.by_name())
    for name in compiled:
        rest = {known: function for known, function in methods.by_name().items() if known != name}
        with pytest.raises(SchemaError, match=name):
            check_methods(compiled, rest)
