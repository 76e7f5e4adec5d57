"""The README's snippets, run as they stand there, but for the port."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path

from conftest import Broker

README = Path(__file__).parent.parent / "README.md"
ADDRESS = "http://127.0.0.1:8080"


def block(language: str, containing: str) -> str:
    """Return the README's one block of this language that contains a text."""
    blocks: list[str] = re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)
    (found,) = [text for text in blocks if containing in text]
    return found


async def run(*command: str, text: str) -> str:
    """Run a program with a text on its standard input; return what it printed."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(120):
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
