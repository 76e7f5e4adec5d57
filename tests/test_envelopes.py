"""A long call is read in one pass over its text, and to the very answer that it gets when it is read in two.

Texts are made by hypothesis: calls as clients write them, with params that are right and wrong, most of them spoilt in
one or two places. What is long is set to nothing, so that they may be short.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from msgspec import Raw

from broker import envelopes
from broker.envelopes import id_of, method_of, params_of, read_at_once, read_envelope
from broker.errors import BrokerError, MethodNotFound, ParseError
from broker.schema import compile_methods, load_document

SCHEMAS = compile_methods(load_document())
MAX_NESTING = 128
NOT_AT_ONCE = object()


@pytest.fixture(autouse=True)
def every_call_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envelopes, "LONG_CALL_BYTES", 0)


def found(read: Any) -> Any:
    """Return what a way of reading finds in a text: id, method and params, or what an answer says of an error."""
    try:
        if (call := read()) is None:
            return NOT_AT_ONCE
        envelope, params = call
        call_id = id_of(envelope)
        method = method_of(envelope)
        if method not in SCHEMAS:
            raise MethodNotFound(method=method)
        return bytes(call_id), bytes(envelope.id), method, plain(params(SCHEMAS[method]))
    except ParseError as error:
        return ParseError, error.data  # the parser has several sentences for the same
    except BrokerError as error:
        return type(error), error.message, error.data


def plain(value: Any) -> Any:
    """Return params as something whose parts can be compared."""
    if isinstance(value, Raw):
        return bytes(value)
    if isinstance(value, msgspec.Struct):
        return [plain(getattr(value, name)) for name in value.__struct_fields__]
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return {name: plain(each) for name, each in value.items()} if isinstance(value, dict) else value


def in_two_passes(text: bytes) -> Any:
    def read() -> Any:
        envelope = read_envelope(Raw(text), MAX_NESTING)
        return envelope, lambda schema: schema.read(params_of(envelope))

    return found(read)


def at_once(text: bytes) -> Any:
    def read() -> Any:
        call = read_at_once(Raw(text), SCHEMAS, MAX_NESTING)
        return call and (call.envelope, lambda schema: call.params())

    return found(read)


VALUES = st.recursive(
    st.sampled_from(
        [
            "1",
            "-0.5e3",
            "true",
            "null",
            '"a"',
            r'"}\"]{\u0041"',
            '"}"',
            '"params"',
            '{"id":1}',
            "{}",
            "[]",
            '"é"',
            "1e400",
        ]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda parts: f"[{','.join(parts)}]"),
        st.lists(st.tuples(st.sampled_from(["a", "params", "id"]), inner), max_size=3).map(
            lambda members: "{" + ",".join(f'"{name}":{value}' for name, value in members) + "}"
        ),
    ),
    max_leaves=6,
)
NAMES = st.sampled_from(['"default"', '"a b"', "7", "null"])
MESSAGES = st.lists(
    st.builds("{{{}}}".format, st.builds('"body":{}'.format, VALUES) | st.just('"headers":{}')), max_size=3
).map(lambda messages: f"[{','.join(messages)}]")
MEMBERS: dict[str, st.SearchStrategy[str]] = {
    "body": VALUES,
    "queue": NAMES,
    "topic": NAMES,
    "delay": st.sampled_from(["0", "1.5", "-1", '"x"', "null", "1e999"]),
    "headers": st.sampled_from(["{}", '{"a":"b"}', '{"a":1}']),
    "messages": MESSAGES,
    "receipts": st.sampled_from(["[]", '["x"]', "[1]"]),
    "limit": st.sampled_from(["1", "0", "1.0"]),
    "unheard_of": VALUES,
    r"b\u006fdy": VALUES,
}
SPACE = st.sampled_from(["", "", "", "", "", " ", "\n\t ", "\f"])


def objects(members: dict[str, st.SearchStrategy[str]], max_size: int) -> st.SearchStrategy[str]:
    """Return texts of objects that have some of these members, in any order, also one twice."""
    one = st.sampled_from(sorted(members)).flatmap(
        lambda name: st.builds(f'{{}}"{name}"{{}}:{{}}{{}}{{}}'.format, SPACE, SPACE, SPACE, members[name], SPACE)
    )
    return st.lists(one, max_size=max_size).map(lambda parts: "{" + ",".join(parts) + "}")


PARAMS = st.one_of(
    VALUES.map('{{"body":{}}}'.format),
    MESSAGES.map('{{"messages":{}}}'.format),
    objects(MEMBERS, 4),
    VALUES,
)
METHODS = st.sampled_from(["enqueue", "enqueue_batch", "publish", "list_queues", "delete_batch", "get_server"])
AROUND: dict[str, st.SearchStrategy[str]] = {
    "jsonrpc": st.sampled_from(['"2.0"', '"2.0"', r'"2.\u0030"', "2.0"]),
    "id": st.sampled_from(["1", '"}"', "null", "[]", "true", "01", '"\\"', '"a\tb"', "1.0e5"]),
    "method": METHODS.map('"{}"'.format) | st.sampled_from(['"x"', "1"]),
    "params": PARAMS,
    "more": VALUES,
}
CALLS = st.builds(
    lambda method, params, order: "{" + ",".join(order).replace("METHOD", method).replace("PARAMS", params) + "}",
    METHODS,
    PARAMS,
    st.permutations(['"jsonrpc":"2.0"', '"method":"METHOD"', '"id":1', '"params":PARAMS']),
)
SPOILS = st.sampled_from(
    ["", "{", "}", "[", "]", '"', ",", ":", "\\", " ", "0", "NaN", r"\ud800", "}}", '}},"id":2}', '"params":{},', "é"]
)


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """Draw a call, mostly spoilt: something is put in the place of a few characters."""
    text = draw(st.one_of(CALLS, CALLS, CALLS, objects(AROUND, 6)))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(SPOILS) + text[at + draw(st.integers(0, 3)) :]
    return (draw(SPACE) + text + draw(SPACE)).encode()


@settings(max_examples=1_000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(texts())
@example(b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params" :{"body":1},"a\\"params":{"body":2}}')
@example(b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":1},"params":{"body":2}}')
@example(b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":"},"id":2}')
@example(b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"delay":"x","body":[1,}')
def test_a_call_that_is_read_at_once_is_found_to_be_what_it_is_when_it_is_read_in_two_passes(text: bytes) -> None:
    read = at_once(text)
    event("at once" if read is not NOT_AT_ONCE else "not at once")
    assert read is NOT_AT_ONCE or read == in_two_passes(text)


@pytest.mark.parametrize(
    "order",
    ["jsonrpc id method params", "jsonrpc method params id", "method params id jsonrpc", "params jsonrpc method"],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_call_as_clients_write_it_is_read_at_once(order: str, separators: tuple[str, str]) -> None:
    members: dict[str, Any] = {"jsonrpc": "2.0", "id": "}", "method": "enqueue", "params": {"body": [{"id": 1}]}}
    text = json.dumps({name: members[name] for name in order.split()}, separators=separators).encode()
    read = at_once(text)
    assert read is not NOT_AT_ONCE
    assert read == in_two_passes(text)
    assert read[2:3] == ("enqueue",)


@pytest.mark.parametrize(
    ("params", "code"),
    [(b'{"body":[NaN]}', -32700), (b'{"body":1,"delay":"x"}', -32602), (b'{"delay":"x","body":NaN}', -32700)],
)
def test_what_is_wrong_with_the_params_of_a_long_call_is_told_at_once(params: bytes, code: int) -> None:
    text = b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":' + params + b"}"
    read = at_once(text)
    assert read is not NOT_AT_ONCE
    assert read[0].code == code
    assert read == in_two_passes(text)
