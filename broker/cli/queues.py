"""`wonderq queues` shows all queues, `wonderq redrive` and `wonderq purge` act on one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click
import msgspec

from broker.cli.commands import WithExamples
from broker.cli.completion import queue_argument, queue_names
from broker.cli.connecting import Conversation, json_option, talking_to, url_option
from broker.cli.output import console, count_of, duration, print_json, print_table, remark, say, to_json

# So many messages one call moves: a second or so, after which the count on the screen changes.
REDRIVEN_AT_ONCE = 10_000


@click.command(
    cls=WithExamples,
    examples=("wonderq queues", "wonderq queues --prefix mail.", "wonderq queues --json | jq -r .queue"),
)
@click.option("--prefix", default="", help="Only those whose name begins like this.", shell_complete=queue_names)
@json_option("a line for each queue, as `list_queues` returns it.")
@url_option
def queues(prefix: str, as_json: bool, url: str) -> None:
    """Show the queues, with what lies in them.

    A figure with ~ before it is an estimate. `oldest` is how long the oldest message has been ready.
    """
    with talking_to(url) as broker:
        listed = broker.pages("list_queues", "queues", prefix=prefix, counts=True)
        if as_json:
            for raw in listed:
                print_json(raw)
            return
        rows = [row_of(msgspec.json.decode(raw)) for raw in listed]
    if not rows:
        remark(f"No queue's name begins with {prefix}." if prefix else "There is no queue that you may see.")
        return
    print_table(("queue", "ready ", "delayed ", "leased ", "total ", "oldest ", "settings"), rows)


def row_of(queue: dict[str, Any]) -> tuple[Any, ...]:
    """Return what the table shows of a queue."""
    counts = queue["counts"]
    sign = "" if counts["exact"] else "~"
    figures = [f"{sign if counts[name] else ''}{counts[name]:,}" for name in ("ready", "delayed", "leased", "total")]
    return (queue["queue"], *figures, duration(queue["oldest_ready_age"]), settings_of(queue))


def settings_of(queue: dict[str, Any]) -> str:
    """Say what of a queue's settings a person should know who wonders what happens to its messages."""
    said = ["paused"] if queue["paused"] else []
    if queue["max_receives"] is not None:
        target = queue["dead_letter_queue"]
        said.append(f"after {count_of(queue['max_receives'], 'attempt')} " + (f"to {target}" if target else "dropped"))
    if queue["max_messages"] is not None:
        said.append(f"at most {count_of(queue['max_messages'], 'message')}")
    return ", ".join(said)


@contextmanager
def counting(what: str) -> Iterator[Callable[[int], None]]:
    """Yield what is told how far it is; it shows that on standard error, where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    with console(stderr=True).status(what) as status:
        yield lambda done: status.update(f"{what}: {done:,}")


@click.command(
    cls=WithExamples,
    examples=("wonderq redrive mail-dead", "wonderq redrive mail-dead --max 10", "wonderq redrive mail-dead --to mail"),
)
@queue_argument()
@click.option("--to", help="Into this queue. Default: where each came from.", shell_complete=queue_names)
@click.option("--max", "most", type=click.IntRange(1), metavar="N", help="At most so many. Default: all.")
@json_option("one object: `moved`, and whether it is `complete`.")
@url_option
def redrive(queue: str, to: str | None, most: int | None, as_json: bool, url: str) -> None:
    """Move dead letters back to where they came from.

    They may be delivered max_receives times again. It goes on until all have moved that were there.
    """
    moved, complete = 0, False
    with talking_to(url) as broker, counting(f"Moving dead letters of {queue}") as show:
        while not complete and (most is None or moved < most):
            this_time = REDRIVEN_AT_ONCE if most is None else min(most - moved, REDRIVEN_AT_ONCE)
            answer = broker.ask("redrive", queue=queue, to=to, max_messages=this_time)
            # A round that had to stop at its limit says that it is not complete.
            moved, complete = moved + answer["moved"], answer["complete"]
            if not answer["moved"] and not complete:
                break
            show(moved)
    if as_json:
        print_json(to_json({"moved": moved, "complete": complete}))
    else:
        where = f"to {to}" if to else "to where they came from"
        say(f"moved {count_of(moved, 'message')} of {queue} {where}")
        if not complete:
            remark("There are more.")


@click.command(cls=WithExamples, examples=("wonderq purge mail --yes", "wonderq purge mail --yes --json"))
@queue_argument()
@click.option("--yes", is_flag=True, help="Do not ask. Needed where nobody can answer.")
@json_option("one object: `purged`, and whether it is `complete`.")
@url_option
def purge(queue: str, yes: bool, as_json: bool, url: str) -> None:
    """Remove all messages of a queue; it asks first.

    They are gone for good, also delayed and leased ones. It goes on until the queue was empty once. Without a terminal
    it does nothing unless --yes is said.
    """
    if not yes and not sys.stdin.isatty():
        raise click.UsageError(f"Nobody can be asked whether to purge {queue}: say --yes.")
    with talking_to(url) as broker:
        if not yes:
            ask_first(broker, queue)
        purged, complete = 0, False
        with counting(f"Purging {queue}") as show:
            while not complete:
                answer = broker.ask("purge_queue", queue=queue)
                purged, complete = purged + answer["purged"], answer["complete"]
                show(purged)
    if as_json:
        print_json(to_json({"purged": purged, "complete": complete}))
    else:
        say(f"removed {count_of(purged, 'message')} from {queue}")


def ask_first(broker: Conversation, queue: str) -> None:
    """Ask whether that queue is meant. Raises click.ClickException where it is not."""
    counts = broker.ask("get_queue", queue=queue)["counts"]
    about = "" if counts["exact"] else "about "
    question = f"Remove all {about}{count_of(counts['total'], 'message')} of {queue} for good?"
    if not click.confirm(question, err=True):
        raise click.ClickException(f"Nothing was removed from {queue}.")
