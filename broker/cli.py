"""The command line: `wonderq serve`, `migrate`, `token`, and `call METHOD …`, which is built from the schema.

Commands that talk to a broker read BROKER_URL and BROKER_TOKEN. Exit codes: 0 done, 1 it could not be done
(the reason is on standard error), 2 the command line is wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import click
import msgspec
import psycopg

from broker import __version__, processes
from broker.client import BrokerError, Client, ConnectionFailed
from broker.credentials import is_pattern
from broker.embedded import EmbeddedPostgres, conninfo_of_running
from broker.installation import EmbeddedError
from broker.logs import configure_logs
from broker.model import timestamp, timestamp_or_null
from broker.schema import Schema, describe, load_document
from broker.settings import Setting, Settings, settings_table
from broker.storage import sessions, tokens
from broker.storage.database import Connection
from broker.storage.migrate import MigrationError, migrate
from broker.storage.tokens import Grant, TooManyTokens

T = TypeVar("T")

DEFAULT_URL = "http://127.0.0.1:8080"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wonderq")
def main() -> None:
    """WonderQ: a message broker on PostgreSQL, spoken to as JSON-RPC 2.0 over HTTP."""


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these settings, of all where none is named; it gets one `Settings` first."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_one_argument(**given: Any) -> None:
            settings = {name: given.pop(name) for name, _, _ in settings_table() if name in given}
            command(read_settings(settings), **given)

        decorated: Callable[..., None] = with_one_argument
        for name, about, default in reversed(settings_table()):
            if not names or name in names:
                decorated = option(name, about, default)(decorated)
        return decorated

    return decorate


def option(name: str, about: Setting, default: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the click option of one setting. What is given is read by `read_settings`, wherever it stood."""
    shown = about.shown_default if about.shown_default is not None else default
    unit = f" {about.unit}" if about.unit and about.shown_default is None else ""
    metavar = "|".join(about.choices) or about.parse.__name__.upper().replace("PARSE_", "")
    # A switch alone means yes.
    alone: dict[str, Any] = {"is_flag": False, "flag_value": "yes"} if about.is_switch else {}
    return click.option(
        about.flag,
        name,
        multiple=about.repeatable,
        metavar="[yes|no]" if about.is_switch else metavar,
        help=f"{about.help}  [{about.variable}; default: {shown}{unit}]",
        **alone,
    )


def read_settings(given: dict[str, Any]) -> Settings:
    """Return the settings: what the command line says, else the environment, else the default."""
    values: dict[str, Any] = {}
    for name, about, _ in settings_table():
        on_command_line = given.get(name)
        text = os.environ.get(about.variable, "")
        if on_command_line not in (None, ()):
            source = about.flag
            value = ",".join(on_command_line) if about.repeatable else on_command_line
        elif text and name in given:
            source, value = about.variable, text
        else:
            continue
        values[name] = read_value(about, source, value)
    return Settings(**values)


def read_value(about: Setting, source: str, text: str) -> Any:
    """Return the value that a text means. Raises click.BadParameter, which names where the text stood."""
    shown = "***" if about.secret else text
    if about.choices:
        limit = f"one of {', '.join(about.choices)}"
    elif about.minimum is not None and about.maximum is not None:
        limit = f"a number from {about.minimum:,.12g} to {about.maximum:,.12g} {about.unit}".strip()
    elif about.is_switch:
        limit = "yes or no"
    else:
        limit = "a value that can be read, and not empty"
    try:
        value = about.parse(text)
        is_allowed = bool(text.strip()) and (not about.choices or value in about.choices)
        if about.minimum is not None and about.maximum is not None:
            is_allowed = is_allowed and about.minimum <= value <= about.maximum
    except (ValueError, OverflowError):
        is_allowed = False
    if not is_allowed:
        raise click.BadParameter(f"{source} must be {limit}, and {shown!r} was given. {about.help}")
    return value


@main.command()
@with_settings()
def serve(settings: Settings) -> None:
    """Run a broker; without --database-url with a PostgreSQL of its own."""
    configure_logs(settings.log_format, settings.log_level)
    sys.exit(processes.run(settings))


@main.command("migrate")
@click.option(
    "--runtime-role",
    metavar="NAME",
    help="A role for brokers to connect as: made where there is none of this name, it may read and write, and not"
    " change the schema nor make tokens.",
)
@with_settings("database_url", "data_dir")
def migrate_command(settings: Settings, runtime_role: str | None) -> None:
    """Bring the database's schema up to date; `serve` does the same at its start."""

    async def run() -> list[str]:
        if settings.database_url is not None:
            return await migrate(settings.database_url, runtime_role=runtime_role)
        postgres = EmbeddedPostgres(settings.data_dir)
        try:
            return await migrate(await postgres.start(), runtime_role=runtime_role)
        finally:
            await postgres.stop()

    try:
        done = asyncio.run(run())
    except (MigrationError, EmbeddedError) as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        reason = str(error).splitlines()[0]
        raise click.ClickException(
            f"The database cannot be migrated: {reason}. Check --database-url (DATABASE_URL); its role needs the right"
            " to create a schema."
        ) from None
    click.echo("\n".join(f"applied {name}" for name in done) or "nothing to do")


@main.group()
def token() -> None:
    """Make, list and revoke tokens, in the database itself; a running broker knows of it within a second."""


Work = Callable[[Connection], Awaitable[T]]


def on_the_database(settings: Settings, work: Work[T]) -> T:
    """Do something on a connection to the database: the given one, or that of a broker which may be running."""

    async def run() -> T:
        async with contextlib.AsyncExitStack() as stack:
            conninfo = settings.database_url or conninfo_of_running(settings.data_dir)
            if conninfo is None:
                postgres = EmbeddedPostgres(settings.data_dir)
                stack.push_async_callback(postgres.stop)
                conninfo = await postgres.start()
            await migrate(conninfo)
            async with await sessions.connect(conninfo) as connection:
                return await work(connection)

    try:
        return asyncio.run(run())
    except (MigrationError, EmbeddedError, TooManyTokens) as error:
        raise click.ClickException(str(error)) from None
    except psycopg.Error as error:
        reason = str(error).splitlines()[0]
        raise click.ClickException(
            f"The database cannot be used: {reason}. Check --database-url (DATABASE_URL)."
        ) from None


def check_patterns(context: click.Context, param: click.Parameter, patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse what cannot be a pattern of names."""
    for pattern in patterns:
        if not is_pattern(pattern):
            raise click.BadParameter(f"{pattern!r} is no pattern of names; one has letters, digits, . _ - and *.")
    return patterns


def check_name(context: click.Context, param: click.Parameter, name: str) -> str:
    """Refuse what cannot be a token's name."""
    if not is_pattern(name) or "*" in name or not name[0].isalnum():
        raise click.BadParameter(
            f"{name!r} is no name; one has letters, digits, . _ - and begins with one of the first two."
        )
    return name


def permission(verb: str, about: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the option that grants a verb."""
    return click.option(
        f"--{verb}",
        multiple=True,
        metavar="PATTERN",
        callback=check_patterns,
        help=f"{about} Repeatable; * is anything.",
    )


NAME = click.argument("name", callback=check_name)


@token.command("create")
@NAME
@permission("send", "Queues and topics to send to.")
@permission("receive", "Queues to receive from.")
@permission("manage", "Queues and topics to create, look into, change and delete.")
@click.option("--admin", is_flag=True, help="May ask for the server and for all counts.")
@click.option(
    "--expires-in", type=click.FloatRange(0, 3_153_600_000, min_open=True), metavar="SECONDS", help="Default: never."
)
@with_settings("database_url", "data_dir")
def create_token(
    settings: Settings, name: str, admin: bool, expires_in: float | None, **patterns: tuple[str, ...]
) -> None:
    """Make a token and print it: it is told nowhere else.

    While one token is replaced by another, both may have the same NAME.
    """
    grant = Grant(**patterns, admin=admin)
    click.echo(on_the_database(settings, lambda connection: tokens.create(connection, name, grant, expires_in)))


@token.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON array.")
@with_settings("database_url", "data_dir")
def list_tokens(settings: Settings, as_json: bool) -> None:
    """List the tokens that there are or were, without their secrets."""
    listed = on_the_database(settings, tokens.list_all)
    rows = [
        {
            "name": each.name, "id": each.id, "state": each.state, "created_at": timestamp(each.created_at),
            "expires_at": timestamp_or_null(each.expires_at), **each.grant._asdict(),
        }
        for each in listed
    ]  # fmt: skip
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        grants = [f"--{verb} {pattern}" for verb in ("send", "receive", "manage") for pattern in row[verb]]
        grants += ["--admin"] * row["admin"]
        expires_at = row["expires_at"] or "never expires"
        click.echo(f"{row['name']:<24} {row['id']} {row['state']:<8} {expires_at:<27} {' '.join(grants)}")


@token.command("revoke")
@NAME
@click.option("--older", is_flag=True, help="All but the newest.")
@with_settings("database_url", "data_dir")
def revoke_token(settings: Settings, name: str, older: bool) -> None:
    """Revoke the tokens of a NAME: within five seconds they count nowhere."""
    revoked = on_the_database(settings, lambda connection: tokens.revoke(connection, name, older=older))
    if not revoked:
        raise click.ClickException(f"There is no token called {name} to revoke; see token list.")
    click.echo(f"revoked {revoked}")


class CallGroup(click.Group):
    """`call METHOD`: a command for each method of the schema, an option for each of its params."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [method["name"] for method in load_document()["methods"]]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        document = load_document()
        for method in document["methods"]:
            if method["name"] == cmd_name:
                return call_command(method, document["components"]["schemas"])
        return None


@main.command(cls=CallGroup)
@click.option("--url", default=lambda: os.environ.get("BROKER_URL", DEFAULT_URL), help="[BROKER_URL]")
@click.pass_context
def call(context: click.Context, url: str) -> None:
    """Call a method of a running broker and print its result as JSON.

    Params are options. A param that is a string is given as it is, any other as JSON:

        wonderq call enqueue --queue mail --body '{"to": "ada"}' --delay 5
    """
    context.obj = url


def call_command(method: Schema, components: dict[str, Schema]) -> click.Command:
    """Build the command of one method."""
    params = []
    for param in method["params"]:
        text = param.get("description") or param["schema"].get("description") or ""
        limits = describe(param["schema"], components)
        params.append(
            click.Option(
                ["--" + param["name"].replace("_", "-"), param["name"]],
                required=param.get("required", False),
                metavar="TEXT" if takes_text(limits) else "JSON",
                help=f"{text} [{limits}]".strip(),
            )
        )

    @click.pass_obj
    def run(url: str, /, **given: str | None) -> None:
        named = {name: value for name, value in given.items() if value is not None}
        kinds = {param["name"]: describe(param["schema"], components) for param in method["params"]}
        call_and_print(url, method["name"], {name: read_param(name, kinds[name], text) for name, text in named.items()})

    help_text = "\n\n".join(filter(None, [method["summary"], method.get("description")]))
    return click.Command(method["name"], params=list(params), callback=run, help=help_text)


def takes_text(limits: str) -> bool:
    """Whether a param is given as it is: a string, or one of a few words."""
    return limits.startswith(("a string", "one of"))


def read_param(name: str, limits: str, text: str) -> str:
    """Return a param's value as JSON; what is JSON already keeps its bytes. Raises click.BadParameter."""
    name = name.replace("_", "-")
    try:
        text.encode()
        if takes_text(limits) and not (text == "null" and limits.endswith("or null")):
            return json.dumps(text)
        msgspec.json.decode(text, type=msgspec.Raw)
    except UnicodeEncodeError:
        raise click.BadParameter(f"--{name} is not UTF-8.") from None
    except msgspec.DecodeError as error:
        raise click.BadParameter(f"--{name} takes JSON, as {limits}: {error}") from None
    return text


def call_and_print(url: str, method: str, params: dict[str, str]) -> None:
    """Call a method and print its result; exit with 1 where it failed."""

    async def run() -> str:
        async with client:
            return await client.call_json(method, params)

    try:
        # A person sees an error sooner than a broker comes back, and may call again.
        client = Client(url, token=os.environ.get("BROKER_TOKEN") or None, deadline=0)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        result = asyncio.run(run())
    except ConnectionFailed as error:
        raise click.ClickException(f"{error} Is a broker running there? --url or BROKER_URL names another.") from None
    except BrokerError as error:
        raise click.ClickException(str(error)) from None
    click.echo(msgspec.json.format(result, indent=2))
