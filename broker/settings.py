"""The settings of the server: one table, from which flags, environment and docs are made.

A flag wins over its environment variable, which wins over the default. Nothing else configures
the server: there is no file to look for at three in the morning.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from ipaddress import ip_network
from pathlib import Path
from typing import Any


def default_data_dir() -> Path:
    """Return where an embedded PostgreSQL keeps its data when nobody says otherwise."""
    if os.geteuid() == 0:
        return Path("/var/lib/wonderq")
    base = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(base) / "wonderq"


def parse_size(text: str) -> int:
    """Read a number of bytes; `8MiB`, `512KiB` and plain digits are understood."""
    for unit, factor in (("KiB", 2**10), ("MiB", 2**20), ("GiB", 2**30)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    return int(text)


def parse_list(text: str) -> tuple[str, ...]:
    """Read a list of values separated by commas."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_networks(text: str) -> tuple[str, ...]:
    """Read a list of networks separated by commas; return them as they are written best."""
    networks = []
    for part in parse_list(text):
        try:
            networks.append(str(ip_network(part)))
        except ValueError:
            raise ValueError("it is no network, such as 10.0.0.0/8 or fd00::/8") from None
    return tuple(networks)


def parse_origins(text: str) -> tuple[str, ...]:
    """Read a list of origins as browsers send them: scheme, host, and a port where it is not the usual one."""
    origins = parse_list(text)
    if not all(re.fullmatch(r"https?://[a-z0-9.:\[\]-]+", origin) for origin in origins):
        raise ValueError("an origin is as https://tools.example, in small letters and without a path")
    return origins


def parse_switch(text: str) -> bool:
    """Read whether something is switched on."""
    switched = {"yes": True, "true": True, "on": True, "1": True, "no": False, "false": False, "off": False, "0": False}
    try:
        return switched[text.strip().lower()]
    except KeyError:
        raise ValueError("it is neither yes nor no") from None


def parse_conninfo(text: str) -> str:
    """Read a libpq URL or connection string: only its form is checked."""
    # Not before it is needed: commands that only show the settings need not wait for it.
    from psycopg import ProgrammingError
    from psycopg.conninfo import conninfo_to_dict

    try:
        conninfo_to_dict(text)
    except ProgrammingError:
        raise ValueError("it is neither a URL nor a connection string") from None
    return text


@dataclass(frozen=True)
class Setting:
    """How one setting is named, read, bounded and explained."""

    flag: str
    variable: str
    help: str
    parse: Callable[[str], Any] = str
    unit: str = ""
    shown_default: str | None = None
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    repeatable: bool = False
    secret: bool = False
    # Whether `get_server` shows it among the limits in force.
    is_limit: bool = False

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand alone, without a value."""
        return self.parse is parse_switch


def setting(default: Any, **about: Any) -> Any:
    """Declare a field of `Settings` together with its line of the table."""
    if callable(default):
        return field(default_factory=default, metadata={"setting": Setting(**about)})
    return field(default=default, metadata={"setting": Setting(**about)})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set, with its default."""

    database_url: str | None = setting(
        None,
        flag="--database-url",
        variable="DATABASE_URL",
        parse=parse_conninfo,
        shown_default="none: an embedded PostgreSQL",
        help="The PostgreSQL to use (15 to 18), as a libpq URL or connection string. Of several hosts the one that"
        " takes writes is used, also after a failover.",
        secret=True,
    )
    data_dir: Path = setting(
        default_data_dir,
        flag="--data-dir",
        variable="BROKER_DATA_DIR",
        parse=Path,
        shown_default="/var/lib/wonderq as root, else $XDG_DATA_HOME/wonderq (~/.local/share/wonderq)",
        help="Where the embedded PostgreSQL keeps its data. Not used with a database URL.",
    )
    host: str = setting(
        "127.0.0.1",
        flag="--host",
        variable="BROKER_HOST",
        help="The address to listen on. Anything but loopback needs tokens, or --auth off, said aloud.",
    )
    port: int = setting(
        8080,
        flag="--port",
        variable="BROKER_PORT",
        parse=int,
        minimum=0,
        maximum=65535,
        help="The port to listen on; 0 picks a free one.",
    )
    auth: str = setting(
        "auto",
        flag="--auth",
        variable="BROKER_AUTH",
        choices=("auto", "required", "off"),
        help="Who may call. `auto`: everybody until the first token is made, and from then on for good only who has"
        " one. `required`: only who has a token. `off`: everybody, on any address, with a warning.",
    )
    max_failed_logins: int = setting(
        30,
        flag="--max-failed-logins",
        variable="BROKER_MAX_FAILED_LOGINS",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000_000,
        help="Requests without a token that counts, from one address in a minute and to each process; more are answered"
        " 429. Who shows a token that counts is let in all the same.",
    )
    max_calls_per_token: int = setting(
        1_000,
        flag="--max-calls-per-token",
        variable="BROKER_MAX_CALLS_PER_TOKEN",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000_000,
        help="Calls in flight at one time for one token, in each process, those that wait for messages too; one more is"
        " `overloaded`.",
    )
    max_call_rate_per_token: float = setting(
        10_000.0,
        flag="--max-call-rate-per-token",
        variable="BROKER_MAX_CALL_RATE_PER_TOKEN",
        is_limit=True,
        parse=float,
        unit="calls a second",
        minimum=1,
        maximum=1_000_000,
        shown_default="10000",
        help="Calls a second for one token, in each process, those of a batch one by one; more are `overloaded`.",
    )
    trusted_proxy: tuple[str, ...] = setting(
        (),
        flag="--trusted-proxy",
        variable="BROKER_TRUSTED_PROXY",
        parse=parse_networks,
        repeatable=True,
        shown_default="none",
        help="A network, as `10.0.0.0/8`, of proxies whose X-Forwarded-For is believed.",
    )
    tls_certificate: Path | None = setting(
        None,
        flag="--tls-certificate",
        variable="BROKER_TLS_CERTIFICATE",
        parse=Path,
        shown_default="none: no TLS",
        help="A file in PEM form with the server's certificate, and those between it and its root: https is spoken"
        " then, by TLS 1.2 and later.",
    )
    tls_key: Path | None = setting(
        None,
        flag="--tls-key",
        variable="BROKER_TLS_KEY",
        parse=Path,
        shown_default="none",
        help="A file with the key of that certificate, in PEM form, without a passphrase.",
    )
    allowed_host: tuple[str, ...] = setting(
        (),
        flag="--allowed-host",
        variable="BROKER_ALLOWED_HOST",
        parse=parse_list,
        repeatable=True,
        shown_default="none",
        help="One more name that the Host header may carry while bound to loopback (localhost,"
        " 127.0.0.1 and [::1] always may). Guards against DNS rebinding.",
    )
    cors_origin: tuple[str, ...] = setting(
        (),
        flag="--cors-origin",
        variable="BROKER_CORS_ORIGIN",
        parse=parse_origins,
        repeatable=True,
        shown_default="none",
        help="A site, as `https://tools.example`, whose pages may call the broker from a browser.",
    )
    processes: int = setting(
        1,
        flag="--processes",
        variable="BROKER_PROCESSES",
        parse=int,
        minimum=1,
        maximum=64,
        help="Server processes on the port, each of which uses one core at most. Limits on connections, calls,"
        " consumers and database connections are for each process.",
    )
    sweep_interval: float = setting(
        1.0,
        flag="--sweep-interval",
        variable="BROKER_SWEEP_INTERVAL",
        parse=float,
        unit="seconds",
        minimum=0.01,
        maximum=3600,
        help="How often expired messages are removed and ended leases counted. What clients see does not depend on it.",
    )
    request_timeout: float = setting(
        10.0,
        flag="--request-timeout",
        variable="BROKER_REQUEST_TIMEOUT",
        is_limit=True,
        parse=float,
        unit="seconds",
        minimum=0.1,
        maximum=600,
        help="A call that the database has not answered by then (beyond its `wait`) is `unavailable`.",
    )
    startup_timeout: float = setting(
        60.0,
        flag="--startup-timeout",
        variable="BROKER_STARTUP_TIMEOUT",
        parse=float,
        unit="seconds",
        minimum=0,
        maximum=86400,
        help="How long a database that cannot be reached is tried for at the start.",
    )
    database_connections: int = setting(
        8,
        flag="--database-connections",
        variable="BROKER_DATABASE_CONNECTIONS",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=200,
        help="Connections of each process for calls; two of them are kept for calls that only read. Three more are"
        " used: to listen, to notify and to see whether PostgreSQL is well.",
    )
    allow_data_loss: bool = setting(
        False,
        flag="--allow-data-loss",
        variable="BROKER_ALLOW_DATA_LOSS",
        parse=parse_switch,
        shown_default="no",
        help="Start, with a loud warning, also where PostgreSQL is set so that acknowledged messages can be lost:"
        " `fsync`, `full_page_writes` or `synchronous_commit` off, or `synchronous_commit` local beside a synchronous"
        " standby.",
    )
    max_request_bytes: int = setting(
        8 * 2**20,
        flag="--max-request-bytes",
        variable="BROKER_MAX_REQUEST_BYTES",
        is_limit=True,
        parse=parse_size,
        unit="bytes",
        shown_default="8MiB",
        minimum=1024,
        maximum=2**30,
        help="The longest request body; more is answered 413.",
    )
    max_nesting: int = setting(
        128,
        flag="--max-nesting",
        variable="BROKER_MAX_NESTING",
        is_limit=True,
        parse=int,
        minimum=8,
        maximum=512,
        help="How deep arrays and objects of one call may lie in each other; deeper is answered -32600.",
    )
    header_timeout: float = setting(
        15.0,
        flag="--header-timeout",
        variable="BROKER_HEADER_TIMEOUT",
        is_limit=True,
        parse=float,
        unit="seconds",
        minimum=0.1,
        maximum=3600,
        help="How long a new connection may say nothing, and then the head of a request may take; after that, and up to"
        " a tenth more, so that not all end at once, it is closed, and answered 408 where a request had begun.",
    )
    body_timeout: float = setting(
        60.0,
        flag="--body-timeout",
        variable="BROKER_BODY_TIMEOUT",
        is_limit=True,
        parse=float,
        unit="seconds",
        minimum=0.1,
        maximum=3600,
        help="How long the body of a request may take in all; then, or up to a tenth later, it is answered 408.",
    )
    body_stall_timeout: float = setting(
        15.0,
        flag="--body-stall-timeout",
        variable="BROKER_BODY_STALL_TIMEOUT",
        is_limit=True,
        parse=float,
        unit="seconds",
        minimum=0.1,
        maximum=3600,
        help="How long no byte of a body may come; then, or up to a tenth later, it is answered 408.",
    )
    keepalive_timeout: float = setting(
        75.0,
        flag="--keepalive-timeout",
        variable="BROKER_KEEPALIVE_TIMEOUT",
        is_limit=True,
        parse=float,
        unit="seconds",
        minimum=0.1,
        maximum=3600,
        help="How long a connection is kept between two requests, and an answer waits for a client that reads nothing.",
    )
    max_connections: int = setting(
        10_000,
        flag="--max-connections",
        variable="BROKER_MAX_CONNECTIONS",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000_000,
        help="Client connections of each process at one time; one more is answered 503.",
    )
    max_calls_in_flight: int = setting(
        20_000,
        flag="--max-calls-in-flight",
        variable="BROKER_MAX_CALLS_IN_FLIGHT",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000_000,
        help="Calls of all clients at one time, in each process, those that wait for messages too and those of a batch"
        " one by one; one more is `overloaded`.",
    )
    max_calls: int = setting(
        10_000,
        flag="--max-calls",
        variable="BROKER_MAX_CALLS",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000_000,
        help="Calls that may wait for a database connection, in each process; one more is `overloaded`.",
    )
    max_waiting_consumers: int = setting(
        10_000,
        flag="--max-waiting-consumers",
        variable="BROKER_MAX_WAITING_CONSUMERS",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000_000,
        help="Calls of `dequeue` that may wait for a message at one time, in each process; one more is `overloaded`.",
    )
    webhook_allow: tuple[str, ...] = setting(
        (),
        flag="--webhook-allow",
        variable="BROKER_WEBHOOK_ALLOW",
        parse=parse_networks,
        repeatable=True,
        shown_default="none",
        help="One more network, as `10.0.0.0/8`, that messages may be pushed to, then over plain http as well. All else"
        " that is pushed to must be public, and https. Whoever may subscribe can make the broker send requests there.",
    )
    webhook_concurrency: int = setting(
        64,
        flag="--webhook-concurrency",
        variable="BROKER_WEBHOOK_CONCURRENCY",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=1_000,
        help="Messages that each process pushes to one subscription at one time.",
    )
    webhook_total: int = setting(
        256,
        flag="--webhook-total",
        variable="BROKER_WEBHOOK_TOTAL",
        is_limit=True,
        parse=int,
        minimum=1,
        maximum=10_000,
        help="Messages that each process pushes at one time, to all subscriptions together. None of them has more of"
        " these places than it leaves free. Endpoints that fail are probed besides, 16 at a time.",
    )
    webhook_timeout: float = setting(
        15.0,
        flag="--webhook-timeout",
        variable="BROKER_WEBHOOK_TIMEOUT",
        is_limit=True,
        parse=float,
        unit="seconds",
        minimum=0.1,
        maximum=300,
        help="How long a push may take, from looking up the host to the end of the answer; at most 5 of these seconds"
        " until there is a connection. Whoever answers later gets the message again.",
    )
    log_format: str = setting(
        "auto",
        flag="--log-format",
        variable="BROKER_LOG_FORMAT",
        choices=("auto", "console", "json"),
        help="How log lines look on standard error: `auto` is console on a terminal, JSON elsewhere.",
    )
    log_level: str = setting(
        "info",
        flag="--log-level",
        variable="BROKER_LOG_LEVEL",
        choices=("debug", "info", "warning", "error"),
        help="What is logged: this and what is worse. The audit log is on `info`, refused access on `warning`.",
    )


def limits_in_force(settings: Settings) -> dict[str, float]:
    """Return every setting that limits what clients may send or hold, by its name."""
    return {name: getattr(settings, name) for name, about, _ in settings_table() if about.is_limit}


def settings_table() -> list[tuple[str, Setting, Any]]:
    """Return (field name, its line of the table, default) for each setting, in order."""
    table = []
    for item in fields(Settings):
        about: Setting = item.metadata["setting"]
        default = item.default_factory() if callable(item.default_factory) else item.default
        table.append((item.name, about, default))
    return table
