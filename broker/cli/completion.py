"""Completion in the shell: the script for it, and the names of queues and topics, which the broker is asked for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any

import click
from click.shell_completion import get_completion_class

from broker.cli.commands import WithExamples

SHELLS = ("bash", "zsh", "fish")
# Whoever presses TAB waits. A broker that is slower completes nothing.
ANSWER_SECONDS = 1.0
MOST_NAMES = 100
INSTALL = {
    "bash": 'eval "$(wonderq completion bash)"',
    "zsh": 'eval "$(wonderq completion zsh)"',
    "fish": "wonderq completion fish | source",
}

Complete = Callable[[click.Context, click.Parameter, str], list[str]]


def names_of(method: str, listed: str, key: str) -> Complete:
    """Return what completes a name by what a method lists; nothing where the broker does not answer at once."""

    def complete(context: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
        try:
            found = asyncio.run(asyncio.wait_for(first_page(url_of(context), method, incomplete), ANSWER_SECONDS))
            return [each[key] for each in found[listed]]
        except Exception:  # A shell that completes is no place for errors: not even for those nobody thought of.
            return []

    return complete


async def first_page(url: str, method: str, prefix: str) -> Any:
    """Ask for the names that begin like this."""
    from broker.client import Client

    async with Client(url, token=os.environ.get("BROKER_TOKEN") or None, deadline=0) as client:
        return await client.call(method, prefix=prefix, limit=MOST_NAMES)


def url_of(context: click.Context) -> str:
    """Return the URL that stands on the command line so far, or else the variable's."""
    above: click.Context | None = context
    while above is not None:
        if above.params.get("url"):
            return str(above.params["url"])
        above = above.parent
    return os.environ.get("BROKER_URL") or "http://127.0.0.1:8080"


queue_names = names_of("list_queues", "queues", "queue")
topic_names = names_of("list_topics", "topics", "topic")


def queue_argument(*, required: bool = True) -> Callable[[Any], Any]:
    """Return the argument that names a queue."""
    return click.argument("queue", required=required, shell_complete=queue_names)


@click.command(cls=WithExamples, examples=tuple(INSTALL.values()))
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print what completes commands and names in a shell.

    Put the line for your shell into its start-up file: ~/.bashrc, ~/.zshrc (after compinit) or
    ~/.config/fish/config.fish.
    """
    complete_class = get_completion_class(shell)
    assert complete_class is not None, "click knows all of SHELLS"
    root = context.find_root()
    click.echo(complete_class(root.command, {}, "wonderq", "_WONDERQ_COMPLETE").source())
