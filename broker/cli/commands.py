"""The first word after `wonderq`: which command it names, how all of them are listed, and how each of them ends."""

from __future__ import annotations

import errno
import importlib
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from broker import __version__

# Where a command is defined, in the order of the list that people see: what is done every day comes first.
SECTIONS = {
    "Every day": {
        "send": "sending:send",
        "receive": "receiving:receive",
        "peek": "receiving:peek",
        "queues": "queues:queues",
        "topics": "topics:topics",
        "stats": "statistics:stats",
    },
    "When something went wrong": {
        "doctor": "doctor:doctor",
        "redrive": "queues:redrive",
        "purge": "queues:purge",
    },
    "Running a broker": {
        "serve": "serving:serve",
        "migrate": "serving:migrate_command",
        "token": "tokens:token",
    },
    "Everything else": {
        "call": "calls:call",
        "completion": "completion:completion",
    },
}

EXIT_CODES = (
    (0, "It is done. Nothing to receive, or to show, is no failure."),
    (1, "It could not be done, or `doctor` found what needs action. The reason is on standard error."),
    (2, "The command line is wrong, and nothing was done."),
    (130, "It was broken off by Ctrl-C. (`stats --watch` ends with 0: that is how one ends it.)"),
)

VARIABLES = (
    ("BROKER_URL", "Where the broker is; `http://127.0.0.1:8080` where it is not set. `--url` wins over it."),
    (
        "BROKER_TOKEN",
        "The token that is shown to it, where it wants one. Never an option: lists of processes show those.",
    ),
    ("NO_COLOR", "Set to anything: no colours, nothing bold. There are none either where the output is no terminal."),
)


class WithExamples(click.Command):
    """A command whose help ends with lines to try. They are in docs/cli.md too, and a test runs them."""

    def __init__(self, *args: Any, examples: tuple[str, ...], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples as they would be typed."""
        formatter.write_paragraph()
        formatter.write_heading("Examples")
        for example in self.examples:
            formatter.write(f"  {example}\n")
        super().format_epilog(ctx, formatter)


class GroupWithExamples(WithExamples, click.Group):
    """The same for a command that has commands of its own."""


class Commands(click.Group):
    """`wonderq` itself. Each command is imported when it is needed; whatever goes wrong ends in a sentence."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for names in SECTIONS.values() for name in names]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for names in SECTIONS.values():
            if cmd_name in names:
                module, attribute = names[cmd_name].split(":")
                command: click.Command = getattr(importlib.import_module(f"broker.cli.{module}"), attribute)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in SECTIONS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name, each.get_short_help_str(80)) for name, each in found if each is not None])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Variables"):
            formatter.write_dl(VARIABLES)
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), meaning) for code, meaning in EXIT_CODES])

    def invoke(self, ctx: click.Context) -> Any:
        # What cannot be written is shown escaped, whatever the terminal's encoding is.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # Click ends quietly with 1 then.
            raise click.ClickException(fault_of(error)) from error


def fault_of(error: Exception) -> str:
    """Say of an error that nobody foresaw what it is and where, for who reports it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"This is a mistake in wonderq {__version__} itself, and not yours: {type(error).__name__}: {error}"
        f" ({Path(frame.filename).name}, line {frame.lineno}). Please report it."
    )


@click.command(
    cls=Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="wonderq")
@click.pass_context
def main(context: click.Context) -> None:
    """WonderQ: a message broker on PostgreSQL.

    \b
    wonderq serve                                   run a broker
    wonderq send default '{"hello": "world"}'       send it a message
    wonderq receive default                         and get it back

    Every command has --help, with examples, and those that show something have --json.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
