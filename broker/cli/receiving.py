"""`wonderq receive` takes messages, `wonderq peek` looks at them.

Promised by `receive`: a message is deleted only after it was printed and the reader of the output has taken it. What
was taken and could not be printed, because the reader has gone, is given back at once. So a message may be printed and
come again; none is deleted that was not printed.
"""

from __future__ import annotations

from typing import Any

import click
import msgspec

from broker.cli.commands import WithExamples
from broker.cli.completion import queue_argument
from broker.cli.connecting import Conversation, as_params, json_option, talking_to, url_option
from broker.cli.output import (
    count_of,
    cut,
    duration,
    flush,
    one_line,
    print_json,
    print_table,
    remark,
    say,
    seconds_since,
)
from broker.client import BrokerError

# So few that they can be printed while their leases run, also where the reader is slow.
LEASED_AT_ONCE = 100
# The longest that one call may wait.
WAIT_SECONDS = 60.0
MOST_SECONDS = 86_400.0


class Taken(msgspec.Struct):
    """What is shown of a message to people; `raw` is all of it."""

    message_id: str
    receive_count: int
    body: msgspec.Raw
    headers: dict[str, str]
    enqueued_at: str
    visible_at: str
    dead_letter: dict[str, Any] | None = None
    receipt: str | None = None
    status: str = "leased"


@click.command(
    cls=WithExamples,
    examples=(
        "wonderq receive mail",
        "wonderq receive mail --max 100 --json | jq -c .body",
        "wonderq receive mail --wait 20",
        "wonderq receive mail --keep",
    ),
)
@queue_argument()
@click.option(
    "--max", "most", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="At most so many messages."
)
@click.option("--keep", is_flag=True, help="Do not delete them: they come back when their lease ends.")
@click.option(
    "--wait",
    type=click.FloatRange(0, MOST_SECONDS),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long for the first one. Default: not at all.",
)
@json_option("a line for each message with all that is known of it, as `dequeue` returns it.")
@url_option
def receive(queue: str, most: int, keep: bool, wait: float, as_json: bool, url: str) -> None:
    """Take messages: print them, and delete them.

    A message is deleted after the reader of the output has it. A pipe has what was written into it: before a reader
    that ends early, as `head`, say --max.

    For people a line has the message's id, the number of the attempt, and the body. Where nothing came, standard error
    says so, and the exit code is 0.
    """
    with talking_to(url) as broker:
        consumer = Consumer(broker, queue, keep=keep, as_json=as_json)
        while consumer.received < most and consumer.receive(min(most - consumer.received, LEASED_AT_ONCE), wait):
            wait = 0.0
    if not consumer.received:
        remark(f"Nothing came from {queue}." if wait else f"There is nothing to receive in {queue} now.")
    elif keep:
        remark(f"Kept: {count_of(consumer.received, 'message')}; each is ready again when its lease ends.")
    if consumer.lost:
        raise click.ClickException(
            f"Printed but not deleted, because their lease was over: {count_of(consumer.lost, 'message')}. They come"
            f" again. Give {queue} a longer visibility_timeout, or take fewer at a time."
        )


class Consumer:
    """Takes messages of a queue, prints them, and deletes them."""

    def __init__(self, broker: Conversation, queue: str, *, keep: bool, as_json: bool) -> None:
        self._broker = broker
        self._queue = queue
        self._keep = keep
        self._as_json = as_json
        self.received = 0
        self.lost = 0

    def receive(self, most: int, wait: float) -> int:
        """Take so many messages at most, print and delete them; return how many there were."""
        taken = self._take(most, wait)
        printed: list[str | None] = []
        unprinted = [each.receipt for each, _ in taken]
        try:
            for each, raw in taken:
                self._print(each, raw)
            flush()
            printed, unprinted = unprinted, []
        finally:
            # Also where the reader has gone, or somebody has pressed Ctrl-C.
            self._give_back(unprinted)
            if not self._keep:
                self._delete(printed)
        self.received += len(taken)
        return len(taken)

    def _take(self, most: int, wait: float) -> list[tuple[Taken, msgspec.Raw]]:
        while True:
            this_time = min(wait, WAIT_SECONDS)
            params = as_params({"queue": self._queue, "max_messages": most, "wait": this_time})
            answer = msgspec.json.decode(self._broker.ask_json("dequeue", params), type=dict[str, list[msgspec.Raw]])
            wait -= this_time
            if answer["messages"] or wait <= 0:
                return [(msgspec.json.decode(raw, type=Taken), raw) for raw in answer["messages"]]

    def _print(self, message: Taken, raw: msgspec.Raw) -> None:
        if self._as_json:
            print_json(raw)
        else:
            say(f"{message.message_id}  attempt {message.receive_count}  {one_line(message.body)}{story_of(message)}")

    def _delete(self, receipts: list[str | None]) -> None:
        if receipts:
            answer = self._broker.ask_repeatedly("delete_batch", as_params({"receipts": receipts}))
            self.lost += sum("error" in each for each in msgspec.json.decode(answer)["results"])

    def _give_back(self, receipts: list[str | None]) -> None:
        if receipts:
            try:
                self._broker.ask("extend_visibility_batch", receipts=receipts, visibility_timeout=0)
            except BrokerError:
                remark("What was taken and not printed is ready again when its lease ends.")


def story_of(message: Taken) -> str:
    """Say of a dead letter where it comes from, and of others nothing."""
    if message.dead_letter is None:
        return ""
    return f"  [dead letter of {message.dead_letter['source_queue']}: {message.dead_letter['reason']}]"


@click.command(
    cls=WithExamples,
    examples=("wonderq peek mail", "wonderq peek mail --status delayed", "wonderq peek mail --limit 1000 --json"),
)
@queue_argument()
@click.option("--status", type=click.Choice(["ready", "delayed", "leased"]), help="Only these.")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, metavar="N", help="At most so many messages."
)
@json_option("a line for each message with all that is known of it, as `list_messages` returns it.")
@url_option
def peek(queue: str, status: str | None, limit: int, as_json: bool, url: str) -> None:
    """Look at messages, the oldest first; take none.

    What a table shows of a body is cut after 200 characters; --json shows all of it.
    """
    with talking_to(url) as broker:
        listed = broker.pages("list_messages", "messages", limit + (not as_json), queue=queue, status=status)
        if as_json:
            for raw in listed:
                print_json(raw)
            return
        messages = [msgspec.json.decode(raw, type=Taken) for raw in listed]
    if not messages:
        remark(f"There are no messages in {queue}." if status is None else f"No message in {queue} is {status}.")
        return
    columns = ("id", "status", "attempts ", "age ", "visible in ", "body")
    print_table(columns, [row_of(each) for each in messages[:limit]])
    if len(messages) > limit:
        remark(f"There are more; --limit {10 * limit} shows more of them.")


def row_of(message: Taken) -> tuple[Any, ...]:
    """Return what a table shows of a message."""
    visible = -seconds_since(message.visible_at)
    return (
        message.message_id,
        message.status,
        message.receive_count,
        duration(seconds_since(message.enqueued_at)),
        duration(max(0.0, visible)) if message.status != "ready" else "",
        cut(one_line(message.body)) + story_of(message),
    )
