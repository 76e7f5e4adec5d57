"""Bodies that are made to cost a broker much: deep, huge, broken at their very end, compressed.

Each is as long as the default limit of a request lets it be, where its length is the point.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import NamedTuple

# A little below the limit: what stands around a value needs room too.
SIZE = 8 * 2**20 - 1024


class Hostile(NamedTuple):
    """A body, and what it must be answered: an HTTP status, and the code of the error, None where it is no error."""

    name: str
    body: bytes
    code: int | None
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


def enqueue(value: bytes) -> bytes:
    """Return a call that would store a message with this body."""
    return b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":' + value + b"}}"


def filled(unit: bytes, before: bytes = b"", behind: bytes = b"") -> bytes:
    """Return as many units as there is room for."""
    return before + unit * ((SIZE - len(before) - len(behind)) // len(unit)) + behind


def deep() -> Iterator[Hostile]:
    half = SIZE // 2
    arrays, objects = b"[" * half + b"]" * half, b'{"a":' * (SIZE // 6) + b"1" + b"}" * (SIZE // 6)
    yield Hostile("deep arrays", arrays, -32600)
    yield Hostile("deep arrays in a body", enqueue(arrays), -32600)
    yield Hostile("deep objects in a body", enqueue(objects), -32600)
    yield Hostile("deep arrays in a batch", b"[" + enqueue(arrays) + b"]", -32600)
    yield Hostile("brackets that are not closed", b"[" * SIZE, -32600)
    yield Hostile("a depth of 129, often", enqueue(filled(b"[" * 126 + b"]" * 126 + b",", b"[", b"1]")), -32600)
    yield Hostile("a depth of 128, often", enqueue(filled(b"[" * 125 + b"]" * 125 + b",", b"[", b"1]")), 1005)
    one_mib = b"[" * 2**19 + b"]" * 2**19
    just = b"[" * 124 + b"]" * 124 + b","
    part = b"[" + just * (2**20 // len(just) - 1) + b"1]"
    # The first of them is flat: a glance at the beginning does not show it.
    messages = MESSAGES + b'{"body":"' + b"x" * 2**17 + b'"},' + b",".join([b'{"body":' + part + b"}"] * 6) + b"]}}"
    yield Hostile("six messages with a depth of 129", messages, -32600)
    yield Hostile("one deep MiB in a batch", b"[" + one_mib[1:-1] + b"]", -32600)


def huge() -> Iterator[Hostile]:
    yield Hostile("an array of numbers in a body", enqueue(filled(b"0,", b"[", b"0]")), 1005)
    yield Hostile("an array of arrays in a body", enqueue(filled(b"[],", b"[", b"0]")), 1005)
    yield Hostile("a string", enqueue(filled(b"x", b'"', b'"')), 1005)
    yield Hostile("a string of escapes", enqueue(filled(rb"\u0041", b'"', b'"')), 1005)
    yield Hostile("a string of quotes", enqueue(filled(rb"\"", b'"', b'"')), 1005)
    yield Hostile("strings of brackets", enqueue(filled(b'"[{",', b"[", b"0]")), 1005)
    yield Hostile("digits", enqueue(filled(b"9")), 1005)
    yield Hostile("a number with a long exponent", enqueue(filled(b"9", b"1e")), 1005)
    yield Hostile("digits for a param", filled(b"9", enqueue(b'1,"delay":')[:-2], b"}}"), -32602)
    yield Hostile("digits for an id", filled(b"9", b'{"jsonrpc":"2.0","id":', b',"method":"x"}'), -32601)
    yield Hostile("a long name of a method", filled(b"x", b'{"jsonrpc":"2.0","id":1,"method":"', b'"}'), -32601)
    yield Hostile("a long name of a queue", filled(b"x", enqueue(b'1,"queue":"')[:-2], b'"}}'), -32602)
    yield Hostile("an object of one name", enqueue(filled(b'"a":1,', b"{", b'"a":1}')), 1005)
    yield Hostile("one param again and again", filled(b'"body":1,', enqueue(b"")[:-9], b'"body":1}}'), None)
    many = b",".join(b'"p%07d":1' % n for n in range(SIZE // 13))
    yield Hostile("many unknown params", enqueue(b"1," + many), -32602)
    yield Hostile("many headers", enqueue(b'1,"headers":{' + many + b"}"), -32602)
    yield Hostile("many names in a body", enqueue(b"{" + many + b"}"), 1005)
    yield Hostile("a batch of numbers", filled(b"0,", b"[", b"0]"), -32600)
    yield Hostile("a batch of objects", filled(b'{"a":0},', b"[", b"0]"), -32600)
    yield Hostile("a batch of arrays", filled(b"[0],", b"[", b"0]"), -32600)
    yield Hostile("a batch of strings with escapes", filled(rb'"\n",', b"[", b"0]"), -32600)
    yield Hostile("many messages", filled(b'{"body":1},', MESSAGES, b'{"body":1}]}}'), -32602)
    yield Hostile("many receipts", filled(b'"x",', RECEIPTS, b'"x"]}}'), -32602)
    yield Hostile("nothing but spaces", filled(b" "), -32700)


MESSAGES = b'{"jsonrpc":"2.0","id":1,"method":"enqueue_batch","params":{"messages":['
RECEIPTS = b'{"jsonrpc":"2.0","id":1,"method":"delete_batch","params":{"receipts":['


def broken() -> Iterator[Hostile]:
    """Yield bodies that are no JSON, some at their very end."""
    for name, value in (
        ("NaN", b"NaN"), ("Infinity", b"-Infinity"), ("a NUL byte", b'"\x00"'), ("half a surrogate pair", rb'"\ud800"'),
        ("a surrogate in UTF-8", b'"\xed\xa0\x80"'), ("a byte that is not UTF-8", b'"\xff"'),
    ):  # fmt: skip
        yield Hostile(name, enqueue(value), -32700)
        yield Hostile(f"{name} behind much", enqueue(filled(b"0,", b"[", value + b"]")), -32700)
    yield Hostile("a string of half surrogate pairs", enqueue(filled(rb"\ud800", b'"', b'"')), -32700)
    yield Hostile("an escaped NUL for a name", enqueue(rb'1,"queue":"a\u0000b"'), -32602)


def compressed() -> Iterator[Hostile]:
    bomb = gzip.compress(bytes(200 * 2**20), 1)
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip"):
        yield Hostile(f"a bomb as {encoding}", bomb, -32600, 415, (("Content-Encoding", encoding),))
    yield Hostile("a bomb that says nothing", bomb, -32700)


def corpus() -> Iterator[Hostile]:
    """Yield all of them; one at a time, for together they have hundreds of megabytes."""
    yield from deep()
    yield from huge()
    yield from broken()
    yield from compressed()
