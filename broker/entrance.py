"""The entrance: what is looked at before a request reaches a method, and who is sent away.

In this order: the Host header (against DNS rebinding: a page of a foreign site cannot name us by that site's name),
whether the server still takes work, the headers of the body, and who calls. Every refusal has the body of a JSON-RPC
error.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from aiohttp import hdrs, web

from broker import audit, requests
from broker.auth import Auth, Caller, Throttled, Unauthorized
from broker.bodies import ConnectionLimits, read_body
from broker.connections import MORE_HEADERS
from broker.errors import BrokerError, Forbidden, InvalidRequest, Overloaded, Unavailable, error_answer, let_go
from broker.metrics import Metrics
from broker.pages import unavailable
from broker.rpc import Rpc
from broker.settings import Settings
from broker.starting import is_loopback

# Pages that only those may see who have a token, where one is needed.
NEEDS_TOKEN = ("/metrics",)


# What a browser is told before a page of another site, one that may call, sends its call.
PREFLIGHT = {
    "Access-Control-Allow-Methods": "POST",
    "Access-Control-Allow-Headers": "authorization, content-type, x-request-id",
    "Access-Control-Max-Age": "600",
}
# And what of the answer it may read, beside the body.
EXPOSED = {"Access-Control-Expose-Headers": "Retry-After, X-Request-Id"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RefusedLogin(Exception):
    """Somebody has no token that counts; `response` says so."""

    def __init__(self, response: web.Response) -> None:
        super().__init__()
        self.response = response


class Entrance:
    """Lets requests in, or sends them away."""

    def __init__(
        self,
        settings: Settings,
        rpc: Rpc,
        auth: Auth,
        metrics: Metrics,
        limits: ConnectionLimits,
        is_draining: Callable[[], bool],
    ) -> None:
        self._rpc = rpc
        self._auth = auth
        self._metrics = metrics
        self._limits = limits
        self._is_draining = is_draining
        self._max_failed_logins = settings.max_failed_logins
        self._checks_host = is_loopback(settings.host)
        self._allowed_hosts = {"localhost", "127.0.0.1", *(name.lower() for name in settings.allowed_host)}
        # Pages of these sites may call; no others, because a browser lets none unless it is told to.
        self._origins = frozenset(settings.cors_origin)
        self._proxies = [ip_network(each) for each in settings.trusted_proxy]

    async def guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what no route should see, and give every refusal the body of a JSON-RPC error."""
        requests.begin(request.headers.get(requests.HEADER))
        if not self._is_host_allowed(request.headers.get(hdrs.HOST)):
            reason = "the Host header names another server; add the name with --allowed-host"
            return refuse(421, InvalidRequest(reason=reason))
        origin = request.headers.get("Origin") if self._origins else None
        if origin in self._origins:
            request[MORE_HEADERS] = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"} | EXPOSED
            if request.method == "OPTIONS" and request.path == "/rpc":
                return web.Response(status=204, headers=PREFLIGHT)
        if request.raw_path == "/rpc" and request.method == "POST":
            return await self.call(request)  # without the routes: nearly every request is one
        try:
            if request.path in NEEDS_TOKEN:
                await self._identify(request)
            return await handler(request)
        except RefusedLogin as error:
            return error.response
        except web.HTTPException as error:
            let_go(error)
            reason = "there is nothing at this address: calls go to POST /rpc"
            if error.status == 405:
                reason = f"this address does not take {request.method}"
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return refuse(error.status, InvalidRequest(reason=reason), allow)

    async def call(self, request: web.Request) -> web.StreamResponse:
        """Answer a request to /rpc."""
        if self._is_draining():
            # Many clients send head and body apart, and take an answer that comes between for a broken connection.
            await read_body(request, self._limits)
            return unavailable(Unavailable(reason="This broker is being stopped, its database is fine"))
        headers = request.headers
        if hdrs.CONTENT_ENCODING in headers and not is_identity(headers.getall(hdrs.CONTENT_ENCODING)):
            return refuse(415, InvalidRequest(reason="bodies are not compressed; leave Content-Encoding away"))
        if not is_json(headers.get(hdrs.CONTENT_TYPE, "")):
            return refuse(415, InvalidRequest(reason="the Content-Type must be application/json"))
        caller = None
        if self._auth.is_required:
            caller = self._auth.known(headers.get(hdrs.AUTHORIZATION))
            if caller is None:
                try:
                    caller = await self._identify(request)
                except RefusedLogin as error:
                    return error.response
        return await self._rpc.handle(request, caller, partial(self._address, request))

    async def _identify(self, request: web.Request) -> Caller | None:
        """Return who calls. Raises RefusedLogin where he needs a token and has none that counts."""
        try:
            return await self._auth.identify(request.headers.get("Authorization"), self._address(request))
        except Unauthorized:
            self._metrics.refused_logins.labels("unauthorized").inc()
            audit.login_refused(self._address(request), request.path, "unauthorized")
            reason = "A token is needed that counts; send it as Authorization: Bearer wq_…"
            raise RefusedLogin(refuse(401, Forbidden(reason=reason), {"WWW-Authenticate": "Bearer"})) from None
        except Throttled as throttled:
            self._metrics.refused_logins.labels("throttled").inc()
            self._metrics.over_limit("failed_logins")
            retry_after = math.ceil(throttled.retry_after)
            limit = self._max_failed_logins
            refusal = Overloaded(limit=limit, what="failed logins from this address", retry_after=retry_after)
            raise RefusedLogin(refuse(429, refusal, {"Retry-After": str(retry_after)})) from None
        except Unavailable as error:
            raise RefusedLogin(unavailable(error)) from None

    def _address(self, request: web.Request) -> str:
        """Return the address of the client: what proxies say of it counts only where they are trusted."""
        address = request.remote or ""
        if not self._proxies:
            return address
        for each in reversed(",".join(request.headers.getall("X-Forwarded-For", [])).split(",")):
            if not any(is_in(address, network) for network in self._proxies) or not each.strip():
                break
            address = without_port(each.strip())
        return address

    def _is_host_allowed(self, host: str | None) -> bool:
        """Against DNS rebinding: a page of a foreign site cannot name us by that site's name."""
        if host is None or not self._checks_host:
            return True
        name = host_name(host)
        return name in self._allowed_hosts or is_loopback(name)


def is_in(address: str, network: IPv4Network | IPv6Network) -> bool:
    """Whether an address, which may be no address, lies in a network."""
    try:
        return ip_address(address) in network
    except ValueError:
        return False


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if ":" in host else host


def is_identity(encodings: Iterable[str]) -> bool:
    """Whether what Content-Encoding says is that nothing was done to the body."""
    return all(each.strip().lower() == "identity" for each in encodings)


def without_port(address: str) -> str:
    """Return an address of X-Forwarded-For without the port that some proxies write behind it."""
    return host_name(address) if address.startswith("[") or address.count(":") == 1 else address


def is_json(content_type: str) -> bool:
    """Whether a Content-Type is application/json, in UTF-8 if it says in what."""
    if content_type == "application/json":
        return True
    media_type, *parameters = (part.strip().lower() for part in content_type.split(";"))
    return media_type == "application/json" and all(
        parameter.replace('"', "") in ("", "charset=utf-8") for parameter in parameters
    )


def refuse(status: int, error: BrokerError, headers: Mapping[str, str] | None = None) -> web.Response:
    """Answer with an HTTP status and a JSON-RPC error."""
    return web.Response(status=status, body=error_answer(error), content_type="application/json", headers=headers)
