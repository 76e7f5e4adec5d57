"""`wonderq stats`: what went through a queue, or all of them, in the last minutes."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import click

from broker.cli.commands import WithExamples
from broker.cli.completion import queue_argument
from broker.cli.connecting import Conversation, as_params, json_option, talking_to, url_option
from broker.cli.output import console, flush, is_terminal, print_json, print_table, say, table

WATCH_SECONDS = 2.0
SERIES = ("enqueued", "delivered", "deleted", "returned", "dead", "expired")
BARS = "▁▂▃▄▅▆▇█"
COLUMNS = ("", "a second ", "last minute ", "in all ", "each minute")


@click.command(cls=WithExamples, examples=("wonderq stats", "wonderq stats mail --minutes 60", "wonderq stats --json"))
@queue_argument(required=False)
@click.option(
    "--minutes", type=click.IntRange(1), default=15, show_default=True, metavar="N", help="So many minutes back."
)
@click.option("--watch", is_flag=True, help="Show it anew every two seconds, until Ctrl-C.")
@json_option("one object, as `get_stats` returns it; with --watch such a line every two seconds.")
@url_option
def stats(queue: str | None, minutes: int, watch: bool, as_json: bool, url: str) -> None:
    """Show what went through in the last minutes.

    Through the QUEUE, or without one through all of them, minute by minute.

    `returned` are messages that came back because their lease ended or was given up; `dead` those that had used up
    their max_receives. The last minute is still going on.
    """
    with talking_to(url) as broker:
        if not watch:
            show(broker, queue, minutes, as_json=as_json)
            return
        with contextlib.suppress(KeyboardInterrupt):
            watch_on(broker, queue, minutes, as_json=as_json)


def show(broker: Conversation, queue: str | None, minutes: int, *, as_json: bool) -> None:
    """Print the figures once."""
    params = as_params({"queue": queue, "minutes": minutes})
    if as_json:
        print_json(broker.ask_json("get_stats", params))
        return
    found = broker.ask("get_stats", queue=queue, minutes=minutes)
    say(title_of(found, minutes))
    print_table(COLUMNS, rows_of(found["minutes"]))


def watch_on(broker: Conversation, queue: str | None, minutes: int, *, as_json: bool) -> None:
    """Print the figures again and again; on a terminal they stay in their place."""
    if as_json or not is_terminal():
        while True:
            show(broker, queue, minutes, as_json=as_json)
            flush()
            time.sleep(WATCH_SECONDS)
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            found = broker.ask("get_stats", queue=queue, minutes=minutes)
            drawn = table(COLUMNS, rows_of(found["minutes"]))
            live.update(
                Group(Text(title_of(found, minutes)), drawn, Text("Ctrl-C ends it.", style="dim")), refresh=True
            )
            time.sleep(WATCH_SECONDS)


def title_of(found: dict[str, Any], minutes: int) -> str:
    """Say what the figures are about."""
    return f"{found['queue'] or 'All queues'}, the last {minutes} minutes"


def rows_of(minutes: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return a line for each series: the rate of the last whole minute, the figures, and how they went."""
    rows = []
    for name in SERIES:
        figures = [int(minute[name]) for minute in minutes]
        whole = figures[-2] if len(figures) > 1 else sum(figures)
        rows.append(
            (name, f"{whole / 60:,.1f}", f"{figures[-1] if figures else 0:,}", f"{sum(figures):,}", line_of(figures))
        )
    return rows


def line_of(figures: list[int]) -> str:
    """Draw figures as a line of bars, the highest of them as high as a bar can be; nothing where all are 0."""
    most = max(figures, default=0)
    if not most:
        return ""
    # What is not nothing is seen.
    return "".join(" " if figure == 0 else BARS[min(7, figure * 8 // (most + 1))] for figure in figures)
