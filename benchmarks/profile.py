"""Where the CPU time of one call goes: microseconds by part of the broker, beside a server that answers a constant.

    python -m benchmarks.profile [--call enqueue] [--body 200] [--connections 64] [--seconds 10] [--out FILE]
                                 [--flame FILE]

First the servers take turns under the same load: the CPU time that one used, divided by the calls that it answered, is
what a call costs. Then py-spy halts each of them now and then and notes its stack, unless it is idle. That slows it
down by a third and more, so only the shares of the parts are taken from then, and divide the cost.

What a share is worth, on a machine with nothing else to do: two thousand stacks tell it to about a percentage point.
The time of C code and of system calls is that of the Python function that called them. (`py-spy --native` would tell
them apart, but halts the broker for milliseconds each time.) A process that is halted from another core runs on for
microseconds, mostly into its next system call, which then seems to take long: so the server and py-spy share one
core, and all else has the others.

Exit code 1 where something is missing, py-spy may not look into the server, or an answer was an error.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.bench import Bench, Options, create_queue
from benchmarks.load import MissingProgram, Wrk
from benchmarks.machine import machine, versions
from benchmarks.processes import MACHINE, ROOT, Cluster, Meter, Server, end_on_sigterm, temporary_folder, tree
from benchmarks.results import US, Cell, Results, Sample, shares

# More often, and py-spy falls behind: it then samples what has not run since the last time.
SAMPLES_A_SECOND = 200
# Machines that are shared become faster and slower from minute to minute: so the cost is measured in turns.
ROUNDS = 3
NAME = "profile"
CONSTANT, POSTGRESQL = "constant answer", "PostgreSQL"
WHOLE, OTHER = "the whole call", "other"
COST = "microseconds_per_call"

# A frame is written as `function (file:line)`, with the file's path from where it is imported. Each belongs to the
# first part here that it matches; a stack to the part of its innermost frame that has one.
PARTS = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        ("HTTP: reading and parsing", r"data_received |^read_body |^BaseRequest\.read |\(aiohttp/(streams|base_pro)"),
        ("HTTP: writing the answer", r"write_answer |in_one_piece |^JsonAnswer|^rfc822|\(aiohttp/(http_wri|web_resp)"),
        ("HTTP: Host, Content-Type, route", r"\(broker/server|\(aiohttp/web_urldispatcher"),
        (
            "HTTP: connection and request otherwise",
            r"\(aiohttp/|\(broker/(?:connections|bodies|answers)|\(yarl/|\(multidict/",
        ),
        ("JSON-RPC: envelope, params by the schema, result", r"\(broker/(rpc|schema)"),
        ("JSON-RPC: jsonrpcserver calls the method", r"\(jsonrpcserver/|\(oslash/"),
        ("counting for /metrics", r"\(broker/metrics|\(prometheus_client/"),
        ("gathering calls into a statement", r"\(broker/storage/group_commit"),
        ("the statement's arrays and its rows", r"\(broker/storage/(messages|storing|handing_out|leases|binary)"),
        ("psycopg and its pool: the statement's way to PostgreSQL", r"\(psycopg|\(broker/storage/database"),
        ("event loop: waiting for sockets, reading them, waking tasks", r"^Runner\.run |\(uvloop/"),
        ("the method itself, and telling who waits", r"\(broker/|\(benchmarks/constant_server"),
    )
)


class SamplingFailed(Exception):
    """There are no stacks that count; the message says why, or what to do."""


def main() -> int:
    given = arguments()
    end_on_sigterm()
    try:
        results = measure(given)
    except (MissingProgram, SamplingFailed) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    (cell,) = results.cells
    print(f"{cell.title}\n")
    for part, *costs in table(cell):
        print(f"{part:<60}" + "".join(f"{cost:>28}" for cost in costs))
    print("".join(f"\n{note}" for note in cell.notes))
    for name, count in cell.errors.items():
        print(f"ERRORS: {count} × {name}")
    if given.out is not None:
        results.write(given.out)
        print(f"\nwritten to {given.out}")
    return 0 if cell.is_valid else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--call", choices=("enqueue", "life"), default="enqueue", help="which script for wrk")
    parser.add_argument("--body", type=int, default=200, metavar="CHARACTERS", help="the size of bodies")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long each server is measured, and sampled")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write everything as JSON")
    parser.add_argument("--flame", type=Path, metavar="FILE", help="write a flame graph of the broker, as SVG")
    return parser.parse_args()


def measure(given: argparse.Namespace) -> Results:
    """Measure and sample a broker and the server that answers a constant."""
    sampler()
    seconds = max(1.0, round(given.seconds / ROUNDS))
    cell = Cell(f"{NAME}-{given.call}", f"where the time of one {given.call} goes")
    with ExitStack() as stack:
        folder = stack.enter_context(temporary_folder())
        cluster = stack.enter_context(Cluster(folder))
        bench = Bench(Options(given.seconds, 1), folder, cluster, stack.enter_context(ExitStack()))
        broker = stack.enter_context(bench.broker())
        constant = stack.enter_context(bench.constant_server(uvloop=broker.loads("uvloop")))
        bench.warm_up(broker, given.body)
        queue, bodies = create_queue(broker, "profile"), bench.bodies(given.body)
        under_load = partial(UnderLoad, connections=given.connections, queue=queue, bodies=bodies, cluster=cluster)
        ours = under_load(US, broker, given.call)
        cell.notes.append(f"{given.connections} connections, bodies of {given.body} characters")
        contestants = (ours, under_load(CONSTANT, constant, "enqueue"))
        for round_ in range(1, ROUNDS + 1):
            bench.progress(f"what a call costs, round {round_}")
            cell.samples += [sample for each in contestants for sample in each.costs(round_, seconds)]
        for each in contestants:
            bench.progress(f"where that goes: {each.who}")
            stacks = read_stacks(each.sampled(given.seconds, "raw", folder / "stacks"))
            cell.samples += divided(each.who, cell.median(WHOLE, each.who, COST) or 0.0, shares_of(stacks))
            cpu, count = cell.cpu(WHOLE, each.who), sum(count for _, count in stacks)
            cell.notes.append(f"{each.who}: {count:,} stacks; CPU while nobody sampled: {shares(cpu)}")
            if (elsewhere := 2 * cpu[MACHINE] - sum(cpu.values())) > 0.25:
                cell.notes.append(f"{elsewhere * 100:.0f} % of a core went to something else: better measure again")
        if given.flame is not None:
            bench.progress("flame graph")
            svg = ours.sampled(given.seconds, "flamegraph", folder / "flame")
            given.flame.write_text(titled(svg, f"one process of {US}, {given.call}, {cell.notes[0]}"), "utf-8")
        return Results(
            kind="profile",
            taken_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            seconds=seconds,
            rounds=ROUNDS,
            machine=machine(),
            versions=versions(cluster),
            postgresql_settings=cluster.settings(),
            cells=[cell],
        )


@dataclass(frozen=True)
class UnderLoad:
    """A server, and what wrk does to it: by which script, from how many connections."""

    who: str
    server: Server
    script: str
    connections: int
    queue: str
    bodies: Path
    cluster: Cluster

    def load(self, seconds: float) -> Wrk:
        url, options = self.server.url, {"queues": 1, "batch": 1}
        return Wrk(self.script, url, self.connections, seconds, queue=self.queue, bodies=self.bodies, **options)

    def costs(self, round_: int, seconds: float) -> list[Sample]:
        """Return what a call costs the server, and what PostgreSQL, while nobody samples."""
        with Meter({self.who: self.server.pid, POSTGRESQL: self.cluster.pid}) as meter:
            tally = self.load(seconds).wait()
        cost = {name: {COST: used / max(1, tally.calls) * 1e6} for name, used in meter.used.items()}
        cpu = meter.shares() | {"load": tally.cpu_seconds / meter.seconds}
        whole = Sample(WHOLE, self.who, round_, cost[self.who], cpu, tally.errors)
        return [whole, Sample(WHOLE, f"{POSTGRESQL} beside {self.who}", round_, cost[POSTGRESQL])]

    def sampled(self, seconds: float, form: str, path: Path) -> str:
        """Let py-spy watch the server under load; return what it wrote, without the paths of this machine."""
        *rest, core = sorted(os.sched_getaffinity(0))
        watched, others = tree(self.server.pid), [os.getpid(), *tree(self.cluster.pid)]
        command = [sampler(), "record", "--pid", str(self.server.pid), "--format", form, "--output", str(path)]
        command += ["--function", "--rate", str(SAMPLES_A_SECOND), "--duration", str(max(1, round(seconds)))]
        confine(watched, {core})
        confine(others, rest or {core})
        try:
            # py-spy needs a moment to begin.
            with self.load(seconds + 1) as load:
                done = subprocess.run(
                    command, capture_output=True, text=True, check=False,
                    preexec_fn=partial(os.sched_setaffinity, 0, {core}),
                )  # fmt: skip
                if done.returncode:
                    raise SamplingFailed(why(done.stderr))
                if errors := load.wait().errors:
                    raise SamplingFailed(f"not every answer was one while py-spy watched: {errors}")
        finally:
            confine([*watched, *others], {*rest, core})
        return without_paths(path.read_text("utf-8"))


def sampler() -> str:
    """Return where py-spy is. Raises MissingProgram."""
    places = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)))
    program = shutil.which("py-spy", path=places)
    if program is None:
        raise MissingProgram("py-spy is not installed, and notes the stacks: pip install 'wonderq[bench]'")
    return program


def why(complaint: str) -> str:
    """Return what to say where py-spy failed with this complaint."""
    if re.search(r"permi(ssion|tted)", complaint, re.IGNORECASE):
        return (
            "py-spy may not look into another process here. Run this as root, or allow it to all:"
            " sudo sysctl kernel.yama.ptrace_scope=0 (in a container: --cap-add SYS_PTRACE)"
        )
    return f"py-spy failed: {complaint.strip().splitlines()[0] if complaint.strip() else 'it said nothing'}"


def confine(pids: Iterable[int], cores: Iterable[int]) -> None:
    """Let processes, with all their threads, run on these cores only."""
    chosen = set(cores)
    for pid in pids:
        with suppress(OSError):  # it has ended
            for thread in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(thread.name), chosen)


def without_paths(text: str) -> str:
    """Return a text with files named as they are imported: nobody else has the folders of this machine."""
    return re.sub(r"/(?:[^/\s():;<>]+/)*(?:site-packages|python3\.\d+)/", "", text.replace(f"{ROOT}/", ""))


def titled(svg: str, title: str) -> str:
    """Return a flame graph under this title, in place of the command that made it."""
    return re.sub(r'(<text id="title"[^>]*>)[^<]*', lambda found: found[1] + title, svg)


def read_stacks(raw: str) -> list[tuple[list[str], int]]:
    """Return each stack, outermost frame first, and how often it was seen: `frame;frame;frame count` a line."""
    lines = (line.rpartition(" ") for line in raw.splitlines() if line)
    return [(stack.split(";"), int(count)) for stack, _, count in lines]


def part_of(stack: Sequence[str]) -> str:
    """Return the part of the innermost frame that has one."""
    for frame in reversed(stack):
        for part, pattern in PARTS:
            if pattern.search(frame):
                return part
    return OTHER


def shares_of(stacks: Iterable[tuple[Sequence[str], int]]) -> dict[str, float]:
    """Return the share (0 to 1) that each part has of all stacks, in the order of the table."""
    counts: Counter[str] = Counter()
    for stack, count in stacks:
        counts[part_of(stack)] += count
    return {part: counts[part] / max(1, counts.total()) for part in (*(part for part, _ in PARTS), OTHER)}


def divided(who: str, cost: float, of: Mapping[str, float]) -> list[Sample]:
    """Return what each part costs somebody whose whole call costs so much."""
    return [Sample(part, who, 1, {COST: share * cost}) for part, share in of.items()]


def table(cell: Cell) -> list[list[str]]:
    """Return the head and a row for each part: its cost and share, and what the constant answer pays for it."""
    rows = [["part", f"{US}, µs a call", "share", f"{CONSTANT}, µs a call"]]
    whole = cell.median(WHOLE, US, COST) or 0.0
    for part in (*(part for part, _ in PARTS), OTHER, WHOLE):
        ours, theirs = cell.median(part, US, COST) or 0.0, cell.median(part, CONSTANT, COST) or 0.0
        if ours or theirs:
            share = ours / whole if whole else 0.0
            rows.append([part, f"{ours:.1f}", f"{share * 100:.0f} %", f"{theirs:.1f}" if theirs else ""])
    beside = cell.median(WHOLE, f"{POSTGRESQL} beside {US}", COST) or 0.0
    return [*rows, ["beside it: PostgreSQL, all its processes", f"{beside:.1f}", "", ""]]


if __name__ == "__main__":
    sys.exit(main())
