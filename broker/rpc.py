"""`POST /rpc`: from the bytes of a request to the bytes of its answer.

`envelopes` reads the envelope and the batch, because jsonrpcserver would refuse a whole batch for one bad element;
calling the method and its outcome go through jsonrpcserver, and only this module knows that. Its check of the
params against the function's signature is left out: the schema has been checked against the signature at the start,
and the params against the schema. An `id` is answered with the very bytes that it came in.

Promises: one bad element of a batch spoils no other; whatever a method raises becomes an error of the contract
that says nothing of the inside; what a method leased for a client that is gone is undone.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from aiohttp import web
from jsonrpcserver.async_dispatcher import call as call_method
from jsonrpcserver.request import Request as DispatchRequest
from jsonrpcserver.result import Error, Result, Success
from jsonrpcserver.sentinels import NOID
from msgspec import Raw
from oslash.either import Left

from broker import requests
from broker.answers import json_answer
from broker.auth import Caller
from broker.bodies import ConnectionLimits, read_body
from broker.connections import client_has_hung_up, send
from broker.envelopes import (
    check_long_call,
    id_of,
    method_of,
    params_of,
    read_at_once,
    read_elements,
    read_envelope,
)
from broker.errors import (
    BrokerError,
    Forbidden,
    InternalError,
    InvalidRequest,
    MethodNotFound,
    Overloaded,
    ParseError,
    error_answer,
    let_go,
)
from broker.model import Lease
from broker.schema import MethodSchema, SchemaError

log = logging.getLogger("broker.rpc")

MAX_NESTING = 128
MAX_CALLS_IN_FLIGHT = 20_000

_NULL = Raw(b"null")


def nowhere() -> str:
    """Return the address of a caller who has none."""
    return ""


@dataclass(slots=True)
class Call:
    """What a method may know of the request that it serves."""

    is_notification: bool = False
    undo: list[Callable[[], None]] = field(default_factory=list)
    # Who calls, None where nobody needs a token, and from where: few calls ask.
    caller: Caller | None = None
    address: Callable[[], str] = nowhere
    # The lease of the call's receipt, where it was looked at already.
    lease: Lease | None = None
    # Of a list of receipts those whose queues the caller may not receive from.
    barred_queues: frozenset[int] = frozenset()


Method = Callable[..., Awaitable[Any]]
# Raises Forbidden where the caller may not do this; returns what has to be awaited before that is known, or None.
Permit = Callable[[Call, MethodSchema, Mapping[str, Any]], Awaitable[None] | None]
# Returns what may be told of an error to who called with these params.
Conceal = Callable[[Caller, Mapping[str, Any], BrokerError], BrokerError]
# Told of what somebody who administers has called, or somebody may not do, and what came of it: ok, or an error's type.
Audit = Callable[[Call, MethodSchema, Mapping[str, Any], str], None]


def nobody_is_asked(call: Call, schema: MethodSchema, params: Mapping[str, Any]) -> None:
    """Permit everything."""


class Watcher(Protocol):
    """Hears of every call that was carried out, and of every one that was over a limit."""

    def call_ended(self, method: str, outcome: str, seconds: float) -> None: ...

    def over_limit(self, limit: str) -> None: ...


_encode = msgspec.json.Encoder().encode


def check_methods(schemas: Mapping[str, MethodSchema], methods: Mapping[str, Method]) -> None:
    """Raise SchemaError, naming the culprit, where schema and functions disagree.

    A function takes the call first and then the params of its method, in the schema's order; what it does not
    name goes into its `**` parameter, if it has one.
    """
    for name in schemas.keys() ^ methods.keys():
        where = "the schema and has no function" if name in schemas else "the functions and not in the schema"
        raise SchemaError(f"the method {name} is in {where}")
    for name, schema in schemas.items():
        parameters = list(inspect.signature(methods[name]).parameters.values())[1:]
        named = [each.name for each in parameters if each.kind is not inspect.Parameter.VAR_KEYWORD]
        declared = list(schema.params)
        if declared[: len(named)] != named or (len(declared) > len(named) and len(parameters) == len(named)):
            raise SchemaError(f"the method {name} takes {named}, and the schema says {declared}")


class Rpc:
    """Answers requests with the methods it was given."""

    def __init__(
        self,
        schemas: Mapping[str, MethodSchema],
        methods: Mapping[str, Method],
        limits: ConnectionLimits,
        watcher: Watcher | None = None,
        permit: Permit = nobody_is_asked,
        audit: Audit = lambda call, schema, params, outcome: None,
        conceal: Conceal = lambda caller, params, error: error,
        *,
        max_nesting: int = MAX_NESTING,
        max_calls_in_flight: int = MAX_CALLS_IN_FLIGHT,
    ) -> None:
        check_methods(schemas, methods)
        self._schemas = schemas
        self._permit = permit
        self._audit = audit
        self._conceal = conceal
        self._limits = limits
        self._max_nesting = max_nesting
        self._max_in_flight = max_calls_in_flight
        self._in_flight = 0
        self._watcher = watcher
        self._methods = {name: _for_jsonrpcserver(method) for name, method in methods.items()}

    @property
    def in_flight(self) -> int:
        """How many calls are not answered yet."""
        return self._in_flight

    async def handle(
        self, request: web.Request, caller: Caller | None = None, address: Callable[[], str] = nowhere
    ) -> web.StreamResponse:
        """Answer one HTTP request whose headers have been found good."""
        text = await read_body(request, self._limits)
        undo: list[Callable[[], None]] = []
        try:
            answer = await self.answer(text, undo, caller, address)
            if undo and client_has_hung_up(request):
                raise ConnectionResetError
            if answer is None:
                return web.Response(status=204)
            response = json_answer(answer)
            if undo:
                # Written here, so that what was taken for a client that is gone is undone.
                return await send(request, response)
        except asyncio.CancelledError:
            _undo(undo)
            raise
        except ConnectionError:
            _undo(undo)
            return web.Response(status=204)  # nobody reads it
        return response

    async def answer(
        self,
        text: bytes,
        undo: list[Callable[[], None]],
        caller: Caller | None = None,
        address: Callable[[], str] = nowhere,
    ) -> bytes | None:
        """Return the JSON-RPC answer to a request's text, None where there is nothing to answer.

        What has to be undone if the answer does not arrive is added to `undo`.
        """
        try:
            elements = read_elements(text, self._max_nesting)
        except BrokerError as error:
            self._count_refusal(error)
            return error_answer(error)
        if elements is None:
            return await self._answer_one(Raw(text), Call(undo=undo, caller=caller, address=address))
        answers = await asyncio.gather(
            *(self._answer_one(element, Call(undo=undo, caller=caller, address=address)) for element in elements)
        )
        given = [answer for answer in answers if answer is not None]
        return b"[" + b",".join(given) + b"]" if given else None

    async def _answer_one(self, element: Raw, call: Call) -> bytes | None:
        began_at = time.perf_counter()
        call_id = _NULL
        name = "invalid"
        try:
            read = read_at_once(element, self._schemas, self._max_nesting)
            envelope = read_envelope(element, self._max_nesting) if read is None else read.envelope
            call.is_notification = not len(envelope.id)
            call_id = id_of(envelope)
            method = method_of(envelope)
            schema = self._schemas.get(method)
            if schema is None:
                raise MethodNotFound(method=method[:128])
            name = method
            kwargs = schema.read(params_of(envelope)) if read is None else read.params()
            check_long_call(element, kwargs, self._max_nesting)
            result = await self._carry_out(call, schema, kwargs)
        except (InvalidRequest, ParseError) as error:
            call.is_notification = False
            return self._refused(name, error, call_id, call, began_at)
        except BrokerError as error:
            return self._refused(name, error, call_id, call, began_at)
        if self._watcher is not None:
            self._watcher.call_ended(name, "ok", time.perf_counter() - began_at)
        if call.is_notification:
            return None
        return b'{"jsonrpc":"2.0","result":' + result + b',"id":' + bytes(call_id) + b"}"

    async def _carry_out(self, call: Call, schema: MethodSchema, kwargs: dict[str, Any]) -> bytes:
        """Return the result of a method, if the caller may call it now, and let it be told of those who administer."""
        outcome = "failed"
        caller = call.caller
        if self._in_flight >= self._max_in_flight:
            raise Overloaded(
                limit=self._max_in_flight, what="calls in flight", retry_after=1, counted_as="calls_in_flight"
            )
        if caller is not None:
            caller.begin()
        self._in_flight += 1
        try:
            if caller is not None:
                asking = self._permit(call, schema, kwargs)
                if asking is not None:
                    await asking
            result = await self._dispatch(schema.name, kwargs, call)
            outcome = "ok"
            return result
        except BrokerError as error:
            outcome = error.type
            raise error if caller is None else self._conceal(caller, kwargs, error) from None
        finally:
            self._in_flight -= 1
            if caller is not None:
                caller.end()
            if schema.is_administrative or outcome == Forbidden.type:
                self._audit(call, schema, kwargs, outcome)

    def _refused(self, name: str, error: BrokerError, call_id: Raw, call: Call, began_at: float) -> bytes | None:
        let_go(error)
        if isinstance(error, InternalError):
            error = _of_this_request(name, error)
        self._count_refusal(error)
        if self._watcher is not None:
            self._watcher.call_ended(name, error.type, time.perf_counter() - began_at)
        return None if call.is_notification else error_answer(error, call_id)

    def _count_refusal(self, error: BrokerError) -> None:
        if error.counted_as is not None and self._watcher is not None:
            self._watcher.over_limit(error.counted_as)

    async def _dispatch(self, method: str, kwargs: dict[str, Any], call: Call) -> bytes:
        """Call a method through jsonrpcserver; return its result as JSON or raise its error."""
        outcome = await call_method(DispatchRequest(method, kwargs, NOID), call, self._methods[method])
        if isinstance(outcome, Left):
            raise outcome._error.data
        result: bytes = outcome._value.result
        return result


def _of_this_request(method: str, error: InternalError) -> InternalError:
    """Let an error name the request that it answers, and the log what it came of.

    What failed may have been done for several calls together, and is in the log under an id of its own.
    """
    request_id, failure = requests.current.get(), error.extra["request_id"]
    if request_id in (None, failure):
        return error
    log.error("call failed method=%s failure=%s request_id=%s", method, failure, request_id)
    return InternalError(outcome=error.outcome, index=error.index, **error.extra | {"request_id": request_id})


def _undo(undo: list[Callable[[], None]]) -> None:
    for undo_one in undo:
        undo_one()


def _for_jsonrpcserver(method: Method) -> Method:
    """Wrap a method as jsonrpcserver wants it: it returns a Result and never raises.

    The result travels as JSON text, so that one that cannot be written is a failure of its method. The error
    itself travels in `data`: it is translated once, by our own code, and not at all by theirs.
    """

    async def adapter(call: Call, **params: Any) -> Result:
        try:
            return Success(_encode(await method(call, **params)))
        except BrokerError as error:
            return Error(error.code, error.message, error)
        except Exception:
            failure = InternalError(outcome="unknown", request_id=requests.current_or_new())
            log.exception("method failed request_id=%s", failure.extra["request_id"])
            return Error(failure.code, failure.message, failure)

    return adapter
