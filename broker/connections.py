"""Connections: the HTTP server's patience with clients that are slow, broken or too many.

aiohttp waits without end for a request's head and for its body, answers broken HTTP in its own words with
a traceback in the log, and drops requests when it stops. `ConnectionRunner` is its AppRunner with a limit on
each of these. It does not promise an answer to a client that still sends after `lingering_time` or
`max_lingering_bytes`: such a client may see a reset. Handlers read bodies with `bodies.read_body`, nothing else.
"""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

from aiohttp import hdrs, web
from aiohttp.http import HttpVersion10, HttpVersion11, RawRequestMessage
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, RequestPayloadError, _ErrInfo
from aiohttp.web_request import BaseRequest
from multidict import CIMultiDict, CIMultiDictProxy

from broker import requests
from broker.answers import (
    BODY_TOO_LARGE,
    INTERNAL_ERROR,
    MALFORMED,
    SERVER_NAME,
    TOO_MANY_CONNECTIONS,
    TOO_SLOW,
    JsonAnswer,
    Refusal,
)
from broker.bodies import EXPECTS_CONTINUE, STOOD_STILL_SECONDS, BodyTooLarge, BodyTooSlow, ConnectionLimits, spread
from broker.errors import let_go

logger = logging.getLogger(__name__)

# Connections beyond the limit that may wait for their 503 to be read; further ones are closed at once.
MAX_REFUSED_CONNECTIONS = 256
# How long a client may take to read why it is sent away.
SENT_AWAY_SECONDS = 1.0

Guard = Callable[..., Awaitable[Any]]
OverLimit = Callable[[str], None]

# What is to be said with the answer to a request, whoever answers: set it as request[MORE_HEADERS].
MORE_HEADERS = web.RequestKey("more_headers", dict[str, str])


_REFUSAL_BY_ERROR: dict[type, Refusal] = {
    RequestPayloadError: MALFORMED,
    BodyTooLarge: BODY_TOO_LARGE,
    BodyTooSlow: TOO_SLOW,
}
_LIMIT_BY_ERROR: dict[type, str] = {BodyTooLarge: "request_bytes", BodyTooSlow: "body_time"}


async def send(request: web.Request, answer: web.StreamResponse) -> web.StreamResponse:
    """Write a `json_answer` now, for a handler that has to know whether it could be written; return what to return.

    Raises ConnectionError where the client is gone.
    """
    assert isinstance(answer, JsonAnswer)
    connection = cast(Connection, request.protocol)
    if connection.can_answer_in_one_piece(request):
        await connection.write_answer(answer)
        return cast(web.StreamResponse, answer)
    response = answer.to_response()
    connection.prepare_answer(request, response)
    await response.prepare(request)
    await response.write_eof()
    return response


def client_has_hung_up(request: web.Request) -> bool:
    """Say whether the client has closed its end, also where the event loop has not seen it yet.

    One system call. Pipelined bytes that wait to be read hide a FIN behind them.
    """
    transport = request.transport
    if transport is None or transport.is_closing():
        return True
    return _peek(transport) == b""


def _peek(transport: asyncio.BaseTransport) -> bytes | None:
    """Return the first byte the kernel holds: b"" for the end, None while there is nothing."""
    # The descriptor is borrowed and given back by detach: neither duplicated nor closed.
    borrowed = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 0, fileno=transport.get_extra_info("socket").fileno())
    try:
        return borrowed.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except (BlockingIOError, InterruptedError):
        return None
    except OSError:  # A reset is an end, too.
        return b""
    finally:
        borrowed.detach()


def _size(message: RawRequestMessage, data: bytes) -> int:
    """Return how many bytes a request has that begins with these, or -1 where they do not tell."""
    head, end, _ = data.partition(b"\r\n\r\n")
    if message.chunked or not end or not head.startswith(f"{message.method} ".encode()):
        return -1
    return len(head) + len(end) + int(message.headers.get(hdrs.CONTENT_LENGTH, "0"))


class Connection(RequestHandler):
    """One client's connection: aiohttp's protocol with a watchdog.

    The watchdog is aiohttp's own keep-alive timer: one handle, re-armed when it fires; only a head that
    arrives in pieces moves it. The start of a head that came in the same segment as the request before it
    cannot be seen from outside the parser: its time runs from its next byte, within `keepalive_timeout`.
    """

    __slots__ = (
        "_channel", "_discarded", "_head_deadline", "_is_lingering", "_is_new", "_limits", "_newest_payload",
        "_newest_upgrade", "_owner", "_upgrade_bytes_left",
    )  # fmt: skip

    def __init__(self, manager: "ConnectionServer", **kwargs: Any) -> None:
        super().__init__(manager, **kwargs)
        self._owner = manager
        self._limits = manager.limits
        self._channel: asyncio.Transport | None = None
        self._newest_payload: StreamReader = EMPTY_PAYLOAD
        self._newest_upgrade: RawRequestMessage | None = None
        self._upgrade_bytes_left: int | None = None  # While a request is arriving that asks for another protocol.
        self._head_deadline: float | None = None  # While the head of a request is half here.
        self._discarded: int | None = None  # Bytes thrown away since parsing ended.
        self._is_lingering = False
        self._is_new = True  # Until its first request.

    @property
    def is_busy(self) -> bool:
        """Whether a request is arriving, being handled, or being answered."""
        channel = self._channel
        if channel is None:
            return False
        if channel.get_write_buffer_size():
            return True
        if self._is_lingering or channel.is_closing():
            return False
        waiter = self._waiter
        return bool(waiter is None or waiter.done() or self._messages or self._head_deadline)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so.
        self._channel = transport
        if self._owner.is_full:
            self._refuse(transport)
            return
        super().connection_made(transport)
        self._next_keepalive_close_time = self._loop.time() + spread(self._limits.header_timeout)
        self._watch_until(self._next_keepalive_close_time)
        # A client that never reads its answer acknowledges the kernel's probes for ever; this ends it.
        with suppress(OSError, AttributeError):
            transport.get_extra_info("socket").setsockopt(
                socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(self._limits.keepalive_timeout * 1000)
            )

    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._owner.refused.discard(self)
        self._channel = None
        self._newest_payload = EMPTY_PAYLOAD  # It refers back to this connection.

    def data_received(self, data: bytes) -> None:
        if self._discarded is not None:
            self._discarded += len(data)
            if self._discarded > self._limits.max_lingering_bytes:
                self.force_close()
            return
        if self._upgraded:
            self._discarded = len(data)  # aiohttp would parse it later, where its parser's errors cost the answer.
            return
        begins_head = self._newest_payload.is_eof()
        try:
            super().data_received(data)
        except Exception as exc:  # aiohttp's parser lets IndexError out for "GET http://a]b[@/".
            self._give_up_parsing(exc)
            return
        messages = self._messages
        if messages:
            message, payload = messages[-1]
            self._head_deadline = None
            self._is_new = False
            if isinstance(message, _ErrInfo):
                messages.pop()
                self._give_up_parsing(message.exc)
            elif message.url is None:  # "CONNECT \n": aiohttp's loop would die of it.
                messages.pop()
                self._give_up_parsing(ValueError("no target"))
            else:
                self._newest_payload = payload
                if message.upgrade and message is not self._newest_upgrade:
                    self._newest_upgrade = message
                    self._upgrade_bytes_left = _size(message, data)
        elif begins_head and self._head_deadline is None and data.strip(b"\r\n"):
            self._head_deadline = self._loop.time() + spread(self._limits.header_timeout)
            self._watch_until(self._head_deadline)
        if self._upgrade_bytes_left is not None:
            self._follow_upgrade(len(data))

    def _follow_upgrade(self, received: int) -> None:
        """Make the answer to a request that asks for another protocol the last one, where bytes came behind it.

        Such a request is answered as any other (RFC 9110, 7.8). But the parser takes what comes behind it in the
        same segment for the other protocol's, and drops it.
        """
        assert self._upgrade_bytes_left is not None
        self._upgrade_bytes_left -= received
        if self._newest_payload.is_eof():
            if self._upgrade_bytes_left != 0:
                self._discarded = 0
                self._message_tail = b""
            self._upgrade_bytes_left = None

    def _give_up_parsing(self, exc: BaseException) -> None:
        """Answer 400 after the requests already here; tell a handler that waits for the broken body."""
        self._discarded = 0
        self._head_deadline = None
        broken = self._messages[-1][1] if self._messages else self._newest_payload
        if not broken.is_eof():
            broken.set_exception(RequestPayloadError("malformed"))
        self._messages.append((_ErrInfo(400, exc, "malformed"), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _watch_until(self, deadline: float) -> None:
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
        self._keepalive_handle = self._loop.call_at(deadline, self._process_keepalive)

    def _process_keepalive(self) -> None:
        """Close the connection if its time is over, else come back when it may be."""
        self._keepalive_handle = None
        if self.transport is None or self._force_close:
            return
        now = self._loop.time()
        waiter = self._waiter
        if waiter is None or waiter.done() or self._messages:
            # While a request is in hand its client is not to blame; what is half here may be the next one.
            deadline = now + self._limits.header_timeout
            if self._head_deadline is not None:
                self._head_deadline = deadline
        else:
            deadline = self._head_deadline or self._next_keepalive_close_time
            if now > deadline + STOOD_STILL_SECONDS and _peek(self.transport):
                # What the client has sent came in time, perhaps; timers are looked at before it is read.
                deadline = self._next_keepalive_close_time = now + STOOD_STILL_SECONDS
                if self._head_deadline is not None:
                    self._head_deadline = deadline
            elif now >= deadline:
                if self._head_deadline is not None or self._is_new:
                    self._owner.over_limit("header_time")
                if self._head_deadline is None:
                    self.force_close()
                else:
                    self._send_away(self.transport, TOO_SLOW)
                return
        self._watch_until(deadline)

    def _handle_request(
        self,
        request: BaseRequest,
        start_time: float | None,
        request_handler: Callable[[BaseRequest], Awaitable[web.StreamResponse]],
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        if hdrs.EXPECT in request._headers:  # Not `headers`, which would be cached as they are.
            # aiohttp would ask for the body before any handler could refuse it.
            headers = CIMultiDict(request._headers)
            expectation = headers.popall(hdrs.EXPECT)[0]
            request._headers = CIMultiDictProxy(headers)
            is_known = expectation.lower() == "100-continue" and request.version >= HttpVersion11
            request[EXPECTS_CONTINUE] = is_known
        if request._version < HttpVersion10:  # A first line that ends before "HTTP/1.1".
            malformed = _ErrInfo(400, ValueError("no version"), "malformed")
            request_handler = self._make_error_handler(malformed)
            request._version = HttpVersion10  # Or the answer would say HTTP/0.9, which is none.
        return super()._handle_request(request, start_time, request_handler)

    def can_answer_in_one_piece(self, request: BaseRequest) -> bool:
        """Whether nothing out of the ordinary has to be said or done with an answer."""
        return (
            request.version == HttpVersion11
            and request.keep_alive
            and request.content.is_eof()
            and self._discarded is None
            and not self._upgraded
            and not self._owner.is_draining
            and MORE_HEADERS not in request
        )

    async def write_answer(self, answer: JsonAnswer) -> None:
        """Write an answer, unless that was done already. Raises ConnectionError where the client is gone."""
        if answer.is_sent:
            return
        answer.is_sent = True
        if self.transport is None or self.transport.is_closing():
            raise ConnectionResetError
        self.transport.write(answer.to_bytes())
        if self._paused:
            await self._drain_helper()

    async def _finish_in_one_piece(self, request: BaseRequest, answer: JsonAnswer) -> tuple[web.StreamResponse, bool]:
        request._finish()
        try:
            await self.write_answer(answer)
        except ConnectionError:
            return cast(web.StreamResponse, answer), True
        return cast(web.StreamResponse, answer), False

    def finish_response(
        self, request: BaseRequest, resp: web.StreamResponse | JsonAnswer, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        if isinstance(resp, JsonAnswer):
            if resp.is_sent or self.can_answer_in_one_piece(request):
                return self._finish_in_one_piece(request, resp)
            resp = resp.to_response()
        if isinstance(resp, web.StreamResponse) and not resp.prepared:
            self.prepare_answer(request, resp)
        if not request.content.is_eof() or (self._discarded is not None and not self._messages):
            return self._finish_and_linger(request, resp, start_time)
        return super().finish_response(request, resp, start_time)

    def prepare_answer(self, request: BaseRequest, response: web.StreamResponse) -> None:
        """Say who answers, and not of which parts and versions it is made; and what else is to be said.

        While the server is draining, or parsing has ended, an answer is the last of its connection, unless further
        requests are here already.
        """
        response.headers.setdefault("Server", SERVER_NAME)
        response.headers.update(request.get(MORE_HEADERS, {}))
        request_id = requests.current.get()
        if request_id is not None:
            response.headers[requests.HEADER] = request_id
        if (self._owner.is_draining or self._discarded is not None) and not self._messages:
            response.force_close()

    async def _finish_and_linger(
        self, request: BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Answer a client that may still be sending, and let it read the answer.

        Closing with unread bytes makes the kernel send a reset, which overtakes the answer. So only this
        end is closed, and what comes is thrown away until the client closes too (its task is then
        cancelled), or the time or the bytes are used up.
        """
        if isinstance(resp, web.StreamResponse):
            resp.force_close()
        result = await super().finish_response(request, resp, start_time)
        if self.transport is not None and not self.transport.is_closing():
            self._linger(self.transport)
            await asyncio.sleep(self._limits.lingering_time)
        return result

    def _linger(self, transport: asyncio.Transport) -> None:
        self._is_lingering = True
        self._discarded = self._discarded or 0
        if transport.can_write_eof():
            transport.write_eof()
        self._resume_transport_reading()

    def _refuse(self, transport: asyncio.Transport) -> None:
        """Answer 503 without a task, and wait a second for the client to read it."""
        self._owner.over_limit("connections")
        if len(self._owner.refused) >= MAX_REFUSED_CONNECTIONS:
            transport.abort()
            return
        self.transport = transport
        self._owner.refused.add(self)
        self._owner.connection_made(self, transport)
        self._send_away(transport, TOO_MANY_CONNECTIONS)

    def _send_away(self, transport: asyncio.Transport, refusal: Refusal) -> None:
        """Answer a client that no task serves, and close in a moment: at once would reset what it still sends."""
        transport.write(refusal.to_bytes())
        self._linger(transport)
        self._keepalive_handle = self._loop.call_later(SENT_AWAY_SECONDS, self.force_close)

    def handle_error(
        self,
        request: BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer as JSON-RPC, saying nothing of the inside; log only what is the server's fault."""
        if requests.current.get() is None:
            requests.begin(None)  # What cannot be read comes here without the guard.
        refusal = MALFORMED if status == 400 else _REFUSAL_BY_ERROR.get(type(exc), INTERNAL_ERROR)
        limit_name = _LIMIT_BY_ERROR.get(type(exc))
        if limit_name is not None:
            self._owner.over_limit(limit_name)
        if refusal is INTERNAL_ERROR:
            logger.exception("request failed: method=%r path=%r", request.method, request.path)
        if exc is not None:
            let_go(exc)
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun, so it can only be cut off")
        if refusal is BODY_TOO_LARGE:
            limit = self._limits.max_body_bytes
            refusal = replace(refusal, message=f"{refusal.message} The limit is {limit} bytes (--max-request-bytes).")
        return refusal.to_response()


class ConnectionServer(web.Server):
    """The connections of one process, and whether it takes more."""

    def __init__(
        self, origin: web.Server, limits: ConnectionLimits, guard: Guard | None, over_limit: OverLimit
    ) -> None:
        super().__init__(
            origin.request_handler if guard is None else partial(guard, handler=origin.request_handler),
            request_factory=origin.request_factory,
            handler_cancellation=True,
            loop=origin._loop,
            **origin._kwargs,
        )
        self.limits = limits
        self.over_limit = over_limit
        self.is_draining = False
        self.accepted_count = 0
        self.refused: set[Connection] = set()

    def __call__(self) -> RequestHandler:
        self.accepted_count += 1
        return Connection(self, loop=self._loop, **self._kwargs)

    @property
    def is_full(self) -> bool:
        return len(self._connections) - len(self.refused) >= self.limits.max_connections


class ConnectionRunner(web.AppRunner):
    """Run an application over `Connection`s. The methods below need `setup()` to have run.

    `guard` is called for every request, with the application as its `handler`: a middleware that can also answer
    in the place of the application, before its routes are looked at. `over_limit` is told of the limit that a client
    was over.
    """

    def __init__(
        self,
        app: web.Application,
        *,
        limits: ConnectionLimits,
        guard: Guard | None = None,
        over_limit: OverLimit = lambda limit: None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            access_log=None,
            keepalive_timeout=limits.keepalive_timeout,
            tcp_keepalive=True,
            auto_decompress=False,
            lingering_time=0.0,  # aiohttp's own has no limit of bytes.
            **kwargs,
        )
        self._limits = limits
        self._guard = guard
        self._over_limit = over_limit

    async def _make_server(self) -> ConnectionServer:
        return ConnectionServer(await super()._make_server(), self._limits, self._guard, self._over_limit)

    @property
    def _connection_server(self) -> ConnectionServer:
        assert isinstance(self.server, ConnectionServer), "call setup() first"
        return self.server

    @property
    def connections(self) -> list[Connection]:
        return [each for each in self._connection_server.connections if isinstance(each, Connection)]

    @property
    def requests_in_flight(self) -> int:
        """Connections on which a request is arriving, being handled, or being answered."""
        return sum(each.is_busy for each in self.connections)

    @property
    def is_draining(self) -> bool:
        return self._connection_server.is_draining

    @property
    def traffic(self) -> tuple[int, int]:
        """How many connections and requests there have been: the same again where nothing came meanwhile."""
        return self._connection_server.accepted_count, self._connection_server.requests_count

    def idle_connections(self) -> list[Connection]:
        return [each for each in self.connections if not each.is_busy]

    def start_draining(self) -> None:
        """Make every further answer the last of its connection (`Connection: close`)."""
        self._connection_server.is_draining = True

    def close_idle(self) -> None:
        """Close idle connections with a FIN, but those with bytes waiting: these are about to be requests."""
        for each in self.idle_connections():
            if each.transport is not None and not _peek(each.transport):
                each.force_close()
