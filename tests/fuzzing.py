"""Requests that nobody would send who means well, made from the schema and from bytes; the same ones for the same seed.

What makes a request wait is bounded: `wait` to a hundredth of a second.
"""

from __future__ import annotations

import json
import random
from typing import Any

import secrecy
from test_bad_input import METHODS, resolve

Json = dict[str, Any]

# May be in no log.
BODY = "what a body of a fuzzed message says"
secrecy.KNOWN.bodies.add(BODY)
NAMES = ["default", "news", "q1", "q2", "q1.dead", "absent"]
# What could be meant; params that are not here are filled in by their type.
LIKELY: dict[str, list[Any]] = {
    "queue": NAMES, "topic": NAMES, "name": ["one", "two"], "dead_letter_queue": [*NAMES, None], "to": [*NAMES, None],
    "body": [1, None, BODY, {"a": [1, 2]}, [[[]]]], "headers": [{}, {"kind": "a"}], "sender": ["ada", None],
    "delay": [0, 0.01, 60], "ttl": [0.05, 60, None], "idempotency_key": [None, "k1", "k2"], "wait": [0, 0.01],
    "messages": [[{"body": 1}], [{"body": 1, "delay": 0.5}, {"body": "x", "idempotency_key": "k1"}]],
    "receipt": ["x", "A" * 38], "receipts": [["x"], ["x", "y", "x"]], "visibility_timeout": [0.05, 1, 30],
    "message_id": ["0000000000000001", "0000000000000007"], "subscription_id": ["0000000000000001"],
    "filter": [None, {"kind": ["a", "b"]}], "url": ["https://10.0.0.1/", "http://127.0.0.1:9/", "https://[::1]/x"],
    "max_messages": [1, 10, None], "limit": [1, 100], "after": [None, "x"], "prefix": ["", "q"], "paused": [False],
}  # fmt: skip
HOSTILE: list[Any] = [
    "", " ", "\x00", "a\x00b", "\ud800", "\udfff\ud800", "é" * 64, "'; DROP TABLE broker.messages; --", '"', "\\", "\n",
    "../../etc/passwd", "%s%n{0}", "${jndi:ldap://x}", "\u202e", "\U0001f600" * 40, "x" * 129, "x" * 5000, "null",
    "NaN", "1e999", "*", "_", "default\x00", "-1", "<script>", "\x1b[31m", "\r\nSet-Cookie: a=b",
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**64, -(2**63) - 1, 10**40, 1e308, 1e-300, 0.1, -0.0, [], [None],
    {}, {"a": {"b": [{}]}}, [[[[]]]], "1", "true",
]  # fmt: skip
# As text, because no value of ours is written so.
RAW = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "01",
    "+1",
    "1_0",
    "tru",
    '"\\ud800"',
    '"\\x"',
    "{",
    "]",
    "",
    "1e",
    "\x00",
]
IDS: list[Any] = [0, 1, -1, 1.5, "a", "", None, 10**30, "\x00", "é" * 50]
MARK = "@@"


def call(rng: random.Random) -> Json:
    """Return a call, most often with something wrong in it."""
    method = rng.choice(METHODS)
    params = {
        param["name"]: likely(rng, param["name"], param["schema"])
        for param in method["params"]
        if param["required"] or rng.random() < 0.3
    }
    made: Json = {"jsonrpc": "2.0", "id": rng.choice(IDS), "method": method["name"], "params": params}
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        spoil_params(rng, method, params)
    if rng.random() < 0.1:
        spoil_envelope(rng, made)
    if rng.random() < 0.15:
        made.pop("id", None)
    return made


def likely(rng: random.Random, name: str, schema: Json) -> Any:
    return rng.choice(LIKELY[name]) if name in LIKELY else rng.choice(resolve(schema).get("enum", [0, 1, "x", None]))


def spoil_params(rng: random.Random, method: Json, params: Json) -> None:
    """Make one thing wrong with the params, or at their bounds."""
    known = [param["name"] for param in method["params"]]
    what = rng.random()
    if what < 0.1 or not known:
        params[rng.choice([*HOSTILE, "limits", "sender_", "__proto__", "id"])] = rng.choice(ODD)
    elif what < 0.2 and params:
        del params[rng.choice(list(params))]
    else:
        name = rng.choice(known)
        schema = next(param["schema"] for param in method["params"] if param["name"] == name)
        pool = [ODD, HOSTILE, bounds(resolve(schema)), LIKELY.get(name, ODD)]
        value = rng.choice(rng.choice(pool))
        if isinstance(params.get(name), list | dict) and rng.random() < 0.5:
            value = inside(rng, params[name], value)
        params[name] = value


def inside(rng: random.Random, whole: Any, value: Any) -> Any:
    """Return a list or an object with one more value in it."""
    if isinstance(whole, list):
        return [*whole, value]
    return whole | {rng.choice(["body", "delay", "kind", "", "x" * 200]): value}


def bounds(schema: Json) -> list[Any]:
    """Return values at, below and above the bounds of a schema."""
    found: list[Any] = [None]
    for word in ("minimum", "maximum", "exclusiveMinimum"):
        if word in schema:
            found += [schema[word], schema[word] - 1, schema[word] + 1, schema[word] * 1.0000001]
    for word in ("minLength", "maxLength"):
        if word in schema:
            found += ["a" * max(0, schema[word] + more) for more in (-1, 0, 1)]
    if schema.get("maxItems", 10**9) < 2000:
        found.append([{"body": 1}] * (schema["maxItems"] + 1))
    return found


def spoil_envelope(rng: random.Random, made: Json) -> None:
    """Make one thing wrong with a call beside its params."""
    member = rng.choice(["jsonrpc", "method", "params", "id", "more"])
    if rng.random() < 0.3:
        made.pop(member, None)
    else:
        made[member] = rng.choice([*ODD, *HOSTILE])


def bounded(made: Json) -> Json:
    """Return a call that does not wait for long."""
    params = made.get("params")
    if isinstance(params, dict):
        wait = params.get("wait")
        if isinstance(wait, int | float) and 0.02 < wait <= 60:
            params["wait"] = 0.01
    return made


def body(rng: random.Random) -> bytes:
    """Return the body of a request: a call, or a batch of several; now and then with one value that is no JSON."""
    what = rng.random()
    one: Any = (
        bounded(call(rng)) if what < 0.85 else [bounded(call(rng)) for _ in range(rng.choice((0, 1, 2, 2, 3, 8)))]
    )
    if what > 0.97:
        one = [*one, rng.choice(ODD)]
    if 0.8 < what < 0.85 and isinstance(one.get("params"), dict):
        one["params"][rng.choice(["body", "queue", "delay"])] = MARK
    text = json.dumps(one, ensure_ascii=rng.random() < 0.7)
    return text.replace(f'"{MARK}"', rng.choice(RAW), 1).encode("utf-8", "surrogatepass")


def request(content: bytes, *fields: str, line: str = "POST /rpc HTTP/1.1", length: int | None = None) -> bytes:
    """Return an HTTP request."""
    length = len(content) if length is None else length
    head = [line, "Host: localhost", "Content-Type: application/json", f"Content-Length: {length}", *fields]
    return "\r\n".join([*head, "", ""]).encode("utf-8", "surrogatepass") + content


LINES = [
    "POST /rpc HTTP/1.0", "POST /rpc HTTP/0.9", "POST /rpc HTTP/2.0", "POST /rpc", "POST  /rpc HTTP/1.1",
    "GET / HTTP/1.1", "GET /rpc HTTP/1.1", "PUT /rpc HTTP/1.1", "OPTIONS * HTTP/1.1", "BREW /rpc HTTP/1.1",
    "POST /rpc?a=b HTTP/1.1", "POST http://evil.example/rpc HTTP/1.1", "POST //rpc HTTP/1.1",
    "POST /rpc/../rpc HTTP/1.1", "POST /%72pc HTTP/1.1",
    "POST /" + "a" * 9000 + " HTTP/1.1", "GET /metrics HTTP/1.1", "GET /livez HTTP/1.1", "GET /openrpc.json HTTP/1.1",
    "POST /rpc#x HTTP/1.1", "POST * HTTP/1.1", "post /rpc HTTP/1.1", "POST /\xff HTTP/1.1", "PRI * HTTP/2.0",
]  # fmt: skip
FIELDS = [
    "Content-Encoding: gzip", "Content-Encoding: identity", "Content-Type: text/plain", "Host: evil.example",
    "Expect: x", "Expect: 100-continue", "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "Content-Length: 5",
    "Upgrade: h2c", "Content-Length: -1", "Content-Length: 1e3", "Connection: upgrade", "Connection: close",
    "X: " + "a" * 9000, "X", ": x", " folded", "X\x00Y: 1", "X: \x00", "X: \xe9", "Authorization: Basic eDp5",
    "Authorization:",
    "Cookie: " + "a=b;" * 99, "Origin: https://evil.example", "X-Forwarded-For: 192.0.2.1", "TE: trailers",
    "Content-Length: 99999999999999999999",
]  # fmt: skip


def from_bytes(rng: random.Random, *fields: str) -> bytes:
    """Return what may be an HTTP request, and may not."""
    what = rng.random()
    content = body(rng)
    if what < 0.1:
        return rng.choice([b"", b"\r\n", b"\x16\x03\x01"]) + rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n"
    if what < 0.2:
        return request(content, *fields, line=rng.choice(LINES))
    if what < 0.4:
        return request(content, *fields, *rng.sample(FIELDS, rng.choice((1, 1, 2, 3))))
    if what < 0.5:
        return chunked(rng, content, *fields)
    if what < 0.53:
        return request(content, *fields, length=max(0, len(content) + rng.choice((-9, -1, 1, 3, 10_000, 2**40))))
    if what < 0.57:
        return request(rng.choice((b" ", b"[", b'"', b"9")) * rng.choice((1_000, 70_000, 300_000)), *fields)
    if what < 0.7:
        return request(damaged(rng, content), *fields)
    return damaged(rng, request(content, *fields))


def chunked(rng: random.Random, content: bytes, *fields: str) -> bytes:
    """Return a request whose body comes in chunks, which are right, or not quite."""
    cut = rng.randint(0, len(content))
    pieces = [piece for piece in (content[:cut], content[cut:]) if piece]
    text = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    head = ["POST /rpc HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Transfer-Encoding: chunked"]
    text = damaged(rng, text) if rng.random() < 0.5 else text
    return "\r\n".join([*head, *fields, "", ""]).encode() + text


def damaged(rng: random.Random, text: bytes) -> bytes:
    """Return bytes of which some are changed, missing, doubled or new."""
    made = bytearray(text)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(made) + 1)
        size = rng.choice((1, 1, 1, 4, 30))
        what = rng.randrange(4)
        if what == 0:
            made[place : place + size] = rng.randbytes(size)
        elif what == 1:
            del made[place : place + size]
        elif what == 2:
            made[place:place] = rng.choice((b"\x00", b"\r\n", b"\xff\xfe", b'"', b"[" * 200, b"{", rng.randbytes(size)))
        else:
            made[place:place] = made[place : place + size]
    return bytes(made)
