"""The commands of every day, against a real broker: send, receive, peek, queues, topics, stats, redrive, purge."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from broker.cli import connecting, lines
from broker.cli.output import duration, printable
from broker.cli.statistics import MOST_BARS, line_of, rows_of
from broker.client import ConnectionFailed
from conftest import Broker, StartBroker
from outside import PATIENCE, eventually, without_database
from test_cli import run

WONDERQ = [sys.executable, "-m", "broker"]
# What bodies and names can do to a terminal: clear it, turn text round, hide in it.
HOSTILE = "\x1b[2J\u202e\u200b\x9b31m\u2028\x07"


async def wonderq(broker: Broker, *words: str, text: str | bytes | None = None) -> Result:
    """Run a command against a broker."""
    return await asyncio.to_thread(run, *words, env={"BROKER_URL": broker.url}, text=text)


async def done(broker: Broker, *words: str, text: str | bytes | None = None) -> str:
    """Run a command against a broker, which must do it without a word of complaint; return what it printed."""
    result = await wonderq(broker, *words, text=text)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


async def bodies(broker: Broker, queue: str = "default") -> list[Any]:
    """Return the bodies in a queue, in their order."""
    return [each["body"] for each in (await broker.call("list_messages", queue=queue, limit=1000))["messages"]]


def environment(broker: Broker) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "DATABASE"))}
    return {**kept, "BROKER_URL": broker.url}


async def start(broker: Broker, *words: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a command as a process of its own."""
    return await started(broker, *WONDERQ, *words, **options)


async def started(broker: Broker, *command: str, **options: Any) -> asyncio.subprocess.Process:
    """Start a program as a process of its own."""
    pipe = asyncio.subprocess.PIPE
    piped = {"stdin": pipe, "stdout": pipe, "stderr": pipe, "env": environment(broker), **options}
    return await asyncio.create_subprocess_exec(*command, **piped)


async def ended(process: asyncio.subprocess.Process, text: bytes = b"") -> tuple[str, str, int | None]:
    """Wait for a process; return what it printed, what it complained of, and its exit code."""
    async with asyncio.timeout(PATIENCE):
        stdout, stderr = await process.communicate(text)
    return (stdout or b"").decode(), (stderr or b"").decode(), process.returncode


# ------------------------------------------------------------------------------------------------------------ send


async def test_a_message_is_sent_and_received(broker: Broker) -> None:
    sent = await done(broker, "send", "default", '{"hello": "world"}')
    (listed,) = (await broker.call("list_messages", queue="default"))["messages"]
    assert sent == f"sent {listed['message_id']} to default\n"
    received = await done(broker, "receive", "default")
    assert received == f'{listed["message_id"]}  attempt 1  {{"hello": "world"}}\n'
    assert await bodies(broker) == []


@pytest.mark.parametrize("body", ["1.0", "1e400", '"\\u0000"', '{"a":1,  "a" : 2}', '"Ωmega"', " [1] ", '"-"'])
async def test_a_body_keeps_its_bytes_there_and_back(broker: Broker, body: str) -> None:
    await done(broker, "send", "default", body)
    await done(broker, "send", "default", text=f"{body}\n")
    _, answer = await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"list_messages","params":{"queue":"default"}}')
    assert answer.count(f'"body":{body.strip()}'.encode()) + answer.count(f'"body":{body}'.encode()) >= 2
    received = (await done(broker, "receive", "default", "--json", "--max", "2")).splitlines()
    assert [f'"body":{body.strip()}' in line.replace('"body": ', '"body":') for line in received] == [True, True]


async def test_what_is_said_of_a_message_arrives(broker: Broker) -> None:
    said = ["--delay", "60", "--ttl", "120", "--header", "kind=a=b", "--header", "empty=", "--idempotency-key", "once"]
    first = json.loads(await done(broker, "send", "default", "1", *said, "--json"))
    again = json.loads(await done(broker, "send", "default", "1", *said, "--json"))
    assert again == {"message_id": first["message_id"], "duplicate": True}
    assert "before" in await done(broker, "send", "default", "1", *said)
    (shown,) = (await broker.call("list_messages", queue="default"))["messages"]
    assert (shown["status"], shown["headers"]) == ("delayed", {"kind": "a=b", "empty": ""})
    assert shown["expires_at"] is not None


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["hello"], "hello is no JSON: invalid character (byte 0). For a string write '\"hello\"', or say --text."),
        (["it's"], "or say --text."),
        ([""], "is no JSON"),
        (["{"], "is no JSON"),
        (["NaN"], "is no JSON"),
        (['"\udcff"'], "not UTF-8"),
        (["1", "--header", "kind"], "NAME=VALUE"),
        (["1", "--header", "a=1", "--header", "a=2"], "twice"),
        (["1", "--delay", "soon"], "--delay"),
        (["\x1b[2J"], "\\u001b[2J is no JSON"),
    ],
)
async def test_what_cannot_be_sent_is_a_mistake_of_the_command_line(
    standing_broker: Broker, words: list[str], sentence: str
) -> None:
    result = await wonderq(standing_broker, "send", "default", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert "\x1b" not in result.stderr


async def test_text_is_sent_as_a_json_string(broker: Broker) -> None:
    await done(broker, "send", "default", "--text", 'she said "no"\n')
    await done(broker, "send", "default", "--text", text='{"a": 1}\n\nlast')
    assert await bodies(broker) == ['she said "no"\n', '{"a": 1}', "", "last"]


async def test_each_line_of_standard_input_is_a_message_in_their_order(broker: Broker) -> None:
    numbers = range(2_500)
    said = await done(broker, "send", "default", text="".join(f"{n}\r\n\n" for n in numbers))
    assert said == "sent 2,500 messages to default\n"
    received = (await done(broker, "receive", "default", "--max", "2500", "--json")).splitlines()
    assert [json.loads(line)["body"] for line in received] == list(numbers)


async def test_json_tells_of_each_line_and_the_same_lines_under_a_key_are_stored_once(broker: Broker) -> None:
    words = ["send", "default", "--idempotency-key", "import-7"]
    first = (await done(broker, *words, "--json", text="1\n2\n3\n")).splitlines()
    again = (await done(broker, *words, "--json", text="1\n2\n3\n")).splitlines()
    assert [json.loads(line)["duplicate"] for line in first + again] == [False] * 3 + [True] * 3
    assert "3 were there already" in await done(broker, *words, text="1\n2\n3\n")
    assert await bodies(broker) == [1, 2, 3]


@pytest.mark.parametrize("bad", ["nope", "{", '"\\ud800"', "NaN", "[1"])
async def test_a_line_that_is_no_json_is_named_and_all_before_it_was_sent_and_nothing_from_it_on(
    broker: Broker, bad: str
) -> None:
    result = await wonderq(broker, "send", "default", text=f"1\n\n2\n{bad}\n4\n")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Line 4 is no JSON" in result.stderr
    assert "Before it 2 messages went to default" in result.stderr
    assert "tail -n +4" in result.stderr
    assert await bodies(broker) == [1, 2]


async def test_a_line_that_is_not_utf8_or_endless_is_named(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    result = await wonderq(broker, "send", "default", text=b'1\n"\xff"\n3\n')
    assert (result.exit_code, "Line 2 is no JSON: it is not UTF-8" in result.stderr) == (1, True)
    monkeypatch.setattr(lines, "LINE_BYTES", 10_000)
    result = await wonderq(broker, "send", "default", text="2\n" + "3" * 20_000)
    assert (result.exit_code, "Line 2 is no JSON: it is longer" in result.stderr) == (1, True)
    assert await bodies(broker) == [1, 2]


async def test_a_line_that_the_broker_refuses_is_named_and_all_before_it_was_sent_and_nothing_from_it_on(
    broker: Broker,
) -> None:
    result = await wonderq(broker, "send", "default", text=f'1\n2\n"{"x" * 5000}"\n4\n')
    assert (result.exit_code, result.stdout) == (1, "")
    assert "Line 3 was refused: The body has 5002 bytes" in result.stderr
    assert await bodies(broker) == [1, 2]
    await broker.call("create_queue", queue="small", max_messages=3)
    result = await wonderq(broker, "send", "small", text="1\n2\n3\n4\n5\n")
    assert "Line 4 was refused: The queue small holds its max_messages" in result.stderr
    assert await bodies(broker, "small") == [1, 2, 3]
    result = await wonderq(broker, "send", "nobody", text="1\n2\n")
    assert (result.exit_code, "Line 1 was refused: There is no queue nobody" in result.stderr) == (1, True)


async def test_lines_are_sent_as_they_come(broker: Broker) -> None:
    """A program that writes a line now and then, as `tail -f`, is not made to wait for a batch to be full."""
    process = await start(broker, "send", "default")
    assert process.stdin is not None
    for line in (b"1\n", b"2\n", b"3"):
        process.stdin.write(line)
        await process.stdin.drain()
        expected = [1, 2][: int(line)]
        await eventually(partial(has, broker, expected))
    assert await ended(process) == ("sent 3 messages to default\n", "", 0)
    assert await bodies(broker) == [1, 2, 3]


async def has(broker: Broker, expected: list[int]) -> bool:
    return await bodies(broker) == expected


async def test_a_batch_whose_answer_was_lost_is_sent_again_and_stored_once(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first answer of every batch is thrown away after the broker has given it."""
    real = connecting.Conversation.ask_json
    asked: list[str] = []

    def losing(self: connecting.Conversation, method: str, params: dict[str, str]) -> str:
        answer = real(self, method, params)
        asked.append(params["messages"])
        if asked.count(params["messages"]) == 1:
            raise ConnectionFailed(-32001, "lost", {"type": "unavailable", "outcome": "unknown"})
        return answer

    monkeypatch.setattr(connecting.Conversation, "ask_json", losing)
    monkeypatch.setattr(lines, "BATCH_MESSAGES", 2)
    said = await done(broker, "send", "default", text="1\n2\n3\n")
    assert said == "sent 3 messages to default, of which 3 were there already\n"
    assert len(asked) == 4
    assert await bodies(broker) == [1, 2, 3]


async def test_where_nobody_knows_what_was_stored_the_key_is_told_that_makes_it_safe_to_send_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = connecting.Conversation.ask_json

    def losing(self: connecting.Conversation, method: str, params: dict[str, str]) -> str:
        real(self, method, params)
        raise ConnectionFailed(-32001, "lost", {"type": "unavailable", "outcome": "unknown"})

    with monkeypatch.context() as patch:
        patch.setattr(connecting.Conversation, "ask_json", losing)
        patch.setattr(connecting, "REPEAT_SECONDS", 0.0)
        result = await wonderq(broker, "send", "default", text="1\n2\n")
    assert (result.exit_code, result.stdout) == (1, "")
    key = result.stderr.partition("--idempotency-key ")[2].partition(":")[0]
    said = await done(broker, "send", "default", "--idempotency-key", key, text="1\n2\n")
    assert said == "sent 2 messages to default, of which 2 were there already\n"


# --------------------------------------------------------------------------------------------------------- receive


async def test_what_was_received_is_deleted_and_what_was_kept_comes_again(broker: Broker) -> None:
    await broker.call("create_queue", queue="mail", visibility_timeout=0.2)
    await broker.call("enqueue", queue="mail", body=1)
    kept = await wonderq(broker, "receive", "mail", "--keep")
    assert (kept.exit_code, "attempt 1  1" in kept.stdout, "Kept: 1 message" in kept.stderr) == (0, True, True)
    again = await done(broker, "receive", "mail", "--wait", "20")
    assert "attempt 2  1" in again
    assert await bodies(broker, "mail") == []


async def test_json_shows_all_that_a_delivery_has(broker: Broker) -> None:
    await broker.call("enqueue", body={"a": [1]}, headers={"k": "v"}, sender="ada")
    (line,) = (await done(broker, "receive", "default", "--json")).splitlines()
    message = json.loads(line)
    assert (message["body"], message["headers"], message["sender"]) == ({"a": [1]}, {"k": "v"}, "ada")
    assert {"message_id", "queue", "receipt", "receive_count", "enqueued_at", "visible_at"} <= set(message)


async def test_a_body_of_several_lines_stays_on_one(broker: Broker) -> None:
    body = b'{"a":\n [1,\r\n 2]}'
    await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":' + body + b"}}")
    for words in (["peek", "default", "--json"], ["receive", "default", "--json"]):
        (line,) = (await done(broker, *words)).splitlines()
        assert json.loads(line)["body"] == {"a": [1, 2]}


async def test_nothing_to_receive_is_said_on_standard_error_and_is_no_failure(broker: Broker) -> None:
    for words in (["receive", "default"], ["receive", "default", "--wait", "0.1"], ["peek", "default"]):
        result = await wonderq(broker, *words)
        assert (result.exit_code, result.stdout) == (0, "")
        assert "default" in result.stderr


async def test_receive_waits_for_the_first_message(broker: Broker) -> None:
    process = await start(broker, "receive", "default", "--wait", "60", "--max", "5")

    async def somebody_waits() -> bool:
        async with broker.http.get(f"{broker.url}/metrics") as response:
            return "wonderq_waiting_consumers 1.0" in await response.text()

    await eventually(somebody_waits)
    await broker.call("enqueue", body="at last")
    stdout, _, code = await ended(process)
    assert (stdout.count("at last"), code) == (1, 0)


async def test_what_a_reader_that_ends_early_did_not_take_is_not_deleted(broker: Broker) -> None:
    """The reader has gone before anything is printed, so no message may be deleted, and all are back at once."""
    many = [{"body": "x" * 1000} for _ in range(200)]
    await broker.call("enqueue_batch", messages=many)
    read, write = os.pipe()
    process = await start(broker, "receive", "default", "--max", "200", "--json", stdout=write)
    os.close(write)
    os.close(read)
    _, stderr, code = await ended(process)
    assert (stderr, code) == ("", 1)
    counts = (await broker.call("get_queue", queue="default"))["counts"]
    assert (counts["ready"], counts["leased"]) == (200, 0)


async def test_a_reader_that_ends_early_costs_no_more_than_what_was_in_the_pipe(broker: Broker) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(1000)])
    command = f"{sys.executable} -m broker receive default --max 1000 --json | head -n 1"
    process = await started(broker, "/bin/sh", "-c", command)
    stdout, stderr, _ = await ended(process)
    assert "Traceback" not in stderr
    assert json.loads(stdout)["body"] == 0
    counts = (await broker.call("get_queue", queue="default"))["counts"]
    assert counts["leased"] == 0
    # A pipe takes 64 KiB before anybody reads: what is in it counts as read, and no message more.
    assert counts["total"] >= 1000 - 64 * 1024 // len(stdout) - 100


async def test_a_lease_that_ended_before_its_message_was_printed_is_told(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.call("create_queue", queue="mail", visibility_timeout=43_200)
    await broker.call("enqueue_batch", queue="mail", messages=[{"body": 1}, {"body": 2}])
    real = connecting.Conversation.ask_json

    def slow(self: connecting.Conversation, method: str, params: dict[str, str]) -> str:
        answer = real(self, method, params)
        if method == "dequeue":  # and somebody else has the first of them before it is deleted
            receipt = json.dumps(json.loads(answer)["messages"][0]["receipt"])
            real(self, "extend_visibility", {"receipt": receipt, "visibility_timeout": "0"})
            real(self, "dequeue", {"queue": '"mail"'})
        return answer

    monkeypatch.setattr(connecting.Conversation, "ask_json", slow)
    result = await wonderq(broker, "receive", "mail", "--max", "2")
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 2)
    assert "Printed but not deleted" in result.stderr
    assert await bodies(broker, "mail") == [1]


async def test_ctrl_c_while_receive_waits_is_exit_code_130_and_takes_nothing_with_it(broker: Broker) -> None:
    process = await start(broker, "receive", "default", "--wait", "60")

    async def somebody_waits() -> bool:
        async with broker.http.get(f"{broker.url}/metrics") as response:
            return "wonderq_waiting_consumers 1.0" in await response.text()

    await eventually(somebody_waits)
    process.send_signal(signal.SIGINT)
    assert await ended(process) == ("", "", 130)
    await broker.call("enqueue", body=1)
    assert (await broker.call("get_queue", queue="default"))["counts"]["ready"] == 1


# ----------------------------------------------------------------------------------------------------------- looking


async def test_peek_shows_messages_and_takes_none(broker: Broker) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n, "delay": 60 * (n % 2)} for n in range(30)])
    shown = await wonderq(broker, "peek", "default")
    assert len(shown.stdout.splitlines()) == 21  # with the columns' names
    assert "--limit 200" in shown.stderr
    delayed = await done(broker, "peek", "default", "--status", "delayed", "--json", "--limit", "1000")
    assert [json.loads(line)["body"] for line in delayed.splitlines()] == list(range(1, 30, 2))
    assert (await broker.call("get_queue", queue="default"))["counts"]["leased"] == 0


async def test_queues_are_shown_with_what_lies_in_them(broker: Broker) -> None:
    await broker.call("create_queue", queue="dead")
    await broker.call(
        "create_queue", queue="mail", max_receives=3, dead_letter_queue="dead", max_messages=10, paused=True
    )
    await broker.call("enqueue_batch", queue="mail", messages=[{"body": 1}, {"body": 2}, {"body": 3, "delay": 60}])
    head, *rows = (await done(broker, "queues")).splitlines()
    assert head.split() == ["queue", "ready", "delayed", "leased", "total", "oldest", "settings"]
    assert [row.split()[0] for row in rows] == ["dead", "default", "mail"]
    assert rows[2].split()[1:5] == ["2", "1", "0", "3"]
    assert rows[2].endswith("paused, after 3 attempts to dead, at most 10 messages")
    (line,) = (await done(broker, "queues", "--prefix", "ma", "--json")).splitlines()
    assert json.loads(line)["counts"]["total"] == 3
    none = await wonderq(broker, "queues", "--prefix", "nobody")
    assert (none.exit_code, none.stdout, "nobody" in none.stderr) == (0, "", True)


async def test_all_queues_are_shown_however_many_pages_they_are(broker: Broker, connection: Any) -> None:
    await connection.execute("INSERT INTO broker.queues (name) SELECT 'q' || n FROM generate_series(1, 2500) n")
    assert len((await done(broker, "queues", "--prefix", "q", "--json")).splitlines()) == 2500


async def test_topics_are_shown_with_their_subscriptions_and_how_those_fare(start_broker: StartBroker) -> None:
    broker = await start_broker(webhook_allow=("127.0.0.0/8",))
    await broker.call("create_topic", topic="news")
    await broker.call("create_topic", topic="quiet", delivery="on_broadcast")
    await broker.call("subscribe", topic="news", name="copies", queue="default", filter={"kind": ["a", "b"]})
    await broker.call("subscribe", topic="news", name="pushed", url="http://127.0.0.1:9/")
    _, copies, pushed, quiet = [line.split() for line in (await done(broker, "topics")).splitlines()]
    assert copies == ["news", "immediate", "copies", "default", "kind", "is", "a", "or", "b", "active"]
    assert pushed == ["pushed", "http://127.0.0.1:9/", "active"]
    assert quiet == ["quiet", "on_broadcast", "nobody", "subscribes"]
    news, _ = map(json.loads, (await done(broker, "topics", "--json")).splitlines())
    assert [each["name"] for each in news["subscriptions"]] == ["copies", "pushed"]


async def totals(broker: Broker, *words: str) -> dict[str, int]:
    """Return what `stats` shows in all, by kind."""
    lines = (await done(broker, "stats", *words)).splitlines()[2:]
    return {name: int(in_all) for name, _, _, in_all, *_ in (line.split() for line in lines)}


async def test_stats_show_what_went_through_a_queue_and_through_all(broker: Broker) -> None:
    await broker.call("create_queue", queue="mail")
    await done(broker, "send", "mail", text="1\n2\n3\n")
    await done(broker, "send", "default", "1")
    await done(broker, "receive", "mail", "--max", "2")

    async def all_is_counted() -> bool:
        return (await totals(broker))["enqueued"] == 4 and (await totals(broker, "mail"))["deleted"] == 2

    await eventually(all_is_counted)
    assert (await totals(broker))["deleted"] == 2
    expected = {"enqueued": 3, "delivered": 2, "deleted": 2, "returned": 0, "dead": 0, "expired": 0}
    assert await totals(broker, "mail", "--minutes", "1440") == expected
    shown = json.loads(await done(broker, "stats", "mail", "--json", "--minutes", "5"))
    assert (shown["queue"], len(shown["minutes"])) == ("mail", 5)
    for words in (["--minutes", "0"], ["--minutes", "1441"]):
        assert (await wonderq(broker, "stats", *words)).exit_code == 2


async def test_stats_are_watched_until_ctrl_c_which_is_how_one_ends_it(broker: Broker) -> None:
    process = await start(broker, "stats", "--watch", "--json")
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        for _ in range(2):
            assert len(json.loads(await process.stdout.readline())["minutes"]) == 15
    process.send_signal(signal.SIGINT)
    assert (await ended(process))[1:] == ("", 0)


async def test_stats_on_a_terminal_stay_in_their_place_and_outlast_a_database_that_is_away(
    start_broker: StartBroker, test_server: str, database_url: str
) -> None:
    broker = await start_broker(request_timeout=0.5)
    shown, code = await asyncio.to_thread(watched, broker, without_database(test_server, database_url))
    assert code == 0
    assert shown.index("enqueued") < shown.index("Ctrl-C ends it.") < shown.index("(unavailable")


def watched(broker: Broker, outage: AbstractContextManager[None]) -> tuple[str, int]:
    """Watch the figures on a terminal before an outage, in it and after it; return all that was shown."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*WONDERQ, "stats", "--watch"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment(broker), "TERM": "xterm"},
    ) as process:
        os.close(theirs)
        try:
            shown = until(ours, b"Ctrl-C ends it.")
            with outage:
                shown += until(ours, b"(unavailable")
            shown += until(ours, b"Ctrl-C ends it.")
            process.send_signal(signal.SIGINT)
            shown += rest_of(ours)
            process.wait(PATIENCE)
        finally:
            process.kill()  # Or its end would be waited for, whatever has gone wrong here.
            os.close(ours)
    return shown.decode(), process.returncode


def until(descriptor: int, text: bytes) -> bytes:
    """Read from a terminal until a text has come."""
    shown = b""
    while text not in shown:
        assert select.select([descriptor], [], [], PATIENCE)[0], shown
        shown += os.read(descriptor, 4096)
    return shown


def rest_of(descriptor: int) -> bytes:
    """Read from a terminal until nobody writes to it any more: who writes waits where nobody reads."""
    shown = b""
    gives_up_at = time.monotonic() + PATIENCE
    with suppress(OSError):  # Linux says so when the other end is closed.
        while select.select([descriptor], [], [], PATIENCE)[0] and (read := os.read(descriptor, 4096)):
            shown += read
            assert time.monotonic() < gives_up_at, shown
    return shown


def test_figures_are_drawn_as_bars_of_which_the_highest_is_full_and_nothing_is_nothing() -> None:
    assert line_of([0, 1, 50, 100]) == " ▁▄█"
    assert line_of([0, 0]) == ""
    assert len(line_of([1] * 1440)) == len(line_of([1] * 30)) == MOST_BARS
    names = ("enqueued", "delivered", "deleted", "returned", "dead", "expired")
    minutes = [{"started_at": "", **dict.fromkeys(names, n)} for n in (0, 60, 7)]
    assert rows_of(minutes)[0] == ("enqueued", "1.0", "7", "67", " █▁")


def test_times_are_said_as_a_person_says_them() -> None:
    said = [duration(seconds) for seconds in (None, 0.04, 59, 119, 120, 7200, 200_000)]
    assert said == ["-", "0.0 s", "59.0 s", "119.0 s", "2 min", "2 h", "2 d"]


# ------------------------------------------------------------------------------------------------------------ acting


async def dead_letters(broker: Broker, count: int) -> None:
    """Let that many messages of `mail` die into `dead`."""
    await broker.call("create_queue", queue="dead")
    await broker.call("create_queue", queue="mail", max_receives=1, dead_letter_queue="dead", visibility_timeout=0.01)
    await broker.call("enqueue_batch", queue="mail", messages=[{"body": n} for n in range(count)])
    await broker.call("dequeue", queue="mail", max_messages=count)

    async def all_are_dead() -> bool:
        return bool((await broker.call("get_queue", queue="dead"))["counts"]["total"] == count)

    await eventually(all_are_dead)


async def test_redrive_moves_dead_letters_back_round_by_round(
    start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = await start_broker(sweep_interval=0.02)
    await dead_letters(broker, 25)
    monkeypatch.setattr("broker.cli.queues.REDRIVEN_AT_ONCE", 10)
    some = await wonderq(broker, "redrive", "dead", "--max", "2")
    assert (some.exit_code, some.stdout) == (0, "moved 2 messages of dead to where they came from\n")
    assert "more" in some.stderr
    moved = json.loads(await done(broker, "redrive", "dead", "--to", "default", "--json"))
    assert moved == {"moved": 23, "complete": True}
    assert len(await bodies(broker)) == 23


async def test_purge_without_a_terminal_wants_yes_and_does_nothing(broker: Broker) -> None:
    await broker.call("enqueue", body=1)
    result = await wonderq(broker, "purge", "default", text="y\n")
    assert (result.exit_code, "say --yes" in result.stderr) == (2, True)
    assert await bodies(broker) == [1]
    assert json.loads(await done(broker, "purge", "default", "--yes", "--json")) == {"purged": 1, "complete": True}
    assert await bodies(broker) == []


def on_a_terminal(broker: Broker, *words: str, answer: bytes = b"") -> tuple[str, int]:
    """Run a command on a terminal of its own; return all that it showed, and its exit code."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*WONDERQ, *words], stdin=theirs, stdout=theirs, stderr=theirs, env={**environment(broker), "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
                if answer and b"[y/N]" in shown:
                    os.write(ours, answer)
                    answer = b""
        except OSError:  # Linux says so when the other side has closed.
            pass
        process.wait(PATIENCE)
    os.close(ours)
    return shown.decode(), process.returncode


@pytest.mark.parametrize(("answer", "code", "left"), [(b"y\n", 0, 0), (b"n\n", 1, 3), (b"\n", 1, 3)])
async def test_purge_on_a_terminal_asks_and_names_the_queue_and_how_many(
    broker: Broker, answer: bytes, code: int, left: int
) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(3)])
    shown, returned = await asyncio.to_thread(on_a_terminal, broker, "purge", "default", answer=answer)
    assert "Remove all 3 messages of default for good?" in shown
    assert (returned, len(await bodies(broker))) == (code, left)


async def test_many_lines_on_a_terminal_show_how_far_it_is(broker: Broker, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("1\n" * 3_000)
    command = f"exec {sys.executable} -m broker send default < {tmp_path / 'lines'}"
    shown, code = await asyncio.to_thread(shell_on_a_terminal, broker, command)
    assert code == 0
    assert "1,000 sent" in shown or "2,000 sent" in shown or "3,000 sent" in shown
    assert "sent 3,000 messages to default" in shown


def shell_on_a_terminal(broker: Broker, command: str) -> tuple[str, int]:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        ["/bin/sh", "-c", command], stdout=theirs, stderr=theirs, env={**environment(broker), "TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = b""
        try:
            while chunk := os.read(ours, 4096):
                shown += chunk
        except OSError:
            pass
        process.wait(PATIENCE)
    os.close(ours)
    return shown.decode(), process.returncode


# ---------------------------------------------------------------------------------------------------- for all of them


async def test_nothing_that_a_terminal_obeys_or_hides_gets_there(broker: Broker) -> None:
    await done(broker, "send", "default", "--text", HOSTILE)
    words = (["peek", "default"], ["peek", "default", "--json"], ["receive", "default", "--keep"])
    for command in (*words, ["call", "list_messages", "--queue", "default"]):
        shown, code = await asyncio.to_thread(on_a_terminal, broker, *command)
        assert code == 0
        assert "\\u202e" in shown
        assert not set("\u202e\u200b\x9b\u2028\x07") & set(shown)
        assert "\x1b[2J" not in shown


async def test_json_for_programs_keeps_the_bytes_that_a_terminal_would_not_get(broker: Broker) -> None:
    await done(broker, "send", "default", '"\u202e\u200b"')
    assert "\u202e\u200b" in await done(broker, "peek", "default", "--json")


def test_what_is_escaped_means_the_same_to_json() -> None:
    text = json.dumps(HOSTILE + "🂡\U000e0041 plain", ensure_ascii=False)
    assert json.loads(printable(text)) == json.loads(text)
    assert printable("Ωmega 🙂 plain") == "Ωmega 🙂 plain"


async def test_colours_are_for_terminals_alone_and_for_nobody_who_said_no(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await broker.call("create_topic", topic="news")
    await broker.call("subscribe", topic="news", name="copies", queue="default")
    green = "\x1b[32m"
    assert "\x1b" not in await done(broker, "topics")
    assert green in (await asyncio.to_thread(on_a_terminal, broker, "topics"))[0]
    monkeypatch.setenv("NO_COLOR", "1")
    for words in (["topics"], ["queues"], ["doctor"]):
        assert "\x1b" not in (await asyncio.to_thread(on_a_terminal, broker, *words))[0]


COMMANDS = (
    ["send", "default", "1"],
    ["receive", "default"],
    ["peek", "default"],
    ["queues"],
    ["topics"],
    ["stats"],
    ["redrive", "default"],
    ["purge", "default", "--yes"],
)


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_where_no_broker_runs_a_sentence_says_so_and_how_to_start_one(words: list[str]) -> None:
    result = run(*words, "--url", "http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "No answer from http://127.0.0.1:1/rpc" in result.stderr
    assert "wonderq serve" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_an_address_that_is_none_is_a_mistake_of_the_command_line(words: list[str]) -> None:
    result = run(*words, "--url", "localhost:8080")
    assert (result.exit_code, "localhost:8080" in result.stderr) == (2, True)


async def test_who_has_no_token_is_told_where_to_put_one(start_broker: StartBroker) -> None:
    broker = await start_broker(auth="required")
    result = await wonderq(broker, "queues")
    assert (result.exit_code, "BROKER_TOKEN" in result.stderr) == (1, True)


async def test_a_mistake_in_the_program_is_a_sentence_too(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr("broker.cli.queues.row_of", broken)
    result = await wonderq(broker, "queues")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "KeyError: 'nobody thought of this' (test_daily_commands.py, line" in result.stderr
    assert "Traceback" not in result.stderr


async def test_a_daily_command_waits_for_nothing_that_a_server_needs(broker: Broker) -> None:
    program = (
        "import sys; from broker.cli import main; main(standalone_mode=False); print(*sys.modules, file=sys.stderr)"
    )
    stdout, stderr, code = await ended(await started(broker, sys.executable, "-c", program, "send", "default", "1"))
    assert (code, stdout[:5]) == (0, "sent ")
    imported = set(stderr.split())
    assert "broker.cli.sending" in imported
    heavy = {"psycopg", "uvloop", "aiohttp.web", "prometheus_client", "structlog", "jsonrpcserver", "rich"}
    heavy |= {"broker.server", "broker.settings", "broker.schema", "broker.embedded"}
    assert not heavy & imported
