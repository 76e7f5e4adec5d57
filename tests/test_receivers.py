"""What a receiver is sent, and what its answer means, however it is given."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from standardwebhooks.webhooks import Webhook
from yarl import URL

from broker import __version__, receivers, signatures
from broker.addresses import Guard, parse_network
from broker.receivers import MAX_RETRY_AFTER, MIN_RETRY_AFTER, Answer, Outcome, Receivers, retry_after
from receiver import Behaviour, Receiver, answering, endless, receiving, resetting, saying, silent

SECRET = signatures.new_secret()
BODY = b'{ "amount" : 1.0, "text":"\\u0000" }'
DEADLINE = 20.0


@contextlib.asynccontextmanager
async def sending(*, timeout: float = DEADLINE, guard: Guard | None = None) -> AsyncIterator[Receivers]:
    """Send to receivers on this machine."""
    made = Receivers(guard or Guard([parse_network("127.0.0.0/8")]), timeout=timeout)
    try:
        yield made
    finally:
        await made.close()


async def push(receiver: Receiver, *, timeout: float = DEADLINE, url: str = "") -> Answer:
    """Push one message; return what came of it, in time."""
    async with sending(timeout=timeout) as sender:
        pushing = sender.post(URL(url or receiver.url), "000000000000002a", BODY, [SECRET])
        return await asyncio.wait_for(pushing, DEADLINE)


async def test_a_receiver_gets_the_very_bytes_signed_and_no_header_that_it_does_not_need() -> None:
    async with receiving() as receiver:
        assert await push(receiver, url=f"{receiver.url}/a%2Fb?key=a%26b%2B&c=%20") == (Outcome.DELIVERED, None)
        (pushed,) = receiver.requests
    assert pushed.line == "POST /hook/a%2Fb?key=a%26b%2B&c=%20 HTTP/1.1"
    assert pushed.body == BODY
    signed = {name: pushed.headers.pop(name) for name in ("webhook-id", "webhook-timestamp", "webhook-signature")}
    assert abs(int(signed["webhook-timestamp"]) - time.time()) < DEADLINE
    Webhook(signatures.secret_text(SECRET)).verify(BODY, signed)
    assert pushed.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "user-agent": f"WonderQ/{__version__}",
    }


@pytest.mark.parametrize("status", [200, 201, 202, 204, 205, 206, 226, 299])
async def test_every_2xx_is_a_delivery(status: int) -> None:
    async with receiving(answering(status)) as receiver:
        assert await push(receiver) == (Outcome.DELIVERED, None)


@pytest.mark.parametrize(
    "status", [101, 300, 301, 302, 303, 304, 307, 308, 400, 401, 404, 408, 418, 500, 502, 504, 599]
)
async def test_every_other_status_is_a_refusal(status: int) -> None:
    async with receiving(answering(status, Retry_After="7")) as receiver:
        assert await push(receiver) == (Outcome.REFUSED, None)


async def test_410_says_that_nothing_more_is_wanted() -> None:
    async with receiving(answering(410)) as receiver:
        assert await push(receiver) == (Outcome.GONE, None)


@pytest.mark.parametrize("status", [429, 503])
async def test_only_who_is_busy_is_left_alone_for_as_long_as_it_asks(status: int) -> None:
    async with receiving(answering(status, Retry_After="7")) as receiver:
        assert await push(receiver) == (Outcome.REFUSED, 7.0)
    async with receiving(answering(status)) as receiver:
        assert await push(receiver) == (Outcome.REFUSED, None)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", MIN_RETRY_AFTER),
        ("1", 1.0),
        (" 120 ", 120.0),
        ("43200", 43_200.0),
        ("43201", MAX_RETRY_AFTER),
        ("9" * 400, MAX_RETRY_AFTER),
        ("Sun, 06 Nov 1994 08:49:37 GMT", MIN_RETRY_AFTER),
        ("Sunday, 06-Nov-94 08:49:37 GMT", MIN_RETRY_AFTER),
        ("Sun Nov  6 08:49:37 1994", MIN_RETRY_AFTER),
        ("Fri, 31 Dec 9999 23:59:59 GMT", MAX_RETRY_AFTER),
        ("", None),
        ("-1", None),
        ("1.5", None),
        ("1e3", None),
        ("²", None),
        ("soon", None),
        ("Sun, 99 Nov 2094 08:49:37 GMT", None),
        ("Sun, 06 Nov 99999999999 08:49:37 GMT", None),
    ],
)
def test_retry_after_is_read_in_both_forms_and_within_limits(text: str, seconds: float | None) -> None:
    assert retry_after(text) == seconds


def test_a_date_to_come_is_as_far_away_as_it_is() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    found = retry_after(date)
    assert found is not None
    assert 98 < found <= 100


async def test_a_redirect_to_a_private_address_is_not_followed() -> None:
    async with receiving() as private:
        for status in (301, 302, 303, 307, 308):
            async with receiving(answering(status, Location=private.url)) as receiver:
                assert await push(receiver) == (Outcome.REFUSED, None)
        assert private.connections == 0


GARBAGE = {
    "no HTTP": saying(b"\x16\x03\x01\x02\x00 this is no HTTP\r\n\r\n", then_close=True),
    "a greeting of another protocol": saying(b"220 mail.test ESMTP\r\n"),
    "a status that is none": saying(b"HTTP/1.1 abc OK\r\n\r\n"),
    "half a head": saying(b"HTTP/1.1 200 OK\r\nContent-Le", then_close=True),
    "half a head and a reset": resetting(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "a reset": resetting(),
    "the end of the connection": saying(b"", then_close=True),
    "a header of a megabyte": saying(b"HTTP/1.1 200 OK\r\nA: " + b"a" * 2**20 + b"\r\n\r\n"),
    "a million headers": saying(b"HTTP/1.1 200 OK\r\n" + b"A: a\r\n" * 1_000_000 + b"\r\n"),
    "two lengths": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n"),
}


@pytest.mark.parametrize("behave", GARBAGE.values(), ids=GARBAGE)
async def test_what_is_no_answer_is_told_from_one(behave: Behaviour) -> None:
    async with receiving(behave) as receiver:
        assert await push(receiver) == (Outcome.UNANSWERED, None)


SLOW = {
    "nothing at all": silent,
    "half a head, and then nothing": saying(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "a head without end": endless(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("behave", SLOW.values(), ids=SLOW)
async def test_who_does_not_answer_in_time_is_not_waited_for(behave: Behaviour) -> None:
    async with receiving(behave) as receiver:
        assert await push(receiver, timeout=0.2) == (Outcome.TIMEOUT, None)


LONG = {
    "a body without end": endless(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"
    ),
    "a body of a terabyte": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000000\r\n\r\n"),
    "a body until the connection ends, which it does not": endless(b"HTTP/1.1 200 OK\r\n\r\n"),
    "a body that does not come": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"),
    "a body that is cut short": saying(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", then_close=True),
    "a body that ends in a reset": resetting(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf"),
    "a compressed body, which is not unpacked": saying(
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 8\r\n\r\nno gzip!"
    ),
}


@pytest.mark.parametrize("behave", LONG.values(), ids=LONG)
async def test_the_head_alone_decides_and_the_rest_is_read_to_a_limit(
    behave: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receivers, "ANSWER_SECONDS", 0.2)
    async with receiving(behave) as receiver:
        assert await push(receiver) == (Outcome.DELIVERED, None)


ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    b"HTTP/1.1 429 Busy\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    b"HTTP/1.0 204 No\r\nSet-Cookie: a=b; Path=/\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\nxx",
    b"HTTP/1.1 301 Moved\r\nLocation: //[::1]:99999/\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=\xff\r\nContent-Encoding: br\r\n\r\n\x00\x01",
    b"HTTP/1.1 103 Early\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
)
ADDED = (b"\r\n", b"\r\n\r\n", b":", b"\x00", b"Content-Length: -1\r\n", b"Transfer-Encoding: gzip\r\n", b"9" * 20)


def spoilt(chance: random.Random) -> bytes:
    """Return an answer with some bytes changed, added or left out."""
    answer = bytearray(chance.choice(ANSWERS))
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = chance.randrange(len(answer) + 1)
        match chance.randrange(4):
            case 0:
                answer[at : at + 1] = chance.randbytes(1)
            case 1:
                del answer[at : at + chance.randrange(1, 10)]
            case 2:
                answer[at:at] = chance.choice(ANSWERS)
            case _:
                answer[at:at] = chance.choice(ADDED)
    return bytes(answer)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_answered_has_an_outcome(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receivers, "ANSWER_SECONDS", 0.05)
    chance = random.Random(seed)
    async with receiving() as receiver, sending(timeout=0.3) as sender:
        for _ in range(100):
            receiver.behave = saying(spoilt(chance), then_close=chance.random() < 0.8)
            answer = await sender.post(URL(receiver.url), "1", BODY, [SECRET])
            assert answer.outcome in set(Outcome)


async def test_a_connection_is_used_again_after_a_short_answer_and_dropped_after_a_long_one() -> None:
    async with receiving(answering(200, b"x" * 1000)) as receiver, sending() as sender:
        for _ in range(3):
            await sender.post(URL(receiver.url), "1", BODY, [SECRET])
        assert receiver.connections == 1
        receiver.behave = answering(500, b"x" * 200_000)
        for _ in range(3):
            await sender.post(URL(receiver.url), "1", BODY, [SECRET])
        assert receiver.connections == 3


async def test_cookies_are_forgotten() -> None:
    async with receiving(answering(200, Set_Cookie="a=b; Path=/")) as receiver, sending() as sender:
        for _ in range(2):
            await sender.post(URL(receiver.url.replace("127.0.0.1", "localhost")), "1", BODY, [SECRET])
        assert not any("cookie" in pushed.headers for pushed in receiver.requests)


async def test_who_is_not_there_is_told_from_who_may_not_be_reached() -> None:
    async with receiving() as receiver:
        pass
    assert await push(receiver) == (Outcome.UNANSWERED, None)
    async with sending(guard=Guard()) as sender, receiving() as receiver:
        for url in (receiver.url, receiver.url.replace("127.0.0.1", "localhost"), "http://[::ffff:127.0.0.1]/"):
            assert await sender.post(URL(url), "1", BODY, [SECRET]) == (Outcome.FORBIDDEN, None), url
        for url in ("http://127.1/", "https://a..b/", "http://receiver.invalid/"):
            assert await sender.post(URL(url), "1", BODY, [SECRET]) == (Outcome.UNANSWERED, None), url
        assert receiver.connections == 0


async def test_who_takes_the_connection_and_speaks_no_tls_is_not_waited_for() -> None:
    async with receiving(silent) as receiver:
        assert await push(receiver, url=receiver.url.replace("http", "https"), timeout=0.2) == (Outcome.TIMEOUT, None)
