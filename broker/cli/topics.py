"""`wonderq topics`: who publishes to whom, and how those fare who are pushed to."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import click
import msgspec

from broker.cli.commands import WithExamples
from broker.cli.completion import topic_names
from broker.cli.connecting import json_option, talking_to, url_option
from broker.cli.output import cut, print_json, print_table, printable, remark, to_json

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = {"active": "green", "failing": "yellow", "ended": "red"}


@click.command(cls=WithExamples, examples=("wonderq topics", "wonderq topics --prefix orders", "wonderq topics --json"))
@click.option("--prefix", default="", help="Only those whose name begins like this.", shell_complete=topic_names)
@json_option("a line for each topic, as `list_topics` returns it, with its subscriptions as `list_subscriptions` does.")
@url_option
def topics(prefix: str, as_json: bool, url: str) -> None:
    """Show the topics, and who subscribes to each of them.

    The state of a subscription is active, failing (its url does not take messages, and is probed) or ended (it said
    that it wants none any more).
    """
    with talking_to(url) as broker:
        listed = [msgspec.json.decode(raw) for raw in broker.pages("list_topics", "topics", prefix=prefix)]
        subscriptions = defaultdict(list)
        for raw in broker.pages("list_subscriptions", "subscriptions"):
            each = msgspec.json.decode(raw)
            subscriptions[each["topic"]].append(each)
    if as_json:
        for topic in listed:
            print_json(to_json({**topic, "subscriptions": subscriptions[topic["topic"]]}))
        return
    if not listed:
        remark(f"No topic's name begins with {prefix}." if prefix else "There is no topic that you may see.")
        return
    rows = [row for topic in listed for row in rows_of(topic, subscriptions[topic["topic"]])]
    print_table(("topic", "delivery", "subscription", "goes to", "only if", "state"), rows)


def rows_of(topic: dict[str, Any], subscriptions: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return the lines of a topic: one for each who subscribes."""
    rows: list[tuple[Any, ...]] = [
        (each["name"], each["url"] or each["queue"], condition_of(each["filter"]), state_of(each["state"]))
        for each in subscriptions
    ] or [("nobody subscribes", "", "", "")]
    return [(topic["topic"], topic["delivery"], *row) if i == 0 else ("", "", *row) for i, row in enumerate(rows)]


def condition_of(wanted: dict[str, list[str]] | None) -> str:
    """Say which messages a subscription wants."""
    return cut(", ".join(f"{header} is {' or '.join(values)}" for header, values in (wanted or {}).items()))


def state_of(state: str) -> Text:
    """Return a state in its colour."""
    from rich.text import Text

    return Text(printable(state), style=COLOURS.get(state, ""))
