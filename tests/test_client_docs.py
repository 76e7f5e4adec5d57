"""The snippets of docs/client.md, run as they stand there, in their order, on one broker."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import textwrap
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

from broker import client as client_package
from broker.client import BrokerError, Client, ConsumerOptions
from conftest import PATIENCE, Broker

PAGE = Path(__file__).parent.parent / "docs" / "client.md"
ADDRESS = "http://127.0.0.1:8080"


def program(snippet: str, url: str) -> str:
    """Return a snippet as a program: those that stand inside `async with … as client` are put there."""
    if "asyncio.run" in snippet or "SyncClient" in snippet:
        return snippet.replace(ADDRESS, url)
    inside = textwrap.indent(snippet, " " * 8)
    return (
        "import asyncio\nfrom broker.client import Client\nasync def main():\n"
        f"    async with Client({url!r}) as client:\n{inside}\nasyncio.run(main())\n"
    )


async def run(text: str) -> str:
    """Run a program; one that handles messages is told to stop when it has handled one. Return what it printed."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-u", "-c", text, stdout=PIPE, stderr=STDOUT)
    assert process.stdout is not None
    output = ""
    try:
        async with asyncio.timeout(4 * PATIENCE):
            async for line in process.stdout:
                output += line.decode()
                if line.startswith(b"handling") and "stop()" not in text:
                    process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0, output
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return output


async def test_every_snippet_of_the_page_of_the_client_works(broker: Broker) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    first, consuming, stopping, errors, hasty, batches, sync = snippets

    async def paste(snippet: str) -> str:
        return await run(program(snippet, broker.url))

    async with Client(broker.url) as client:
        message_id = (await paste(first)).strip()
        [stored] = [message async for message in client.list_messages("mail")]
        assert (stored.message_id, stored.headers) == (message_id, {"kind": "greeting"})
        assert await paste(consuming) == "handling {'to': 'ada'} 1\n"
        assert (await client.count_messages("mail"))["total"] == 0
        await client.enqueue_batch("mail", [{"body": 1}, {"body": 2}])
        assert await paste(stopping) == "handling 1\n"
        assert await paste(errors) == ""
        assert "'total': 2" in await paste(hasty)
        assert "True {'to': 'grace'}" in await paste(batches)
        assert await paste(sync) == "handling dear Ada\n"


def test_the_page_names_every_option_and_every_exception() -> None:
    text = PAGE.read_text()
    public = [getattr(client_package, name) for name in client_package.__all__]
    exceptions = [each.__name__ for each in public if isinstance(each, type) and issubclass(each, BrokerError)]
    for name in (*exceptions, *ConsumerOptions.__annotations__):
        assert f"`{name}`" in text, name
