"""What takes too long, or too much of the machine, for every change: to be run at night and before a release.

    make test-nightly
    make test-nightly ARGS='mutations power-cut --seed 7'
    make test-nightly ARGS='--quick'

Each part can be named; without names all are run, in the order of the list. Some need root, a C compiler, libfaketime,
or packages that are fetched into a folder of their own; what cannot be tried is skipped, and says why. At the end comes
a table, and with `--json FILE` the same as JSON. Exit code 1 where a promise was broken or a part has failed.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import uvloop

import clock_steps
import disk_faults
import long_soak
import mixed_load
import mutations
import patroni
import pgbouncer
import power_cut
import standby_away
from parts import Options, Part, Result

PARTS: dict[str, Part] = {
    "mutations": mutations.run,
    "power-cut": power_cut.run,
    "disk-faults": disk_faults.run,
    "clock-steps": clock_steps.run,
    "patroni": patroni.run,
    "standby-away": standby_away.run,
    "soak": long_soak.run,
    "mixed-load": mixed_load.run,
    "pgbouncer": pgbouncer.run,
}

began_at = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - began_at:8.1f} s  {line}", flush=True)


async def run(names: list[str], options: Options) -> list[tuple[str, Result]]:
    """Run these parts; return what their cases came to. A part that fails is a case of its own."""
    results: list[tuple[str, Result]] = []
    for name in names:
        say(f"--- {name}")
        attempt = Result(name)
        try:
            async for result in PARTS[name](options, say):
                result.seconds = time.monotonic() - result.began_at
                results.append((name, result))
                say(f"{result.verdict}: {result.case} {line(result)}")
        except Exception:
            traceback.print_exc()
            attempt.violations.append(traceback.format_exc().strip().splitlines()[-1])
            attempt.seconds = time.monotonic() - attempt.began_at
            results.append((name, attempt))
    return results


def line(result: Result) -> str:
    """Return the rest of what is to be said of a case."""
    figures = " ".join(f"{name}={value}" for name, value in result.figures.items() if not isinstance(value, dict))
    return "; ".join(filter(None, [result.skipped, *result.violations, figures]))


def table(results: list[tuple[str, Result]]) -> str:
    rows = [("part", "case", "s", "verdict", "")]
    rows += [(part, each.case, f"{each.seconds:.0f}", each.verdict, line(each)) for part, each in results]
    widths = [max(len(row[n]) for row in rows) for n in range(4)]
    return "\n".join("  ".join([*(row[n].ljust(widths[n]) for n in range(4)), row[4]]).rstrip() for row in rows)


def as_json(results: list[tuple[str, Result]], options: Options) -> dict[str, Any]:
    return {
        "seed": options.seed,
        "is_quick": options.is_quick,
        "results": [
            {
                "part": part,
                "case": each.case,
                "verdict": each.verdict,
                "seconds": round(each.seconds, 1),
                "figures": each.figures,
                "violations": each.violations,
                "skipped": each.skipped,
            }
            for part, each in results
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Run what takes hours, or a machine of its own.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: any")
    parser.add_argument("--quick", action="store_true", help="a fraction of the size")
    parser.add_argument("--times", type=int, help="so many cuts, kills, seeds or minutes, in place of a part's own")
    parser.add_argument(
        "--only", action="append", default=[], metavar="TEXT", help="mutations with this in their names"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the summary there")
    chosen = parser.parse_args()
    unknown = set(chosen.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no part is called {', '.join(sorted(unknown))}")
    names = chosen.parts or list(PARTS)
    options = Options(chosen.seed, chosen.quick, chosen.times, tuple(chosen.only))
    say(f"seed {options.seed}; to repeat: make test-nightly ARGS='{' '.join(names)} --seed {options.seed}'")
    results = uvloop.run(run(names, options))
    print(f"\n{table(results)}\n")
    summary = as_json(results, options)
    if chosen.json:
        chosen.json.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary))
    return 1 if any(each.violations for _, each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
