"""Measure the broker beside its peers, on one private PostgreSQL with durable settings, and judge what came out.

    python -m benchmarks [--cell NAME] [--seconds 3] [--rounds 3] [--out FILE]   the cells of `make bench`
    python -m benchmarks --flat                                                 those that need millions of rows
    python -m benchmarks --smoke                                                each of both, for about a second

Progress goes to standard error, the table to standard output. Exit code 1 where a cell could not be measured or an
answer was an error; never because of a speed.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bench import Bench, Options
from benchmarks.cells import PLANS as CELLS
from benchmarks.cells import Plan
from benchmarks.consuming import CONSUMING_PLANS
from benchmarks.dashboard import DASHBOARD_PLANS
from benchmarks.defence import DEFENCE_PLANS
from benchmarks.flat import FLAT_PLANS
from benchmarks.load import MissingProgram
from benchmarks.machine import machine, versions
from benchmarks.processes import Cluster, end_on_sigterm, temporary_folder
from benchmarks.push import PUSH_PLANS
from benchmarks.results import Cell, Results, table

PLANS = (*CELLS, *PUSH_PLANS, *CONSUMING_PLANS, *DEFENCE_PLANS, *FLAT_PLANS, *DASHBOARD_PLANS)


def main() -> int:
    options, plans, out, kind = arguments()
    end_on_sigterm()
    try:
        results = measure(options, plans, kind)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    print(table(results.cells))
    if out is not None:
        results.write(out)
        print(f"\nwritten to {out}")
    return 0 if all(cell.is_valid for cell in results.cells) else 1


def arguments() -> tuple[Options, list[Plan], Path | None, str]:
    """Read the command line: how to measure, what, where to write it, and what kind of run it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [plan.name for plan in PLANS]
    parser.add_argument("--cell", action="append", metavar="NAME", choices=names, help=f"only this: {', '.join(names)}")
    parser.add_argument("--flat", action="store_true", help="the cells with millions of rows")
    parser.add_argument("--smoke", action="store_true", help="every cell, for about a second")
    parser.add_argument(
        "--seconds", type=float, default=Options.seconds, help="how long each contestant is measured in a round"
    )
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="how often each contestant is measured")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    given = parser.parse_args()
    options = Options(given.seconds, given.rounds)
    if given.smoke:
        options = Options(1.0, 1, smoke=True)
    kind = "smoke" if given.smoke else "flat" if given.flat else "bench"
    plans = [
        plan for plan in PLANS if (plan.name in given.cell if given.cell else given.smoke or plan.is_flat == given.flat)
    ]
    return options, plans, given.out, kind


def measure(options: Options, plans: list[Plan], kind: str) -> Results:
    """Measure these cells one after the other."""
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        cluster = stack.enter_context(Cluster(folder))
        bench = Bench(options, folder, cluster, stack.enter_context(ExitStack()))
        results = Results(
            kind=kind,
            taken_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=options.seconds,
            rounds=options.rounds,
            machine=machine(),
            versions=versions(cluster),
            postgresql_settings=cluster.settings(),
            cells=[],
        )
        for plan in plans:
            began_at = time.monotonic()
            results.cells.append(cell := Cell(plan.name, plan.title))
            try:
                plan.run(bench, cell)
            except MissingProgram as error:
                cell.failure = str(error)
            except Exception as error:
                cell.failure = f"{type(error).__name__}: {error}"
            cell.took_seconds = round(time.monotonic() - began_at, 1)
            bench.progress(f"{cell.name}: {cell.failure or f'took {cell.took_seconds:.0f} s'}")
    return results


if __name__ == "__main__":
    sys.exit(main())
