"""A call on its way: one HTTP request an attempt, repeated while that is safe and the deadline permits.

What the broker calls `retryable`, and certainly has not done, is repeated whatever it is. What may have been done is
repeated only where doing it twice is the same as doing it once (`is_harmless_twice`). Pauses grow, are random from zero
up (so that a thousand clients do not come back together), and are never shorter than what the broker asks for.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import aiohttp
import msgspec

from broker.client.errors import BrokerError, error_of, in_doubt, no_answer

CONNECT_SECONDS = 10.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0

READS = ("get_", "list_", "count_", "rpc.")
# A second `delete` finds nothing, a second extension begins anew, a queue that is there is left as it is.
HARMLESS_TWICE = frozenset(
    {"delete", "delete_batch", "extend_visibility", "extend_visibility_batch", "create_queue", "create_topic"}
)
# With a key in each of their messages they are stored once.
KEYED = frozenset({"enqueue", "enqueue_batch", "publish"})

_log = logging.getLogger("broker.client")


@dataclass(frozen=True)
class Call:
    """What is to be called: `params` are JSON text, `keys` the idempotency keys in it.

    `wait` is for how many seconds the broker may keep the call by what it was asked.
    """

    method: str
    params: str
    wait: float = 0.0
    keys: tuple[str, ...] = ()
    is_harmless_twice: bool = False

    @property
    def is_read(self) -> bool:
        return self.method.startswith(READS)


class Answer(NamedTuple):
    """The result, as JSON text. `was_in_doubt`: an attempt before the last may have been carried out too."""

    result: msgspec.Raw
    was_in_doubt: bool


def pause_before(attempt: int, retry_after: float = 0.0, limit: float = math.inf) -> float:
    """Return how long to wait before the next attempt, after so many: random, growing, and not before it may."""
    longest = min(limit, LONGEST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2 ** min(attempt, 16))
    return retry_after + random.uniform(0, longest)  # noqa: S311  no secret


def retry_after_of(error: BrokerError) -> float:
    """Return for how many seconds the broker asks to be left alone."""
    seconds = error.data.get("retry_after", 0.0)
    return max(0.0, float(seconds)) if isinstance(seconds, int | float) else 0.0


class Transport:
    """The connections to one broker."""

    def __init__(self, url: str, token: str | None, attempt_timeout: float) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"The broker's URL must begin with http:// or https://, not so {url!r}.")
        self._endpoint = url.rstrip("/") + "/rpc"
        self._attempt_timeout = attempt_timeout
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        # A call that waits for messages holds its connection meanwhile. So there is no limit to the
        # connections but the caller's number of concurrent calls.
        connector = aiohttp.TCPConnector(limit=0)
        self._session = aiohttp.ClientSession(connector=connector, headers=self._headers)

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def carry_out(self, call: Call, deadline: float) -> Answer:
        """Make a call, again and again for `deadline` seconds beyond its `wait`; with 0 once.

        Raises BrokerError: OutcomeUnknown where an attempt may have been carried out and none has told.
        """
        clock = asyncio.get_running_loop().time
        ends_at = clock() + deadline + call.wait
        attempt, was_in_doubt = 0, False
        while True:
            seconds = self._attempt_timeout + call.wait
            try:
                result = await self._attempt(call, min(seconds, ends_at - clock()) if deadline else seconds)
                return Answer(result, was_in_doubt)
            except BrokerError as error:
                is_in_doubt = error.outcome == "unknown" and not call.is_read
                was_in_doubt = was_in_doubt or is_in_doubt
                pause = pause_before(attempt, retry_after_of(error))
                may_be_sent = error.retryable and (call.is_read or call.is_harmless_twice or not is_in_doubt)
                if not deadline or not may_be_sent or clock() + pause >= ends_at:
                    # Under a key a refusal tells nothing of an attempt before it: that may be under way still.
                    if was_in_doubt and (is_in_doubt or error.retryable or call.keys):
                        raise in_doubt(error, call.keys) from error
                    raise
                _log.debug("%s failed and is sent again in %.2f s: %s", call.method, pause, error)
            attempt += 1
            await asyncio.sleep(pause)

    async def _attempt(self, call: Call, seconds: float) -> msgspec.Raw:
        if self._session is None:
            raise RuntimeError("The client is not open: use `async with Client(...) as client`.")
        text = f'{{"jsonrpc":"2.0","id":1,"method":{json.dumps(call.method)},"params":{call.params}}}'.encode()
        timeout = aiohttp.ClientTimeout(total=seconds, connect=CONNECT_SECONDS)
        post = self._session.post(self._endpoint, data=text, timeout=timeout, allow_redirects=False)
        try:
            async with post as response:
                return _read_answer(response.status, response.headers, await response.read(), is_read=call.is_read)
        except (aiohttp.ClientError, TimeoutError) as error:
            unsent = aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.InvalidURL
            is_certain = isinstance(error, unsent) or call.is_read
            never = isinstance(error, aiohttp.InvalidURL | aiohttp.ClientSSLError)
            reason = str(error) or type(error).__name__
            raise no_answer(
                f"No answer from {self._endpoint}: {reason}",
                outcome="none" if is_certain else "unknown",
                retryable=not never,
            ) from error


class _Error(msgspec.Struct):
    code: int
    message: str
    data: dict[str, Any]


class _Answer(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw()
    error: _Error | None = None


_decoder = msgspec.json.Decoder(_Answer)


def _read_answer(status: int, headers: Mapping[str, str], text: bytes, *, is_read: bool) -> msgspec.Raw:
    try:
        answer = _decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        answer = _Answer()
    asked_for = headers.get("Retry-After", "") if status in (429, 503) else ""
    retry_after = {"retry_after": float(asked_for)} if asked_for.isdecimal() else {}
    if answer.error is not None:
        raise error_of(answer.error.code, answer.error.message, {**retry_after, **answer.error.data})
    if not bytes(answer.result):
        # Something between here and the broker has answered in its place. A gateway may find it later.
        failed = no_answer(
            f"HTTP {status} came with no answer of a broker; is the address right?",
            outcome="none" if is_read else "unknown",
            retryable=status in (429, 502, 503, 504),
        )
        failed.data = {**failed.data, **retry_after}
        raise failed
    return answer.result
