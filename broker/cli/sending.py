"""`wonderq send`: one message from the command line, or one for each line of standard input.

Promised of many lines: they are sent in their order, in batches, each under an idempotency key of its own, so that a
batch whose answer was lost is sent again and stored once. The first line that is no JSON, or that the broker refuses,
ends it: every line before was sent, that line and all after it were not, and its number is told.
"""

from __future__ import annotations

import shlex
import sys
import uuid
from typing import NamedTuple

import click
import msgspec

from broker.cli.commands import WithExamples
from broker.cli.completion import queue_argument
from broker.cli.connecting import Conversation, json_option, sentence_of, talking_to, url_option
from broker.cli.lines import BadLineError, Line, batches, json_of, progress
from broker.cli.output import count_of, print_json, printable, remark, say, to_json
from broker.client import BrokerError


class Options(NamedTuple):
    """What is said once and holds for every message."""

    headers: dict[str, str]
    delay: float | None
    ttl: float | None
    key: str | None


class Enqueued(msgspec.Struct):
    """What the broker says of a message."""

    message_id: str
    duplicate: bool


class Batch(msgspec.Struct):
    """What the broker says of many."""

    messages: list[Enqueued]


def read_headers(_context: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Read headers that are written as NAME=VALUE."""
    headers: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{each!r} is no header; one is written as NAME=VALUE.")
        if name in headers:
            raise click.BadParameter(f"{name!r} is given twice.")
        headers[name] = value
    return headers


@click.command(
    cls=WithExamples,
    examples=(
        """wonderq send mail '{"to": "ada"}'""",
        """wonderq send mail '{"to": "ada"}' --delay 5 --header kind=welcome""",
        "wonderq send mail --text 'good morning'",
        """seq 3 | sed 's/.*/{"number": &}/' | wonderq send mail""",
    ),
)
@queue_argument()
@click.argument("body", required=False)
@click.option("--text", "is_text", is_flag=True, help="BODY, or each line, is a string, and is sent as a JSON string.")
@click.option("--delay", type=float, metavar="SECONDS", help="Hand it out so much later. Default: as the queue says.")
@click.option("--ttl", type=float, metavar="SECONDS", help="Let it expire so much later. Default: as the queue says.")
@click.option("--header", "headers", multiple=True, metavar="NAME=VALUE", callback=read_headers, help="Repeatable.")
@click.option(
    "--idempotency-key",
    "key",
    metavar="KEY",
    help="Store it once, however often it is sent within the queue's idempotency_window. Of many lines each has the key"
    " KEY:NUMBER, so that the same lines can be sent again.",
)
@json_option("for each message a line with its message_id, and whether it was a duplicate.")
@url_option
def send(
    queue: str,
    body: str | None,
    is_text: bool,
    delay: float | None,
    ttl: float | None,
    headers: dict[str, str],
    key: str | None,
    as_json: bool,
    url: str,
) -> None:
    """Send messages: BODY, or a line of input each.

    Without BODY one message for each line of standard input is sent to the QUEUE.

    BODY is JSON, and consumers get its very bytes. In a shell it stands in single quotes; a string has its own double
    quotes within them, or say --text.

    Of standard input each line is a JSON value, and empty lines are left out (with --text every line counts). The first
    line that is no JSON, or that the broker refuses, ends it: every line before it was sent, and nothing from it on.
    """
    options = Options(headers, delay, ttl, key)
    if body is not None:
        send_one(url, queue, read_body(body, is_text=is_text), options, as_json=as_json)
    else:
        send_lines(url, queue, options, is_text=is_text, as_json=as_json)


def read_body(text: str, *, is_text: bool) -> bytes:
    """Return the body's JSON, its bytes as they were given. Raises click.BadParameter."""
    try:
        encoded = text.encode()
        return json_of(encoded, is_text=is_text)
    except UnicodeEncodeError:
        raise click.BadParameter("BODY is not UTF-8.") from None
    except ValueError as error:
        quoted = shlex.quote(to_json(text).decode())
        raise click.BadParameter(
            printable(f"{text} is no JSON: {error}. For a string write {quoted}, or say --text.")
        ) from None


def send_one(url: str, queue: str, body: bytes, options: Options, *, as_json: bool) -> None:
    """Send a message and say which it became."""
    with talking_to(url) as broker:
        params = {"queue": to_json(queue).decode(), **params_of(body, options, options.key or uuid.uuid4().hex)}
        answer = broker.ask_repeatedly("enqueue", params)
    enqueued = msgspec.json.decode(answer, type=Enqueued)
    if as_json:
        print_json(answer)
    elif enqueued.duplicate:
        say(f"{enqueued.message_id} was sent to {queue} before under this key, and is not stored again")
    else:
        say(f"sent {enqueued.message_id} to {queue}")


def params_of(body: bytes, options: Options, key: str) -> dict[str, str]:
    """Return what the broker is told of a message, each param as JSON."""
    given = {"headers": options.headers or None, "delay": options.delay, "ttl": options.ttl, "idempotency_key": key}
    params = {name: to_json(value).decode() for name, value in given.items() if value is not None}
    return {"body": body.decode(), **params}


def send_lines(url: str, queue: str, options: Options, *, is_text: bool, as_json: bool) -> None:
    """Send what standard input has, and say how many messages that was."""
    stream = sys.stdin.buffer
    if stream.isatty():
        remark("Type one JSON value a line; Ctrl-D ends it.")
    with talking_to(url) as broker:
        sender = Sender(broker, queue, options, as_json=as_json)
        try:
            with progress(stream) as advance:
                for batch in batches(stream, is_text=is_text):
                    sender.send(batch)
                    advance(sender.sent, sum(len(line.body) + 1 for line in batch))
        except BadLineError as error:
            raise click.ClickException(sender.story(error.number, f"is no JSON: {error.reason}.")) from None
        except RefusedLineError as error:
            if error.error.outcome == "unknown":
                raise click.ClickException(sender.story_of_doubt(error.error)) from None
            raise click.ClickException(sender.story(error.number, f"was refused: {sentence_of(error.error)}")) from None
        except KeyboardInterrupt:
            remark(
                f"Broken off after {count_of(sender.sent, 'message')}; a batch that was under way may be stored too."
            )
            raise
    if not as_json:
        before = f", of which {sender.duplicates:,} were there already" if sender.duplicates else ""
        say(f"sent {count_of(sender.sent, 'message')} to {queue}{before}")


class RefusedLineError(Exception):
    """The broker refused a line, or gave no answer that allows to go on."""

    def __init__(self, number: int, error: BrokerError) -> None:
        super().__init__(number, error)
        self.number = number
        self.error = error


class Sender:
    """Sends batches of lines, and remembers what became of them."""

    def __init__(self, broker: Conversation, queue: str, options: Options, *, as_json: bool) -> None:
        self._broker = broker
        self._queue = queue
        self._options = options
        self._as_json = as_json
        self._key = options.key or uuid.uuid4().hex
        self.sent = 0
        self.duplicates = 0

    def send(self, batch: list[Line]) -> None:
        """Send a batch. Raises RefusedLineError; the lines before that one are sent then."""
        try:
            self._send_all(batch)
        except BrokerError as error:
            index = error.data.get("index")
            if error.outcome == "unknown" or len(batch) == 1:
                raise RefusedLineError(batch[0].number, error) from None
            if isinstance(index, int) and 0 < index < len(batch):
                self.send(batch[:index])
                raise RefusedLineError(batch[index].number, error) from None
            # Nothing says which line it was, or what holds for the first holds for all.
            for line in batch:
                self.send([line])

    def story(self, number: int, what: str) -> str:
        """Say what became of the lines, where one of them ended it."""
        return (
            f"Line {number:,} {what} Before it {count_of(self.sent, 'message')} went to {self._queue}; nothing from"
            f" this line on was sent. To go on from there: tail -n +{number} FILE | wonderq send {self._queue}"
        )

    def story_of_doubt(self, error: BrokerError) -> str:
        """Say what became of the lines, where no answer tells."""
        return (
            f"{sentence_of(error)} {count_of(self.sent, 'message')} went to {self._queue}, and more may have. Send the"
            f" same lines again with --idempotency-key {self._key}: what is there is not stored twice, as long as the"
            " queue's idempotency_window lasts."
        )

    def _send_all(self, batch: list[Line]) -> None:
        elements = []
        for line in batch:
            params = params_of(line.body, self._options, f"{self._key}:{line.number}")
            elements.append("{" + ",".join(f'"{name}":{value}' for name, value in params.items()) + "}")
        params = {"queue": to_json(self._queue).decode(), "messages": f"[{','.join(elements)}]"}
        answer = self._broker.ask_repeatedly("enqueue_batch", params)
        enqueued = msgspec.json.decode(answer, type=Batch).messages
        self.sent += len(enqueued)
        self.duplicates += sum(each.duplicate for each in enqueued)
        if self._as_json:
            for each in enqueued:
                print_json(to_json(each))
