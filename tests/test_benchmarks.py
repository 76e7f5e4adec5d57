"""The benchmarks count what was done and nothing else, compare what is comparable, and report every cell.

No speed is judged here. What needs wrk is skipped where it is not installed.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web

from benchmarks import profile, report
from benchmarks.__main__ import PLANS
from benchmarks.bench import Bench, prepare
from benchmarks.caller import Caller, SetTimes
from benchmarks.consuming import Consuming
from benchmarks.flat import QUEUE, fill
from benchmarks.load import MissingProgram, Tally, Work, Wrk, merge, tally_of, work, write_bodies, wrk
from benchmarks.processes import cpu_seconds
from benchmarks.results import US, Cell, Check, Results, Sample, percentile, table
from broker import answers, connections
from broker.bodies import read_body
from broker.client import BrokerError
from broker.server import Server
from broker.settings import Settings

needs_wrk = pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed: apt-get install wrk")

Answer = Callable[[dict[str, Any], int], tuple[int, Any]]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Serve /rpc: `answer` gets each request and its number, and returns a status and what stands beside the id."""
    loop = asyncio.new_event_loop()
    numbers = itertools.count()
    started = threading.Event()
    runner: web.AppRunner

    async def handle(request: web.Request) -> web.Response:
        call = json.loads(await request.read())
        status, said = answer(call, next(numbers))
        text = json.dumps({"jsonrpc": "2.0", **said, "id": call["id"]}, separators=(",", ":"))
        return web.Response(status=status, text=text, content_type="application/json")

    async def start() -> None:
        nonlocal runner
        application = web.Application()
        application.router.add_post("/rpc", handle)
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        started.set()

    def run() -> None:
        loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def stored(call: dict[str, Any], _: int) -> tuple[int, Any]:
    one = {"message_id": "000000000000002a", "duplicate": False}
    if call["method"] == "enqueue_batch":
        return 200, {"result": {"messages": [one] * len(call["params"]["messages"])}}
    return 200, {"result": one}


REFUSED = {"error": {"code": 1005, "message": "too much at once", "data": {"type": "overloaded"}}}


@pytest.fixture(scope="module")
def bodies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of bodies of 200 characters."""
    return write_bodies(tmp_path_factory.mktemp("bodies") / "pool", 200)


def test_bodies_are_json_strings_of_the_size_and_differ(bodies: Path) -> None:
    lines = bodies.read_text().splitlines()
    assert {len(json.loads(line)) for line in lines} == {200}
    assert len(set(lines)) == len(lines) > 1000


# What wrk's scripts count


@needs_wrk
def test_what_was_stored_counts(bodies: Path) -> None:
    calls: list[dict[str, Any]] = []

    def answer(call: dict[str, Any], n: int) -> tuple[int, Any]:
        calls.append(call)
        return stored(call, n)

    with serving(answer) as url:
        tally = wrk("enqueue", url, 4, 1, queue="a", queues=3, batch=1, bodies=bodies)
    # What was under way when the time was over is not counted: at most one call a connection.
    assert len(calls) - 4 <= tally.messages == tally.calls <= len(calls)
    assert tally.messages > 0
    assert tally.errors == {}
    assert {call["params"]["queue"] for call in calls} == {"a0", "a1", "a2"}
    different = len({call["params"]["body"] for call in calls})
    assert different == min(len(calls), len(bodies.read_text().splitlines()))
    assert tally.cpu_seconds > 0
    assert 0.9 < tally.seconds < 5


@needs_wrk
@pytest.mark.parametrize("status", [200, 503])
def test_an_error_never_counts_as_throughput(bodies: Path, status: int) -> None:
    with serving(lambda call, n: (status, REFUSED)) as url:
        for script, options in (("enqueue", {"queues": 1, "batch": 1}), ("life", {"batch": 1})):
            tally = wrk(script, url, 2, 1, queue="a", bodies=bodies, **options)
            assert tally.messages == 0
            assert sum(tally.errors.values()) == tally.calls > 0
            assert any("too much at once" in kind for kind in tally.errors)


@needs_wrk
def test_one_error_among_many_answers_is_seen(bodies: Path) -> None:
    with serving(lambda call, n: (200, REFUSED) if n == 7 else stored(call, n)) as url:
        tally = wrk("enqueue", url, 2, 1, queue="a", queues=1, batch=1, bodies=bodies)
    assert sum(tally.errors.values()) == 1
    assert tally.messages == tally.calls - 1


@needs_wrk
def test_a_batch_that_was_stored_in_part_does_not_count(bodies: Path) -> None:
    def part(call: dict[str, Any], n: int) -> tuple[int, Any]:
        status, answer = stored(call, n)
        return status, {"result": {"messages": answer["result"]["messages"][1:]}}

    with serving(part) as url:
        tally = wrk("enqueue", url, 2, 1, queue="a", queues=1, batch=10, bodies=bodies)
    assert tally.messages == 0
    assert sum(tally.errors.values()) == tally.calls > 0


@needs_wrk
def test_a_message_that_was_gone_before_it_was_deleted_does_not_count(bodies: Path) -> None:
    def answer(call: dict[str, Any], n: int) -> tuple[int, Any]:
        match call["method"]:
            case "enqueue":
                return stored(call, n)
            case "dequeue":
                return 200, {"result": {"messages": [{"receipt": "r", "body": "b"}]}}
        return 200, {"result": {"deleted": False}}

    with serving(answer) as url:
        for script, options in (("life", {"batch": 1}), ("consumers", {"producers": 1, "in_system": 10})):
            tally = wrk(script, url, 2, 1, queue="a", bodies=bodies, **options)
            assert tally.messages == 0
            assert sum(tally.errors.values()) > 0


@needs_wrk
def test_an_error_within_a_batch_is_an_error(bodies: Path) -> None:
    def answer(call: dict[str, Any], n: int) -> tuple[int, Any]:
        match call["method"]:
            case "enqueue_batch":
                return stored(call, n)
            case "dequeue":
                return 200, {"result": {"messages": [{"receipt": f"r{i}"} for i in range(5)]}}
        return 200, {"result": {"results": [{"deleted": True}] * 4 + [REFUSED]}}

    with serving(answer) as url:
        tally = wrk("life", url, 2, 1, queue="a", batch=5, bodies=bodies)
    assert tally.messages == 0
    assert sum(tally.errors.values()) > 0


@needs_wrk
@pytest.mark.parametrize("batch", [1, 10])
def test_the_messages_counted_have_lived_in_the_broker(standing_server: Server, bodies: Path, batch: int) -> None:
    queue = f"bench-life-{batch}"
    with Caller(standing_server.url) as caller:
        caller.call("create_queue", queue=queue)
        tally = wrk("life", standing_server.url, 4, 1, queue=queue, batch=batch, bodies=bodies)
        left = caller.call("get_queue", queue=queue)["counts"]["total"]
    assert tally.errors == {}
    assert tally.messages > 0
    assert tally.messages % batch == 0
    assert left <= 4 * batch, "more is under way than the connections have"


@needs_wrk
def test_waiting_consumers_get_what_is_produced(standing_server: Server, bodies: Path) -> None:
    with Caller(standing_server.url) as caller:
        caller.call("create_queue", queue="bench-consumers")
        tally = wrk(
            "consumers", standing_server.url, 12, 1, queue="bench-consumers", producers=4, in_system=8, bodies=bodies
        )
        left = caller.call("get_queue", queue="bench-consumers")["counts"]["total"]
    assert tally.errors == {}
    assert tally.messages > 0
    assert left <= 8


def test_without_wrk_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(MissingProgram, match="apt-get install wrk"):
        Wrk("enqueue", "http://127.0.0.1:1", 1, 1)


def test_what_wrk_says_of_connections_are_errors() -> None:
    line = (
        "completed=5 calls=6 refused=1 connect=0 read=2 write=0 timeout=3 microseconds=2000000 p50=1500 p99=9000"
        " max=9500 refusal=503 no=way"
    )
    tally = tally_of(f"Running 2s test\n{line}\n", "", 0.5)
    assert tally.messages_per_second == 2.5
    assert tally.errors == {"read failed": 2, "no answer in time": 3, "refused (503 no=way)": 1}
    assert (tally.p50_ms, tally.p99_ms, tally.max_ms) == (1.5, 9.0, 9.5)


def test_a_script_that_fails_is_no_result_of_zero() -> None:
    with pytest.raises(RuntimeError, match="attempt to call"):
        tally_of("Running 2s test", "life.lua: attempt to call a nil value", 0.5)


# Workers


class Fails:
    def run(self, ready: Callable[[], None]) -> Tally:
        ready()
        raise ValueError("no such queue")


class Counts:
    def run(self, ready: Callable[[], None]) -> Tally:
        ready()
        return Tally(messages=3, errors={"lost": 1})


def test_what_workers_did_is_added_up() -> None:
    workers: list[Work] = [Counts(), Counts()]
    tally = work(workers)
    assert (tally.messages, tally.errors) == (6, {"lost": 2})


def test_a_worker_that_fails_is_no_result() -> None:
    workers: list[Work] = [Counts(), Fails()]
    with pytest.raises(RuntimeError, match="no such queue"):
        work(workers)


def test_rates_of_workers_that_ran_at_once_are_over_the_longest_time() -> None:
    tally = merge([Tally(messages=10, seconds=1), Tally(messages=10, seconds=2)])
    assert tally.messages_per_second == 10


# The client's loop


@pytest.mark.parametrize("by_loop", [False, True])
def test_messages_that_are_consumed_count_when_they_are_deleted(standing_server: Server, by_loop: bool) -> None:
    queue = f"bench-consuming-{by_loop}"
    with Caller(standing_server.url) as caller:
        caller.call("create_queue", queue=queue)
        caller.call("enqueue_batch", queue=queue, messages=[{"body": n} for n in range(300)])
        tally = Consuming(standing_server.url, queue, 3, 10, 300, by_loop).run(lambda: None)
        assert (tally.messages, tally.errors) == (300, {})
        assert caller.call("count_messages", queue=queue)["total"] == 0


@pytest.mark.parametrize("by_loop", [False, True])
def test_calls_that_are_refused_are_no_result_of_consuming(by_loop: bool) -> None:
    def answer(call: dict[str, Any], n: int) -> tuple[int, Any]:
        return 200, REFUSED if call["method"] == "dequeue" else {"result": {}}

    with serving(answer) as url, pytest.raises(BrokerError):
        Consuming(url, "q", 1, 10, 300, by_loop).run(lambda: None)


# Latencies


def test_a_message_takes_as_long_as_its_consumer_waits_for_it(standing_server: Server) -> None:
    with Caller(standing_server.url) as caller:
        caller.call("create_queue", queue="bench-times")
    tally = SetTimes(standing_server.url, "bench-times", 50, 1, producers=2, consumers=2).run(lambda: None)
    assert tally.errors == {}
    assert len(tally.latencies_ms) == 50
    assert min(tally.latencies_ms) > 0


def test_a_broker_that_keeps_producers_waiting_does_not_gain_by_it(standing_server: Server) -> None:
    """Twenty messages are due within a tenth of a second, and one producer sends them, each after the other."""
    with Caller(standing_server.url) as caller:
        caller.call("create_queue", queue="bench-late", delay=0.2)
    worker = SetTimes(standing_server.url, "bench-late", 200, 0.1, producers=1, consumers=4)
    tally = worker.run(lambda: None)
    assert tally.errors == {}
    assert min(tally.latencies_ms) >= 200, "the delay belongs to the time of each"


def test_percentiles_are_those_of_the_sorted_values() -> None:
    assert percentile(range(1, 101), 0.5) == 50
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([7.0], 0.99) == 7.0


def test_the_cpu_of_a_process_counts() -> None:
    before = cpu_seconds(os.getpid())
    while cpu_seconds(os.getpid()) < before + 0.05:
        sum(range(100_000))


# Rows that are put into the table


@pytest.mark.parametrize(
    ("state", "counts"),
    [
        ({}, {"ready": 50}),
        ({"visible": "now() + interval '1 day'"}, {"delayed": 50}),
        ({"visible": "now() + interval '1 hour'", "leased": True}, {"leased": 50}),
        ({"expires": "now() - interval '1 minute'"}, {}),
    ],
)
async def test_messages_put_into_the_table_are_in_the_state_that_is_meant(
    empty_database_url: str, bodies: Path, state: dict[str, Any], counts: dict[str, int]
) -> None:
    class Quiet(Bench):
        def __init__(self) -> None:
            pass

        def bodies(self, size: int) -> Path:
            return bodies

        def progress(self, text: str) -> None:
            pass

    def put() -> dict[str, int]:
        prepare(empty_database_url, [QUEUE])
        fill(Quiet(), empty_database_url, 50, **state)
        with psycopg.connect(empty_database_url) as connection:
            rows = connection.execute("SELECT count(*) FROM broker.messages").fetchone()
            assert rows == (50,)
        return {}

    await asyncio.to_thread(put)
    settings = replace(Settings(host="127.0.0.1", port=0), sweep_interval=3600)
    async with Server(empty_database_url, settings) as server:

        def ask() -> dict[str, int]:
            with Caller(server.url) as caller:
                found: dict[str, int] = caller.call("get_queue", queue=QUEUE)["counts"]
                return found

        found = await asyncio.to_thread(ask)
    none = {"ready": 0, "delayed": 0, "leased": 0}
    assert {name: found[name] for name in none} == none | counts


# Where the time of a call goes

# As py-spy writes them, without the frames that all stacks begin with.
IN_UVLOOP = "run_to_end (broker/server.py:431);Runner.run (asyncio/runners.py:86)"
IN_HANDLER = f"{IN_UVLOOP};RequestHandler.start (aiohttp/web_protocol.py:612)"
IN_ANSWER = f"{IN_HANDLER};Connection.write_answer (broker/connections.py:379)"
IN_METHOD = (
    f"{IN_UVLOOP};Server._rpc (broker/server.py:362);Rpc._dispatch (broker/rpc.py:198);"
    "call (jsonrpcserver/async_dispatcher.py:24);Methods.enqueue (broker/methods.py:67)"
)
IN_STATEMENT = (
    f"{IN_UVLOOP};GroupCommit._send (broker/storage/group_commit.py:216);enqueue (broker/storage/storing.py:165);"
    "AsyncCursor.execute (psycopg/cursor_async.py:100)"
)


@pytest.mark.parametrize(
    ("stack", "part"),
    [
        (IN_UVLOOP, "event loop"),
        (f"{IN_UVLOOP};Connection.data_received (broker/connections.py:285)", "HTTP: reading"),
        (IN_HANDLER, "HTTP: connection"),
        (IN_ANSWER, "HTTP: writing"),
        (f"{IN_ANSWER};rfc822_formatted_time (aiohttp/helpers.py:540)", "HTTP: writing"),
        (IN_METHOD, "the method itself"),
        (IN_METHOD.rpartition(";")[0], "JSON-RPC: jsonrpcserver"),
        (f"{IN_METHOD};json_text (broker/methods.py:312);WeakSet.add (_weakrefset.py:85)", "the method itself"),
        (f"{IN_METHOD};GroupCommit.call (broker/storage/group_commit.py:113)", "gathering"),
        (IN_STATEMENT, "psycopg"),
        (f"{IN_STATEMENT};ArrayDumper.dump (broker/storage/binary.py:60)", "the statement's arrays"),
        ("_run_code (<frozen runpy>:65);Thread.run (threading.py:975)", "other"),
    ],
)
def test_a_stack_counts_for_the_part_of_the_innermost_frame_that_has_one(stack: str, part: str) -> None:
    assert profile.part_of(stack.split(";")).startswith(part)


def test_the_rules_of_the_parts_name_modules_and_functions_that_exist() -> None:
    modules = [path.stem for path in (report.ROOT / "broker").rglob("*.py")]
    rules = " ".join(pattern.pattern for _, pattern in profile.PARTS)
    named = [
        name for names in re.findall(r"broker/(?:storage/)?\(?([\w|]+)", rules) for name in names.split("|") if name
    ]
    assert {"rpc", "schema", "server", "group_commit", "binary"} <= set(named)
    assert [name for name in named if not any(module.startswith(name) for module in modules)] == []
    functions: list[tuple[Any, str]] = [
        (connections.Connection.data_received, "HTTP: reading"),
        (read_body, "HTTP: reading"),
        (connections.Connection.write_answer, "HTTP: writing"),
        (connections.Connection.can_answer_in_one_piece, "HTTP: writing"),
        (answers.JsonAnswer.to_bytes, "HTTP: writing"),
    ]
    for function, part in functions:
        file = function.__module__.replace(".", "/")
        assert profile.part_of([f"{function.__qualname__} ({file}.py:1)"]).startswith(part)


def test_what_py_spy_writes_is_read_with_blanks_in_names_and_counts() -> None:
    raw = "main (a.py:1);<module> (b c.py:2) 17\n_run (<frozen runpy>:3) 1\n"
    assert profile.read_stacks(raw) == [
        (["main (a.py:1)", "<module> (b c.py:2)"], 17),
        (["_run (<frozen runpy>:3)"], 1),
    ]


def test_the_parts_share_the_cost_by_how_often_they_were_seen() -> None:
    raw = f"{IN_ANSWER} 3\n{IN_UVLOOP} 4\n{IN_ANSWER};JsonAnswer.to_bytes (a.py:1) 2\nalien (x.py:1) 1\n"
    shares = profile.shares_of(profile.read_stacks(raw))
    assert {part: share for part, share in shares.items() if share} == {
        "HTTP: writing the answer": 0.5,
        "event loop: waiting for sockets, reading them, waking tasks": 0.4,
        profile.OTHER: 0.1,
    }
    parts = profile.divided(US, 80.0, shares)
    assert {sample.case: sample.figures[profile.COST] for sample in parts}["HTTP: writing the answer"] == 40.0
    assert sum(sample.figures[profile.COST] for sample in parts) == pytest.approx(80)


def test_stacks_and_flame_graphs_name_no_folder_of_this_machine() -> None:
    text = f'<text id="title" x="1">/opt/py-spy record --pid 7</text>f ({report.ROOT}/broker/rpc.py:1)'
    text += (
        ";g (/home/me/.venv/lib/python3.11/site-packages/aiohttp/web.py:2);h (/usr/lib/python3.11/asyncio/runners.py:3)"
    )
    text = profile.titled(profile.without_paths(text), "one process")
    assert text == (
        '<text id="title" x="1">one process</text>f (broker/rpc.py:1);g (aiohttp/web.py:2);h (asyncio/runners.py:3)'
    )


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ("Permission Denied: Try running again with elevated permissions", "kernel.yama.ptrace_scope=0"),
        ("Error: Operation not permitted (os error 1)", "kernel.yama.ptrace_scope=0"),
        ("Error: Failed to find python version\n\nCaused by: something", "Failed to find python version"),
        ("", "it said nothing"),
    ],
)
def test_where_py_spy_may_not_look_it_is_said_what_to_do(complaint: str, said: str) -> None:
    assert said in profile.why(complaint)
    assert "Caused by" not in profile.why(complaint)


def test_without_py_spy_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(MissingProgram, match="pip install"):
        profile.sampler()


# Results and report


def a_cell(name: str = "single-life") -> Cell:
    cell = Cell(name, f"the cell {name}")
    for round_, (ours, theirs) in enumerate([(100.0, 50.0), (400.0, 100.0), (30.0, 10.0)], 1):
        cell.samples.append(Sample("200 B", US, round_, {"messages_per_second": ours}, {US: 0.97, "load": 0.1}))
        cell.samples.append(Sample("200 B", "PGMQ", round_, {"messages_per_second": theirs}))
    return cell


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    cell = a_cell()
    assert cell.ratio("messages_per_second", ("200 B", US), ("200 B", "PGMQ")) == 3
    assert cell.median("200 B", US, "messages_per_second") == 100
    assert cell.ratio("messages_per_second", ("200 B", US), ("200 B", "nobody")) is None
    assert cell.ratio("p50_ms", ("200 B", US), ("200 B", "PGMQ")) is None


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (Check("a", 1.5, "×", at_least=1.5), "reached"),
        (Check("a", 1.4999, "×", at_least=1.5), "NOT reached"),
        (Check("a", 2.0, "×", at_most=2.0), "reached"),
        (Check("a", 2.001, "×", at_most=2.0), "NOT reached"),
        (Check("a", None, "×", at_least=1.5), "not measured"),
        (Check("a", 7.0, "ms"), "reported"),
    ],
)
def test_a_target_is_reached_or_it_is_not(check: Check, verdict: str) -> None:
    assert check.verdict == verdict


def test_a_cell_with_an_error_is_invalid_whatever_its_figures() -> None:
    cell = a_cell()
    cell.checks.append(Check("by PGMQ", 9.9, "×", at_least=1.5))
    assert cell.is_valid
    assert "9.9" in table([cell])
    assert ": reached" in table([cell])
    cell.samples[0].errors["refused"] = 1
    assert not cell.is_valid
    assert ": reached" not in table([cell])
    assert "1 × WonderQ, 200 B: refused" in table([cell])


def a_run(cells: list[Cell], kind: str = "bench", taken_at: str = "2026-11-22T12:00:00+00:00") -> Results:
    return Results(kind, taken_at, 3.0, 3, {"cores": "2", "memory": "8 GiB"}, {"wrk": "4.1"}, {"fsync": "on"}, cells)


def a_run_of_every_cell() -> Results:
    cells = [a_cell(plan.name) for plan in PLANS]
    for n, (plan, cell) in enumerate(zip(PLANS, cells, strict=True)):
        cell.title = plan.title
        cell.checks.append(Check(f"by no. {n:02}", 1000.5 + n, "×", at_least=1.5))
    return a_run(cells)


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    run = a_run_of_every_cell()
    run.write(tmp_path / "run.json")
    assert Results.read(tmp_path / "run.json") == run


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match=r"old\.json"):
        Results.read(tmp_path / "old.json")


def test_the_page_has_every_cell_and_every_target() -> None:
    run = a_run_of_every_cell()
    page = report.page([run])
    for n, plan in enumerate(PLANS):
        assert f"### {plan.title[0].upper()}{plan.title[1:]}\n" in page
        assert page.count(f"by no. {n:02}") == 2, "among the targets, and in its section"
        assert f"(#{report.anchor(plan.title)})" in page


def a_profile() -> Cell:
    cell = Cell("profile-enqueue", "where the time of one enqueue goes", notes=["64 connections"])
    postgresql = f"{profile.POSTGRESQL} beside {US}"
    for who, costs in ((US, (99.0, 80.0, 70.0)), (profile.CONSTANT, (30.0,)), (postgresql, (12.34,))):
        cell.samples += [Sample(profile.WHOLE, who, n, {profile.COST: cost}) for n, cost in enumerate(costs, 1)]
    parts = {"HTTP: writing the answer": 0.25, "gathering calls into a statement": 0.75}
    cell.samples += profile.divided(US, 80.0, parts)
    cell.samples += profile.divided(profile.CONSTANT, 30.0, {"HTTP: writing the answer": 1.0})
    return cell


def test_the_page_says_where_the_time_of_a_call_goes_if_that_was_measured(tmp_path: Path) -> None:
    a_run([a_profile()], kind="profile").write(tmp_path / "profile.json")
    runs = [a_run([a_cell()]), Results.read(tmp_path / "profile.json")]
    before, _, text = report.page(runs).partition("## Where the time of one enqueue goes\n")
    assert "### Run: `make bench-profile`" in before
    assert [line for line in text.splitlines() if line.startswith("| ")][:6] == [
        "| part | WonderQ, µs a call | share | constant answer, µs a call |",
        "| --- | --- | --- | --- |",
        "| HTTP: writing the answer | 20.0 | 25 % | 30.0 |",
        "| gathering calls into a statement | 60.0 | 75 % |  |",
        "| the whole call | 80.0 | 100 % | 30.0 |",
        "| beside it: PostgreSQL, all its processes | 12.3 |  |  |",
    ]
    assert "- 64 connections." in text
    assert "](profile-enqueue.svg)" in text
    assert "**Invalid**" not in text
    assert "Where the time of one enqueue goes" not in report.page(runs[:1])


def test_a_profile_with_an_error_is_invalid() -> None:
    cell = a_profile()
    cell.samples[0].errors["refused"] = 7
    text = report.page([a_run([a_cell()]), a_run([cell], kind="profile")])
    assert "**Invalid**: 7 × WonderQ, the whole call: refused." in text


def test_the_page_says_what_was_missed_and_what_is_invalid() -> None:
    missed, invalid = a_cell("single-life"), a_cell("batch-life")
    for cell in (missed, invalid):
        cell.checks.append(Check("by PGMQ", 0.4, "×", at_least=1.0))
    invalid.samples[0].errors["refused"] = 3
    page = report.page([a_run([missed, invalid])])
    assert "**NOT reached**" in page
    assert "**invalid**" in page
    assert "3 × WonderQ, 200 B: refused" in page


def test_a_cell_counts_as_it_was_measured_last() -> None:
    old, new = a_cell(), a_cell()
    old.checks.append(Check("by PGMQ", 1.11, "×", at_least=1.0))
    new.checks.append(Check("by PGMQ", 2.22, "×", at_least=1.0))
    page = report.page([a_run([new], taken_at="2026-11-23T12:00:00+00:00"), a_run([old])])
    assert "2.22" in page
    assert "1.11" not in page


def test_what_limits_a_cell_is_what_was_busy() -> None:
    cell = a_cell()
    assert "one core, that of WonderQ" in report.limit_of(cell, "200 B", US, 2)
    for sample in cell.of("200 B", US):
        sample.cpu |= {"load": 0.95}
    assert "lower bound" in report.limit_of(cell, "200 B", US, 2)
    for sample in cell.of("200 B", US):
        sample.cpu = {US: 0.5, "load": 0.1, "PostgreSQL": 0.4, "whole machine": 1.4}
    assert report.limit_of(cell, "200 B", US, 2).startswith("no CPU")
    assert "40 % of a core went to something else" in report.limit_of(cell, "200 B", US, 2)
    assert report.limit_of(cell, "200 B", "PGMQ", 2) == ""


def test_capacity_is_the_load_times_what_was_measured() -> None:
    wal = Cell("commits-and-wal", "commits")
    wal.samples.append(Sample("64 connections", US, 1, {"wal_bytes_per_message": 1_000.0}))
    page = report.page([a_run([a_cell(), wal])])
    row = next(line for line in page.splitlines() if line.startswith("| 1,000 |"))
    assert "86.4 million" in row
    assert "86.4 GB" in row
    assert "more than it can" in row, "it reached 100 messages/s"
    assert "100 %" not in row


def test_a_page_is_not_written_from_a_smoke_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run([a_cell()], kind="smoke").write(tmp_path / "smoke.json")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "smoke.json"), "--page", str(tmp_path / "page.md")])
    assert report.main() == 1
    assert not (tmp_path / "page.md").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_the_plot_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: it comes with wonderq[bench]")
    a_run_of_every_cell().write(tmp_path / "bench.json")
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path / "bench.json"), "--page", str(tmp_path / "page.md")])
    assert report.main() == 0
    drawing = (tmp_path / "page.svg").read_text()
    assert "PGMQ" in drawing
    assert all(f"by no. {n:02}" in drawing for n in range(len(PLANS)))


def test_the_page_and_results_kept_here_are_those_of_each_other() -> None:
    files = sorted(report.FILES.glob("*.json"))
    if not files:
        pytest.skip("no results are kept")
    assert report.PAGE.read_text("utf-8") == report.page([Results.read(path) for path in files])
    for path in (*files, *report.PAGE.parent.glob("*.svg")):
        assert not re.search(r"/(?:tmp|work|root|home|Users)/", path.read_text("utf-8"))
