"""How far a demo has come, on standard output."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show how many are done, of `what` there are `total`: a bar on a terminal, a line for each tenth elsewhere."""
    if sys.stdout.isatty():
        columns = (BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns) as bar:
            task = bar.add_task(what, total=total)
            yield lambda done: bar.update(task, completed=done)
        return
    shown = 0

    def show(done: int) -> None:
        nonlocal shown
        if done * 10 // total > shown:
            shown = done * 10 // total
            print(f"{done} of {total} {what}", flush=True)

    yield show
