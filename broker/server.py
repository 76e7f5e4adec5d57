"""The server: builds each part once, joins them, starts and stops them in order.

Start: PostgreSQL (its own, or the one it is told of), migrations, pool, services, HTTP; then one line on
standard output says where it listens. Stop, on SIGTERM or SIGINT: new work is refused with 503 and nothing new is
pushed, those who wait get an empty answer, what is under way is answered, then everything ends in the opposite order.

This is one process; `processes` runs several on the same port.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import sys
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from ipaddress import ip_network
from typing import Any

import uvloop
from aiohttp import web

from broker import audit
from broker.addresses import Guard
from broker.auth import Auth, CallLimits
from broker.bodies import ConnectionLimits
from broker.connections import ConnectionRunner
from broker.draining import drain, nobody_else
from broker.entrance import Entrance
from broker.errors import BrokerError
from broker.files import load_files
from broker.installation import EmbeddedError
from broker.methods import Methods
from broker.metrics import Metrics
from broker.pages import Pages
from broker.permissions import Permissions, conceal
from broker.receivers import Receivers
from broker.rpc import Rpc
from broker.schema import compile_methods, load_document
from broker.settings import Settings
from broker.sharing import BACKLOG, Share, SharedSite
from broker.starting import (
    StartError,
    Stopped,
    announce,
    cannot_listen,
    migrated_database,
    stop_on_signals,
    tls_of,
    unless_stopped,
    url_of,
)
from broker.statistics import Statistics
from broker.storage.calls import Calls
from broker.storage.database import Database
from broker.storage.migrate import MigrationError
from broker.storage.notifications import Notifications
from broker.sweeper import Sweeper
from broker.tally import Tally
from broker.tls import Site
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
STATISTICS_SECONDS = 0.5
RETRY_SECONDS = 0.5
# How often one of several processes says what its gauges are.
GAUGES_SECONDS = 0.5
# Limits that the metrics say beside what has been used of them.
SHOWN_LIMITS = (
    "max_connections", "max_calls", "max_calls_in_flight", "max_waiting_consumers", "database_connections",
    "webhook_total",
)  # fmt: skip
GC_THRESHOLDS = (20_000, 20, 20)
# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT. Raises StartError, EmbeddedError or MigrationError where it cannot."""
    stop = stop_on_signals()
    with contextlib.suppress(Stopped):
        async with migrated_database(settings, stop) as conninfo, contextlib.AsyncExitStack() as stack:
            server = await unless_stopped(stop, stack.enter_async_context(Server(conninfo, settings)))
            spend_less_on_memory()
            announce(server.url)
            await stop.wait()
            log.info("stopping")


def spend_less_on_memory() -> None:
    """Make a process that has started spend its time on requests."""
    collect_less_garbage()
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep up to 32 MiB of what is freed, and not map what is smaller than 16 MiB anew each time.

    A request of megabytes has several buffers of its size: to get their pages from the kernel, and give them back, was
    a fifth of what it cost. Elsewhere than with glibc nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(_M_MMAP_THRESHOLD, 16 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 32 * 2**20)


def collect_less_garbage() -> None:
    """Look seldom for what can be thrown away, and not in what lives as long as the server.

    Hardly any of what requests leave is in circles.
    """
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


class Server:
    """One process of a broker on a migrated database: an async context manager that serves while it is entered.

    `share` is what it has of a port that other processes serve as well; without, the port is its own.
    """

    def __init__(self, conninfo: str, settings: Settings, share: Share | None = None) -> None:
        self.settings = settings
        self._share = share
        self._tls = tls_of(settings)
        self.metrics = Metrics(share.metrics_folder if share else None)
        self.metrics.show_limits({name: getattr(settings, name) for name in SHOWN_LIMITS})
        self.tally = Tally()
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
            watch_ages=self.metrics.lease_age.observe_all,
            tally=self.tally,
        )
        self.waiting = WaitingRoom(
            self.database, self.calls, max_waiting=settings.max_waiting_consumers, tally=self.tally
        )
        self.notifications = Notifications(self.database, self.waiting.hear, self.waiting.look_at_all)
        self.waiting.tell_others = self.notifications.tell
        self.sweeper = Sweeper(
            self.database, self.metrics, self.tally, self.waiting.tell, interval=settings.sweep_interval
        )
        self.statistics = Statistics(self.database, self.tally)
        self.limits = ConnectionLimits(
            header_timeout=settings.header_timeout,
            body_timeout=settings.body_timeout,
            body_stall_timeout=settings.body_stall_timeout,
            keepalive_timeout=settings.keepalive_timeout,
            max_body_bytes=settings.max_request_bytes,
            max_connections=settings.max_connections,
        )
        guard = Guard([ip_network(each) for each in settings.webhook_allow])
        self.webhooks = self._webhooks(guard)
        document = load_document()
        self.methods = Methods(
            self.database,
            self.calls,
            self.waiting,
            self.metrics,
            self.tally,
            settings,
            document,
            check_url=guard.check_url,
            subscriptions_changed=self.webhooks.changed,
        )
        self.auth = Auth(
            self.database,
            settings.auth,
            max_failures=settings.max_failed_logins,
            limits=CallLimits(settings.max_calls_per_token, settings.max_call_rate_per_token),
        )
        self.auth.became_required = self.waiting.send_away
        self.rpc = Rpc(
            compile_methods(document),
            self.methods.by_name(),
            self.limits,
            self.metrics,
            Permissions(self.database).permit,
            audit.call_ended,
            conceal,
            max_nesting=settings.max_nesting,
            max_calls_in_flight=settings.max_calls_in_flight,
        )
        self.pages = Pages(
            self.database,
            self.metrics,
            document,
            is_draining=lambda: self.runner.is_draining,
            read_gauges=self._read_gauges,
        )
        self.entrance = Entrance(
            settings, self.rpc, self.auth, self.metrics, self.limits, is_draining=lambda: self.runner.is_draining
        )
        self.runner = ConnectionRunner(
            self._application(),
            limits=self.limits,
            guard=self.entrance.guard,
            over_limit=self.metrics.over_limit,
            shutdown_timeout=CANCEL_SECONDS,
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
        application.add_routes([web.post("/rpc", self.entrance.call), *self.pages.routes(), *load_files().routes()])
        return application

    def _read_gauges(self) -> None:
        self.metrics.waiting.set(self.waiting.waiting)
        self.metrics.breaker.set(self.database.breaker.reason is not None)
        self.metrics.connections.set(len(self.runner.connections))
        self.metrics.pushing.set(self.webhooks.under_way)
        self.metrics.in_flight.set(self.rpc.in_flight)
        self.metrics.calls_waiting.set(self.calls.waiting + self.database.waiting)
        connections, busy = self.database.pool_use()
        self.metrics.pool.set(connections)
        self.metrics.pool_busy.set(busy)
        self.metrics.settle()

    async def _show_gauges(self) -> None:
        while True:
            self._read_gauges()
            await asyncio.sleep(GAUGES_SECONDS)

    @property
    def url(self) -> str:
        """Where it listens."""
        return url_of(self.runner.addresses[0], self.settings)

    async def __aenter__(self) -> Server:
        try:
            await self._start()
        except BaseException:
            await self._stop()
            raise
        return self

    async def _start(self) -> None:
        await self.database.open(self.settings.startup_timeout)
        await self.auth.refresh()
        await self.runner.setup()
        services = [
            self.database.breaker.run,
            self.notifications.run,
            self.waiting.run,
            self.sweeper.run,
            self.statistics.run,
            self.calls.low_water.run,
            self.webhooks.run,
            self.auth.run,
        ]
        if self._share is not None:
            services.append(self._show_gauges)
        self._services = [asyncio.create_task(keep_up(service)) for service in services]
        await self._listen()

    async def _listen(self) -> None:
        if self._share is not None:
            for listener in self._share.listeners:
                await SharedSite(self.runner, listener, self._share, self._tls).start()
            return
        try:
            await Site(
                self.runner, self.settings.host, self.settings.port, backlog=BACKLOG, ssl_context=self._tls
            ).start()
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
        # Last: what is undone counts too.
        await self.statistics.append(STATISTICS_SECONDS)
        await self.database.close()


async def keep_up(service: Callable[[], Awaitable[None]]) -> None:
    """Run a service until cancelled, and again where it fails in a way that it does not know itself."""
    while True:
        try:
            await service()
        except Exception:
            log.exception("service failed and is started again service=%s", service.__qualname__)
        await asyncio.sleep(RETRY_SECONDS)


def run_to_end(serving: Coroutine[Any, Any, None]) -> int:
    """Serve; return the exit code. What stands in the way of a start is said in one line."""
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serving)
    except (StartError, EmbeddedError, MigrationError, BrokerError) as error:
        print(f"wonderq: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0
