"""Settings as options: each flag, its variable and its limits come from the one table in `broker.settings`."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import click

from broker.settings import Setting, Settings, settings_table


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these settings, of all where none is named; it gets one `Settings` first."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def with_one_argument(**given: Any) -> None:
            settings = {name: given.pop(name) for name, _, _ in settings_table() if name in given}
            command(read_settings(settings), **given)

        decorated: Callable[..., None] = with_one_argument
        for name, about, default in reversed(settings_table()):
            if not names or name in names:
                decorated = option(name, about, default)(decorated)
        return decorated

    return decorate


def option(name: str, about: Setting, default: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return the click option of one setting. What is given is read by `read_settings`, wherever it stood."""
    shown = about.shown_default if about.shown_default is not None else default
    unit = f" {about.unit}" if about.unit and about.shown_default is None else ""
    metavar = "|".join(about.choices) or about.parse.__name__.upper().replace("PARSE_", "")
    # A switch alone means yes.
    alone: dict[str, Any] = {"is_flag": False, "flag_value": "yes"} if about.is_switch else {}
    return click.option(
        about.flag,
        name,
        multiple=about.repeatable,
        metavar="[yes|no]" if about.is_switch else metavar,
        help=f"{about.help}  [{about.variable}; default: {shown}{unit}]",
        **alone,
    )


def read_settings(given: dict[str, Any]) -> Settings:
    """Return the settings: what the command line says, else the environment, else the default."""
    values: dict[str, Any] = {}
    for name, about, _ in settings_table():
        on_command_line = given.get(name)
        text = os.environ.get(about.variable, "")
        if on_command_line not in (None, ()):
            source = about.flag
            value = ",".join(on_command_line) if about.repeatable else on_command_line
        elif text and name in given:
            source, value = about.variable, text
        else:
            continue
        values[name] = read_value(about, source, value)
    return Settings(**values)


def read_value(about: Setting, source: str, text: str) -> Any:
    """Return the value that a text means. Raises click.BadParameter, which names where the text stood."""
    shown = "***" if about.secret else text
    if about.choices:
        limit = f"one of {', '.join(about.choices)}"
    elif about.minimum is not None and about.maximum is not None:
        limit = f"a number from {about.minimum:,.12g} to {about.maximum:,.12g} {about.unit}".strip()
    elif about.is_switch:
        limit = "yes or no"
    else:
        limit = "a value that can be read, and not empty"
    try:
        value = about.parse(text)
        is_allowed = bool(text.strip()) and (not about.choices or value in about.choices)
        if about.minimum is not None and about.maximum is not None:
            is_allowed = is_allowed and about.minimum <= value <= about.maximum
    except (ValueError, OverflowError):
        is_allowed = False
    if not is_allowed:
        raise click.BadParameter(f"{source} must be {limit}, and {shown!r} was given. {about.help}")
    return value
