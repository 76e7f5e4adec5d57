"""`wonderq serve` and `wonderq migrate`: a broker, and the schema that it needs in its database."""

from __future__ import annotations

import asyncio
import sys

import click
import psycopg

from broker import processes
from broker.cli.commands import WithExamples
from broker.cli.setting_options import with_settings
from broker.embedded import EmbeddedPostgres
from broker.installation import EmbeddedError
from broker.logs import configure_logs
from broker.settings import Settings
from broker.storage.migrate import MigrationError, migrate


@click.command(
    cls=WithExamples,
    examples=("wonderq serve", "DATABASE_URL=postgresql://wonderq@db1,db2/wonderq wonderq serve --processes 2"),
)
@with_settings()
def serve(settings: Settings) -> None:
    """Run a broker.

    Without --database-url it has a PostgreSQL of its own. It prints one line on standard output when it is ready,
    `listening on URL`, and logs on standard error. Ctrl-C and SIGTERM stop it within ten seconds.
    """
    configure_logs(settings.log_format, settings.log_level)
    sys.exit(processes.run(settings))


@click.command(
    "migrate",
    cls=WithExamples,
    examples=("wonderq migrate", "wonderq migrate --runtime-role wonderq_runtime"),
)
@click.option(
    "--runtime-role",
    metavar="NAME",
    help="A role for brokers to connect as: made where there is none of this name, it may read and write, and not"
    " change the schema nor make tokens. Name it at each upgrade: rights are granted on the tables that there are.",
)
@with_settings("database_url", "data_dir")
def migrate_command(settings: Settings, runtime_role: str | None) -> None:
    """Bring the database's schema up to date.

    `serve` does the same at its start.
    """

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
