"""The examples and the demo, run as the processes that they are.

Where the demo starts a broker of its own it has a folder that every account may enter: below pytest's temporary
folders the PostgreSQL of a broker that root started could not reach its data.
"""

import asyncio
import json
import os
import shutil
import signal
import sys
import tempfile
import uuid
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from broker.client import Client
from conftest import StartBroker
from scripted import http

PROJECT = Path(__file__).resolve().parents[1]
DEADLINE = 120

ODD_NAMES = [
    b"with space",
    b"100%25",
    b"line\nbreak",
    b"-rf",
    b"'\"`$HOME",
    b"\xff\xfe not utf-8",
    "Ω ☃".encode(),
    b"n" * 255,
    b"empty",
]


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="wonderq-test-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def files(folder: Path) -> Path:
    """Make a directory of 60 files, of which some have odd names, and of things that are no files."""
    root = folder / "files"
    (root / "deep" / "deeper").mkdir(parents=True)
    names = [os.fsdecode(name) for name in ODD_NAMES] + [f"deep/deeper/{n}" for n in range(51)]
    for name in names:
        (root / name).write_text("" if name == "empty" else f"this is {name!r}")
    (root / "link").symlink_to(root / "empty")
    (root / "loop").symlink_to(root)
    os.mkfifo(root / "pipe")
    return root


@pytest.fixture
def modules(folder: Path) -> Path:
    """Make a directory of 47 modules, of which 31 are large and in packages, and of files that are none."""
    root = folder / "modules"
    large = "def found():\n    pass\n" * 300
    for package, size, text in (("one", 30, large), ("two", 10, "async def small(): ...\n")):
        (root / package / "inner").mkdir(parents=True)
        for number in range(size):
            (root / package / "inner" / f"{number}.py").write_text(text)
    for name in (b"with space.py", b"\xff\xfe not utf-8.py", b"empty.py", b"100%25.py", b"a.py", b"b.py"):
        (root / os.fsdecode(name)).write_text("" if name == b"empty.py" else "def top(): ...\n")
    (root / os.fsdecode(b"\xff package")).mkdir()
    (root / os.fsdecode(b"\xff package/large.py")).write_text(large)
    (root / "one" / "text.txt").write_text("def no_module(): ...")
    (root / "link.py").symlink_to(root / "empty.py")
    return root


@pytest.fixture
def queue() -> str:
    return f"examples-{uuid.uuid4().hex}"


@pytest.fixture
async def client(broker_url: str) -> AsyncIterator[Client]:
    async with Client(broker_url) as client:
        yield client


@asynccontextmanager
async def running(*command: str, **environ: str | Path) -> AsyncIterator[Process]:
    unset = ("BROKER_URL", "BROKER_TOKEN", "DATABASE_URL", "DEMO_DIR", "DEMO_DATA_DIR", "DEMO_FAULT")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    given = {name: str(value) for name, value in environ.items()}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=PROJECT, env=kept | {"PYTHONPATH": str(PROJECT), **given}, stdout=PIPE, stderr=PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def outcome(process: Process) -> tuple[int | None, str, str]:
    """Wait for the end; return exit code, output and errors."""
    async with asyncio.timeout(DEADLINE):
        output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def run(*command: str, **environ: str | Path) -> tuple[int | None, str, str]:
    async with running(*command, **environ) as process:
        return await outcome(process)


async def line_of(process: Process, beginning: str) -> str:
    """Read the process's output up to the line that begins so."""
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE):
        async for line in process.stdout:
            if line.decode().startswith(beginning):
                return line.decode()
    raise AssertionError(f"the process ended without saying {beginning!r}")


def example(name: str, url: str, *options: str) -> list[str]:
    return [sys.executable, f"examples/{name}.py", "--url", url, *options]


DEMO = (sys.executable, "-m", "examples.demo")
PUBSUB = (sys.executable, "-m", "examples.pubsub")


async def test_the_producer_prints_the_ids_of_what_it_stored(broker_url: str, client: Client, queue: str) -> None:
    await client.create_queue(queue)

    code, output, _ = await run(*example("producer", broker_url, "--queue", queue, "--count", "3", "--sender", "me"))

    messages = await client.dequeue(queue, max_messages=10)
    assert code == 0
    assert output.split() == [message.message_id for message in messages]
    assert [message.sender for message in messages] == ["me"] * 3


async def test_the_consumer_prints_and_deletes_what_it_takes(broker_url: str, client: Client, queue: str) -> None:
    await client.create_queue(queue)
    await client.enqueue_batch(queue, [{"body": {"n": n}, "sender": "me"} for n in range(15)])

    code, output, _ = await run(*example("consumer", broker_url, "--queue", queue, "--max", "12"))

    lines = [line.split("\t") for line in output.splitlines()]
    assert code == 0
    assert lines == [["me", json.dumps({"n": n}), "1"] for n in range(12)]
    assert (await client.count_messages(queue))["total"] == 3


async def test_two_producers_and_two_consumers_pass_each_message_on_once(
    broker_url: str, client: Client, queue: str
) -> None:
    await client.create_queue(queue)
    produce = [run(*example("producer", broker_url, "--queue", queue, "--count", "50")) for _ in range(2)]
    consume = [run(*example("consumer", broker_url, "--queue", queue, "--max", "50")) for _ in range(2)]

    results = await asyncio.gather(*produce, *consume)

    lines = [line for _, output, _ in results[2:] for line in output.splitlines()]
    assert [code for code, _, _ in results] == [0] * 4
    assert len(lines) == len(set(lines)) == 100
    assert (await client.count_messages(queue))["total"] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_consumer_that_is_told_to_stop_leaves_nothing_behind(
    broker_url: str, client: Client, queue: str, number: signal.Signals
) -> None:
    await client.create_queue(queue)
    await client.enqueue(queue, 1, sender="me")
    async with running(*example("consumer", broker_url, "--queue", queue)) as consumer:
        await line_of(consumer, "me\t1")
        consumer.send_signal(number)
        code, _, errors = await outcome(consumer)

    assert (code, errors) == (0, "")
    assert (await client.count_messages(queue))["total"] == 0


@pytest.mark.parametrize("name", ["producer", "consumer"])
async def test_producer_and_consumer_say_what_is_wrong(broker_url: str, queue: str, name: str) -> None:
    no_queue = await run(*example(name, broker_url, "--queue", queue))
    no_broker = await run(*example(name, "http://127.0.0.1:1", "--deadline", "0.5"))

    assert (no_queue[0], no_broker[0]) == (1, 1)
    assert "queue_not_found" in no_queue[2]
    assert "http://127.0.0.1:1/rpc" in no_broker[2]
    assert "Traceback" not in no_queue[2] + no_broker[2]


async def test_a_program_that_is_not_asynchronous_sends_and_handles(broker_url: str, client: Client) -> None:
    code, output, errors = await run(sys.executable, "examples/synchronous.py", "one", "two", BROKER_URL=broker_url)

    assert (code, errors) == (0, "")
    assert sorted(line.split()[0] for line in output.splitlines()) == ["one", "two"]
    assert (await client.count_messages("words"))["total"] == 0


def node(*arguments: str) -> list[str]:
    """Return the command of the example in Node, whose tests are left out only where nobody counts on them."""
    if shutil.which("node") is None:
        assert os.environ.get("CI") != "true", "node is missing"
        pytest.skip("node is not installed")
    return ["node", "examples/node/broker.mjs", *arguments]


async def test_plain_node_sends_and_takes(broker_url: str, client: Client, queue: str) -> None:
    await client.create_queue(queue)

    sent = await run(*node("produce", queue, '{"hello":"world"}', "[1, 2]"), BROKER_URL=broker_url)
    stored = [message.message_id async for message in client.list_messages(queue)]
    taken = await run(*node("consume", queue, "2"), BROKER_URL=broker_url)

    assert (sent[0], sent[2], sent[1].split()) == (0, "", stored)
    assert taken == (0, '{"hello":"world"} 1\n[1,2] 1\n', "")
    assert (await client.count_messages(queue))["total"] == 0


async def test_plain_node_stores_once_what_it_has_to_send_twice(broker_url: str, client: Client, queue: str) -> None:
    """A server before the broker passes each request on, and loses every other answer."""
    await client.create_queue(queue)
    sent: list[dict[str, Any]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        call = json.loads(await reader.readexactly(length))
        sent.append(call["params"])
        answer = {"jsonrpc": "2.0", "id": 1, "result": await client.call(call["method"], **call["params"])}
        if len(sent) % 2 == 0:
            writer.write(http("200 OK", json.dumps(answer)))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        code, output, errors = await run(*node("produce", queue, "1", "2", "3"), BROKER_URL=url)

    stored = [message.message_id async for message in client.list_messages(queue)]
    assert (code, errors, len(sent)) == (0, "", 6)
    assert output.split() == stored
    assert len({params["idempotency_key"] for params in sent}) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_plain_node_stops_when_it_is_told(
    broker_url: str, client: Client, queue: str, number: signal.Signals
) -> None:
    await client.create_queue(queue)
    await client.enqueue(queue, 1)
    async with running(*node("consume", queue), BROKER_URL=broker_url) as consumer:
        await line_of(consumer, "1 1")
        consumer.send_signal(number)
        code, _, errors = await outcome(consumer)

    assert (code, errors) == (0, "")
    assert (await client.count_messages(queue))["total"] == 0


@pytest.mark.parametrize("what", ["produce", "consume"])
async def test_plain_node_says_what_is_wrong(broker_url: str, queue: str, what: str) -> None:
    no_queue = await run(*node(what, queue, "1"), BROKER_URL=broker_url)
    no_broker = await run(*node(what, queue, "1"), BROKER_URL="http://127.0.0.1:1", DEADLINE_MS="500")

    assert (no_queue[0], no_broker[0]) == (1, 1)
    assert "queue_not_found" in no_queue[2]
    assert "http://127.0.0.1:1" in no_broker[2]


@pytest.mark.parametrize("shell", ["sh", "bash"])
async def test_the_session_can_be_run_and_pasted(broker_url: str, shell: str) -> None:
    if shutil.which(shell) is None or shutil.which("curl") is None:
        pytest.skip(f"needs {shell} and curl")

    ran = await run(shell, "examples/session.sh", BROKER_URL=broker_url)
    pasted = await run(shell, "-c", f"{shell} -s < examples/session.sh", BROKER_URL=broker_url)

    for code, output, errors in (ran, pasted):
        answers = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
        assert (code, errors) == (0, "")
        assert [answer["id"] for answer in answers] == list(range(1, 17))
        assert answers[2]["result"]["messages"][0]["body"] == {"hello": "world"}
        assert answers[4]["result"] == {"deleted": True}
        assert answers[5]["result"]["total"] == 0
        assert answers[8]["result"]["deliveries"] == 1
        (copy,) = answers[9]["result"]["messages"]
        assert (copy["body"], copy["topic"]) == ({"rain": True}, "news")
        assert copy["published_id"] == answers[8]["result"]["message_id"]
        first, second = (answers[n]["result"] for n in (10, 11))
        assert (first["duplicate"], second) == (False, {"message_id": first["message_id"], "duplicate": True})
        assert [answers[n]["result"]["messages"][0]["receive_count"] for n in (12, 14)] == [1, 2]
        assert answers[15]["result"] == {"deleted": True}


async def test_the_session_ends_at_the_first_error() -> None:
    code, _, errors = await run("sh", "examples/session.sh", BROKER_URL="http://127.0.0.1:1")

    assert code != 0
    assert "curl" in errors


async def test_the_demo_finds_every_file_counted_once_also_on_old_data(folder: Path, files: Path) -> None:
    environ = {"DEMO_DIR": files, "DEMO_DATA_DIR": folder / "data"}

    runs = [await run(*DEMO, **environ), await run(*DEMO, **environ)]

    for code, output, errors in runs:
        assert (code, errors) == (0, "")
        assert "60 files below" in output
        assert "60 tasks" in output
        assert "60 of 60 files" in output
        assert "problems      0" in output
        # What the killed consumer held was delivered to another.
        held = int(output.split("killed while it held ")[1].split()[0])
        assert held > 0
        assert f"{held} of the {held} of the killed consumer came back" in output


async def test_the_demo_works_on_the_data_of_one_that_was_interrupted(folder: Path, files: Path) -> None:
    environ = {"DEMO_DIR": files, "DEMO_DATA_DIR": folder / "data"}
    async with running(*DEMO, **environ) as demo:
        await line_of(demo, "consumer-1 killed")
        demo.send_signal(signal.SIGINT)
        interrupted, _, errors = await outcome(demo)

    code, output, _ = await run(*DEMO, **environ)

    assert (interrupted, errors) == (130, "interrupted; everything is stopped\n")
    assert code == 0
    assert "60 tasks" in output


@pytest.mark.parametrize(
    ("fault", "problem"), [("wrong", "wrong: "), ("missing", "missing: "), ("twice", "counted twice: ")]
)
async def test_the_demo_notices_what_went_wrong(broker_url: str, files: Path, fault: str, problem: str) -> None:
    code, output, errors = await run(*DEMO, DEMO_DIR=files, BROKER_URL=broker_url, DEMO_FAULT=fault)

    assert (code, errors) == (1, "")
    assert f"\n{problem}" in output


async def test_a_file_that_changes_under_way_is_a_wrong_one(broker_url: str, files: Path) -> None:
    async with running(*DEMO, DEMO_DIR=files, BROKER_URL=broker_url) as demo:
        # By now some files were read.
        await line_of(demo, "consumer-1 killed")
        for path in files.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.write_text("something else")
        code, output, _ = await outcome(demo)

    assert code == 1
    assert "\nwrong: " in output
    assert "but the file changed meanwhile" in output


async def test_files_that_vanish_under_way_do_not_hurt(broker_url: str, files: Path) -> None:
    async with running(*DEMO, DEMO_DIR=files, BROKER_URL=broker_url) as demo:
        await line_of(demo, "consumer-1 killed")
        shutil.rmtree(files)
        code, output, errors = await outcome(demo)

    assert (code, errors) == (0, "")
    assert "60 tasks" in output
    assert "problems      0" in output


async def test_a_directory_without_files_is_said(folder: Path) -> None:
    code, _, errors = await run(*DEMO, DEMO_DIR=folder, DEMO_DATA_DIR=folder / "data")

    assert code == 1
    assert errors == f"There are no files below {folder.resolve()}: set DEMO_DIR to a directory with some.\n"


async def test_a_demo_whose_broker_cannot_start_says_why(folder: Path, files: Path) -> None:
    data_dir = folder / "data"
    data_dir.write_text("in the way")

    code, _, errors = await run(*DEMO, DEMO_DIR=files, DEMO_DATA_DIR=data_dir)

    assert code == 1
    assert str(data_dir) in errors
    assert "The broker ended before it was ready." in errors


async def test_both_subscribers_handle_every_module_once_also_after_an_interrupted_run(
    folder: Path, modules: Path
) -> None:
    environ = {"DEMO_DIR": modules, "DEMO_DATA_DIR": folder / "data"}
    async with running(*PUBSUB, **environ) as demo:
        await line_of(demo, "index killed")
        demo.send_signal(signal.SIGINT)
        interrupted, _, errors = await outcome(demo)

    code, output, complaints = await run(*PUBSUB, **environ)

    assert (interrupted, errors) == (130, "interrupted; everything is stopped\n")
    assert (code, complaints) == (0, ""), output
    assert "47 modules below" in output
    assert "published     47 modules; 78 copies for 2 subscribers" in output
    assert "index         47 of 47 as found here" in output
    assert "lines         31 of 31 as found here" in output
    # What the killed subscriber held came to it again.
    held = int(output.split("index killed while it held ")[1].split()[0])
    assert held > 0
    assert f"{held} of the {held} messages that it held came again" in output
    assert "broadcast     4 messages while nobody subscribed, then 8 copies" in output
    assert output.count(": 4 of 4 as found here") == 2
    assert "forged        2 of 2 subscribers refused" in output
    assert "problems      0" in output


async def test_the_demo_of_topics_notices_what_went_wrong(start_broker: StartBroker, modules: Path) -> None:
    broker = await start_broker(webhook_allow=("127.0.0.0/8",))

    faults = "wrong,missing,twice,forged"
    code, output, errors = await run(*PUBSUB, DEMO_DIR=modules, BROKER_URL=broker.url, DEMO_FAULT=faults)

    assert (code, errors) == (1, "")
    assert "\nwrong: lines found something else in " in output
    assert "\nmissing: lines never handled " in output
    assert "\nhandled twice: " in output
    assert "\ncopies: " in output
    assert "\nforged: 1 subscribers took a message that nobody had signed" in output
    assert "\nunknown: lines handled forged, which was not for it" in output
    # It leaves nothing behind that would be pushed to nobody.
    assert (await broker.call("list_topics"))["topics"] == []


async def test_the_demo_of_topics_says_what_it_cannot_do(broker_url: str, folder: Path, modules: Path) -> None:
    no_push = await run(*PUBSUB, DEMO_DIR=modules, BROKER_URL=broker_url)
    no_modules = await run(*PUBSUB, DEMO_DIR=modules / "link.py", BROKER_URL=broker_url)
    no_fault = await run(*PUBSUB, DEMO_DIR=modules, BROKER_URL=broker_url, DEMO_FAULT="wrong,lost")

    assert [no_push[0], no_modules[0], no_fault[0]] == [1, 1, 1]
    assert "--webhook-allow" in no_push[2]
    assert no_modules[2].startswith("There are no modules below ")
    assert no_fault[2] == "DEMO_FAULT is 'wrong,lost'; it may name wrong, missing, twice, forged.\n"
    assert "Traceback" not in no_push[2] + no_modules[2] + no_fault[2]
