"""What comes before a server serves: the signals, the database, its migrations, and whether it may be used.

The database is the one that is named, or one of our own, which is started and kept running here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import psycopg

from broker.embedded import EmbeddedPostgres
from broker.installation import EmbeddedError
from broker.settings import Settings
from broker.storage import durability, tokens
from broker.storage.durability import ServerFacts
from broker.storage.migrate import migrate
from broker.tls import CertificateError, server_context

log = logging.getLogger("broker.starting")

RETRY_SECONDS = 0.5
# An embedded PostgreSQL, or a worker, that dies this often without a long life between is not started again.
MAX_CRASHES = 5
LONG_LIFE_SECONDS = 60
# What a process uses besides its connections for calls: to listen, to notify and to see whether PostgreSQL is well.
SERVICE_CONNECTIONS = 3
# Where commands look for a broker when nobody tells them.
USUAL_URL = f"http://{Settings.host}:{Settings.port}"


T = TypeVar("T")

# What PostgreSQL says where waiting does not help. Errors of connecting carry no SQLSTATE; in another language
# than English they are waited for like any other.
REFUSALS = ("authentication failed", "no password supplied", "does not exist", "no pg_hba.conf entry")


class Stopped(Exception):
    """The server was told to stop before it had started."""


class StartError(Exception):
    """The server cannot start, or not go on; the message says why and what to do."""


def stop_on_signals() -> asyncio.Event:
    """Return what SIGTERM and SIGINT set from now on."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def migrated_database(settings: Settings, stop: asyncio.Event) -> AsyncIterator[str]:
    """Yield how to connect to the database, the given one or one of our own, when it is ready. Raises Stopped."""
    tls_of(settings)  # before anything else is started
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


async def check_binding(settings: Settings, conninfo: str) -> None:
    """Refuse to open the broker to the network where nobody needs a token, unless that was said aloud."""
    if is_loopback(settings.host):
        return
    if settings.auth == "off":
        log.warning("NO AUTHENTICATION: whoever reaches the port may do everything host=%s", settings.host)
    elif settings.auth == "auto" and not await tokens.were_ever_on(conninfo):
        raise StartError(
            f"Whoever reaches {settings.host} could do everything, because there are no tokens. Make one (wonderq token"
            " create NAME), or say --auth required (BROKER_AUTH=required), or in a network that you trust --auth off"
            " (BROKER_AUTH=off)."
        )


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
    """Wait for the database, migrate it and check it.

    Raises Stopped, and StartError where it cannot be reached in time, lets everybody in or would lose messages.
    """
    give_up_at = time.monotonic() + settings.startup_timeout
    while True:
        try:
            for name in await unless_stopped(stop, migrate(conninfo)):
                log.info("migrated name=%s", name)
            await unless_stopped(stop, check_binding(settings, conninfo))
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


def announce(url: str) -> None:
    """Say that calls are taken: to programs by one line on standard output, to a person at a terminal what to try."""
    print(f"listening on {url}", flush=True)  # noqa: T201
    if sys.stderr.isatty():
        where = "" if url == USUAL_URL else f"BROKER_URL={url} "
        hint = f'See it at {url}/ or try, in another terminal: {where}wonderq send default \'{{"hello": "world"}}\''
        print(hint, file=sys.stderr)  # noqa: T201


def cannot_listen(settings: Settings, error: OSError) -> StartError:
    """Return the error that says that a port is not to be had."""
    return StartError(
        f"Cannot listen on {settings.host}:{settings.port}: {error.strerror}. Choose another --port;"
        " 0 picks a free one."
    )


def url_of(address: tuple[Any, ...], settings: Settings) -> str:
    """Return the URL of a server that listens on a socket's address."""
    host, port = address[:2]
    scheme = "http" if settings.tls_certificate is None else "https"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    """Return what connections are protected with, None where they are not. Raises StartError."""
    try:
        return server_context(settings.tls_certificate, settings.tls_key)
    except CertificateError as error:
        raise StartError(str(error)) from None
