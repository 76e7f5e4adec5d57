"""The other end of a push: what a receiver is sent, and what its answer means.

A POST has the message's body as it was sent and the headers of the Standard Webhooks specification. Its answer means
what its status says, once the head has been read. What else comes is thrown away, up to a limit; it is not shown to
anybody. Each phase has a time limit, all of them together have one, and redirects are not followed.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import NamedTuple

import aiohttp
from yarl import URL

from broker import __version__
from broker.addresses import ForbiddenAddress, Guard
from broker.signatures import sign

# To find the host, connect and agree on TLS.
CONNECT_SECONDS = 5.0
# What may follow the head of an answer, and for how long: then the connection is dropped.
MAX_ANSWER_BYTES = 64 * 2**10
ANSWER_SECONDS = 2.0
# How long a receiver may ask to be left alone: as long as a lease may be, and not so short that it would be a loop.
MAX_RETRY_AFTER = 43_200.0
MIN_RETRY_AFTER = 0.5

OK, GONE = range(200, 300), 410
ASKS_FOR_PATIENCE = (429, 503)


class Outcome(StrEnum):
    """What came of a push."""

    DELIVERED = "delivered"
    GONE = "gone"
    REFUSED = "refused"
    TIMEOUT = "timeout"
    UNANSWERED = "unanswered"
    FORBIDDEN = "forbidden"


class Answer(NamedTuple):
    """What came of a push; `retry_after` is for how many seconds the receiver asked to be left alone."""

    outcome: Outcome
    retry_after: float | None = None


class Receivers:
    """Sends messages to receivers. `timeout` is in seconds, for a whole push."""

    def __init__(self, guard: Guard, *, timeout: float, tls: ssl.SSLContext | None = None) -> None:
        self._guard = guard
        self._timeout = aiohttp.ClientTimeout(total=timeout, connect=min(CONNECT_SECONDS, timeout))
        self._tls = tls
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def post(self, url: URL, message_id: str, body: bytes, secrets: Sequence[bytes]) -> Answer:
        """Send one message; return what came of it, whatever the other end does."""
        timestamp = int(time.time())
        headers = {
            "webhook-id": message_id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(message_id, timestamp, body, secrets),
        }
        try:
            session = self._session(url.scheme)
            async with session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                answer = answer_of(response.status, response.headers)
                await _throw_away(response)
                return answer
        except TimeoutError:
            return Answer(Outcome.TIMEOUT)
        except aiohttp.ClientConnectorError as error:
            is_forbidden = isinstance(error.os_error, ForbiddenAddress)
            return Answer(Outcome.FORBIDDEN if is_forbidden else Outcome.UNANSWERED)
        # Among them whatever aiohttp makes of what is no HTTP.
        except (aiohttp.ClientError, OSError, ValueError):
            return Answer(Outcome.UNANSWERED)

    def _session(self, scheme: str) -> aiohttp.ClientSession:
        """Return the session for a scheme: connections are kept and used again, and nothing else."""
        session = self._sessions.get(scheme)
        if session is None:
            session = self._sessions[scheme] = aiohttp.ClientSession(
                connector=self._guard.connector(scheme, tls=self._tls),
                timeout=self._timeout,
                headers={"Content-Type": "application/json", "User-Agent": f"WonderQ/{__version__}"},
                skip_auto_headers=("Accept", "Accept-Encoding"),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                read_bufsize=MAX_ANSWER_BYTES,
                trust_env=False,
            )
        return session

    async def close(self) -> None:
        """Close every connection."""
        while self._sessions:
            _, session = self._sessions.popitem()
            await session.close()


def answer_of(status: int, headers: Mapping[str, str]) -> Answer:
    """Return what an answer means by its head."""
    if status in OK:
        return Answer(Outcome.DELIVERED)
    if status == GONE:
        return Answer(Outcome.GONE)
    if status in ASKS_FOR_PATIENCE:
        return Answer(Outcome.REFUSED, retry_after(headers.get("Retry-After", "")))
    return Answer(Outcome.REFUSED)


def retry_after(text: str) -> float | None:
    """Return the seconds that a header Retry-After names, by a number or a date, within limits; None if by neither."""
    text = text.strip()
    try:
        seconds = float(text) if text.isascii() and text.isdigit() else _seconds_until(text)
    except ValueError:
        return None
    return min(max(seconds, MIN_RETRY_AFTER), MAX_RETRY_AFTER)


def _seconds_until(date: str) -> float:
    """Return the seconds until a date of HTTP. Raises ValueError where it is none."""
    try:
        moment = parsedate_to_datetime(date)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        seconds = (moment - datetime.now(UTC)).total_seconds()
    except (OverflowError, IndexError, TypeError) as error:
        raise ValueError("not a date") from error
    return seconds if math.isfinite(seconds) else MAX_RETRY_AFTER


async def _throw_away(response: aiohttp.ClientResponse) -> None:
    """Read what follows the head, so that the connection can be used again; drop it where that is too much."""
    if response.content.at_eof():
        return
    left = MAX_ANSWER_BYTES
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            while left >= 0 and not response.content.at_eof():
                left -= len(await response.content.readany())
    except (aiohttp.ClientError, OSError, ValueError):
        left = -1
    if left < 0:
        response.close()
