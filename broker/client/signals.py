"""SIGTERM and SIGINT, told to everyone in this process who wants to stop in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Tell = Callable[[], Any]

_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_listeners: list[Tell] = []
_before: dict[signal.Signals, Any] = {}


@contextmanager
def told_by_signals(tell: Tell, *, listens: bool = True) -> Iterator[None]:
    """Call `tell` at each of these signals, beside others who listen; outside the main thread nobody can.

    After the last listener has gone the signals mean what they did before.
    """
    if not listens or threading.current_thread() is not threading.main_thread():
        yield
        return
    if not _listeners:
        _before.update({number: signal.signal(number, _tell_all) for number in _NUMBERS})
    _listeners.append(tell)
    try:
        yield
    finally:
        _listeners.remove(tell)
        if not _listeners:
            for number, handler in _before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _tell_all(number: int, frame: FrameType | None) -> None:
    for tell in _listeners:
        tell()
