"""Logs: one line an event on standard error, for people on a terminal and as JSON elsewhere.

A record is written as `log.info("event key=%s", value)`: the pairs at its end become fields of their own, so that who
collects logs need not take a sentence apart. What a client sent never reaches a log unescaped: the console renderer and
the JSON renderer both quote it.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog

from broker import requests

# By the text that stands in the code, and never by a value, which may look like a pair itself.
_PAIRS = re.compile(r"(?: \w+=%[sdr])+\Z")


def split_pairs(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Make fields of the pairs at the end of a record's text."""
    text, args = event["_record"].msg, event.pop("positional_args", None)
    found = _PAIRS.search(text) if isinstance(text, str) and isinstance(args, tuple) else None
    if found is None:
        return event
    names = re.findall(r" (\w+)=", found[0])
    event["event"] = text[: found.start()] % args[: -len(names)]
    for name, value in zip(names, args[-len(names) :], strict=True):
        event[name] = value if isinstance(value, int | float) else str(value)
    return event


def add_request_id(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Say for which request something was logged, where it was for one."""
    request_id = requests.current.get()
    if request_id is not None:
        event.setdefault("request_id", request_id)
    return event


def configure_logs(log_format: str, log_level: str = "info") -> None:
    """Send every log record to standard error, a line each.

    `log_format` is console, json or auto; `log_level` is debug, info, warning or error.
    """
    is_console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor
    if is_console:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    else:
        renderer = structlog.processors.JSONRenderer()
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[
            split_pairs,
            structlog.stdlib.add_log_level,
            structlog.stdlib.add_logger_name,
            add_request_id,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
        ],
        pass_foreign_args=True,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=log_level.upper(), handlers=[handler], force=True)
    # The pool says at every attempt that it cannot connect; our own line says it once a call.
    logging.getLogger("psycopg.pool").setLevel(logging.ERROR)
