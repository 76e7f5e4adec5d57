"""The server: builds each part once, joins them, starts and stops them in order.

Start: PostgreSQL (its own, or the one it is told of), migrations, pool, services, HTTP; then one line on
standard output says where it listens. Stop, on SIGTERM or SIGINT: new work is refused with 503 and nothing new is
pushed, those who wait get an empty answer, what is under way is answered, then everything ends in the opposite order.

This is one process; `processes` runs several on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from ipaddress import ip_network
from typing import Any, TypeVar

import psycopg
import uvloop
from aiohttp import web

from broker.addresses import Guard
from broker.connections import ConnectionLimits, ConnectionRunner, read_body
from broker.draining import drain, nobody_else
from broker.embedded import EmbeddedPostgres
from broker.errors import BrokerError, InvalidRequest, Unavailable, error_answer
from broker.installation import EmbeddedError
from broker.methods import Methods
from broker.metrics import Metrics
from broker.pages import Pages, unavailable
from broker.receivers import Receivers
from broker.rpc import Rpc
from broker.schema import compile_methods, load_document
from broker.settings import Settings
from broker.sharing import BACKLOG, Share, SharedSite
from broker.storage import durability
from broker.storage.calls import Calls
from broker.storage.database import Database
from broker.storage.durability import ServerFacts
from broker.storage.migrate import MigrationError, migrate
from broker.storage.notifications import Notifications
from broker.sweeper import Sweeper
from broker.waiting import WaitingRoom
from broker.webhooks import PushLimits, Webhooks

log = logging.getLogger("broker.server")

# Of the ten seconds within which the server must stop, what is under way gets this much; then each step of
# the stop gets so little that a database which does not answer cannot use up the rest.
DRAIN_SECONDS = 5.0
# What is being pushed gets this much of it, and some is left to close the port in peace.
PUSH_SECONDS = 4.0
CANCEL_SECONDS = 0.25
UNDO_SECONDS = 1.0
STOP_SERVICES_SECONDS = 0.5
RETRY_SECONDS = 0.5
# How often one of several processes says what its gauges are.
GAUGES_SECONDS = 0.5
# An embedded PostgreSQL, or a worker, that dies this often without a long life between is not started again.
MAX_CRASHES = 5
LONG_LIFE_SECONDS = 60
# What a process uses besides its connections for calls: to listen, to notify and to see whether PostgreSQL is well.
SERVICE_CONNECTIONS = 3

GC_THRESHOLDS = (20_000, 20, 20)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


# What PostgreSQL says where waiting does not help. Errors of connecting carry no SQLSTATE; in another language
# than English they are waited for like any other.
REFUSALS = ("authentication failed", "no password supplied", "does not exist", "no pg_hba.conf entry")


class Stopped(Exception):
    """The server was told to stop before it had started."""


class StartError(Exception):
    """The server cannot start, or not go on; the message says why and what to do."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartError, EmbeddedError or MigrationError where it cannot."""
    stop = stop_on_signals()
    with contextlib.suppress(Stopped):
        async with migrated_database(settings, stop) as conninfo, contextlib.AsyncExitStack() as stack:
            server = await unless_stopped(stop, stack.enter_async_context(Server(conninfo, settings)))
            collect_less_garbage()
            print(f"listening on {server.url}", flush=True)  # noqa: T201
            await stop.wait()
            log.info("stopping")


def collect_less_garbage() -> None:
    """Make a process that has started spend its time on requests."""
    # What lives as long as the server is not looked through again and again for what can be thrown away; and
    # what requests leave is, less often: hardly any of it is in circles.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


def stop_on_signals() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set from now on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def migrated_database(settings: Settings, stop: asyncio.Event) -> AsyncIterator[str]:
    """Yield how to connect to the database, the given one or one of our own, when it is ready. Raises Stopped."""
    check_binding(settings)
    async with contextlib.AsyncExitStack() as stack:
        conninfo = settings.database_url
        if conninfo is None:
            conninfo = await stack.enter_async_context(embedded_postgres(settings, stop))
        await prepare(conninfo, settings, stop)
        yield conninfo


async def unless_stopped(stop: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Return what the work returns. Raises Stopped, with the work cancelled, where the server is to stop before."""
    working, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Stopped
    finally:
        stopping.cancel()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


def check_binding(settings: Settings) -> None:
    """Refuse to open the broker to the network unless that was said aloud."""
    if is_loopback(settings.host):
        return
    if settings.auth != "off":
        raise StartError(
            f"Whoever reaches {settings.host} could do everything. Listen on 127.0.0.1 behind a proxy that asks"
            " for credentials, or say --auth off (BROKER_AUTH=off) in a network that you trust."
        )
    log.warning("NO AUTHENTICATION: whoever reaches the port may do everything host=%s", settings.host)


def is_loopback(host: str) -> bool:
    """Whether a host, as a flag or a Host header names it, is this machine and no other."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


@contextlib.asynccontextmanager
async def embedded_postgres(settings: Settings, stop: asyncio.Event) -> AsyncIterator[str]:
    """Run a PostgreSQL of our own and start it again should it die; yield how to connect to it."""
    # What was set for other programs must not redirect the way to our own server.
    for name in [name for name in os.environ if name.startswith("PG")]:
        del os.environ[name]
    used = settings.processes * (settings.database_connections + SERVICE_CONNECTIONS)
    # A few more than are used: for tools, and for connections that are just being replaced.
    postgres = EmbeddedPostgres(settings.data_dir, settings={"max_connections": str(max(100, used + 20))})
    conninfo = await unless_stopped(stop, postgres.start())
    log.info("embedded PostgreSQL runs data_dir=%s", settings.data_dir)
    keeper = asyncio.create_task(keep_running(postgres, stop))
    try:
        yield conninfo
    finally:
        keeper.cancel()
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        finally:
            await postgres.stop()


async def keep_running(postgres: EmbeddedPostgres, stop: asyncio.Event) -> None:
    """Start PostgreSQL again whenever it has ended. Stops the broker and raises EmbeddedError where it cannot."""
    crashes = 0
    while True:
        began_at = time.monotonic()
        code = await postgres.wait_ended()
        crashes = 1 if time.monotonic() - began_at > LONG_LIFE_SECONDS else crashes + 1
        log.error("embedded PostgreSQL has ended and is started again exit_code=%s", code)
        try:
            if crashes > MAX_CRASHES:
                raise EmbeddedError("The embedded PostgreSQL ends again and again: its log may say why.")
            await postgres.stop()
            await postgres.start()
        except EmbeddedError:
            stop.set()
            raise


async def prepare(conninfo: str, settings: Settings, stop: asyncio.Event) -> None:
    """Wait for the database, check it and migrate it.

    Raises Stopped, and StartError where it cannot be reached in time or would lose messages.
    """
    give_up_at = time.monotonic() + settings.startup_timeout
    while True:
        try:
            for name in await unless_stopped(stop, migrate(conninfo)):
                log.info("migrated name=%s", name)
            check_durability(await unless_stopped(stop, durability.facts_of(conninfo)), settings)
            return
        except psycopg.OperationalError as error:
            reason = str(error).splitlines()[0]
            if time.monotonic() >= give_up_at or any(words in reason for words in REFUSALS):
                raise StartError(
                    f"The database cannot be used: {reason}. Check --database-url (DATABASE_URL), or leave it out"
                    " for an embedded PostgreSQL."
                ) from error
            log.warning("waiting for the database reason=%s", reason)
            await unless_stopped(stop, asyncio.sleep(RETRY_SECONDS))
        except psycopg.Error as error:
            raise StartError(
                f"The database cannot be migrated: {error}. The role needs the right to create a schema in it."
            ) from error


def check_durability(facts: ServerFacts, settings: Settings) -> None:
    """Refuse a PostgreSQL that would lose what was acknowledged, unless that was said aloud."""
    if not facts.risks:
        return
    risks = "; ".join(facts.risks)
    if not settings.allow_data_loss:
        raise StartError(
            f"Acknowledged messages could be lost: {risks}. Set that to on in PostgreSQL, or say --allow-data-loss"
            " (BROKER_ALLOW_DATA_LOSS=yes) where they may be."
        )
    log.warning("DATA LOSS IS ALLOWED: acknowledged messages can be lost because=%s", risks)


class Server:
    """One process of a broker on a migrated database: an async context manager that serves while it is entered.

    `share` is what it has of a port that other processes serve as well; without, the port is its own.
    """

    def __init__(self, conninfo: str, settings: Settings, share: Share | None = None) -> None:
        self.settings = settings
        self._share = share
        self._checks_host = is_loopback(settings.host)
        self._allowed_hosts = {"localhost", "127.0.0.1", *(name.lower() for name in settings.allowed_host)}
        self.metrics = Metrics(share.metrics_folder if share else None)
        self.database = Database(
            conninfo,
            connections=settings.database_connections,
            max_calls=settings.max_calls,
            request_timeout=settings.request_timeout,
        )
        self.database.breaker.opened.append(self.metrics.breaker_openings.inc)
        self.calls = Calls(
            self.database,
            max_calls=settings.max_calls,
            undelivered=lambda queue, delivery: self.waiting.give_back_soon(queue, delivery),
            stored=lambda queue, stored: self.methods.stored(queue, stored),
            published=lambda published: self.methods.published(published),
            watch=self.metrics.statement_ended,
        )
        self.waiting = WaitingRoom(self.database, self.calls, max_waiting=settings.max_waiting_consumers)
        self.notifications = Notifications(self.database, self.waiting.hear, self.waiting.look_at_all)
        self.waiting.tell_others = self.notifications.tell
        self.sweeper = Sweeper(self.database, self.metrics, self.waiting.tell, interval=settings.sweep_interval)
        self.limits = ConnectionLimits(
            max_body_bytes=settings.max_request_bytes, max_connections=settings.max_connections
        )
        guard = Guard([ip_network(each) for each in settings.webhook_allow])
        self.webhooks = self._webhooks(guard)
        document = load_document()
        self.methods = Methods(
            self.database,
            self.calls,
            self.waiting,
            self.metrics,
            settings,
            document,
            check_url=guard.check_url,
            subscriptions_changed=self.webhooks.changed,
        )
        self.rpc = Rpc(compile_methods(document), self.methods.by_name(), self.limits, self.metrics)
        self.pages = Pages(
            self.database,
            self.metrics,
            document,
            is_draining=lambda: self.runner.is_draining,
            read_gauges=self._read_gauges,
        )
        self.runner = ConnectionRunner(
            self._application(), limits=self.limits, guard=self._guard, shutdown_timeout=CANCEL_SECONDS
        )
        self._services: list[asyncio.Task[None]] = []

    def _webhooks(self, guard: Guard) -> Webhooks:
        settings = self.settings
        return Webhooks(
            self.database,
            self.calls,
            Receivers(guard, timeout=settings.webhook_timeout),
            self.metrics,
            dequeue=partial(self.waiting.dequeue, takes_place=False),
            give_back_soon=self.waiting.give_back_soon,
            tell=self.waiting.tell,
            limits=PushLimits(settings.webhook_concurrency, settings.webhook_total, settings.webhook_timeout),
        )

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=self.settings.max_request_bytes)
        application.add_routes([web.post("/rpc", self._rpc), *self.pages.routes()])
        return application

    def _read_gauges(self) -> None:
        self.metrics.waiting.set(self.waiting.waiting)
        self.metrics.breaker.set(self.database.breaker.reason is not None)
        self.metrics.connections.set(len(self.runner.connections))
        self.metrics.pushing.set(self.webhooks.under_way)

    async def _show_gauges(self) -> None:
        while True:
            self._read_gauges()
            await asyncio.sleep(GAUGES_SECONDS)

    @property
    def url(self) -> str:
        """Where it listens."""
        return url_of(self.runner.addresses[0])

    async def __aenter__(self) -> Server:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def _start(self) -> None:
        await self.database.open(self.settings.startup_timeout)
        await self.runner.setup()
        services = [
            self.database.breaker.run,
            self.notifications.run,
            self.waiting.run,
            self.sweeper.run,
            self.calls.low_water.run,
            self.webhooks.run,
        ]
        if self._share is not None:
            services.append(self._show_gauges)
        self._services = [asyncio.create_task(keep_up(service)) for service in services]
        await self._listen()

    async def _listen(self) -> None:
        if self._share is not None:
            for listener in self._share.listeners:
                await SharedSite(self.runner, listener, self._share).start()
            return
        try:
            await web.TCPSite(self.runner, self.settings.host, self.settings.port, backlog=BACKLOG).start()
        except OSError as error:
            raise cannot_listen(self.settings, error) from error

    async def leave_port(self) -> None:
        """Accept no more, so that another broker can have the port; what is under way goes on."""
        for site in self.runner.sites:
            await site.stop()

    async def __aexit__(self, *_: object) -> None:
        self.runner.start_draining()
        self.webhooks.stop_taking()
        self.waiting.close()
        pushed = asyncio.create_task(self.webhooks.drain(PUSH_SECONDS))

        async def all_are_idle() -> None:
            await asyncio.shield(pushed)
            await (self._share.all_are_idle if self._share else nobody_else)()

        is_drained = await drain(self.runner, DRAIN_SECONDS, all_are_idle)
        await pushed
        if not is_drained:
            log.warning("stopped before every request was answered")
        await self._stop()

    async def _stop(self) -> None:
        # Handlers that are still at work are cancelled, and so give back what they leased; then this is waited
        # for, while the services can still tell the other brokers of it.
        await self.runner.cleanup()
        await self.webhooks.close()
        await self.waiting.settle(UNDO_SECONDS)
        for service in self._services:
            service.cancel()
        if self._services:
            _, running = await asyncio.wait(self._services, timeout=STOP_SERVICES_SECONDS)
            if running:
                self.database.cut_services()
                await asyncio.wait(running, timeout=STOP_SERVICES_SECONDS)
        await self.database.close()

    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse what no route should see, and give every refusal the body of a JSON-RPC error."""
        if not self._is_host_allowed(request.headers.get("Host")):
            reason = "the Host header names another server; add the name with --allowed-host"
            return refuse(421, InvalidRequest(reason=reason))
        if request.raw_path == "/rpc" and request.method == "POST":
            return await self._rpc(request)  # without the routes: nearly every request is one
        try:
            return await handler(request)
        except web.HTTPException as error:
            reason = "there is nothing at this address: calls go to POST /rpc"
            if error.status == 405:
                reason = f"this address does not take {request.method}"
            allow = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            return refuse(error.status, InvalidRequest(reason=reason), allow)

    async def _rpc(self, request: web.Request) -> web.StreamResponse:
        if self.runner.is_draining:
            # Many clients send head and body apart, and take an answer that comes between for a broken connection.
            await read_body(request, self.limits)
            return unavailable(Unavailable(reason="This broker is being stopped, its database is fine"))
        if any(each.strip().lower() != "identity" for each in request.headers.getall("Content-Encoding", [])):
            return refuse(415, InvalidRequest(reason="bodies are not compressed; leave Content-Encoding away"))
        if not is_json(request.headers.get("Content-Type", "")):
            return refuse(415, InvalidRequest(reason="the Content-Type must be application/json"))
        return await self.rpc.handle(request)

    def _is_host_allowed(self, host: str | None) -> bool:
        """Against DNS rebinding: a page of a foreign site cannot name us by that site's name."""
        if host is None or not self._checks_host:
            return True
        name = host_name(host)
        return name in self._allowed_hosts or is_loopback(name)


def cannot_listen(settings: Settings, error: OSError) -> StartError:
    """Return the error that says that a port is not to be had."""
    return StartError(
        f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another --port;"
        " 0 picks a free one."
    )


def url_of(address: tuple[Any, ...]) -> str:
    """Return the URL of a server that listens on a socket's address."""
    host, port = address[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def keep_up(service: Callable[[], Awaitable[None]]) -> None:
    """Run a service until cancelled, and again where it fails in a way that it does not know itself."""
    while True:
        try:
            await service()
        except Exception:
            log.exception("service failed and is started again service=%s", service.__qualname__)
        await asyncio.sleep(RETRY_SECONDS)


def host_name(host: str) -> str:
    """Return the name in a Host header, without the port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].split("]")[0]
    return host.rsplit(":", 1)[0] if ":" in host else host


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


def run_to_end(serving: Coroutine[Any, Any, None]) -> int:
    """Serve; return the exit code. What stands in the way of a start is said in one line."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serving)
    except (StartError, EmbeddedError, MigrationError, BrokerError) as error:
        print(f"wonderq: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
