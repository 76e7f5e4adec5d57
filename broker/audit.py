"""The audit log: who has administered, and who was refused, one line each.

A line says who (the token's name), from where, what (the method and the names that it was about) and what came of it.
It has no bodies, receipts or tokens. It goes where the log goes, under a name of its own, `broker.audit`: acts on the
level info, refused access on warning.
"""

from __future__ import annotations

import getpass
import logging
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from broker.errors import Forbidden
from broker.rpc import Call
from broker.schema import MethodSchema

log = logging.getLogger("broker.audit")

# Params that may be shown: names, which have no secrets in them.
SHOWN = ("queue", "topic", "name", "dead_letter_queue", "to", "message_id", "subscription_id")
NOBODY = "-"


def call_ended(call: Call, schema: MethodSchema, params: Mapping[str, Any], outcome: str) -> None:
    """Write down what a call came to: "ok", or the type of its error."""
    about = {name: params[name] for name in SHOWN if isinstance(params.get(name), str)}
    caller = NOBODY if call.caller is None else call.caller.name
    pairs = "".join(f" {name}=%s" for name in about)
    level = logging.WARNING if outcome == Forbidden.type else logging.INFO
    said = f"%s caller=%s address=%s{pairs} outcome=%s"
    log.log(level, said, schema.name, caller, call.address, *about.values(), outcome)


def command_line(command: str, outcome: str, **about: object) -> str:
    """Return what is to be written down of a command: whoever is logged in on this machine has given it."""
    try:
        caller = getpass.getuser()
    except (KeyError, OSError):
        caller = NOBODY
    shown = " ".join(f"{name}={value}" for name, value in about.items())
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return f"{now} {command} caller={caller} address={socket.gethostname()} {shown} outcome={outcome}"


def login_refused(address: str, path: str, reason: str) -> None:
    """Write down that somebody without a token that counts was sent away."""
    log.warning("no access caller=%s address=%s path=%s outcome=%s", NOBODY, address, path, reason)
