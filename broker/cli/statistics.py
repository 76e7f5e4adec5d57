"""`wonderq stats`: what went through a queue, or all of them, in the last minutes."""

from __future__ import annotations

import contextlib
import math
import time
from typing import Any

import click

from broker.cli.commands import WithExamples
from broker.cli.completion import queue_argument
from broker.cli.connecting import Conversation, as_params, json_option, sentence_of, talking_to, url_option
from broker.cli.output import console, count_of, flush, is_terminal, print_json, print_table, printable, say, table
from broker.client import BrokerError

WATCH_SECONDS = 2.0
SERIES = ("enqueued", "delivered", "deleted", "returned", "dead", "expired")
BARS = "▁▂▃▄▅▆▇█"
# With the figures they fit into the 80 columns of a terminal.
MOST_BARS = 30
MOST_MINUTES = 1440
COLUMNS = ("", "a second ", "this minute ", "in all ", "over time")


@click.command(cls=WithExamples, examples=("wonderq stats", "wonderq stats mail --minutes 60", "wonderq stats --json"))
@queue_argument(required=False)
@click.option(
    "--minutes",
    type=click.IntRange(1, MOST_MINUTES),
    default=15,
    show_default=True,
    metavar="N",
    help="So many minutes back.",
)
@click.option("--watch", is_flag=True, help="Show it anew every two seconds, until Ctrl-C.")
@json_option("one object, as `get_stats` returns it; with --watch such a line every two seconds.")
@url_option
def stats(queue: str | None, minutes: int, watch: bool, as_json: bool, url: str) -> None:
    """Show what went through in the last minutes.

    Through the QUEUE, or without one through all of them, minute by minute.

    `returned` are messages that came back because their lease ended or was given up; `dead` those that had used up
    their max_receives. The rate is that of the last whole
    minute; this minute is still going on. It takes a second until something is counted.
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
    """Print the figures again and again; on a terminal they stay in their place.

    A broker that is away for a moment, after it has answered once, ends nothing there.
    """
    if as_json or not is_terminal():
        while True:
            show(broker, queue, minutes, as_json=as_json)
            flush()
            time.sleep(WATCH_SECONDS)
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    found, trouble = broker.ask("get_stats", queue=queue, minutes=minutes), ""
    with Live(console=console(), auto_refresh=False) as live:
        while True:
            drawn = table(COLUMNS, rows_of(found["minutes"]))
            below = Text(printable(trouble), style="red") if trouble else Text("Ctrl-C ends it.", style="dim")
            live.update(Group(Text(title_of(found, minutes)), drawn, below), refresh=True)
            time.sleep(WATCH_SECONDS)
            try:
                found, trouble = broker.ask("get_stats", queue=queue, minutes=minutes), ""
            except BrokerError as error:
                trouble = sentence_of(error)


def title_of(found: dict[str, Any], minutes: int) -> str:
    """Say what the figures are about."""
    return f"{found['queue'] or 'All queues'}, the last {count_of(minutes, 'minute')}"


def rows_of(minutes: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return a line for each series: the rate of the last whole minute, the figures, and how they went."""
    rows = []
    for name in SERIES:
        figures = [int(minute[name]) for minute in minutes]
        whole = figures[-2] if len(figures) > 1 else figures[-1]
        rows.append((name, f"{whole / 60:,.1f}", f"{figures[-1]:,}", f"{sum(figures):,}", line_of(figures)))
    return rows


def line_of(figures: list[int]) -> str:
    """Draw figures as a line of bars, the highest of them as high as a bar can be; nothing where all are 0.

    Where there are many, each bar is the sum of several.
    """
    together = math.ceil(len(figures) / MOST_BARS)
    # The last bar is the one that is not complete, on the left where they do not divide.
    first = len(figures) % together
    heights = [sum(figures[i : i + together]) for i in range(first, len(figures), together)]
    heights = [sum(figures[:first]), *heights] if first else heights
    most = max(heights, default=0)
    if not most:
        return ""
    # What is not nothing is seen.
    return "".join(" " if height == 0 else BARS[min(7, height * 8 // (most + 1))] for height in heights)
