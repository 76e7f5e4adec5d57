"""The verdict of the demo: what the subscribers kept against the same work done without a broker."""

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.client import Broadcast

from . import MODULES, PACKAGES
from .ledger import Entry
from .modules import Module, path_of, work

SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Course:
    """What happened on the way; times in seconds.

    `index` was killed when it held the messages `held` and had handled `handled` modules. While it was `down` there
    came to be `waited` messages for it, and `lines` had handled `others`. The publishers were told of `copies`. Of the
    second topic `stored` messages lay there until the broadcast. In the end `refused` subscribers took no forgery.
    """

    held: set[str]
    handled: int
    down: float
    waited: int
    others: int
    caught_up: float
    copies: int
    stored: int
    broadcast: Broadcast
    refused: int


def judge(
    directory: Path,
    wanted: Mapping[str, list[Module]],
    packages: Mapping[str, int],
    entries: Mapping[str, list[Entry]],
    course: Course,
    started: float,
) -> tuple[str, bool]:
    """Compare everything with the same work done here; return a text for people and whether all is well.

    `wanted` and `entries` are by subscriber, `started` is when the run began (seconds since 1970).
    """
    of_modules = {
        name: judge_modules(name, directory, modules, entries[name], started) for name, modules in wanted.items()
    }
    of_packages = {name: judge_packages(name, packages, entries[name]) for name in wanted}
    problems = [problem for judged in (*of_modules.values(), *of_packages.values()) for problem in judged.problems]
    came_again = {entry.webhook_id for entry in entries["index"] if entry.times > 1} & course.held
    problems += [f"never came again: message {held}" for held in course.held - came_again]
    copies = sum(map(len, wanted.values()))
    if course.copies != copies:
        problems.append(f"copies: the publishers were told of {course.copies}, and there should be {copies}")
    if course.refused != len(wanted):
        problems.append(f"forged: {len(wanted) - course.refused} subscribers took a message that nobody had signed")
    given_out = course.broadcast
    expected = (len(packages), len(packages), len(packages) * len(wanted))
    if (course.stored, given_out.messages, given_out.deliveries) != expected:
        problems.append(f"broadcast: {course.stored} of {len(packages)} messages were stored; given out: {given_out}")
    lines = [
        f"published     {len(wanted['index'])} modules; {course.copies} copies for {len(wanted)} subscribers",
        *(f"{name:13} {judged}" for name, judged in of_modules.items()),
        *findings(entries["index"], entries["lines"]),
        f"killed        index, after {course.handled} modules; it was down for {course.down:.1f} s,",
        f"              and lines had {course.others} of {len(wanted['lines'])} when it came back",
        f"              {len(came_again)} of the {len(course.held)} messages that it held came again",
        f"              {course.waited} messages waited for it; it caught up in {course.caught_up:.1f} s",
        f"broadcast     {course.stored} messages while nobody subscribed, then {given_out.deliveries} copies",
        *(f"              {name}: {judged}" for name, judged in of_packages.items()),
        f"forged        {course.refused} of {len(wanted)} subscribers refused a message that nobody had signed",
        f"problems      {len(problems)}",
        *problems[:SHOWN_PROBLEMS],
    ]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    return "\n".join(lines), not problems


@dataclass(frozen=True)
class Judged:
    """What became of the messages of one topic at one subscriber."""

    expected: int
    equal: int
    gone: int
    came_again: int
    problems: list[str]

    def __str__(self) -> str:
        gone = f"; {self.gone} not compared, because the module has gone away since" if self.gone else ""
        return f"{self.equal} of {self.expected} as found here, {self.came_again} came more than once{gone}"


def judge_modules(
    subscriber: str, directory: Path, modules: list[Module], entries: list[Entry], started: float
) -> Judged:
    """Do a subscriber's work on its modules again and compare."""
    own = {module.name: work(subscriber, directory, module.name) for module in modules}
    return compare(subscriber, MODULES, own, entries, {name for name in own if has_changed(directory, name, started)})


def judge_packages(subscriber: str, packages: Mapping[str, int], entries: list[Entry]) -> Judged:
    """Compare what a subscriber got by the broadcast with what was published before."""
    own = {package: {"package": package, "modules": count} for package, count in packages.items()}
    return compare(subscriber, PACKAGES, own, entries, set())


def compare(
    subscriber: str, topic: str, own: dict[str, dict[str, Any]], entries: list[Entry], changed: Collection[str]
) -> Judged:
    """Compare what a subscriber kept of a topic with what it should have found, by names."""
    kept: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        if entry.topic == topic:
            kept[entry.name].append(entry)
    problems = [f"unknown: {subscriber} handled {name}, which was not for it" for name in kept.keys() - own.keys()]
    equal = gone = 0
    for name, expected in own.items():
        found = [entry.found for entry in kept[name]]
        if not found:
            problems.append(f"missing: {subscriber} never handled {name}")
        elif all(each == expected for each in found):
            equal += len(found) == 1
        elif "error" in expected:
            gone += 1
        else:
            but = ", but the module changed meanwhile" if name in changed else ""
            problems.append(f"wrong: {subscriber} found something else in {name} than is found here{but}")
        if len(found) > 1:
            ids = ", ".join(sorted(entry.webhook_id for entry in kept[name]))
            problems.append(f"handled twice: {name} by {subscriber}, as the messages {ids}")
    came_again = sum(entry.times > 1 for entries in kept.values() for entry in entries)
    return Judged(len(own), equal, gone, came_again, problems)


def has_changed(directory: Path, name: str, started: float) -> bool:
    """Tell whether a module was written to, or went away, since then (seconds since 1970)."""
    try:
        return path_of(directory, name).stat().st_ctime >= started
    except OSError:
        return True


def findings(index: list[Entry], lines: list[Entry]) -> list[str]:
    """Return in two lines what there was to find out."""
    names = Counter(name for entry in index for name, _ in entry.found.get("functions", ()))
    most = ", ".join(f"{name} {count}" for name, count in names.most_common(3))
    total = sum(entry.found.get("lines", 0) for entry in lines)
    code = sum(entry.found.get("code", 0) for entry in lines)
    return [
        f"found         {names.total()} functions, most often {most}",
        f"              {total} lines in what matches, {code} of them neither blank nor a comment",
    ]
