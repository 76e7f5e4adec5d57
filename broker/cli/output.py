"""What is printed, and how: text that is safe to show, lines of JSON for programs, tables and colours for people.

What is shown to people holds nothing that a terminal would obey or hide: whatever is not printable is escaped as JSON
would (`\\u001b`), so that a body that is shown is still the JSON that it was. JSON for programs keeps its bytes; on a
terminal it is escaped in the same way, which does not change what it means.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import click
import msgspec

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# In what a table shows of a body.
SHOWN_CHARACTERS = 200
# Where there is no terminal nothing is cut, and nothing wrapped.
WIDE = 100_000
UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))


def printable(text: str) -> str:
    """Escape what is not printable: controls, what turns the direction of text, what is invisible."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else escaped(each) for each in text)


def escaped(character: str) -> str:
    """Return a character as JSON escapes it."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))


def one_line(json_text: str | bytes | msgspec.Raw) -> str:
    """Return JSON without line breaks: outside of strings they are spaces, and inside there are none."""
    text = json_text if isinstance(json_text, str) else bytes(json_text).decode()
    return text.replace("\n", " ").replace("\r", " ")


def print_json(json_text: str | bytes | msgspec.Raw) -> None:
    """Print JSON on one line, as UTF-8 whatever the locale says."""
    line = one_line(json_text)
    if is_terminal():
        line = printable(line)
    sys.stdout.buffer.write(line.encode() + b"\n")


def to_json(value: Any) -> bytes:
    """Return a value as JSON; what is JSON already, `msgspec.Raw`, as it is."""
    return msgspec.json.encode(value)


def say(text: str) -> None:
    """Print a line for people on standard output."""
    click.echo(printable(text))


def remark(text: str) -> None:
    """Print a line on standard error: what is no part of the result."""
    click.echo(printable(text), err=True)


def flush() -> None:
    """Wait until all that was printed has been taken. Raises BrokenPipeError where nobody takes it any more."""
    sys.stdout.flush()


def is_terminal() -> bool:
    """Whether a person looks at standard output."""
    return sys.stdout.isatty()


def console(*, stderr: bool = False) -> Console:
    """Return what tables and bars are drawn on: with colours on a terminal alone, and never where NO_COLOR is set."""
    from rich.console import Console  # not before it is needed: importing it takes as long as a call

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDE
    # Who wants no colours gets nothing bold or dim either: plain text.
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(
        file=stream, width=width, color_system=colours, markup=False, emoji=False, highlight=False, soft_wrap=False
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """Return a table. A number stands on the right, and so does a column whose name ends with a space."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    drawn = Table(box=box.SIMPLE_HEAD if sys.stdout.isatty() else None, pad_edge=False, header_style="bold")
    for name in columns:
        is_number = name.endswith(" ")
        drawn.add_column(Text(name.strip()), justify="right" if is_number else "left", no_wrap=is_number)
    for row in rows:
        drawn.add_row(*(each if isinstance(each, Text) else Text(printable(str(each))) for each in row))
    return drawn


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table."""
    drawn, screen = table(columns, rows), console()
    if is_terminal():
        screen.print(drawn)
        return
    with screen.capture() as captured:
        screen.print(drawn)
    # Columns are filled up with spaces, of which nobody has anything behind the last one.
    click.echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def count_of(count: float, noun: str) -> str:
    """Return a number with its noun: 1 message, 2,000 messages."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float | None) -> str:
    """Return a time as a person says it: 3.2 s, 12 min, 5 h, 3 d; a dash where there is none."""
    if seconds is None:
        return "-"
    for unit, name in UNITS:
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.1f} s"


def seconds_since(stamp: str) -> float:
    """Return how long ago a time of the broker's was, by this machine's clock; negative where it is to come."""
    return (datetime.now(UTC) - datetime.fromisoformat(stamp)).total_seconds()


def cut(text: str) -> str:
    """Return the beginning of a text, for a table."""
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
