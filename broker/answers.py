"""Answers as the connections write them: a call's in one piece, and those that no application gives.

Nothing here knows of a method: what is refused here never came that far.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from typing import Any, cast

from aiohttp import web
from aiohttp.helpers import rfc822_formatted_time

from broker import requests

SERVER_NAME = "wonderq"


class JsonAnswer:
    """A 200 with a body of JSON, as a handler may return it: written in one piece, without aiohttp's response.

    That one is built for everything that an answer can be, and takes as long as a small request takes otherwise.
    """

    __slots__ = ("body", "is_sent", "request_id")

    # What aiohttp asks of a response that it did not write itself.
    keep_alive = True

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.request_id = requests.current_or_new()
        self.is_sent = False

    def to_bytes(self) -> bytes:
        return (
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(self.body)}\r\n"
            f"Date: {rfc822_formatted_time()}\r\nServer: {SERVER_NAME}\r\n"
            f"{requests.HEADER}: {self.request_id}\r\n\r\n"
        ).encode() + self.body

    def to_response(self) -> web.Response:
        return web.Response(body=self.body, content_type="application/json")


def json_answer(body: bytes) -> web.StreamResponse:
    """Return a JsonAnswer as what aiohttp takes it for."""
    return cast(web.StreamResponse, JsonAnswer(body))


@dataclass(frozen=True)
class Refusal:
    """An answer that is given before, or instead of, the application's."""

    status: HTTPStatus
    code: int
    type: str
    message: str
    retryable: bool = False
    outcome: str = "none"
    headers: tuple[tuple[str, str], ...] = ()

    @cached_property
    def response_fields(self) -> dict[str, str]:
        # Connection is spelt out because aiohttp takes what it cannot parse for HTTP/1.0.
        return {"Content-Type": "application/json", **dict(self.headers), "Connection": "close"}

    @property
    def body(self) -> bytes:
        data: dict[str, Any] = {"type": self.type, "retryable": self.retryable, "outcome": self.outcome}
        request_id = requests.current.get()
        if request_id is not None:
            data["request_id"] = request_id
        if self.type == "overloaded":
            data["retry_after"] = 1
        error = {"code": self.code, "message": self.message, "data": data}
        return json.dumps({"jsonrpc": "2.0", "error": error, "id": None}).encode()

    def to_bytes(self) -> bytes:
        body = self.body
        fields = {**self.response_fields, "Content-Length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        return f"HTTP/1.1 {self.status} {self.status.phrase}\r\n{head}\r\n".encode() + body

    def to_response(self) -> web.Response:
        response = web.Response(status=self.status, body=self.body, headers=self.response_fields)
        response.force_close()
        return response


# fmt: off
MALFORMED = Refusal(
    HTTPStatus.BAD_REQUEST, -32600, "invalid_request",
    "This is not a valid HTTP/1.1 request: check its first line, headers and body framing.")
TOO_SLOW = Refusal(
    HTTPStatus.REQUEST_TIMEOUT, -32600, "invalid_request",
    "The whole request did not arrive in time: send it again.", retryable=True)
BODY_TOO_LARGE = Refusal(
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, -32600, "invalid_request",
    "The request's body is over this server's limit: send less in one request.")
TOO_MANY_CONNECTIONS = Refusal(
    HTTPStatus.SERVICE_UNAVAILABLE, -32002, "overloaded",
    "This server has too many connections: wait a second, then connect again.",
    retryable=True, headers=(("Retry-After", "1"),))
INTERNAL_ERROR = Refusal(
    HTTPStatus.INTERNAL_SERVER_ERROR, -32603, "internal_error",
    "The server failed at this request: what was done is unknown. Its log has more under the request id.",
    outcome="unknown")
# fmt: on
