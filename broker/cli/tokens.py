"""`wonderq token`: make, list and revoke tokens, in the database itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import TypeVar

import click
import psycopg

from broker import audit
from broker.cli.commands import GroupWithExamples, WithExamples
from broker.cli.setting_options import with_settings
from broker.credentials import is_pattern
from broker.embedded import EmbeddedPostgres, conninfo_of_running
from broker.installation import EmbeddedError
from broker.model import timestamp, timestamp_or_null
from broker.settings import Settings
from broker.storage import sessions, tokens
from broker.storage.database import Connection
from broker.storage.migrate import MigrationError, migrate
from broker.storage.tokens import Grant, TooManyTokens

T = TypeVar("T")


@click.group(cls=GroupWithExamples, examples=("wonderq token create orders --send 'orders.*'", "wonderq token list"))
def token() -> None:
    """Make, list and revoke tokens.

    It works on the database itself; a running broker knows of it within a second.
    """


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


@token.command(
    "create",
    cls=WithExamples,
    examples=(
        "wonderq token create orders --send 'orders.*' --receive orders.in",
        "wonderq token create operator --manage '*' --admin --expires-in 86400",
    ),
)
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
    made = on_the_database(settings, lambda connection: tokens.create(connection, name, grant, expires_in))
    click.echo(audit.command_line("token_create", "ok", name=name, token_id=made[3:].partition(".")[0]), err=True)
    click.echo(made)


@token.command("list", cls=WithExamples, examples=("wonderq token list", "wonderq token list --json"))
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


@token.command("revoke", cls=WithExamples, examples=("wonderq token revoke orders",))
@NAME
@click.option("--older", is_flag=True, help="All but the newest.")
@with_settings("database_url", "data_dir")
def revoke_token(settings: Settings, name: str, older: bool) -> None:
    """Revoke the tokens of a NAME: within five seconds they count nowhere."""
    revoked = on_the_database(settings, lambda connection: tokens.revoke(connection, name, older=older))
    if not revoked:
        raise click.ClickException(f"There is no token called {name} to revoke; see token list.")
    click.echo(audit.command_line("token_revoke", "ok", name=name, revoked=revoked), err=True)
    click.echo(f"revoked {revoked}")
