"""The id of the HTTP request that is being answered: in its answer, in its errors, and in every line of the log.

A client may send one of its own as `X-Request-Id`; one that could do harm in a log is replaced. The id travels in the
context of the request's task and of those that it starts, so nobody has to hand it on; what is done for several
requests together has none.
"""

from __future__ import annotations

import itertools
import os
import re
from contextvars import ContextVar

HEADER = "X-Request-Id"
_SAFE = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Ids of this process begin with what no other has; a random number for each would cost as much as all of the rest.
_PREFIX = os.urandom(5).hex()
_numbers = itertools.count(1)

current: ContextVar[str | None] = ContextVar("request_id", default=None)


def new_id() -> str:
    """Return an id that nobody else has."""
    return f"{_PREFIX}-{next(_numbers):x}"


def begin(given: str | None) -> None:
    """Let the present request have the id that its client has given, if that is safe, or one of ours."""
    current.set(given if given is not None and _SAFE.fullmatch(given) else new_id())


def current_or_new() -> str:
    """Return the id of the present request; a new one where there is no request."""
    return current.get() or new_id()
