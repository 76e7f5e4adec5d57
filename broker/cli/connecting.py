"""How commands talk to a broker: where it is, one call after the other, and what its errors mean to a person."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
import msgspec

from broker.cli.output import printable
from broker.client import BrokerError, Client, ConnectionFailed

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_URL = "http://127.0.0.1:8080"
# How long a call that may be repeated is repeated, where a broker was there before.
REPEAT_SECONDS = 30.0
PAUSE_SECONDS = (0.1, 5.0)
PASSES = ("unavailable", "overloaded")

# What to type next, for what the broker's own sentence cannot know.
NEXT = {
    "queue_not_found": "On the command line: wonderq call create_queue --queue NAME, or wonderq queues.",
    "topic_not_found": "On the command line: wonderq call create_topic --topic NAME, or wonderq topics.",
    "method_not_found": "The broker is older than this wonderq: wonderq doctor shows both versions.",
}

url_option = click.option(
    "--url", envvar="BROKER_URL", default=DEFAULT_URL, show_default=True, show_envvar=True, help="Where the broker is."
)


def json_option(what: str) -> Callable[[F], F]:
    """Return the option that makes a command speak to programs; `what` says in which form."""
    return click.option("--json", "as_json", is_flag=True, help=f"For programs: {what}")


class Conversation:
    """One connection to a broker, for as many calls as a command makes. All of them raise BrokerError."""

    def __init__(self, runner: asyncio.Runner, client: Client) -> None:
        self._runner = runner
        self._client = client
        self._has_answered = False

    def ask_json(self, method: str, params: dict[str, str]) -> str:
        """Call a method with params that are JSON; return its result as such."""
        result = self._runner.run(self._client.call_json(method, params))
        self._has_answered = True
        return result

    def ask(self, method: str, /, **params: Any) -> Any:
        """Call a method; return its result as Python values."""
        return msgspec.json.decode(self.ask_json(method, as_params(params)))

    def ask_repeatedly(self, method: str, params: dict[str, str]) -> str:
        """Call a method that may be carried out twice; repeat it for a while where the broker is away for a moment.

        A broker that never answered is not waited for: then it is rather the address that is wrong.
        """
        give_up_at = time.monotonic() + REPEAT_SECONDS
        pause = PAUSE_SECONDS[0]
        while True:
            try:
                return self.ask_json(method, params)
            except BrokerError as error:
                passes = error.type in PASSES or error.outcome == "unknown"
                is_lost = isinstance(error, ConnectionFailed) and not self._has_answered and error.outcome == "none"
                # Random, so that several do not come back together, and not before the broker wants it.
                asked_for = error.data.get("retry_after", 0)
                waits = asked_for + pause * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
                if not passes or is_lost or time.monotonic() + waits > give_up_at:
                    raise
            time.sleep(waits)
            pause = min(2 * pause, PAUSE_SECONDS[1])

    def pages(self, method: str, key: str, at_most: int | None = None, **params: Any) -> Iterator[msgspec.Raw]:
        """Yield what a method lists, page by page, each as it came."""
        after, left = None, at_most
        while left is None or left > 0:
            given = {**params, "after": after, "limit": min(1000, left or 1000)}
            page = msgspec.json.decode(self.ask_json(method, as_params(given)), type=dict[str, msgspec.Raw])
            listed = msgspec.json.decode(page[key], type=list[msgspec.Raw])
            yield from listed
            after = msgspec.json.decode(page["next"])
            if after is None:
                return
            left = None if left is None else left - len(listed)


@contextmanager
def talking_to(url: str) -> Iterator[Conversation]:
    """Yield a conversation with the broker at a URL; an error of it that nobody caught ends the command."""
    try:
        # A person sees an error sooner than a broker comes back; `ask_repeatedly` is for what may be repeated.
        client = Client(url, token=os.environ.get("BROKER_TOKEN") or None, deadline=0)
    except ValueError as error:
        raise click.UsageError(printable(str(error))) from None
    with asyncio.Runner() as runner:
        try:
            runner.run(client.__aenter__())
            try:
                yield Conversation(runner, client)
            finally:
                runner.run(client.__aexit__(None, None, None))
        except BrokerError as error:
            raise click.ClickException(sentence_of(error)) from None


def sentence_of(error: BrokerError) -> str:
    """Return what went wrong and what to do next, for a person."""
    if isinstance(error, ConnectionFailed):
        # A part of aiohttp's sentence that tells people nothing.
        reason = error.message.rstrip(".").replace(" ssl:default", "")
        return printable(f"{reason}. {after_silence(error)}")
    sentence = f"{error.message.rstrip('.')} ({error.type}, {error.code})."
    following = NEXT.get(error.type, "")
    if error.type == "forbidden":
        has_token = bool(os.environ.get("BROKER_TOKEN"))
        following = "" if has_token else "Put a token into BROKER_TOKEN; wonderq token create makes one."
    return printable(f"{sentence} {following}".strip())


def after_silence(error: ConnectionFailed) -> str:
    """Say what to do where no answer came."""
    if error.outcome == "none":
        return "Is a broker running there? Start one with wonderq serve, or name another by --url or BROKER_URL."
    return "Nobody knows whether it was done: look (wonderq queues, wonderq peek) before you do it again."


def as_params(values: dict[str, Any]) -> dict[str, str]:
    """Return params as JSON, each by itself; those that are None are not sent."""
    return {name: msgspec.json.encode(value).decode() for name, value in values.items() if value is not None}
