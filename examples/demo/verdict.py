"""The verdict of the demo: what the consumers reported against what is on the disk."""

import os
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from .files import read_file

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Report:
    """What a consumer says about the file of one task."""

    task: str
    receive_count: int
    name: str
    found: dict[str, Any]
    sender: str


def judge(directory: Path, names: list[str], reports: list[Report], held: set[str], started: float) -> tuple[str, bool]:
    """Compare the reports with the files; return a text for people and whether all is well.

    `held` are the tasks of the killed consumer, `started` is when the run began (seconds since 1970).
    """
    reports_by_name: dict[str, list[Report]] = defaultdict(list)
    receive_counts: Counter[str] = Counter()
    for report in reports:
        reports_by_name[report.name].append(report)
        receive_counts[report.task] = max(receive_counts[report.task], report.receive_count)

    came_back = [task for task in held if receive_counts[task] >= 2]
    problems = [f"never came back: message {task}" for task in held.difference(came_back)]
    problems += [f"unknown: {name}" for name in reports_by_name.keys() - set(names)]
    size = equal = unreadable = gone = 0
    for name in names:
        own = read_file(directory, name)
        size += own.get("size", 0)
        tasks = {report.task for report in reports_by_name[name]}
        differing = [report.found for report in reports_by_name[name] if report.found != own]
        if not tasks:
            problems.append(f"missing: {name}")
        elif len(tasks) > 1:
            problems.append(f"counted twice: {name}, by the messages {', '.join(sorted(tasks))}")
        elif not differing:
            equal += 1
            unreadable += "error" in own
        elif "error" in own:
            gone += 1
        else:
            changed = ", but the file changed meanwhile" if changed_since(started, directory, name) else ""
            problems.append(f"wrong: {name}: reported {differing[0]}, computed here {own}{changed}")

    redeliveries = sum(count - 1 for count in receive_counts.values())
    shares = ", ".join(f"{sender} {count}" for sender, count in sorted(Counter(r.sender for r in reports).items()))
    lines = [
        f"files         {len(names)}, {size / 1e6:.1f} MB",
        f"messages      {len(receive_counts)} tasks, {len(reports)} reports: {shares}",
        f"              {len(reports) - len(receive_counts)} reports came twice, known by the task's message_id",
        f"redeliveries  {redeliveries}; {len(came_back)} of the {len(held)} of the killed consumer came back",
        f"digests       {equal} as computed here ({unreadable} of them unreadable for both)",
        f"              {gone} not compared, because the file has gone away since",
        f"problems      {len(problems)}",
        *problems[:SHOWN_PROBLEMS],
    ]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(lines), not problems


def changed_since(started: float, directory: Path, name: str) -> bool:
    """Tell whether the file was written to, or went away, since then."""
    path = os.path.join(os.fsencode(directory), unquote_to_bytes(name))
    try:
        return os.stat(path).st_ctime >= started
    except OSError:
        return True
