"""Slow, broken and too many clients, spoken to through raw sockets.

Each limit is shortened to a fraction of a second; PATIENCE, many times longer, only catches a hang.
"""

import asyncio
import contextlib
import io
import json
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace

import aiohttp
import pytest
from aiohttp import web

from broker.answers import json_answer
from broker.bodies import BodyTooLarge, BodyTooSlow, ConnectionLimits, read_body
from broker.connections import ConnectionRunner, client_has_hung_up, send
from broker.draining import drain

PATIENCE = 10.0
LIMITS = ConnectionLimits(
    header_timeout=0.3,
    body_timeout=0.9,
    body_stall_timeout=0.3,
    keepalive_timeout=0.9,
    lingering_time=5.0,
)
PATIENT = ConnectionLimits()
MEBIBYTE = 2**20

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Broker:
    runner: ConnectionRunner
    port: int

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def ask(self, *pieces: bytes, pause: float = 0.0) -> bytes:
        """Send the pieces; return all that comes until the server closes."""
        reader, writer = await self.connect()
        try:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
            return await asyncio.wait_for(reader.read(), PATIENCE)
        finally:
            writer.close()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, object]:
        assert self.headers["content-type"] == "application/json"
        document = json.loads(self.body)
        assert (document["jsonrpc"], document["id"]) == ("2.0", None)
        error = document["error"]
        assert set(error) == {"code", "message", "data"}
        assert set(error["data"]) - {"retry_after", "request_id"} == {"type", "retryable", "outcome"}
        data = {name: value for name, value in error["data"].items() if name != "request_id"}
        return {"code": error["code"], **data}


def parse(answer: bytes) -> Answer:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    assert first.startswith(("HTTP/1.1 ", "HTTP/1.0 ")), first
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert len(body) == int(headers["content-length"])
    return Answer(int(first.split()[1]), headers, body)


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
    length = next(int(line[15:]) for line in head.decode().split("\r\n") if line[:15] == "Content-Length:")
    return parse(head + await asyncio.wait_for(reader.readexactly(length), PATIENCE))


@contextlib.asynccontextmanager
async def serve(limits: ConnectionLimits, handler: Handler | None = None) -> AsyncIterator[Broker]:
    async def echo(request: web.Request) -> web.StreamResponse:
        return web.Response(body=await read_body(request, limits))

    app = web.Application()
    app.router.add_route("*", "/rpc", handler or echo)
    runner = ConnectionRunner(app, limits=limits, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, backlog=1024)
    await site.start()
    try:
        yield Broker(runner, site.port)
    finally:
        await runner.cleanup()


async def eventually(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not fact():
            await asyncio.sleep(0.01)


def post(body: bytes = b"", *fields: str, length: int | None = None) -> bytes:
    lines = ["POST /rpc HTTP/1.1", "Host: a", f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([*lines, *fields, "", ""]).encode() + body


INVALID = {"code": -32600, "type": "invalid_request", "outcome": "none"}


# Slow clients


async def test_a_client_that_says_nothing_is_closed_in_silence() -> None:
    async with serve(LIMITS) as broker:
        assert await broker.ask() == b""


async def test_line_ends_alone_are_not_the_start_of_a_request() -> None:
    async with serve(LIMITS) as broker:
        assert await broker.ask(b"\r\n") == b""


async def test_one_byte_and_then_silence_is_answered_408() -> None:
    async with serve(LIMITS) as broker:
        answer = parse(await broker.ask(b"P"))
    assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert answer.error == {**INVALID, "retryable": True}


async def test_headers_that_drip_are_answered_408_however_steadily() -> None:
    async with serve(LIMITS) as broker:
        reader, writer = await broker.connect()
        with contextlib.suppress(ConnectionError):
            for byte in post(b"", *(f"X-{n}: 1" for n in range(1000))):
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
                if reader.at_eof() or broker.runner.connections == []:
                    break
        assert (await read_answer(reader)).status == 408
        writer.close()


async def test_a_body_that_stalls_is_answered_408_long_before_its_total_time() -> None:
    async with serve(replace(PATIENT, body_stall_timeout=0.3)) as broker:
        answer = parse(await broker.ask(post(b"half", length=8)))
    assert (answer.status, answer.error) == (408, {**INVALID, "retryable": True})


async def test_a_body_that_drips_is_answered_408_after_its_total_time() -> None:
    loop = asyncio.get_running_loop()
    async with serve(LIMITS) as broker:
        reader, writer = await broker.connect()
        writer.write(post(length=100_000))
        begun_at = loop.time()
        answer = asyncio.create_task(read_answer(reader))
        while not answer.done():
            writer.write(b"x")
            await asyncio.sleep(0.05)
        assert (await answer).status == 408
        assert loop.time() - begun_at >= LIMITS.body_timeout - 0.1
        writer.close()


async def test_a_slow_body_is_an_error_that_the_handler_can_catch() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        with pytest.raises(BodyTooSlow):
            await read_body(request, LIMITS)
        return web.Response(text="caught")

    async with serve(LIMITS, handler) as broker:
        assert parse(await broker.ask(post(b"half", length=8))).body == b"caught"


async def test_a_second_request_that_is_slow_is_answered_408_and_its_predecessor_normally() -> None:
    async with serve(LIMITS) as broker:
        reader, writer = await broker.connect()
        for rest in (b"", b"POST /r"):
            writer.write(post(b"one") + rest)
            assert (await read_answer(reader)).body == b"one"
        await asyncio.sleep(0)
        writer.write(b"pc")
        assert (await read_answer(reader)).status == 408
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()


async def test_a_head_begun_while_another_request_is_handled_has_its_time_too() -> None:
    proceed = asyncio.Event()

    async def handler(_: web.Request) -> web.StreamResponse:
        await proceed.wait()
        return web.Response(text="done")

    async with serve(LIMITS, handler) as broker:
        reader, writer = await broker.connect()
        writer.write(post())
        await eventually(lambda: broker.runner.requests_in_flight == 1)
        writer.write(b"POST /r")
        await asyncio.sleep(LIMITS.header_timeout * 3)
        proceed.set()
        assert (await read_answer(reader)).body == b"done"
        assert (await read_answer(reader)).status == 408
        writer.close()


async def test_an_idle_connection_lives_for_the_keepalive_timeout_and_no_longer() -> None:
    loop = asyncio.get_running_loop()
    async with serve(LIMITS) as broker:
        reader, writer = await broker.connect()
        writer.write(post(b"one"))
        assert (await read_answer(reader)).body == b"one"
        idle_since = loop.time()
        await asyncio.sleep(LIMITS.header_timeout * 2)
        writer.write(post(b"two"))
        assert (await read_answer(reader)).body == b"two"
        idle_since = loop.time()
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        assert loop.time() - idle_since >= LIMITS.keepalive_timeout - 0.1
        writer.close()


async def test_a_handler_may_take_longer_than_any_limit_on_clients() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(LIMITS.keepalive_timeout * 2)
        return web.Response(text="done")

    async with serve(LIMITS, handler) as broker:
        reader, writer = await broker.connect()
        for _ in range(2):
            writer.write(post())
            assert (await read_answer(reader)).body == b"done"
        writer.close()


async def test_a_request_in_many_pieces_and_pipelined_requests_are_answered_in_order() -> None:
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        for byte in post(b"0"):
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await read_answer(reader)).body == b"0"
        writer.write(b"".join(post(str(number).encode()) for number in range(100)))
        for number in range(100):
            assert (await read_answer(reader)).body == str(number).encode()
        writer.close()


@pytest.mark.skipif(sys.platform != "linux", reason="TCP_USER_TIMEOUT is Linux's")
async def test_a_client_that_never_reads_its_answer_is_cut_off() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        return web.Response(body=bytes(64 * MEBIBYTE))

    async with serve(LIMITS, handler) as broker:
        with socket.create_connection(("127.0.0.1", broker.port)) as client:
            client.sendall(post())
            await eventually(lambda: broker.runner.requests_in_flight == 1)
            await eventually(lambda: not broker.runner.connections)


# Requests that ask for another protocol

H2C = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__")
WEBSOCKET = (
    "Connection: Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: MTIzNDU2Nzg5MDEyMzQ1Ng==",
)


@pytest.mark.parametrize("fields", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
async def test_a_request_that_asks_for_another_protocol_is_answered_and_its_connection_stays(
    fields: tuple[str, ...],
) -> None:
    """Java's HttpClient asks with every request, and sends a body apart from its head."""
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        head, _, _ = post(b"apart", *fields).partition(b"apart")
        for request in (post(b"whole", *fields), post(b"", *fields), post(bytes(MEBIBYTE), *fields), post(b"another")):
            writer.write(request)
            assert (await read_answer(reader)).body == request.partition(b"\r\n\r\n")[2]
            writer.write(head)
            await eventually(lambda: broker.runner.requests_in_flight == 1)
            writer.write(b"apart")
            answer = await read_answer(reader)
            assert answer.body == b"apart"
            assert "connection" not in answer.headers
        writer.close()


BEHIND = {
    "a request": post(b"two"),
    "one that asks as well": post(b"two", *H2C),
    "half a request": post(b"two")[:20],
    "what breaks the URL parser": b"GET http://a]b[@/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "what is not HTTP": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
@pytest.mark.parametrize("body", [b"one", b""], ids=["body", "no body"])
@pytest.mark.parametrize("fields", [H2C, WEBSOCKET], ids=["h2c", "websocket"])
async def test_what_comes_behind_a_request_that_asks_for_another_protocol_is_dropped_and_the_answer_says_so(
    fields: tuple[str, ...], body: bytes, behind: bytes
) -> None:
    """The client learns that it has to send the rest again."""
    async with serve(PATIENT) as broker:
        answer = parse(await broker.ask(post(body, *fields) + behind))
    assert (answer.status, answer.body, answer.headers["connection"]) == (200, body, "close")


async def test_what_comes_behind_a_body_that_came_in_pieces_is_dropped_too() -> None:
    chunked = post(b"", *H2C).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked") + b"3\r\none\r\n0\r\n\r\n"
    for request in (post(b"one", *H2C), chunked):
        async with serve(PATIENT) as broker:
            answer = parse(await broker.ask(request[:30], request[30:-4], request[-4:] + post(b"two"), pause=0.02))
        assert (answer.status, answer.body, answer.headers["connection"]) == (200, b"one", "close")


async def test_requests_before_one_that_asks_for_another_protocol_are_answered_as_ever() -> None:
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        writer.write(post(b"0") + post(b"1") + post(b"2", *H2C) + post(b"3"))
        answers = [await read_answer(reader) for _ in range(3)]
        assert [(answer.body, answer.headers.get("connection")) for answer in answers] == [
            (b"0", None), (b"1", None), (b"2", "close"),
        ]  # fmt: skip
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()


async def test_an_answer_that_is_written_early_says_too_that_it_is_the_last_one() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await send(request, json_answer(b"1"))

    async with serve(PATIENT, handler) as broker:
        answer = parse(await broker.ask(post(b"one", *H2C) + post(b"two")))
    assert (answer.body, answer.headers["connection"]) == (b"1", "close")


# Broken requests

CHUNKED = b"POST /rpc HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
MALFORMED = {
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "no method": b" / HTTP/1.1\r\nHost: a\r\n\r\n",
    "unknown method": b"SEND /rpc HTTP/1.1\r\nHost: a\r\n\r\n",
    "method in lower case": b"post /rpc HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP 0.9": b"GET /rpc\r\n\r\n",
    "no space before the version": b"POST /rpcHTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP 2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP 3.0": b"GET /rpc HTTP/3.0\r\nHost: a\r\n\r\n",
    "space in the path": b"GET /rpc x HTTP/1.1\r\nHost: a\r\n\r\n",
    "NUL in the path": b"GET /r\x00pc HTTP/1.1\r\nHost: a\r\n\r\n",
    "relative path": b"GET rpc HTTP/1.1\r\nHost: a\r\n\r\n",
    "target without end": b"GET http://[::1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "target that breaks the URL parser": b"GET http://a]b[@/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "CONNECT to nowhere": b"CONNECT \nHost: a\r\n\r\n",
    "CONNECT without a target": b"CONNECT \na:b HTT%/1.1\r\nHost: a\r\n\r\n",
    "no Host": b"GET /rpc HTTP/1.1\r\n\r\n",
    "two Hosts": b"GET /rpc HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "header without colon": b"GET /rpc HTTP/1.1\r\nHost: a\r\nnonsense\r\n\r\n",
    "space in a header's name": b"GET /rpc HTTP/1.1\r\nHost: a\r\nX Y: 1\r\n\r\n",
    "NUL in a header": b"GET /rpc HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
    "bare CR in a header": b"GET /rpc HTTP/1.1\r\nHost: a\r\nX: 1\r2\r\n\r\n",
    "folded header": b"GET /rpc HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
    "long request line": b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
    "long header": b"GET /rpc HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 9000 + b"\r\n\r\n",
    "endless header": b"GET /rpc HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 4 * MEBIBYTE,
    "many headers": b"GET /rpc HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 200 + b"\r\n",
    "negative length": post(b"", length=-1),
    "length in words": b"POST /rpc HTTP/1.1\r\nHost: a\r\nContent-Length: five\r\n\r\nhello",
    "huge length": post(b"", length=10**30),
    "two lengths": post(b"hello", "Content-Length: 6"),
    "length and chunks": post(b"0\r\n\r\n", "Transfer-Encoding: chunked"),
    "unknown transfer encoding": b"POST /rpc HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: zip\r\n\r\nhello",
    "chunked twice over": b"POST /rpc HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked, zip\r\n\r\nhello",
    "chunk size in words": CHUNKED + b"five\r\nhello",
    "chunk longer than said": CHUNKED + b"3\r\nhello",
    "old websocket": b"GET /rpc HTTP/1.1\r\nHost: a\r\nSec-WebSocket-Key1: x\r\n\r\n",
}


@pytest.mark.parametrize("pieces", [1, 2, 7])
@pytest.mark.parametrize("request_", MALFORMED.values(), ids=MALFORMED.keys())
async def test_malformed_http_is_answered_400_as_json_and_logs_no_error(
    request_: bytes, pieces: int, caplog: pytest.LogCaptureFixture
) -> None:
    size = -(-len(request_) // pieces)
    async with serve(PATIENT) as broker:
        parts = [request_[start : start + size] for start in range(0, len(request_), size)]
        answer = parse(await broker.ask(*parts, pause=0.005))
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert answer.error == {**INVALID, "retryable": False}
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_chunk_that_breaks_while_the_body_is_read_is_answered_400_at_once() -> None:
    async with serve(PATIENT) as broker:
        answer = parse(await broker.ask(CHUNKED, b"5\r\nhello\r\n", b"five\r\n", pause=0.05))
    assert (answer.status, answer.error["code"]) == (400, -32600)


async def test_requests_before_a_malformed_one_are_answered() -> None:
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        writer.write(post(b"one"))
        await eventually(lambda: broker.runner.traffic[1] == 1)
        writer.write(b"nonsense\r\n\r\n")
        assert (await read_answer(reader)).body == b"one"
        assert (await read_answer(reader)).status == 400
        writer.close()


async def test_a_damaged_byte_anywhere_never_costs_the_answer() -> None:
    """Damage one valid request at each of its bytes; every answer is the echo or a 4xx."""
    whole = post(b"hello", "Connection: close")
    async with serve(replace(LIMITS, lingering_time=0.3)) as broker:

        async def damage(at: int, by: int) -> None:
            answers = await broker.ask(whole[:at] + bytes([by]) + whole[at + 1 :])
            assert b"Internal Server Error" not in answers
            assert answers[9:12] in (b"200", b"400", b"404", b"405", b"408")

        for by in (0, 10, 13, 32, 58, 0x80, 0xFF):
            await asyncio.gather(*(damage(at, by) for at in range(len(whole))))


async def test_an_unexpected_error_is_a_500_that_says_nothing_and_a_log_that_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        raise ZeroDivisionError("the secret")

    async with serve(PATIENT, handler) as broker:
        answer = parse(await broker.ask(post()))
    assert answer.status == 500
    expected = {"code": -32603, "type": "internal_error", "outcome": "unknown", "retryable": False}
    assert answer.error == expected
    assert b"secret" not in answer.body
    [record] = caplog.records
    assert (record.name, record.levelname) == ("broker.connections", "ERROR")
    assert record.exc_info is not None
    assert record.exc_info[0] is ZeroDivisionError


async def test_a_timeout_inside_the_handler_is_a_500_too(caplog: pytest.LogCaptureFixture) -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        raise TimeoutError("inside")

    async with serve(PATIENT, handler) as broker:
        assert parse(await broker.ask(post())).error["code"] == -32603
    assert len(caplog.records) == 1


# Bodies


async def test_a_body_of_five_megabytes_is_read_whole() -> None:
    body = os.urandom(5_000_000)
    async with serve(PATIENT) as broker:
        assert parse(await broker.ask(post(body, "Connection: close"))).body == body


@pytest.mark.parametrize("size", [0, 1, 2 * MEBIBYTE])
async def test_a_body_in_chunks_is_read_whole(size: int) -> None:
    body = os.urandom(size)
    chunk = b"%x\r\n%s\r\n" % (size, body) if body else b""
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        for _ in range(2):
            writer.write(CHUNKED)
            await asyncio.sleep(0.02)
            writer.write(chunk + b"0\r\n\r\n")
            assert (await read_answer(reader)).body == body
        writer.close()


@pytest.mark.parametrize("framing", ["length", "chunks"])
@pytest.mark.parametrize("size", [20, 60])
async def test_a_client_that_sends_too_much_without_waiting_gets_to_see_the_413(framing: str, size: int) -> None:
    body = bytes(MEBIBYTE)
    if framing == "length":
        pieces = [post(length=size * MEBIBYTE), *[body] * size]
    else:
        pieces = [CHUNKED, *[b"100000\r\n%s\r\n" % body] * size, b"0\r\n\r\n"]
    async with serve(PATIENT) as broker:
        answer = parse(await broker.ask(*pieces))
    assert (answer.status, answer.headers["connection"]) == (413, "close")
    assert answer.error == {**INVALID, "retryable": False}


async def test_an_aiohttp_client_that_sends_too_much_gets_to_see_the_413() -> None:
    async with serve(PATIENT) as broker, aiohttp.ClientSession() as session:
        url = f"http://127.0.0.1:{broker.port}/rpc"
        for _ in range(3):
            async with session.post(url, data=io.BytesIO(bytes(20 * MEBIBYTE))) as answer:
                assert answer.status == 413
        async with session.post(url, data=b"small") as answer:
            assert await answer.read() == b"small"


async def test_a_body_whose_length_is_too_large_is_refused_before_it_is_read() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        with pytest.raises(BodyTooLarge):
            await read_body(request, PATIENT)
        return web.Response(text="refused")

    async with serve(PATIENT, handler) as broker:
        reader, writer = await broker.connect()
        writer.write(post(length=PATIENT.max_body_bytes + 1))
        assert (await read_answer(reader)).body == b"refused"
        writer.close()


async def send_on(writer: asyncio.StreamWriter, piece: bytes) -> None:
    async with asyncio.timeout(PATIENCE):
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)


async def test_what_is_thrown_away_after_an_answer_is_bounded() -> None:
    limits = replace(PATIENT, max_lingering_bytes=MEBIBYTE)
    async with serve(limits) as broker:
        _, writer = await broker.connect()
        writer.write(post(length=100 * MEBIBYTE))
        with pytest.raises(ConnectionError):
            await send_on(writer, bytes(MEBIBYTE))
        writer.close()


async def test_a_client_that_sends_on_after_the_answer_is_closed_after_the_lingering_time() -> None:
    async with serve(replace(PATIENT, lingering_time=0.3)) as broker:
        reader, writer = await broker.connect()
        writer.write(post(length=100 * MEBIBYTE))
        assert (await read_answer(reader)).status == 413
        with pytest.raises(ConnectionError):
            await send_on(writer, b"x")
        writer.close()


async def test_a_client_that_expects_100_is_asked_for_its_body() -> None:
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        for word in (b"hello", b"again"):
            writer.write(post(length=5)[:-2] + b"Expect: 100-Continue\r\nX: \xff\r\n\r\n")
            interim = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), PATIENCE)
            assert interim == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(word)
            assert (await read_answer(reader)).body == word
        writer.close()


async def test_a_client_that_expects_100_is_not_asked_for_a_body_that_is_too_large() -> None:
    async with serve(PATIENT) as broker:
        answer = await broker.ask(post(b"", "Expect: 100-continue", length=20 * MEBIBYTE))
    assert answer.startswith(b"HTTP/1.1 413 ")


async def test_an_unknown_expectation_is_ignored() -> None:
    async with serve(PATIENT) as broker:
        answer = await broker.ask(post(b"hello", "Expect: wonders", "Connection: close"))
    assert parse(answer).body == b"hello"


async def test_compressed_bodies_are_never_decompressed() -> None:
    async with serve(PATIENT) as broker:
        answer = await broker.ask(post(b"not gzip", "Content-Encoding: gzip", "Connection: close"))
    assert parse(answer).body == b"not gzip"


# Too many clients


async def test_a_connection_over_the_limit_is_answered_503_and_others_are_served() -> None:
    async with serve(replace(PATIENT, max_connections=2)) as broker:
        kept = [await broker.connect() for _ in range(2)]
        await eventually(lambda: len(broker.runner.connections) == 2)
        answers = await asyncio.gather(*(broker.ask(post(b"no")) for _ in range(10)))
        for answer in map(parse, answers):
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert (answer.error["type"], answer.error["retry_after"]) == ("overloaded", 1)
            assert (answer.error["code"], answer.error["retryable"]) == (-32002, True)
        for reader, writer in kept:
            writer.write(post(b"yes"))
            assert (await read_answer(reader)).body == b"yes"
        kept[0][1].close()
        await eventually(lambda: len(broker.runner.connections) == 1)
        assert parse(await broker.ask(post(b"now", "Connection: close"))).body == b"now"
        kept[1][1].close()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
async def test_two_hundred_connections_of_every_fate_leak_no_descriptor() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    async def handler(request: web.Request) -> web.StreamResponse:
        assert not client_has_hung_up(request)
        return web.Response(body=await read_body(request, LIMITS))

    async with serve(replace(LIMITS, max_connections=150, lingering_time=0.3), handler) as broker:
        await broker.ask(post(b"", "Connection: close"))
        await eventually(lambda: not broker.runner.connections)
        before = descriptors()
        fates = [b"", b"P", b"nonsense\r\n\r\n", post(b"ab", length=4), post(b"ab", "Connection: close")]
        await asyncio.gather(*(broker.ask(fates[number % len(fates)]) for number in range(200)))
        await eventually(lambda: not broker.runner.connections)
        await eventually(lambda: descriptors() <= before)


# Clients that go away


@pytest.mark.parametrize("way", ["stays", "pipelines", "closes", "resets"])
async def test_a_client_that_has_hung_up_is_seen_before_the_loop_sees_it(way: str) -> None:
    found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.StreamResponse:
        assert not client_has_hung_up(request)
        if way == "pipelines":
            client.sendall(post())
        elif way == "closes":
            client.close()
        elif way == "resets":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
        # No await since: the loop cannot have looked.
        if not found.done():
            found.set_result(client_has_hung_up(request))
        return web.Response()

    async with serve(PATIENT, handler) as broker:
        with socket.create_connection(("127.0.0.1", broker.port)) as client:
            client.sendall(post())
            assert await asyncio.wait_for(found, PATIENCE) is (way in ("closes", "resets"))


async def test_a_handler_whose_client_goes_away_is_cancelled_and_then_sees_it() -> None:
    found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(PATIENCE)
        finally:
            found.set_result(client_has_hung_up(request))
        return web.Response()

    async with serve(PATIENT, handler) as broker:
        _, writer = await broker.connect()
        writer.write(post())
        await eventually(lambda: broker.runner.requests_in_flight == 1)
        writer.close()
        assert await asyncio.wait_for(found, PATIENCE)
        await eventually(lambda: not broker.runner.connections)


# Stopping


async def test_requests_in_flight_and_idle_connections_are_told_apart() -> None:
    proceed = asyncio.Event()

    async def handler(_: web.Request) -> web.StreamResponse:
        await proceed.wait()
        return web.Response(text="done")

    async with serve(PATIENT, handler) as broker:
        runner = broker.runner
        reader, writer = await broker.connect()
        idle_reader, idle_writer = await broker.connect()
        half_reader, half_writer = await broker.connect()
        await eventually(lambda: len(runner.idle_connections()) == 3)
        writer.write(post())
        half_writer.write(b"POST /r")
        await eventually(lambda: runner.requests_in_flight == 2)
        runner.close_idle()
        assert await asyncio.wait_for(idle_reader.read(), PATIENCE) == b""
        proceed.set()
        half_writer.write(post()[7:])
        assert (await read_answer(half_reader)).body == b"done"
        assert "connection" not in (await read_answer(reader)).headers
        for each in (writer, idle_writer, half_writer):
            each.close()


async def test_an_answer_of_a_draining_server_closes_its_connection_but_drops_nothing_pipelined() -> None:
    async with serve(PATIENT) as broker:
        reader, writer = await broker.connect()
        await eventually(lambda: len(broker.runner.connections) == 1)
        broker.runner.start_draining()
        assert broker.runner.is_draining
        writer.write(post(b"1") + post(b"2"))
        assert "connection" not in (await read_answer(reader)).headers
        assert (await read_answer(reader)).headers["connection"] == "close"
        assert await asyncio.wait_for(reader.read(), PATIENCE) == b""
        writer.close()


async def test_draining_waits_for_requests_and_meanwhile_still_answers_newcomers() -> None:
    proceed = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if await read_body(request, PATIENT) == b"new":
            return web.Response(status=503)
        await proceed.wait()
        return web.Response(text="done")

    async with serve(PATIENT, handler) as broker:
        old_reader, old_writer = await broker.connect()
        old_writer.write(post())
        await eventually(lambda: broker.runner.requests_in_flight == 1)
        draining = asyncio.create_task(drain(broker.runner, PATIENCE))
        await asyncio.sleep(0.5)
        assert parse(await broker.ask(post(b"new"))).status == 503
        proceed.set()
        assert (await read_answer(old_reader)).headers["connection"] == "close"
        assert await asyncio.wait_for(draining, PATIENCE)
        with pytest.raises(ConnectionRefusedError):
            await broker.connect()
        old_writer.close()


async def test_draining_gives_up_at_its_timeout() -> None:
    async def handler(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(PATIENCE * 3)
        return web.Response()

    async with serve(PATIENT, handler) as broker:
        _, writer = await broker.connect()
        writer.write(post())
        await eventually(lambda: broker.runner.requests_in_flight == 1)
        assert not await asyncio.wait_for(drain(broker.runner, 0.5), PATIENCE)
        writer.close()


@pytest.mark.parametrize("keeps_alive", [True, False])
async def test_draining_under_load_loses_no_request(keeps_alive: bool) -> None:
    """Twenty clients ask without a pause until they cannot connect; nothing else may end them.

    Nor may they hold up the stop: it is over long before its timeout, though they never fall silent.
    """
    loop = asyncio.get_running_loop()
    outcomes: dict[int, int] = {}

    async def handler(request: web.Request) -> web.StreamResponse:
        if broker.runner.is_draining:
            return web.Response(status=503)
        await read_body(request, PATIENT)
        await asyncio.sleep(0.005)
        return web.Response(text="done")

    async def client(url: str) -> None:
        connector = aiohttp.TCPConnector(force_close=not keeps_alive)
        async with aiohttp.ClientSession(connector=connector) as session:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                while True:
                    async with session.post(url, data=b"x" * 1000) as answer:
                        await answer.read()
                        outcomes[answer.status] = outcomes.get(answer.status, 0) + 1

    async with serve(PATIENT, handler) as broker:
        url = f"http://127.0.0.1:{broker.port}/rpc"
        clients = [asyncio.create_task(client(url)) for _ in range(20)]
        await eventually(lambda: outcomes.get(200, 0) >= 200)
        begun_at = loop.time()
        assert await asyncio.wait_for(drain(broker.runner, PATIENCE), PATIENCE * 2)
        assert loop.time() - begun_at < PATIENCE / 2
        await asyncio.wait_for(asyncio.gather(*clients), PATIENCE)
    assert set(outcomes) <= {200, 503}
