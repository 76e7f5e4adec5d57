"""The snippets of README.md and docs/topics.md, run as they stand there, but for the ports."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import sys
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from broker.signatures import secret_bytes, secret_text, sign
from conftest import Broker, StartBroker

README = Path(__file__).parent.parent / "README.md"
TOPICS = README.parent / "docs" / "topics.md"
ADDRESS = "http://127.0.0.1:8080"
DEADLINE = 120


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's blocks of this language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def block(language: str, containing: str) -> str:
    """Return the README's one block of this language that contains a text."""
    (found,) = [text for text in blocks(README, language) if containing in text]
    return found


async def run(*command: str, text: str, **environ: str) -> str:
    """Run a program with a text on its standard input; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=PIPE, stdout=PIPE, stderr=STDOUT, env=os.environ | environ
    )
    async with asyncio.timeout(DEADLINE):
        output, _ = await process.communicate(text.encode())
    assert process.returncode == 0, output.decode()
    return output.decode()


async def test_the_session_with_curl_works_when_pasted(broker: Broker) -> None:
    output = await run("sh", "-eu", text=block("sh", "rpc()").replace(ADDRESS, broker.url))
    assert '"duplicate":false' in output
    assert '"body":{"hello":"world"}' in output
    assert '"deleted":true' in output
    assert '"total":0' in output


async def test_the_python_snippet_works_when_pasted(broker: Broker) -> None:
    snippet = block("python", "from broker.client import Client").replace(ADDRESS, broker.url)
    assert "{'hello': 'world'}" in await run(sys.executable, "-", text=snippet)


RECEIVERS = {"python": [sys.executable, "-c"], "js": ["node", "-e"]}


@asynccontextmanager
async def receiver(language: str, port: int, secret: str) -> AsyncIterator[Process]:
    """Run a receiver of the page of topics."""
    (text,) = blocks(TOPICS, language)
    assert text.count("9000") == 1
    process = await asyncio.create_subprocess_exec(
        *RECEIVERS[language], text.replace("9000", str(port)), stdout=PIPE, env=os.environ | {"SECRET": secret}
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def line_of(process: Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(DEADLINE):
        return (await process.stdout.readline()).decode().strip()


async def statuses(port: int, secret: str) -> list[int]:
    """Send a message that nobody has signed, one that was signed long ago, and one twice; return the answers."""
    now = int(time.time())
    signed_at = {"unsigned": now, "old": now - 1000, "twice": now}
    found = []
    async with aiohttp.ClientSession() as session:
        for message_id in ("unsigned", "old", "twice", "twice"):
            timestamp, body = signed_at[message_id], f'"{message_id}"'.encode()
            headers = {"webhook-id": message_id, "webhook-timestamp": str(timestamp), "webhook-signature": "v1,AAAA"}
            if message_id != "unsigned":
                headers["webhook-signature"] = sign(message_id, timestamp, body, [os.urandom(32), secret_bytes(secret)])
            async with asyncio.timeout(DEADLINE):
                found.append(await status(session, f"http://127.0.0.1:{port}/", body, headers))
    return found


async def status(session: aiohttp.ClientSession, url: str, body: bytes, headers: dict[str, str]) -> int:
    """Send a message as soon as somebody listens; return the answer's status."""
    while True:
        try:
            async with session.post(url, data=body, headers=headers) as response:
                return response.status
        except aiohttp.ClientConnectorError:
            await asyncio.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def secret_in(output: str) -> str:
    (secret,) = re.findall(r'"secret": "(whsec_[^"]+)"', output)
    return str(secret)


@pytest.mark.parametrize("language", RECEIVERS)
async def test_a_receiver_takes_only_what_was_signed_just_now_and_each_message_once(language: str) -> None:
    if shutil.which(RECEIVERS[language][0]) is None:
        pytest.skip(f"needs {RECEIVERS[language][0]}")
    port, secret = free_port(), secret_text(os.urandom(32))

    async with receiver(language, port, secret) as process:
        answers = await statuses(port, secret)
        process.terminate()
        async with asyncio.timeout(DEADLINE):
            output, _ = await process.communicate()

    assert answers == [401, 401, 204, 204]
    assert output == b'"twice"\n'


async def test_the_page_of_topics_works_when_pasted(start_broker: StartBroker) -> None:
    broker = await start_broker(webhook_allow=("127.0.0.0/8",))
    port = free_port()

    async def paste(*texts: str) -> str:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        text = "\n".join(texts).replace("127.0.0.1:9000", f"127.0.0.1:{port}")
        return await run("sh", "-eu", text=text, BROKER_URL=broker.url, PATH=path)

    topic, chosen, stored, url, publish, redrive, rotate = blocks(TOPICS, "sh")

    assert '"order": 7' in await paste(topic)
    # One more copy for those who want large orders, and one for billing, which wants all.
    assert '"deliveries": 2' in await paste(chosen)
    assert '"messages": 1,\n  "deliveries": 1' in await paste(stored)
    old = secret_in(await paste(url))
    async with receiver("python", port, old) as process:
        await paste(publish)
        assert await line_of(process) == '{"order": 9}'
        # With the old secret and with the new one a message is taken, for as long as both count.
        new = secret_in(await paste(rotate))
        await paste(publish)
        assert await line_of(process) == '{"order": 9}'
    async with receiver("python", port, new) as process:
        await paste(publish)
        assert await line_of(process) == '{"order": 9}'
    assert '"moved": 0' in await paste(redrive)


def test_no_other_snippet_is_on_the_page_of_topics() -> None:
    """Those of these languages are run above."""
    assert set(re.findall(r"^```(\w+)$", TOPICS.read_text(), re.MULTILINE)) == {"sh", *RECEIVERS}
