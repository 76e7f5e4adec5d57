"""The command line, as a person at a terminal meets it: what it prints, where, and with which exit code."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from broker import __version__, cli, processes
from broker.cli import serving
from broker.cli.commands import WithExamples
from broker.schema import load_document
from broker.settings import Setting, Settings, settings_table
from conftest import Broker, StartBroker

METHODS = {method["name"]: method for method in load_document()["methods"]}
TABLE = {name: (about, default) for name, about, default in settings_table()}


def run(*words: str, env: dict[str, str] | None = None, text: str | bytes | None = None) -> Result:
    """Run a command in this process, with a text on standard input, without the settings of the environment."""
    cleared = {about.variable: None for about, _ in TABLE.values()} | {"BROKER_URL": None, "BROKER_TOKEN": None}
    return CliRunner().invoke(cli.main, words, input=text, env={**cleared, **(env or {})}, prog_name="wonderq")


async def call(broker: Broker, method: str, *words: str) -> Any:
    """`wonderq call METHOD`; return what it printed, as JSON means it."""
    done = await asyncio.to_thread(run, "call", method, *words, env={"BROKER_URL": broker.url})
    assert (done.exit_code, done.stderr) == (0, "")
    return json.loads(done.stdout)


# ------------------------------------------------------------------------------------------------------------ call


async def test_every_method_can_be_called(start_broker: StartBroker) -> None:
    await one_life_by_every_method(await start_broker(webhook_allow=("127.0.0.0/8",)))


async def one_life_by_every_method(broker: Broker) -> None:
    """One life of queues, topics and messages, by every method that the schema has."""
    called: set[str] = set()

    async def do(method: str, *words: str) -> Any:
        called.add(method)
        return await call(broker, method, *words)

    queue = await do("create_queue", "--queue", "mail", "--visibility-timeout", "60", "--max-messages", "null")
    assert (queue["queue"], queue["visibility_timeout"], queue["max_messages"]) == ("mail", 60, None)
    assert (await do("update_queue", "--queue", "mail", "--paused", "true"))["paused"] is True
    assert (await do("update_queue", "--queue", "mail", "--paused", "false"))["paused"] is False
    first = await do(
        "enqueue", "--queue", "mail", "--body", '{"to": "ada"}', "--headers", '{"a": "b"}', "--sender", "me"
    )
    many = await do("enqueue_batch", "--queue", "mail", "--messages", '[{"body": 1}, {"body": 2, "delay": 0}]')
    assert len(many["messages"]) == 2
    assert (await do("get_queue", "--queue", "mail"))["counts"]["ready"] == 3
    assert [each["queue"] for each in (await do("list_queues", "--prefix", "ma", "--counts", "true"))["queues"]] == [
        "mail"
    ]
    assert await do("count_messages", "--queue", "mail", "--status", "ready") == {"total": 3, "exact": True}
    assert len((await do("get_stats", "--queue", "mail", "--minutes", "3"))["minutes"]) == 3
    assert len((await do("list_messages", "--queue", "mail", "--limit", "2"))["messages"]) == 2
    shown = await do("get_message", "--queue", "mail", "--message-id", first["message_id"])
    assert (shown["body"], shown["headers"], shown["sender"]) == ({"to": "ada"}, {"a": "b"}, "me")
    changed = await do("update_message", "--queue", "mail", "--message-id", first["message_id"], "--body", '"new"')
    assert changed["body"] == "new"
    taken = (await do("dequeue", "--queue", "mail", "--max-messages", "3", "--wait", "1"))["messages"]
    assert [message["body"] for message in taken] == ["new", 1, 2]
    receipts = [message["receipt"] for message in taken]
    await do("extend_visibility", "--receipt", receipts[0], "--visibility-timeout", "90.5")
    both = json.dumps(receipts[1:])
    extended = await do("extend_visibility_batch", "--receipts", both, "--visibility-timeout", "90")
    assert len(extended["results"]) == 2
    assert await do("delete", "--receipt", receipts[0]) == {"deleted": True}
    assert await do("delete_batch", "--receipts", both) == {"results": [{"deleted": True}] * 2}
    last = await do("enqueue", "--queue", "mail", "--body", "null")
    assert await do("delete_message", "--queue", "mail", "--message-id", last["message_id"]) == {"deleted": True}
    assert await do("redrive", "--queue", "mail", "--max-messages", "5") == {"moved": 0, "complete": True}
    assert await do("purge_queue", "--queue", "mail") == {"purged": 0, "complete": True}
    topic = await do("create_topic", "--topic", "news", "--delivery", "on_broadcast")
    assert (await do("list_topics", "--prefix", "ne"))["topics"] == [topic]
    await do("subscribe", "--topic", "news", "--name", "copies", "--queue", "mail", "--filter", '{"kind": ["a", "b"]}')
    pushed = await do("subscribe", "--topic", "news", "--name", "pushed", "--url", "http://127.0.0.1:9/")
    assert (await do("rotate_secret", "--subscription-id", pushed["subscription_id"]))["secret"] != pushed["secret"]
    listed = await do("list_subscriptions", "--topic", "news")
    assert [each["name"] for each in listed["subscriptions"]] == ["copies", "pushed"]
    assert await do("unsubscribe", "--subscription-id", pushed["subscription_id"]) == {"deleted_messages": 0}
    assert (await do("publish", "--topic", "news", "--body", "1", "--headers", '{"kind": "b"}'))["deliveries"] == 0
    assert await do("broadcast", "--topic", "news") == {"messages": 1, "deliveries": 1, "complete": True}
    assert await do("delete_topic", "--topic", "news") == {"deleted_messages": 0, "complete": True}
    assert await do("delete_queue", "--queue", "mail") == {"deleted_messages": 1, "complete": True}
    assert (await do("get_caller"))["admin"] is True
    assert (await do("get_server"))["version"] == __version__
    assert [method["name"] for method in (await do("rpc.discover"))["methods"]] == list(METHODS)
    assert called == set(METHODS)


@pytest.mark.parametrize(
    "body",
    ["1.0", "1e400", "123456789012345678901234567890", '"\\u0000"', '{"a":1,  "a" : 2}', '"Ωmega 🂡"', "-0", '"1"'],
)
async def test_json_keeps_its_bytes_on_the_way_to_the_broker_and_its_meaning_on_the_way_back(
    broker: Broker, body: str
) -> None:
    sent = await call(broker, "enqueue", "--body", body)
    _, answer = await broker.post(b'{"jsonrpc":"2.0","id":1,"method":"dequeue"}')
    assert f'"body":{body},'.encode() in answer
    words = ["call", "get_message", "--queue", "default", "--message-id", sent["message_id"]]
    shown = await asyncio.to_thread(run, *words, env={"BROKER_URL": broker.url})
    assert shown.exit_code == 0

    def exactly(text: str) -> Any:
        return json.loads(text, parse_float=str, parse_int=str, object_pairs_hook=list)

    assert dict(exactly(shown.stdout))["body"] == exactly(body)


async def test_a_string_is_taken_as_it_is(broker: Broker) -> None:
    for sender in ('"quoted"', "Ω\nmega", "true", "12", " "):
        sent = await call(broker, "enqueue", "--body", "1", "--sender", sender)
        shown = await call(broker, "get_message", "--queue", "default", "--message-id", sent["message_id"])
        assert shown["sender"] == sender


async def test_an_error_is_a_sentence_on_standard_error_and_exit_code_1(broker: Broker) -> None:
    for words, sentence in (
        (["dequeue", "--queue", "nobody"], "There is no queue nobody"),
        (["dequeue", "--max-messages", "0"], "`max_messages` must be an integer from 1 to 1000, and 0 was given"),
        (["delete", "--receipt", "x"], "not a receipt"),
        (["enqueue", "--body", json.dumps("x" * 5000)], "the queue default takes 4096"),
    ):
        done = await asyncio.to_thread(run, "call", *words, env={"BROKER_URL": broker.url})
        assert (done.exit_code, done.stdout) == (1, "")
        assert sentence in done.stderr
        assert done.stderr.startswith("Error: ")
        assert "Traceback" not in done.stderr


def test_a_broker_that_cannot_be_reached_is_an_error_that_names_it() -> None:
    done = run("call", "--url", "http://127.0.0.1:1", "get_server")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "http://127.0.0.1:1" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["call", "enqueue"], "--body"),
        (["call", "enqueue", "--body", "{"], "--body"),
        (["call", "enqueue", "--body", ""], "--body"),
        (["call", "enqueue", "--body", "nonsense"], "--body"),
        (["call", "enqueue", "--body", '"\udcff"'], "--body"),
        (["call", "enqueue", "--body", "1", "--sender", "\udcff"], "--sender"),
        (["call", "enqueue", "--body", "1", "--colour", "red"], "--colour"),
        (["call", "dequeue", "--wait", "soon"], "--wait"),
        (["call", "nothing"], "nothing"),
        (["call", "--url", "localhost:8080", "get_server"], "localhost:8080"),
        (["nothing"], "nothing"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_and_says_what_is_wrong(words: list[str], named: str) -> None:
    done = run(*words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_a_method_names_every_param(method: str) -> None:
    done = run("call", method, "--help")
    assert done.exit_code == 0
    for param in METHODS[method]["params"]:
        assert "--" + param["name"].replace("_", "-") + " " in done.stdout
        assert param["schema"] is not None
    assert METHODS[method]["summary"].split()[0] in done.stdout


def test_the_help_names_every_command_and_every_setting() -> None:
    assert run("--help").exit_code == 0
    for command in ("serve", "migrate", "call"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0
    for method in METHODS:
        assert method in run("call", "--help").stdout
    words = run("serve", "--help").stdout.split()
    for about, _ in TABLE.values():
        assert about.flag in words
        assert any(about.variable in word for word in words)


def with_examples(command: click.Command, name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the name and the examples of a command, and of each below it but the methods of `call`."""
    assert isinstance(command, WithExamples), name
    yield name, command.examples
    if isinstance(command, click.Group) and name != "call":
        for inner, each in command.commands.items():
            yield from with_examples(each, f"{name} {inner}")


def examples() -> dict[str, tuple[str, ...]]:
    """Return the examples of every command."""
    context = click.Context(cli.main)
    found: dict[str, tuple[str, ...]] = {}
    for name in cli.main.list_commands(context):
        command = cli.main.get_command(context, name)
        assert command is not None
        found.update(with_examples(command, name))
    return found


def test_the_help_of_every_command_ends_with_examples() -> None:
    for name, lines in examples().items():
        shown = run(*name.split(), "--help").stdout
        assert lines
        assert shown.endswith("".join(f"  {line}\n" for line in lines))
    for method in METHODS:
        shown = run("call", method, "--help").stdout
        assert f"Examples:\n  wonderq call {method}" in shown


def test_no_word_at_all_shows_the_commands_of_every_day_first() -> None:
    done = run()
    assert (done.exit_code, done.stderr) == (0, "")
    places = [done.stdout.index(f"\n  {name} ") for name in ("send", "receive", "queues", "doctor", "serve", "call")]
    assert places == sorted(places)
    assert done.stdout == run("--help").stdout


async def test_every_example_in_the_help_does_what_it_shows(
    start_broker: StartBroker, database_url: str, tmp_path: Path
) -> None:
    broker = await start_broker(auth="off")
    for name in ("mail", "mail-dead"):
        await broker.call("create_queue", queue=name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    env |= {"PATH": path, "BROKER_URL": broker.url, "DATABASE_URL": database_url, "HOME": str(tmp_path)}
    for name, lines in examples().items():
        if name == "completion" or (name == "stats" and "get_stats" not in METHODS):
            continue  # the first in shells of its own: test_completion
        for line in lines:
            if "jq" in line and shutil.which("jq") is None:
                continue
            assert await outcome(re.sub("DATABASE_URL=[^ ]* ", "", line), env, tmp_path) == "", line


async def outcome(line: str, env: dict[str, str], folder: Path) -> str:
    """Run a line in a shell; return "" where it went well, else what it said. A server is stopped when it serves."""
    if serves := "wonderq serve" in line:
        line = f"exec {line} --port 0 --allow-data-loss"
    elif "doctor" in line:
        line = f"{line} || test $? = 1"  # the database of the tests keeps nothing
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", line, env=env, cwd=folder, stdin=pipe, stdout=pipe, stderr=pipe
    )
    async with asyncio.timeout(60):
        if serves:
            assert process.stdout is not None
            if (await process.stdout.readline()).startswith(b"listening on "):
                process.terminate()
        _, stderr = await process.communicate()
    return "" if process.returncode == 0 else stderr.decode() or f"exit code {process.returncode}"


# --------------------------------------------------------------------------------------------------------- settings

# For each setting two values that differ from the default, as text and as what it means.
VALUES: dict[str, tuple[tuple[str, Any], tuple[str, Any]]] = {
    "database_url": (("host=a", "host=a"), ("postgresql://b/c", "postgresql://b/c")),
    "data_dir": (("/a", Path("/a")), ("b", Path("b"))),
    "host": (("0.0.0.0", "0.0.0.0"), ("::1", "::1")),
    "port": (("0", 0), ("65535", 65535)),
    "auth": (("off", "off"), ("required", "required")),
    "max_failed_logins": (("1", 1), ("1000000", 1_000_000)),
    "max_calls_per_token": (("1", 1), ("1000000", 1_000_000)),
    "max_call_rate_per_token": (("1", 1.0), ("1000000", 1_000_000.0)),
    "trusted_proxy": (("10.0.0.0/8", ("10.0.0.0/8",)), ("::1, 10.0.0.1", ("::1/128", "10.0.0.1/32"))),
    "tls_certificate": (("/a.pem", Path("/a.pem")), ("b.pem", Path("b.pem"))),
    "tls_key": (("/a.pem", Path("/a.pem")), ("b.pem", Path("b.pem"))),
    "allowed_host": (("a.example", ("a.example",)), ("b, c", ("b", "c"))),
    "cors_origin": (
        ("https://a.example", ("https://a.example",)),
        ("http://b:1, http://c", ("http://b:1", "http://c")),
    ),
    "processes": (("2", 2), ("64", 64)),
    "sweep_interval": (("0.01", 0.01), ("3600", 3600.0)),
    "request_timeout": (("0.1", 0.1), ("600", 600.0)),
    "startup_timeout": (("0", 0.0), ("86400", 86400.0)),
    "database_connections": (("1", 1), ("200", 200)),
    "allow_data_loss": (("yes", True), ("1", True)),
    "max_request_bytes": (("512KiB", 512 * 1024), ("1024", 1024)),
    "max_nesting": (("8", 8), ("512", 512)),
    "header_timeout": (("0.1", 0.1), ("3600", 3600.0)),
    "body_timeout": (("0.1", 0.1), ("3600", 3600.0)),
    "body_stall_timeout": (("0.1", 0.1), ("3600", 3600.0)),
    "keepalive_timeout": (("0.1", 0.1), ("3600", 3600.0)),
    "max_calls_in_flight": (("1", 1), ("1000000", 1_000_000)),
    "max_connections": (("1", 1), ("1000000", 1_000_000)),
    "max_calls": (("1", 1), ("1000000", 1_000_000)),
    "max_waiting_consumers": (("1", 1), ("1000000", 1_000_000)),
    "webhook_allow": (("127.0.0.0/8", ("127.0.0.0/8",)), ("::1, 10.0.0.1", ("::1/128", "10.0.0.1/32"))),
    "webhook_concurrency": (("1", 1), ("1000", 1_000)),
    "webhook_total": (("1", 1), ("10000", 10_000)),
    "webhook_timeout": (("0.1", 0.1), ("300", 300.0)),
    "log_format": (("json", "json"), ("console", "console")),
    "log_level": (("debug", "debug"), ("error", "error")),
}


@pytest.fixture
def settings_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Settings]:
    """Return the settings that `wonderq serve` with these words would serve with."""
    served: list[Settings] = []

    def remember(settings: Settings) -> int:
        served.append(settings)
        return 0

    monkeypatch.setattr(processes, "run", remember)
    monkeypatch.setattr(serving, "configure_logs", lambda *_: None)

    def serve(*words: str, **env: str) -> Settings:
        done = run("serve", *words, env=env)
        assert (done.exit_code, done.output) == (0, "")
        return served.pop()

    return serve


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_is_a_flag_and_a_variable_and_the_flag_wins(settings_of: Callable[..., Settings], name: str) -> None:
    about: Setting
    about, default = TABLE[name]
    (text, value), (other_text, other_value) = VALUES[name]
    assert getattr(settings_of(), name) == default
    assert getattr(settings_of(**{about.variable: ""}), name) == default
    assert getattr(settings_of(about.flag, text), name) == value
    assert getattr(settings_of(f"{about.flag}={other_text}"), name) == other_value
    assert getattr(settings_of(**{about.variable: other_text}), name) == other_value
    assert getattr(settings_of(about.flag, text, **{about.variable: other_text}), name) == value
    assert getattr(settings_of(about.flag, text, **{about.variable: "\x01 is never read"}), name) == value


def test_a_repeatable_flag_may_be_given_several_times(settings_of: Callable[..., Settings]) -> None:
    assert settings_of("--allowed-host", "a", "--allowed-host", "b,c").allowed_host == ("a", "b", "c")


def test_a_switch_alone_means_yes(settings_of: Callable[..., Settings]) -> None:
    assert settings_of("--allow-data-loss").allow_data_loss is True
    assert settings_of("--allow-data-loss", "--port", "0").port == 0
    assert settings_of("--allow-data-loss=no", BROKER_ALLOW_DATA_LOSS="yes").allow_data_loss is False


BAD = [
    (name, text, limit)
    for name, (about, _) in TABLE.items()
    for text, limit in [
        *([(f"{about.minimum - 1:.0f}", f"{about.minimum:,.12g}")] if about.minimum is not None else []),
        *([(f"{about.maximum + 1:.0f}", f"{about.maximum:,.12g}")] if about.maximum is not None else []),
        *(
            [(text, f"{about.minimum:,.12g}") for text in ("many", "nan", "inf", "-inf", "")]
            if about.minimum is not None
            else []
        ),
        *([(text, ", ".join(about.choices)) for text in ("no", "")] if about.choices else []),
        *([(text, "yes or no") for text in ("perhaps", "")] if about.is_switch else []),
    ]
]


@pytest.mark.parametrize(("name", "text", "limit"), BAD)
def test_a_bad_value_is_exit_code_2_and_names_its_place_the_limit_and_what_was_given(
    name: str, text: str, limit: str
) -> None:
    about, _ = TABLE[name]
    for done, place in (
        (run("serve", f"{about.flag}={text}"), about.flag),
        (run("serve", env={about.variable: text}), about.variable) if text else (None, ""),
    ):
        if done is not None:
            assert (done.exit_code, done.stdout) == (2, "")
            for part in (place, limit, repr(text)):
                assert part in done.stderr


@pytest.mark.parametrize("text", ["", "rubbish", "host", "postgresql://[", "colour=red"])
def test_a_database_url_that_is_none_is_exit_code_2_and_is_not_repeated(text: str) -> None:
    done = run("serve", "--database-url", text)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "--database-url" in done.stderr
    assert "'***'" in done.stderr


# ---------------------------------------------------------------------------------------------------- other commands


def test_migrate_says_what_it_applied_and_the_second_time_that_there_is_nothing_to_do(empty_database_url: str) -> None:
    first = run("migrate", "--database-url", empty_database_url)
    assert first.exit_code == 0
    assert "applied 001_initial" in first.stdout
    second = run("migrate", env={"DATABASE_URL": empty_database_url})
    assert (second.exit_code, second.stdout) == (0, "nothing to do\n")


def test_migrate_of_a_database_that_is_away_is_one_sentence_and_exit_code_1(tmp_path: Path) -> None:
    done = run("migrate", "--database-url", f"host={tmp_path}")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")
    assert "--database-url" in done.stderr
    assert "Traceback" not in done.stderr


def test_python_m_broker_is_the_same_as_the_console_script() -> None:
    script = os.path.join(os.path.dirname(sys.executable), "wonderq")
    for command in ([sys.executable, "-m", "broker"], [script]):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert (done.stdout, done.stderr) == (f"wonderq, version {__version__}\n", "")
