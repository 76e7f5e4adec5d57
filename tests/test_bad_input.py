"""Bad input of every kind is refused with an error of the contract: never a 5xx, a traceback, a hang, an effect.

What can be wrong with the params of a method is generated from the schema, read here a second time and in
another way than the broker reads it.
"""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import random
import re
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import broker as package
from broker.nesting import is_deeper
from broker.server import Server
from broker.storage import tokens
from broker.storage.tokens import Grant
from conftest import Broker, StartBroker, server_in_a_thread
from outside import PATIENCE, blocked_enqueues, eventually, locked, request, send, without_database

Json = dict[str, Any]
DOCUMENT: Json = json.loads((Path(package.__file__).parent / "rpc_schema.json").read_text("utf-8"))
METHODS: list[Json] = DOCUMENT["methods"]
COMPONENTS: Json = DOCUMENT["components"]

MIB = 2**20
each_method = pytest.mark.parametrize("method", METHODS, ids=[method["name"] for method in METHODS])


def assert_is_error(error: Json) -> None:
    assert set(error) == {"code", "message", "data"}
    assert isinstance(error["data"]["type"], str)
    assert error["data"]["retryable"] in (True, False)
    assert error["data"]["outcome"] in ("none", "unknown")
    for inside in ("Traceback", ".py", "psycopg", "msgspec", "aiohttp", "Error:"):
        assert inside not in error["message"]


async def refusal(broker: Broker, body: bytes) -> Json:
    """Send a body that is refused as a whole; return the error."""
    async with asyncio.timeout(PATIENCE):
        status, answer = await broker.post(body)
    assert status == 200, answer[:200]
    decoded = json.loads(answer)
    assert decoded["id"] is None
    assert_is_error(decoded["error"])
    error: Json = decoded["error"]
    return error


async def codes(broker: Broker, body: bytes) -> list[int | None]:
    """Send a batch; return the code of each answer, None for a result."""
    async with asyncio.timeout(PATIENCE):
        status, answer = await broker.post(body)
    assert status == 200, answer[:200]
    return [each.get("error", {}).get("code") for each in json.loads(answer)]


def call(method: str, params: str, call_id: str = "1") -> str:
    """Return a request whose params are written as they are here."""
    return f'{{"jsonrpc":"2.0","id":{call_id},"method":"{method}","params":{params}}}'


ENQUEUE = call("enqueue", '{"body":1}').encode()
COUNT = call("count_messages", '{"queue":"default"}').encode()

# Text that is no JSON

BROKEN = [
    *(b"", b" ", b"\n", b"{", b"[", b"}", b"]", b'"', b"nul", b"nulll", b"tru", b"TRUE", b"None", b"undefined"),
    *(b"NaN", b"Infinity", b"-Infinity", b"nan", b"inf", b"+1", b"01", b"-01", b"00", b".5", b"1.", b"-", b"--1"),
    *(b"1e", b"1e+", b"1.e5", b"0x10", b"1_000", b"1,000", b"'a'", b'"a', b'a"', b'"\\x41"', b'"\\u12"', b'"\\u00zz"'),
    *(b'"\\"', b'"\\U00000041"', b'"a\nb"', b'"a\tb"', b'"\x00"', b'"\x1f"', b"[1,]", b"[,1]", b"[1,,2]", b"[1 2]"),
    *(b'{"a":1,}', b'{,"a":1}', b"{a:1}", b"{'a':1}", b'{"a" 1}', b'{"a"}', b'{"a":}', b'{"a":1 "b":2}', b"{1:2}"),
    *(
        b"[1}",
        b'{"a":1]',
        b"1 2",
        b"{} {}",
        b"[]]",
        b"{}}",
        b"/* c */ 1",
        b"1 // c",
        b"# c",
        b"\x00",
        b"{}\x00",
    ),
    *(b"\x0b1", b"\x0c1", b"\xa01", b"<a/>", b"jsonrpc=2.0", b"--x\r\n\r\n{}", b"\x1f\x8b\x08\x00", b"PK\x03\x04"),
]
NOT_UTF8 = [
    *(
        b"\xff",
        b"\xfe",
        b'"\xff"',
        b'"\x80"',
        b'"\xc3"',
        b'"\xc3("',
        b'"\xc0\xaf"',
        b'"\xe0\x80\xaf"',
        b'"\xf8\x88\x80"',
    ),
    *(b'"\xf4\x90\x80\x80"', b'"\xed\xa0\x80"', b'"\xed\xbf\xbf"', b'"\xed\xa0\xbd\xed\xb8\x80"', b'"caf\xe9"'),
]
SURROGATES = [
    b'"\\ud800"',
    b'"\\udfff"',
    b'"\\uD800x"',
    b'"\\udc00\\ud800"',
    b'"\\ud800\\u0041"',
    b'"\\ud83d\\ud83d\\ude00"',
]
UTF16_AND_MARKS = ['{"a":1}'.encode(code) for code in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig")]

PLACES = [
    b"%b",
    b"[%b]",
    b"[" + COUNT + b",%b]",
    b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":%b}}',
    b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":{"deep":[%b]}}}',
    b'{"jsonrpc":"2.0","id":%b,"method":"enqueue","params":{"body":1}}',
    b'{"jsonrpc":"2.0","id":1,"method":%b,"params":{"body":1}}',
    b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":%b}',
    b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":1},"unknown":%b}',
    b'[{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":%b}},' + ENQUEUE + b"]",
]


@pytest.mark.parametrize("place", PLACES)
async def test_text_that_is_not_json_in_utf8_is_a_parse_error_wherever_it_stands(
    standing_broker: Broker, place: bytes
) -> None:
    before = await standing_broker.call("count_messages")
    for text in [*BROKEN, *NOT_UTF8, *SURROGATES, *UTF16_AND_MARKS]:
        if not text.strip() and b"[%b]" in place:
            continue  # an empty array
        error = await refusal(standing_broker, place % text)
        assert error["code"] == -32700, (text, error)
        assert error["data"].pop("request_id")
        assert error["data"] == {"type": "parse_error", "retryable": False, "outcome": "none"}
    assert await standing_broker.call("count_messages") == before


STRINGS = [
    '{"jsonrpc":"2.0","id":"@","method":"enqueue","params":{"body":1}}',
    '{"jsonrpc":"2.0@","id":1,"method":"enqueue","params":{"body":1}}',
    '{"jsonrpc":"2.0","id":1,"method":"enqueue@","params":{"body":1}}',
    '{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":1},"@":1}',
    call("enqueue", '{"body":"@"}'),
    call("enqueue", '{"body":{"@":1}}'),
    call("enqueue", '{"body":1,"@":1}'),
    call("enqueue", '{"body":1,"queue":"@"}'),
    call("enqueue", '{"body":1,"sender":"@"}'),
    call("enqueue", '{"body":1,"headers":{"@":"a"}}'),
    call("enqueue", '{"body":1,"headers":{"a":"@"}}'),
    call("enqueue_batch", '{"messages":[{"body":1},{"body":1,"sender":"@"}]}'),
    call("delete", '{"receipt":"@"}'),
    call("delete_batch", '{"receipts":["a","@"]}'),
    call("list_queues", '{"prefix":"@"}'),
]


@pytest.mark.parametrize("text", STRINGS)
async def test_an_unpaired_surrogate_is_a_parse_error_in_every_string(standing_broker: Broker, text: str) -> None:
    before = await standing_broker.call("count_messages")
    for surrogate in (b"\\ud800", b"\\uDFFF", b"a\\ud83dz", b"\xed\xa0\x80", b"\xed\xb0\x80"):
        for body in (text.encode(), b"[" + text.encode() + b"]"):
            assert (await refusal(standing_broker, body.replace(b"@", surrogate)))["code"] == -32700, surrogate
    assert await standing_broker.call("count_messages") == before


async def test_a_pair_of_surrogates_is_a_character(standing_broker: Broker) -> None:
    text = call("no_such_method", "{}", r'"\ud83d\ude00"')
    _, answer = await standing_broker.post(text.encode())
    assert json.loads(answer)["id"] == "\U0001f600"


# Nesting


def nested(kind: str, depth: int) -> str:
    """Return a value that is nested so deep, in arrays, objects or both."""
    if kind == "arrays":
        return "[" * depth + "]" * depth
    if kind == "objects":
        return '{"a":' * depth + "1" + "}" * depth
    half, odd = divmod(depth, 2)
    return '[{"a":' * half + "[]" * odd + ("" if odd else "1") + "}]" * half


KINDS = ["arrays", "objects", "both"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_request_may_be_nested_128_deep_and_not_deeper(standing_broker: Broker, kind: str) -> None:
    """The request itself and its params are two of them."""
    for depth in (125, 126):
        answer = await standing_broker.post(call("enqueue", f'{{"queue":"no","body":{nested(kind, depth)}}}').encode())
        assert json.loads(answer[1])["error"]["code"] == 1001
    for depth in (127, 128, 200, 500, 1000, 5000, 100_000):
        error = await refusal(standing_broker, call("enqueue", f'{{"body":{nested(kind, depth)}}}').encode())
        assert error["code"] in (-32600, -32700), depth
        assert error["data"]["outcome"] == "none"
        assert "128" in error["message"] or error["code"] == -32700


async def test_brackets_in_strings_are_no_nesting(standing_broker: Broker) -> None:
    for text in ("[" * 1000, '\\"[{' * 200, "\\\\", "[\\\\", '\\\\\\"[' * 200):
        for body in (f'["{text}"]', f'{{"{text}":["{text}",[]]}}'):
            answer = await standing_broker.post(call("enqueue", f'{{"queue":"no","body":{body}}}').encode())
            assert json.loads(answer[1])["error"]["code"] == 1001, body[:20]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [129, 1000, 100_000])
async def test_too_deep_nesting_is_refused_wherever_it_stands(standing_broker: Broker, kind: str, depth: int) -> None:
    deep = nested(kind, depth)
    for text in (
        deep,
        f'{{"jsonrpc":"2.0","id":{deep},"method":"enqueue","params":{{"body":1}}}}',
        f'{{"jsonrpc":"2.0","id":1,"method":{deep},"params":{{"body":1}}}}',
        f'{{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{deep}}}',
        call("enqueue", f'{{"body":1,"headers":{deep}}}'),
        call("enqueue", f'{{"body":1,"unknown":{deep}}}'),
        call("enqueue_batch", f'{{"messages":[{{"body":{deep}}}]}}'),
    ):
        async with asyncio.timeout(PATIENCE):
            status, answer = await standing_broker.post(text.encode())
        assert status == 200
        answers = json.loads(answer)
        for each in answers if isinstance(answers, list) else [answers]:
            assert each["error"]["code"] in (-32600, -32700)
            assert each["error"]["data"]["outcome"] == "none"


@pytest.mark.parametrize("kind", KINDS)
async def test_an_element_that_is_nested_too_deep_does_not_spoil_its_neighbours(
    standing_broker: Broker, kind: str
) -> None:
    for depth in (127, 128, 129, 200, 500, 800, 1000, 5000, 100_000):
        deep = call("enqueue", f'{{"body":{nested(kind, depth)}}}').encode()
        assert await codes(standing_broker, b"[" + b",".join([COUNT, deep, COUNT]) + b"]") == [None, -32600, None]


# Much of it

HUGE: dict[str, Callable[[], bytes]] = {
    "8 MiB of [": lambda: b"[" * (8 * MIB),
    "8 MiB of {": lambda: b"{" * (8 * MIB),
    'objects 8 MiB deep: {"a":': lambda: b'{"a":' * (8 * MIB // 5),
    "8 MiB of opened and closed arrays": lambda: b"[" * (4 * MIB) + b"]" * (4 * MIB),
    "8 MiB of commas": lambda: b"[" + b"," * (8 * MIB - 2) + b"]",
    "8 MiB of spaces": lambda: b" " * (8 * MIB),
    "8 MiB of spaces in an array": lambda: b"[" + b" " * (8 * MIB - 2) + b"]",
    "8 MiB of NUL": lambda: b"\x00" * (8 * MIB),
    "8 MiB of one number": lambda: b"1" * (8 * MIB),
    "8 MiB of one string that does not end": lambda: b'"' + b"a" * (8 * MIB - 1),
    "8 MiB of backslashes": lambda: b'"' + b"\\" * (8 * MIB - 2) + b'"',
    "4 million numbers": lambda: b"[" + b"1," * (4 * MIB - 2) + b"1]",
    "4 million numbers and no end": lambda: b"[" + b"1," * (4 * MIB - 1),
    "2 million arrays": lambda: b"[" + b"[1]," * (2 * MIB - 1) + b"1]",
    "a million strings with escapes": lambda: b"[" + b'"\\n",' * (8 * MIB // 5 - 1) + b"1]",
    "empty objects": lambda: b"[" + b"{}," * (8 * MIB // 3 - 1) + b"1]",
    "a number of 7 MiB behind 999 others": lambda: b"[" + b"1," * 999 + b"1" * (7 * MIB) + b" ]]",
    "a million members": lambda: b"{" + b'"a":1,' * (MIB - 1) + b'"a":1}',
    "a method's name of 8 MiB": lambda: b'{"jsonrpc":"2.0","method":"%b"}' % (b"x" * (8 * MIB - 50)),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE)
async def test_a_huge_request_is_answered_in_time_and_the_broker_lives_on(
    standing_broker: Broker, text: Callable[[], bytes]
) -> None:
    answer = await send(standing_broker.url, request(body=text()))
    if answer.status != 204:  # a notification of a method that does not exist
        assert answer.status == 200
        assert len(answer.body) < 4000
        error = answer.json["error"]
        assert error["code"] in (-32700, -32600)
        assert_is_error(error)
    assert (await standing_broker.call("count_messages"))["exact"]


async def test_what_is_too_large_is_not_repeated_in_the_error(standing_broker: Broker) -> None:
    huge = "x" * 5_000_000
    for method, params, code in (
        ("enqueue", f'{{"body":"{huge}"}}', 1005),
        ("enqueue", f'{{"body":1,"queue":"{huge}"}}', -32602),
        ("enqueue", f'{{"body":1,"sender":"{huge}"}}', -32602),
        ("enqueue", f'{{"body":1,"headers":{{"{huge}":""}}}}', -32602),
        ("enqueue", f'{{"body":1,"{huge}":1}}', -32602),
        ("enqueue", f'{{"body":1,"ttl":{"9" * 5_000_000}}}', -32602),
        ("delete", f'{{"receipt":"{huge}"}}', -32602),
        (huge, "{}", -32601),
    ):
        answer = await send(standing_broker.url, request(body=call(method, params).encode()))
        assert (answer.status, answer.json["error"]["code"]) == (200, code)
        assert len(answer.body) < 2000
        assert_is_error(answer.json["error"])


def test_the_depth_of_any_text_is_found_with_little_memory() -> None:
    """Escapes or strings by the million cost a search that keeps track of them a hundred times the text."""
    brackets = '{"a":[' + "[]," * 200
    for text in (
        brackets + '"' + "\\n" * MIB + '"]}',
        brackets + '"' + '[\\"' * MIB + '"]}',
        brackets + '"",' * MIB + "1]}",
    ):
        tracemalloc.start()
        try:
            assert [is_deeper(text.encode(), most) for most in (2, 3)] == [True, False]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 5 * len(text) + 10 * MIB


async def test_a_gzip_bomb_is_never_unpacked(standing_broker: Broker) -> None:
    bomb = gzip.compress(b" " * (200 * MIB), compresslevel=1)
    answer = await send(standing_broker.url, request("POST", "/rpc", bomb, "Content-Encoding: gzip"))
    assert answer.status == 415
    assert answer.error["data"]["outcome"] == "none"
    assert (await refusal(standing_broker, bomb))["code"] == -32700
    answer = await send(standing_broker.url, request("POST", "/rpc", bomb, "Transfer-Encoding: gzip"))
    assert 400 <= answer.status < 500


# Params that the schema does not allow

VALID: Json = {
    "queue": "default",
    "body": 1,
    "messages": [{"body": 1}],
    "receipt": "x",
    "receipts": ["x"],
    "visibility_timeout": 1,
    "message_id": "0000000000000001",
    "topic": "news",
    "name": "one",
    "subscription_id": "0000000000000001",
}
# What a method needs besides, where the schema cannot say so.
BESIDES = {"subscribe": ',"url":"http://127.0.0.1:9/"'}
SAMPLES = {
    "null": ["null"],
    "boolean": ["true", "false"],
    "integer": ["0", "1", "-1"],
    "number": ["1.5", "1e-3"],
    "string": ['""', '"x"', '"1"', '"null"', '"ready"'],
    "array": ["[]", "[1]", "[[]]", '["x"]'],
    "object": ["{}", '{"a":1}', '{"a":"b"}'],
}


def resolve(schema: Json) -> Json:
    """Return a schema without references: its limits, and `type` as a list."""
    if "$ref" in schema:
        return resolve(COMPONENTS["schemas"][schema["$ref"].rpartition("/")[2]])
    merged: Json = {}
    for part in [*schema.get("allOf", ()), *schema.get("anyOf", ())]:
        resolved = resolve(part)
        merged = {**merged, **resolved, "type": merged.get("type", []) + resolved.get("type", [])}
    own = {name: value for name, value in schema.items() if name not in ("allOf", "anyOf")}
    if isinstance(own.get("type"), str):
        own["type"] = [own["type"]]
    return {**merged, **own}


@dataclass(frozen=True)
class Place:
    """A value among the params of a method: its path as errors name it, its schema, and params to put it in."""

    path: str
    schema: Json
    template: str
    is_required: bool

    def params(self, value: str) -> str:
        return self.template.replace('"@@"', value)


def places(method: Json) -> Iterator[Place]:
    """Yield every place for a value among the params of a method, those inside of messages and lists too."""
    required = {param["name"] for param in method["params"] if param["required"]}
    base = {name: VALID[name] for name in required}
    for param in method["params"]:
        name = param["name"]
        schema = resolve(param["schema"])
        yield Place(name, schema, json.dumps({**base, name: "@@"}), name in required)
        if "array" not in schema.get("type", ()):
            continue
        item = resolve(schema["items"])
        good = VALID[name][0]
        yield Place(f"{name}[2]", item, json.dumps({**base, name: [good, good, "@@"]}), False)
        for member, member_schema in item.get("properties", {}).items():
            template = json.dumps({**base, name: [good, {"body": 1, member: "@@"}, good]})
            yield Place(f"{name}[1].{member}", resolve(member_schema), template, member in item["required"])


async def assert_all_refused(broker: Broker, method: Json, cases: list[tuple[str, str]]) -> None:
    """Send calls in batches; each must be refused because of the param at its path, and change nothing."""
    before = await broker.call("count_messages"), await broker.call("list_queues")
    for start in range(0, len(cases), 500):
        some = cases[start : start + 500]
        texts = [call(method["name"], params, str(n)) for n, (_, params) in enumerate(some)]
        status, answer = await broker.post(f"[{','.join(texts)}]".encode())
        assert status == 200
        answers = json.loads(answer)
        assert [each["id"] for each in answers] == list(range(len(some)))
        for (path, params), each in zip(some, answers, strict=True):
            shown = f"{path} in {params[:200]}: {str(each)[:500]}"
            assert "error" in each, shown
            error = each["error"]
            assert_is_error(error)
            assert error["code"] == -32602, shown
            data = error["data"]
            assert (data["type"], data["retryable"], data["outcome"]) == ("invalid_params", False, "none"), shown
            assert data["param"] == path, shown
            assert f"`{path}`" in error["message"], shown
            index = re.match(r"\w+\[(\d+)\]", path)
            assert data.get("index") == (int(index.group(1)) if index else None), shown
    assert (await broker.call("count_messages"), await broker.call("list_queues")) == before


@each_method
async def test_a_param_of_another_type_is_refused_and_named(standing_broker: Broker, method: Json) -> None:
    cases = []
    for place in places(method):
        kinds = set(place.schema.get("type", SAMPLES))
        if "number" in kinds:
            kinds.add("integer")
        cases += [
            (place.path, place.params(value))
            for kind, values in SAMPLES.items()
            if kind not in kinds
            for value in values
        ]
        if "body" not in place.path:
            assert any(path == place.path for path, _ in cases), place.path
    await assert_all_refused(standing_broker, method, cases)


def beyond(schema: Json) -> Iterator[str]:
    """Yield numbers that lie outside of a schema's bounds."""
    low: float = schema["minimum" if "minimum" in schema else "exclusiveMinimum"]
    high: float = schema["maximum"]
    is_integer = "integer" in schema["type"]
    yield from (str(low - 1), str(high + 1), "-" + "9" * 30, "9" * 30, "9" * 400, "-" + "9" * 400, "1e400", "-1e400")
    yield from (str(2**31), str(-(2**31)), str(2**63), str(2**64), "1e308", "1e30")
    if "exclusiveMinimum" in schema:
        yield from (str(low), f"{low}.0", f"-{low}", "0e5", "1e-400")
    if is_integer:
        yield from ("1.5", "0.9999999999999999", str(high + 0.5))
    else:
        yield from (str(low - 1e-9), str(high * 1.000001), "-1e-300" if low == 0 else str(low - 1))


def is_bounded_number(schema: Json) -> bool:
    return bool({"integer", "number"} & set(schema.get("type", ())))


@each_method
async def test_a_number_out_of_range_is_refused_and_named(standing_broker: Broker, method: Json) -> None:
    numbers = [place for place in places(method) if is_bounded_number(place.schema)]
    # 2**31 lies inside one range.
    cases = [
        (place.path, place.params(value))
        for place in numbers
        for value in beyond(place.schema)
        if not place.schema["minimum" if "minimum" in place.schema else "exclusiveMinimum"]
        < float(value)
        <= place.schema["maximum"]
        or "." in value
    ]
    await assert_all_refused(standing_broker, method, cases)


@each_method
async def test_a_number_at_a_bound_is_taken(start_broker: StartBroker, method: Json) -> None:
    """Whatever else is wrong with such a call, it is neither its params nor a failure inside."""
    broker = await start_broker(webhook_allow=("127.0.0.0/8",))
    for place in places(method):
        if not is_bounded_number(place.schema):
            continue
        bounds = [str(place.schema["maximum"])]
        if "minimum" in place.schema:
            bounds.append(str(place.schema["minimum"]))
        else:
            bounds += ["1e-300", "1e-9", "0.000001"]
        if "number" in place.schema["type"]:
            bounds += [f"{bounds[0]}.0", "0.1234567891234567"]
        for value in bounds:
            await broker.call("enqueue", body=1)  # so that no dequeue has to wait
            params = place.params(value).replace(
                "default", f"q{random.getrandbits(60)}", method["name"] == "create_queue"
            )
            params = params[:-1] + BESIDES.get(method["name"], "") + "}"
            _, answer = await broker.post(call(method["name"], params).encode())
            error = json.loads(answer).get("error", {"code": None})
            assert error["code"] not in (-32602, -32603), (place.path, value, error)


BAD_NAMES = [
    *("", " ", ".a", "-a", "_a", "a b", "a/b", "a:b", "a*", "a\n", "\na", "a\r\n", "a\t", "a\u0000", "\u0000"),
    *("ä", "a\u2028", "ａ", "a\u200b", "٣", "a'b", 'a"b', "a\\b", "a;b", "a%", "a" * 129, "a" * 100_000),
]


def bad_strings(schema: Json) -> Iterator[str]:
    """Yield strings that a schema does not allow."""
    if "enum" in schema:
        yield from ("", "READY", "other", " ", schema["enum"][0] + "\n", schema["enum"][0] + "\x00")
        return
    if "A-Za-z0-9" in schema.get("pattern", ""):
        yield from BAD_NAMES
        return
    assert schema["pattern"] == "^[^\\u0000]*$"
    yield from ("\x00", "a\x00", "\x00a", "a\n\x00")
    yield from ("x" * (schema["maxLength"] + 1), "\U0001f600" * (schema["maxLength"] + 1), "x" * 100_000)
    if schema.get("minLength"):
        yield ""


@each_method
async def test_a_string_that_is_too_short_too_long_or_has_foreign_characters_is_refused_and_named(
    standing_broker: Broker, method: Json
) -> None:
    cases = [
        (place.path, place.params(json.dumps(value)))
        for place in places(method)
        if "string" in place.schema.get("type", ())
        for value in bad_strings(place.schema)
    ]
    await assert_all_refused(standing_broker, method, cases)


@each_method
async def test_a_list_that_is_empty_or_too_long_is_refused_and_named(standing_broker: Broker, method: Json) -> None:
    cases = [
        (place.path, place.params(json.dumps([VALID[place.path][0]] * size)))
        for place in places(method)
        if "array" in place.schema.get("type", ())
        for size in (0, 1001, 5000)
    ]
    await assert_all_refused(standing_broker, method, cases)


BAD_HEADERS = [
    '{"a\\u0000":"b"}',
    '{"a":"b\\u0000"}',
    '{"a":"b","c":"\\u0000"}',
    '{"a":null}',
    '{"a":1}',
    '{"a":true}',
    '{"a":["b"]}',
    '{"a":{"b":"c"}}',
    '{"a":"b","c":1}',
    json.dumps({f"k{n}": "" for n in range(65)}),
    json.dumps({"a": "x" * 4096}),
    json.dumps({"": "x" * 4097}),
    json.dumps({"x" * 4097: ""}),
    json.dumps({"ä" * 2048: "x"}),
    json.dumps({f"k{n:02}": "\U0001f600" * 16 for n in range(64)}),
]


@pytest.mark.parametrize("name", ["enqueue", "enqueue_batch", "update_message", "publish"])
async def test_headers_that_are_no_strings_or_too_many_or_too_long_are_refused_and_named(
    standing_broker: Broker, name: str
) -> None:
    (method,) = (method for method in METHODS if method["name"] == name)
    cases = [
        (place.path, place.params(headers))
        for place in places(method)
        if place.path.endswith("headers")
        for headers in BAD_HEADERS
    ]
    assert len(cases) == len(BAD_HEADERS)
    await assert_all_refused(standing_broker, method, cases)


async def test_headers_may_have_64_keys_and_4_kib(broker: Broker) -> None:
    for headers in ({f"{n:02}": "x" * 62 for n in range(64)}, {"": "x" * 4096}, {"ä" * 2047: "\x01\n"}, {"": ""}):
        assert len(headers) <= 64
        message_id = (await broker.call("enqueue", body=1, headers=headers))["message_id"]
        shown = await broker.call("get_message", queue="default", message_id=message_id)
        assert shown["headers"] == headers
        shown = await broker.call("update_message", queue="default", message_id=message_id, headers=headers)
        assert shown["headers"] == headers


async def test_headers_over_4_kib_are_told_by_how_much(standing_broker: Broker) -> None:
    error = await standing_broker.error("enqueue", body=1, headers={"ä": "x" * 4095})
    assert (error["data"]["limit"], error["data"]["given"]) == (4096, 4097)
    error = await standing_broker.error(
        "enqueue_batch", messages=[{"body": 1}, {"body": 1, "headers": {"a": "x" * 4096}}]
    )
    assert (error["code"], error["data"]["index"]) == (-32602, 1)


@each_method
async def test_an_unknown_param_is_refused_by_every_method(standing_broker: Broker, method: Json) -> None:
    base = {param["name"]: VALID[param["name"]] for param in method["params"] if param["required"]}
    names = ["unknown", "Queue", "queue ", "messageId", "", "ü", "__class__", "self", "call", "params"]
    values: list[Any] = [1, None, "x", {"a": []}]
    cases = [(name, json.dumps({**base, name: value})) for name in names for value in values]
    for place in places(method):
        if "properties" in place.schema:
            cases += [
                (f"{place.path}.{name}", place.params(json.dumps({"body": 1, name: 1}))) for name in ("queue", "id")
            ]
    await assert_all_refused(standing_broker, method, cases)


@each_method
async def test_a_missing_param_is_refused_and_named(standing_broker: Broker, method: Json) -> None:
    base = {param["name"]: VALID[param["name"]] for param in method["params"] if param["required"]}
    cases = [(name, json.dumps({known: value for known, value in base.items() if known != name})) for name in base]
    for place in places(method):
        if "properties" in place.schema:
            cases += [(f"{place.path}.{name}", place.params("{}")) for name in place.schema["required"]]
    await assert_all_refused(standing_broker, method, cases)


@each_method
async def test_positional_params_are_refused_by_every_method(standing_broker: Broker, method: Json) -> None:
    for params in ("[]", "[1]", '["default",1]', '[{"queue":"default","body":1}]'):
        _, answer = await standing_broker.post(call(method["name"], params).encode())
        assert json.loads(answer)["error"]["code"] == -32602


async def test_an_update_that_names_nothing_to_change_is_refused(standing_broker: Broker) -> None:
    error = await standing_broker.error("update_message", queue="default", message_id="x")
    assert error["code"] == -32602


async def test_a_cursor_that_no_page_gave_is_refused(standing_broker: Broker) -> None:
    for after in ("", "x", "-1", "00000000000000zz", "f" * 16, "0" * 17, "ä" * 16):
        error = await standing_broker.error("list_messages", queue="default", after=after)
        assert (error["code"], error["data"]["param"]) == (-32602, "after"), after


async def test_a_body_is_measured_in_bytes_against_its_queue(broker: Broker) -> None:
    await broker.call("create_queue", queue="small", max_message_bytes=10)
    fits, over = "ä" * 4, "ä" * 4 + "x"  # 8 bytes and the quotes
    raw = call("enqueue", '{"queue":"small","body":  "ääää"  }').encode()
    assert b"result" in (await broker.post(raw))[1]
    error = await broker.error("enqueue", queue="nowhere", body=over)
    assert error["code"] == 1001
    for text in ('"ääääx"', "[1, 2, 34]", "12345678901", '"\\u00e4\\u00e4"'):
        _, answer = await broker.post(call("enqueue", f'{{"queue":"small","body":{text}}}').encode())
        decoded = json.loads(answer)
        size = len(text.encode())
        if size <= 10:
            assert "result" in decoded, text
        else:
            assert (decoded["error"]["code"], decoded["error"]["data"]["given"]) == (1005, size)
    _, answer = await broker.post(
        call("enqueue_batch", f'{{"queue":"small","messages":[{{"body":"{fits}"}},{{"body":"{over}"}}]}}').encode()
    )
    data = json.loads(answer)["error"]["data"]
    assert (data["type"], data["limit"], data["given"], data["index"]) == ("message_too_large", 10, 11, 1)


# Anything at all

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
NAMES = st.sampled_from([method["name"] for method in METHODS])
PARAM_NAMES = st.sampled_from(sorted({param["name"] for method in METHODS for param in method["params"]} - {"wait"}))
LIKELY = JSON_VALUES | st.sampled_from(["default", "ready", 1, 1000, [{"body": 1}], ["x"], {"a": "b"}, "0" * 16])
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "jsonrpc": st.just("2.0") | JSON_VALUES,
        "method": NAMES | JSON_VALUES,
        "params": st.dictionaries(PARAM_NAMES | st.text(max_size=5), LIKELY, max_size=5) | JSON_VALUES,
        "id": st.integers() | st.text(max_size=5) | JSON_VALUES,
    },
)
GOOD_REQUESTS = st.builds(
    lambda method, params, call_id: {"jsonrpc": "2.0", "method": method, "params": params, "id": call_id},
    NAMES,
    st.dictionaries(PARAM_NAMES, LIKELY, max_size=4),
    st.integers(),
)
KNOWN_CODES = {error["code"] for error in COMPONENTS["errors"].values()}

hypothesis_settings = settings(
    max_examples=250, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def fuzzed(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test over many inputs, the same ones each time."""
    # The broker's thread draws from the same `random` while Hypothesis watches for strategies that do.
    allowed = pytest.mark.filterwarnings("ignore:Do not use the .random. module inside strategies")
    decorated: Callable[..., None] = allowed(hypothesis_settings(test))
    return decorated


@pytest.fixture(scope="module")
def fuzzed_server(test_server: str) -> Iterator[Server]:
    """A broker to which anything may happen."""
    with server_in_a_thread(test_server) as server:
        yield server


def post(server: Server, body: bytes) -> Any:
    """Send a body; return the answer as JSON, None where there is none, once its form is found good."""
    host, port = server.runner.addresses[0][:2]
    connection = http.client.HTTPConnection(host, port, timeout=PATIENCE)
    try:
        connection.request("POST", "/rpc", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    assert response.status in (200, 204), (body, text)
    if response.status == 204:
        assert text == b""
        return None
    answer = json.loads(text)
    for each in answer if isinstance(answer, list) else [answer]:
        assert each["jsonrpc"] == "2.0"
        assert "id" in each
        assert ("result" in each) is ("error" not in each)
        if "error" in each:
            assert_is_error(each["error"])
            assert each["error"]["code"] in KNOWN_CODES
            assert each["error"]["code"] not in (-32603, -32001), (body, each)
    return answer


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


BRACKETS = st.recursive(
    st.text('[]{}"\\a', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\a', max_size=4), inner, max_size=3),
    max_leaves=15,
)


@fuzzed
@given(value=BRACKETS)
def test_the_depth_of_any_value_is_counted_right(value: Any) -> None:
    for text in (json.dumps(value), json.dumps(value, separators=(",", ":"))):
        found = depth(value)
        assert not is_deeper(text.encode(), found)
        assert found == 0 or is_deeper(text.encode(), found - 1)


@fuzzed
@given(body=st.binary(max_size=200))
def test_any_bytes_are_answered(fuzzed_server: Server, body: bytes) -> None:
    post(fuzzed_server, body)


@fuzzed
@given(value=JSON_VALUES | REQUESTS | st.lists(REQUESTS | JSON_VALUES, max_size=5))
def test_any_json_is_answered_call_by_call(fuzzed_server: Server, value: Any) -> None:
    answer = post(fuzzed_server, json.dumps(value).encode("utf-8"))
    if isinstance(value, list) and value:
        assert len(answer or []) <= len(value)


@fuzzed
@given(calls=st.lists(GOOD_REQUESTS, min_size=1, max_size=5))
def test_any_params_are_answered_with_the_ids_of_the_calls(fuzzed_server: Server, calls: list[Json]) -> None:
    answers = post(fuzzed_server, json.dumps(calls).encode("utf-8"))
    assert [each["id"] for each in answers] == [each["id"] for each in calls]


@fuzzed
@given(data=st.data())
def test_a_request_with_some_bytes_changed_is_answered(fuzzed_server: Server, data: st.DataObject) -> None:
    text = bytearray(json.dumps(data.draw(st.lists(GOOD_REQUESTS, min_size=1, max_size=2))).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(text) - 1))
        text[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    post(fuzzed_server, bytes(text))


# Every error of the schema


@dataclass(frozen=True)
class World:
    """What a provocation may use."""

    start_broker: StartBroker
    server: str
    database_url: str

    async def broker(self, **settings: Any) -> Broker:
        started: Broker = await self.start_broker(**settings)
        return started

    async def lease(self, broker: Broker, **params: Any) -> Json:
        """Enqueue and dequeue a message."""
        await broker.call("enqueue", body=1)
        ((message),) = (await broker.call("dequeue", **params))["messages"]
        taken: Json = message
        return taken


async def parse_error(world: World) -> Json:
    return await refusal(await world.broker(), b"{")


async def invalid_request(world: World) -> Json:
    return await refusal(await world.broker(), b"[]")


async def method_not_found(world: World) -> Json:
    return await (await world.broker()).error("fetch")


async def invalid_params(world: World) -> Json:
    return await (await world.broker()).error("dequeue", max_messages=1001)


async def internal_error(world: World) -> Json:
    broker = await world.broker()
    async with await psycopg.AsyncConnection.connect(world.database_url, autocommit=True) as connection:
        await connection.execute("DROP TABLE broker.messages CASCADE")
    return await broker.error("enqueue", body="swordfish")


async def unavailable(world: World) -> Json:
    broker = await world.broker(request_timeout=0.3)
    with without_database(world.server, world.database_url):
        return await broker.error("enqueue", body=1)


async def overloaded(world: World) -> Json:
    broker = await world.broker(max_waiting_consumers=1)
    waiting = asyncio.create_task(broker.call("dequeue", wait=60))

    async def is_waiting() -> bool:
        return broker.server.waiting.waiting == 1

    await eventually(is_waiting)
    error = await broker.error("dequeue", wait=60)
    await broker.call("enqueue", body=1)
    assert len((await waiting)["messages"]) == 1
    return error


async def queue_not_found(world: World) -> Json:
    return await (await world.broker()).error("enqueue", queue="nowhere", body=1)


async def queue_exists(world: World) -> Json:
    broker = await world.broker()
    await broker.call("create_queue", queue="orders", delay=1)
    await broker.call("create_queue", queue="orders", delay=1)
    return await broker.error("create_queue", queue="orders", delay=2)


async def message_not_found(world: World) -> Json:
    return await (await world.broker()).error("get_message", queue="default", message_id="00000000000000ff")


async def lease_lost(world: World) -> Json:
    broker = await world.broker()
    first = await world.lease(broker)
    await broker.call("extend_visibility", receipt=first["receipt"], visibility_timeout=0)
    (second,) = (await broker.call("dequeue"))["messages"]
    assert second["message_id"] == first["message_id"]
    return await broker.error("delete", receipt=first["receipt"])


async def message_too_large(world: World) -> Json:
    return await (await world.broker()).error("enqueue", body="x" * 4095)


async def message_leased(world: World) -> Json:
    broker = await world.broker()
    message = await world.lease(broker)
    return await broker.error("delete_message", queue="default", message_id=message["message_id"])


async def idempotency_conflict(world: World) -> Json:
    broker = await world.broker()
    await broker.call("enqueue", body=1, idempotency_key="k")
    return await broker.error("enqueue", body=2, idempotency_key="k")


async def invalid_receipt(world: World) -> Json:
    broker = await world.broker()
    receipt = (await world.lease(broker))["receipt"]
    for wrong in (receipt[:-1], receipt + "A", "A" * len(receipt), receipt.swapcase(), "x", "ä" * 43):
        assert (await broker.error("extend_visibility", receipt=wrong, visibility_timeout=1))["code"] == 1010
    return await broker.error("delete", receipt=receipt[:-1])


async def forbidden(world: World) -> Json:
    broker = await world.broker(auth="required")
    async with await psycopg.AsyncConnection.connect(world.database_url, autocommit=True) as connection:
        token = await tokens.create(connection, "ada", Grant(send=["mail"]), None)
    request = call("enqueue", '{"queue":"orders","body":1}').encode()
    _, answer = await broker.post(request, Authorization=f"Bearer {token}")
    error: Json = json.loads(answer)["error"]
    return error


async def topic_not_found(world: World) -> Json:
    return await (await world.broker()).error("publish", topic="nowhere", body=1)


async def topic_exists(world: World) -> Json:
    broker = await world.broker()
    await broker.call("create_topic", topic="news")
    return await broker.error("create_topic", topic="news", delivery="on_broadcast")


async def subscription_not_found(world: World) -> Json:
    return await (await world.broker()).error("unsubscribe", subscription_id="00000000000000ff")


async def subscription_exists(world: World) -> Json:
    broker = await world.broker()
    await broker.call("create_topic", topic="news")
    await broker.call("subscribe", topic="news", name="one", queue="default")
    return await broker.error("subscribe", topic="news", name="one", queue="default", filter={"a": ["b"]})


async def queue_in_use(world: World) -> Json:
    return await (await world.broker()).error("delete_queue", queue="default")


async def queue_full(world: World) -> Json:
    broker = await world.broker()
    await broker.call("create_queue", queue="small", max_messages=2)
    await broker.call("enqueue_batch", queue="small", messages=[{"body": 1}, {"body": 2}])
    return await broker.error("enqueue", queue="small", body=3)


@dataclass(frozen=True)
class Expected:
    """How an error is provoked, and what it must say."""

    provoke: Callable[[World], Awaitable[Json]]
    retryable: bool
    says: str
    data: Json


ERRORS = {
    "parse_error": Expected(parse_error, False, "Send one JSON-RPC 2.0 request", {}),
    "invalid_request": Expected(invalid_request, False, "at least one call", {}),
    "method_not_found": Expected(method_not_found, False, "rpc.discover", {"method": "fetch"}),
    "invalid_params": Expected(
        invalid_params, False, "from 1 to 1000, and 1001 was given", {"param": "max_messages", "given": "1001"}
    ),
    "internal_error": Expected(internal_error, False, "log", {}),
    "unavailable": Expected(unavailable, True, "try again", {}),
    "overloaded": Expected(overloaded, True, "try again in 1 s", {"retry_after": 1, "limit": 1}),
    "queue_not_found": Expected(queue_not_found, False, "create_queue", {"queue": "nowhere"}),
    "queue_exists": Expected(queue_exists, False, "update_queue", {"queue": "orders", "differs": "delay"}),
    "message_not_found": Expected(message_not_found, False, "deleted", {"message_id": "00000000000000ff"}),
    "lease_lost": Expected(lease_lost, False, "dequeue again", {}),
    "message_too_large": Expected(
        message_too_large, False, "send less, or raise max_message_bytes", {"limit": 4096, "given": 4097}
    ),
    "message_leased": Expected(message_leased, True, "name the receipt", {}),
    "idempotency_conflict": Expected(idempotency_conflict, False, "a key of its own", {"key": "k"}),
    "invalid_receipt": Expected(invalid_receipt, False, "unchanged", {}),
    "forbidden": Expected(forbidden, False, "made with --send", {"permission": "send", "name": "orders"}),
    "topic_not_found": Expected(topic_not_found, False, "create_topic", {"topic": "nowhere"}),
    "topic_exists": Expected(topic_exists, False, "delete it", {"topic": "news", "delivery": "immediate"}),
    "subscription_not_found": Expected(
        subscription_not_found, False, "list_subscriptions", {"subscription_id": "00000000000000ff"}
    ),
    "subscription_exists": Expected(
        subscription_exists, False, "unsubscribe it", {"topic": "news", "name": "one", "differs": "filter"}
    ),
    "queue_in_use": Expected(queue_in_use, False, "purge_queue", {"queue": "default"}),
    "queue_full": Expected(queue_full, True, "wait until", {"queue": "small", "limit": 2}),
}


def test_every_error_of_the_schema_is_provoked_below() -> None:
    assert set(ERRORS) == set(COMPONENTS["errors"])


@pytest.mark.parametrize("name", COMPONENTS["errors"])
async def test_an_error_has_its_code_and_says_whether_to_repeat_and_what_to_do(
    name: str, start_broker: StartBroker, test_server: str, database_url: str
) -> None:
    expected = ERRORS[name]
    error = await expected.provoke(World(start_broker, test_server, database_url))
    assert_is_error(error)
    assert error["code"] == COMPONENTS["errors"][name]["code"]
    data = error["data"]
    assert (data["type"], data["retryable"], data["outcome"]) == (name, expected.retryable, "none")
    assert data.items() >= expected.data.items()
    assert expected.says in error["message"]
    for inside in ("swordfish", "broker.messages", "SELECT", "INSERT", "42P01", "relation"):
        assert inside not in json.dumps(error)


async def test_an_update_of_a_body_that_is_too_large_is_refused_and_changes_nothing(broker: Broker) -> None:
    message_id = (await broker.call("enqueue", body=1))["message_id"]
    error = await broker.error(
        "update_message", queue="default", message_id=message_id, body="x" * 4095, headers={"a": "b"}
    )
    assert (error["code"], error["data"]["limit"], error["data"]["given"]) == (1005, 4096, 4097)
    shown = await broker.call("get_message", queue="default", message_id=message_id)
    assert (shown["body"], shown["headers"]) == (1, {})


async def test_a_batch_of_messages_with_a_bad_one_stores_none_and_names_it(broker: Broker) -> None:
    await broker.call("create_queue", queue="small", max_messages=2)
    bad = {"body": "x" * 4095}
    error = await broker.error("enqueue_batch", messages=[{"body": 1}, {"body": 2}, bad, {"body": 3}])
    assert (error["code"], error["data"]["index"]) == (1005, 2)
    error = await broker.error("enqueue_batch", queue="small", messages=[{"body": 1}, {"body": 2}, {"body": 3}])
    assert (error["code"], error["data"]["index"]) == (1014, 2)
    error = await broker.error("enqueue_batch", queue="nowhere", messages=[{"body": 1}])
    assert error["code"] == 1001
    assert (await broker.call("count_messages"))["total"] == 0


async def test_a_batch_of_receipts_tells_each_its_own_error(broker: Broker) -> None:
    await broker.call("enqueue", body=1)
    (message,) = (await broker.call("dequeue"))["messages"]
    receipts = ["x", message["receipt"], message["receipt"], "A" * 43]
    extended = (await broker.call("extend_visibility_batch", receipts=receipts, visibility_timeout=60))["results"]
    assert ["visible_at" in each for each in extended] == [False, True, True, False]
    results = (await broker.call("delete_batch", receipts=receipts))["results"]
    assert results[1:3] == [{"deleted": True}, {"deleted": False}]
    for each in (results[0], results[3], extended[0], extended[3]):
        assert_is_error(each["error"])
        assert each["error"]["code"] == 1010
    gone = (await broker.call("extend_visibility_batch", receipts=receipts[1:2], visibility_timeout=60))["results"]
    assert gone[0]["error"]["code"] == 1004


async def test_a_call_that_the_database_does_not_answer_in_time_may_have_been_done(
    start_broker: StartBroker, database_url: str
) -> None:
    """A table is locked, so the statement is sent and never ends. What only reads has certainly done nothing."""
    calls: list[tuple[str, Json, str]] = [
        ("enqueue", {"body": 1}, "unknown"),
        ("update_queue", {"queue": "default", "delay": 0}, "unknown"),
        ("dequeue", {}, "unknown"),
        ("get_queue", {"queue": "default"}, "none"),
        ("list_messages", {"queue": "default"}, "none"),
    ]
    # All of them at once: so the time can be long enough to make a connection for each on any machine.
    broker: Broker = await start_broker(request_timeout=2)
    async with locked(database_url, "broker.queues"):
        errors = await asyncio.gather(*(broker.error(method, **params) for method, params, _ in calls))
    for error, (method, _, outcome) in zip(errors, calls, strict=True):
        data = error["data"]
        assert (error["code"], data["retryable"], data["outcome"]) == (-32001, True, outcome), method
    await broker.call("enqueue", body=1)


async def test_a_call_whose_connection_is_cut_may_have_been_done(broker: Broker, database_url: str) -> None:
    async with locked(database_url, "broker.queues") as connection:
        writing = asyncio.create_task(broker.error("enqueue", body=1))
        await eventually(lambda: blocked_enqueues(connection))
        (backend,) = await blocked_enqueues(connection)
        await connection.execute("SELECT pg_terminate_backend(%s)", [backend])
        error = await writing
    assert (error["code"], error["data"]["outcome"]) == (-32001, "unknown")
    assert (await broker.call("count_messages"))["total"] == 0


async def test_a_call_too_many_for_the_database_is_overloaded_and_the_others_are_served(
    start_broker: StartBroker, database_url: str
) -> None:
    """Three calls arrive together where two may wait."""
    # The broker's own looks at the locked table hold a connection, and the two that are kept for reads.
    broker: Broker = await start_broker(max_calls=2, database_connections=4)
    async with locked(database_url, "broker.queues") as connection:
        calls = asyncio.create_task(codes(broker, b"[" + b",".join([ENQUEUE] * 3) + b"]"))
        await eventually(lambda: blocked_enqueues(connection))
    assert await calls == [None, None, -32002]
    assert await codes(broker, b"[" + ENQUEUE + b"]") == [None]
    assert b'wonderq_refused_total{limit="calls"} 1.0' in broker.server.metrics.text()
