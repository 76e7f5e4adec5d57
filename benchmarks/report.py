"""Write docs/performance.md, and its plot, from what the benchmarks found.

    python -m benchmarks.report [benchmarks/results/*.json]

Every figure comes from the files named; where a cell is in several, the newest one counts. The text on what limits a
cell is derived from CPU shares as far as they tell, and else kept in FOUND, below.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import profile
from benchmarks.processes import MACHINE
from benchmarks.results import US, Cell, Check, Results, figure, shares

ROOT = Path(__file__).resolve().parent.parent
PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "performance.svg"
FILES = ROOT / "benchmarks" / "results"

INTRODUCTION = """\
<!-- Made by python -m benchmarks.report; change benchmarks/report.py, or measure again. -->

# Performance

What WonderQ does beside its peers, measured in the same minutes on the same machine, and what limits it. Ratios say
more than rates: they hold on other machines, rates do not.

![Measured by target, and rates beside the peers](performance.svg)

"""

METHOD = """\
## Method

- `make bench` measures all cells but those with millions of rows, which `make bench-flat` measures; where the time
  of a call goes is found out by `make bench-profile`. This page is written from their results by
  `python -m benchmarks.report`. `make bench-smoke` runs all of it for a second.
- A private PostgreSQL is started for it, the same for all that need one, with `fsync`, `synchronous_commit` and
  `full_page_writes` on. Everything else that takes part syncs what it acknowledges to the same disk.
- Contestants take turns, A B A B A B; each is warmed up. A figure is the median of the rounds; a ratio is taken within
  each round, and then the median.
- The load comes from `wrk` with a script in Lua; for peers that speak no HTTP from small clients in Python whose CPU
  is reported, too. PGMQ is called directly through psycopg, in the way, of several, that gets most done, without HTTP.
  Clients, servers and PostgreSQL share the machine.
- An answer that is an error counts as nothing and makes its cell invalid. A message counts when its deletion was
  confirmed.
- Bodies are random characters, which do not compress: of 200 bytes, where nothing else is said.
- CPU is given in per cent of one core. "Whole machine" is everything that ran on it.
"""

# What a look beyond the CPU shares has shown, by cell.
FOUND: dict[str, str] = {
    "commits-and-wal": (
        "Calls that come while a statement is under way share the next one, and its commit: so commits a message fall"
        " with the number of connections, and a lone caller pays for each call."
    ),
    "end-to-end": "A message is on disk twice before it is there: by its enqueue, and by its lease.",
}

DAY = 86_400
LOADS = (10, 100, 1_000, 5_000)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, default=sorted(FILES.glob("*.json")), help="results as JSON")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write the page; the plot lies beside it")
    given = parser.parse_args()
    runs = [Results.read(path) for path in given.files]
    if not runs or any(run.kind == "smoke" for run in runs):
        print("Give the results of real runs: make bench, make bench-flat, make bench-profile.", file=sys.stderr)
        return 1
    given.page.write_text(page(runs), "utf-8")
    plot(newest_cells(runs), given.page.with_suffix(".svg"))
    return 0


def newest_cells(runs: Iterable[Results]) -> list[Cell]:
    """Return each cell as it was measured last, in the order of the runs."""
    cells: dict[str, Cell] = {}
    for run in sorted(runs, key=lambda run: run.taken_at):
        cells |= {cell.name: cell for cell in run.cells}
    first_seen = dict.fromkeys(cell.name for run in runs for cell in run.cells)
    return [cells[name] for name in first_seen]


def page(runs: Sequence[Results]) -> str:
    """Return the whole page."""
    cells = newest_cells(runs)
    parts = [INTRODUCTION, targets(cells), METHOD, "".join(about(run) for run in runs), "## The cells\n"]
    profiles = [cell for cell in cells if cell.name.startswith(profile.NAME)]
    parts += [section(cell, int(runs[0].machine["cores"])) for cell in cells if cell not in profiles]
    parts += [where_time_goes(cell) for cell in profiles]
    parts.append(capacity(cells))
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def in_words(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{figure(value)} {unit}".strip()


def verdict(cell: Cell, check: Check) -> str:
    """Return what came of a check, in bold where it is a miss."""
    text = check.verdict if cell.is_valid else "invalid"
    return text if text in ("reached", "reported") else f"**{text}**"


def targets(cells: Iterable[Cell]) -> str:
    """Return the table of all targets."""
    rows = [
        [
            f"[{cell.title}](#{anchor(cell.title)})",
            check.what,
            check.target,
            in_words(check.value, check.unit),
            verdict(cell, check),
        ]
        for cell in cells
        for check in cell.checks
        if check.target
    ]
    return "## Targets\n\n" + markdown(("cell", "figure", "to reach", "measured", ""), rows)


def anchor(heading: str) -> str:
    """Return how a heading is linked to."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def about(run: Results) -> str:
    """Return on what a run was made."""
    facts = {
        "measured": f"{run.taken_at}, {run.rounds} × {figure(run.seconds)} s for each contestant",
        **run.machine,
        "versions": ", ".join(f"{name} {version}" for name, version in run.versions.items()),
        "PostgreSQL": ", ".join(f"`{name}={value}`" for name, value in run.postgresql_settings.items()),
    }
    return f"\n### Run: `make {'bench' if run.kind == 'bench' else f'bench-{run.kind}'}`\n\n" + markdown(
        ("", ""), ([name, value] for name, value in facts.items())
    )


def section(cell: Cell, cores: int) -> str:
    """Return what there is to say of one cell."""
    names = list(dict.fromkeys(name for sample in cell.samples for name in sample.figures))
    rows = []
    for case, who in cell.contestants():
        values = (cell.median(case, who, name) for name in names)
        rows.append(
            [case, who, *("" if value is None else figure(value) for value in values), shares(cell.cpu(case, who))]
        )
    head = ["case", "who", *(name.replace("_", " ") for name in names), "CPU"]
    parts = [f"### {cell.title[0].upper()}{cell.title[1:]}\n", markdown(head, rows)]
    parts.append(complaint(cell))
    parts += ["".join(f"- {check_line(cell, check)}\n" for check in cell.checks)]
    parts += ["".join(f"- {note}.\n" for note in cell.notes)]
    limits = [
        f"{case}, {who}: {limit}" for case, who in cell.contestants() if (limit := limit_of(cell, case, who, cores))
    ]
    if limits:
        parts.append("What limits it:\n\n" + "".join(f"- {text}.\n" for text in limits))
    if cell.name in FOUND:
        parts.append(FOUND[cell.name] + "\n")
    return "\n".join(part for part in parts if part)


def where_time_goes(cell: Cell) -> str:
    """Return what a call costs, part by part; the flame graph lies beside the page."""
    head, *rows = profile.table(cell)
    parts = [
        f"## {cell.title[0].upper()}{cell.title[1:]}\n",
        "The CPU time of one broker process, divided by the calls that it answered, and by what it was spent on; beside"
        " it, what a server on the same aiohttp and the same event loop pays that reads a request and answers a"
        " constant. Waiting, for the disk most of all, takes no CPU time and is not in it.\n",
        markdown(head, rows),
        complaint(cell),
        "".join(f"- {note}.\n" for note in cell.notes),
        "The parts are those of stacks that py-spy saw, and good to about a percentage point; what C code or the system"
        " did counts for the part that called it. [The flame graph](profile-enqueue.svg) has the functions. Measured by"
        " `make bench-profile`; see `benchmarks/profile.py` for how.\n",
    ]
    return "\n".join(part for part in parts if part)


def complaint(cell: Cell) -> str:
    """Return why no figure of a cell counts; empty where they do."""
    errors = [cell.failure, *(f"{count} × {name}" for name, count in cell.errors.items())]
    return "" if cell.is_valid else f"**Invalid**: {'; '.join(filter(None, errors))}.\n"


def check_line(cell: Cell, check: Check) -> str:
    to_reach = f", to reach: {check.target}" if check.target else ""
    return f"{check.what}: {in_words(check.value, check.unit)}{to_reach}: {verdict(cell, check)}"


def limit_of(cell: Cell, case: str, who: str, cores: int) -> str:
    """Return what was at its limit, as far as CPU shares tell; empty where they were not taken, or of peers."""
    cpu = cell.cpu(case, who)
    if US not in cpu and who not in ("one process", "two processes"):
        return ""
    known = {name: share for name, share in cpu.items() if name != MACHINE}
    machine = cpu.get(MACHINE, 0.0)
    busiest = max(known, key=lambda name: known[name])
    if known.get("load", 0.0) >= 0.9:
        text = "the load itself, so it is a lower bound"
    elif machine >= 0.9 * cores:
        text = f"the CPU of the machine; of those who took part {busiest} used most"
    elif known[busiest] >= 0.9 and busiest != "PostgreSQL":
        text = f"one core, that of {busiest}"
    else:
        text = "no CPU: waiting for the disk, for locks, or for one another"
    other = machine - sum(known.values())
    return text + (f"; {other * 100:.0f} % of a core went to something else" if other > 0.25 else "")


def capacity(cells: Sequence[Cell]) -> str:
    """Return how to plan for a load, from what was measured."""
    by_name = {cell.name: cell for cell in cells}
    wal = by_name.get("commits-and-wal", Cell("", ""))
    wal_single, wal_batch = (
        wal.median(case, US, "wal_bytes_per_message") for case in ("64 connections", "batches of 100")
    )
    single, batch = (
        by_name[name].median("200 B", US, "messages_per_second") if name in by_name else None
        for name in ("single-life", "batch-life")
    )
    stored = (
        by_name["single-enqueue"].median("200 B", "a stored message", "bytes_on_disk")
        if ("single-enqueue" in by_name)
        else None
    )
    rows = [
        [
            f"{load:,}",
            f"{load * DAY / 1e6:,.1f} million",
            gigabytes(load, wal_single),
            gigabytes(load, wal_batch),
            gigabytes(load, stored),
            share_of(load, single),
            share_of(load, batch),
        ]
        for load in LOADS
    ]
    head = (
        "messages/s",
        "messages a day",
        "WAL a day, single calls",
        "WAL a day, batches of 100",
        "disk, if nobody consumes for a day",
        "of this machine, single calls",
        "of this machine, batches of 100",
    )
    return f"""## Capacity planning

For bodies of 200 bytes that are enqueued, dequeued and deleted once, on average over the day. One message is
{in_words(stored, "bytes")} on disk while it is stored, {in_words(wal_single, "bytes")} of WAL over its life by single
calls from 64 connections, {in_words(wal_batch, "bytes")} in batches of 100; full-page images come on top, after each
checkpoint, so make checkpoints rare. The last columns compare with what this machine reached while it also made the
load: {in_words(single, "messages/s")} by single calls, {in_words(batch, "messages/s")} in batches.

{markdown(head, rows)}
WAL has to be archived or kept for standbys. Double the disk for the dead rows that vacuum has not taken up yet, and
plan for the peak of the day, not for its average: larger batches first, then more cores.
"""


def gigabytes(load: float, size: float | None) -> str:
    return "–" if size is None else f"{load * DAY * size / 1e9:,.1f} GB"


def share_of(load: float, rate: float | None) -> str:
    if rate is None:
        return "–"
    return f"{load / rate * 100:.0f} %" if load <= rate else "more than it can"


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Draw rates of whole lives beside the peers, and how far each figure lies from its target."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "wonderq", "font.size": 9})
    good, bad, plain = "#2a7f4f", "#b3413a", "#8a93a0"
    by_name = {cell.name: cell for cell in cells}
    checks = [
        (f"{cell.name}: {check.what}", check)
        for cell in cells
        for check in cell.checks
        if check.target and check.value and cell.is_valid
    ]
    lives = [by_name[name] for name in ("single-life", "batch-life") if name in by_name]
    heights = [*([2.2] * len(lives)), max(1.0, 0.24 * len(checks))]
    drawing, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, sum(heights) + 1), height_ratios=heights, layout="constrained", squeeze=False
    )
    for axis, cell in zip(axes[:, 0], lives, strict=False):
        rates = {
            who: cell.median(case, who, "messages_per_second") or 0
            for case, who in cell.contestants()
            if case == "200 B"
        }
        names = list(rates)[::-1]
        axis.barh(names, [rates[name] for name in names], color=[good if name == US else plain for name in names])
        axis.bar_label(axis.containers[0], labels=[figure(rates[name]) for name in names], padding=3)
        axis.set_title(f"{cell.name}, 200 B: messages/s", loc="left")
        axis.set_xticks([])
        axis.margins(x=0.12)
    last = axes[-1, 0]
    distances = [margin(check) for _, check in checks][::-1]
    last.barh(
        [name for name, _ in checks][::-1], [distance - 1 for distance in distances], left=1,
        color=[good if distance >= 1 else bad for distance in distances],
    )  # fmt: skip
    last.set_xscale("log")
    last.axvline(1, color="black", linewidth=0.8)
    last.xaxis.set_major_formatter(lambda value, _: f"{value:g} ×")
    last.set_title("better than the target by", loc="left")
    for axis in axes[:, 0]:
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(drawing)


def margin(check: Check) -> float:
    """Return how many times better than its target a figure is; below 1 it misses it."""
    assert check.value is not None
    if check.at_least is not None:
        return check.value / check.at_least
    assert check.at_most is not None
    return check.at_most / max(check.value, 1e-9)


if __name__ == "__main__":
    sys.exit(main())
