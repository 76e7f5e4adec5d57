"""Lines of JSON on standard input: read as they come, checked, and put together in batches that fit into a request."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import msgspec

from broker.cli.output import console, to_json

# A request may have 8 MiB unless the broker says otherwise, and a body 1 MiB.
BATCH_MESSAGES = 1_000
BATCH_BYTES = 4 * 2**20
LINE_BYTES = 2 * 2**20
READ_BYTES = 2**20


class Line(NamedTuple):
    """A line of the input: its number, from 1, and its body as JSON."""

    number: int
    body: bytes


class BadLineError(Exception):
    """A line is no JSON; `reason` says why."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason


def json_of(text: bytes, *, is_text: bool) -> bytes:
    """Return a text as JSON. Raises ValueError, which says what is wrong, where it is none."""
    try:
        decoded = text.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    if is_text:
        return to_json(decoded)
    try:
        msgspec.json.decode(text, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error).removeprefix("JSON is malformed: ")) from None
    return text


@contextmanager
def progress(stream: BinaryIO) -> Iterator[Callable[[int, int], None]]:
    """Yield what is told, after each batch, how many messages were sent and how many more bytes were read.

    It draws a bar on standard error, where that is a terminal and nobody types the lines, once it takes a while.
    """
    if not sys.stderr.isatty() or stream.isatty():
        yield lambda sent, size: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    total = bytes_in(stream)
    words = TextColumn("{task.fields[sent]} sent")
    with Progress(words, BarColumn(), TimeRemainingColumn(), console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, sent="0")
        yield lambda sent, size: bar.update(task, advance=size, sent=f"{sent:,}")


def bytes_in(stream: BinaryIO) -> int | None:
    """Return how many bytes there are to read, None where only their end will tell."""
    try:
        found = os.fstat(stream.fileno())
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def lines_of(stream: BinaryIO) -> Iterator[list[tuple[int, bytes]]]:
    """Yield the lines that have come, with their numbers, as soon as they have. Raises BadLineError."""
    number, rest = 0, b""
    while chunk := stream.read1(READ_BYTES):  # type: ignore[attr-defined]
        *complete, rest = (rest + chunk).split(b"\n")
        yield [(number + i, line.removesuffix(b"\r")) for i, line in enumerate(complete, 1)]
        number += len(complete)
        if len(rest) > LINE_BYTES:
            raise BadLineError(number + 1, "it is longer than any queue takes, which is 1 MiB")
    if rest:
        yield [(number + 1, rest)]


def batches(stream: BinaryIO, *, is_text: bool) -> Iterator[list[Line]]:
    """Yield what is to be sent together. Raises BadLineError, after all that came before that line."""
    for lines in lines_of(stream):
        batch: list[Line] = []
        size = 0
        for number, text in lines:
            if not text.strip() and not is_text:
                continue
            try:
                body = json_of(text, is_text=is_text)
            except ValueError as error:
                if batch:
                    yield batch
                raise BadLineError(number, str(error)) from None
            if batch and (len(batch) == BATCH_MESSAGES or size + len(body) > BATCH_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(Line(number, body))
            size += len(body)
        if batch:
            yield batch
