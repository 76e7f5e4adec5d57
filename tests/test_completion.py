"""Completion in the shell: the scripts that the shells take, and names that the broker is asked for."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from broker.cli.completion import ANSWER_SECONDS, INSTALL, SHELLS
from conftest import Broker, StartBroker
from outside import PATIENCE, without_database
from test_cli import run

BIN = Path(sys.executable).parent


ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
ENVIRONMENT["PATH"] = f"{BIN}:{os.environ['PATH']}"


def completed(url: str, *words: str) -> list[str]:
    """Return what bash offers for the last word, where the script was taken."""
    script = f"""{INSTALL["bash"]}
        COMP_WORDS=(wonderq {shlex.join(words)})
        COMP_CWORD={len(words)}
        _wonderq_completion wonderq
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return in_shell("bash", script, url)


def in_shell(shell: str, script: str, url: str) -> list[str]:
    """Return the lines that a script prints; it must not complain."""
    asked = {**ENVIRONMENT, "BROKER_URL": url}
    done = subprocess.run(
        [shell, "-c", script], env=asked, capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stderr == ""
    return [line for line in done.stdout.splitlines() if line]


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_one_that_the_shell_takes(shell: str) -> None:
    done = run("completion", shell)
    assert (done.exit_code, "_WONDERQ_COMPLETE" in done.stdout) == (0, True)
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    subprocess.run([shell, "-n"], input=done.stdout, text=True, check=True, timeout=PATIENCE)
    # As its help says. A zsh that completes anything has done the first part before.
    first = "autoload -Uz compinit && compinit -u -D && " if shell == "zsh" else ""
    assert in_shell(shell, f"{first}{INSTALL[shell]} && echo taken", "http://127.0.0.1:1") == ["taken"]


def test_another_shell_is_a_mistake_of_the_command_line() -> None:
    done = run("completion", "tcsh")
    assert (done.exit_code, "bash" in done.stderr) == (2, True)


async def test_names_of_queues_and_topics_complete_by_asking_the_broker(broker: Broker) -> None:
    for name in ("mail.in", "mail.out", "news"):
        await broker.call("create_queue", queue=name)
    await broker.call("create_topic", topic="orders")
    for words, expected in (
        (["send", ""], ["default", "mail.in", "mail.out", "news"]),
        (["receive", "mail."], ["mail.in", "mail.out"]),
        (["redrive", "news", "--to", "m"], ["mail.in", "mail.out"]),
        (["topics", "--prefix", ""], ["orders"]),
        (["call", "get_queue", "--queue", "n"], ["news"]),
        (["call", "publish", "--topic", "o"], ["orders"]),
        (["peek", "--url", broker.url, "ne"], ["news"]),
    ):
        url = "http://127.0.0.1:1" if "--url" in words else broker.url
        assert await asyncio.to_thread(completed, url, *words) == expected


async def test_fish_completes_names_too(broker: Broker) -> None:
    if shutil.which("fish") is None:
        pytest.skip("needs fish")
    await broker.call("create_queue", queue="mail.in")
    script = f"{INSTALL['fish']}; complete -C 'wonderq send '"
    offered = await asyncio.to_thread(in_shell, "fish", script, broker.url)
    assert [line.split()[0] for line in offered] == ["default", "mail.in"]


def test_commands_and_options_complete_without_a_broker() -> None:
    assert completed("http://127.0.0.1:1", "re") == ["receive", "redrive"]
    assert "--keep" in completed("http://127.0.0.1:1", "receive", "--")


async def test_a_broker_that_does_not_answer_completes_nothing_and_says_nothing(
    start_broker: StartBroker, test_server: str, database_url: str
) -> None:
    assert await asyncio.to_thread(completed, "http://127.0.0.1:1", "send", "d") == []
    assert await asyncio.to_thread(completed, "no address", "send", "d") == []
    broker = await start_broker(request_timeout=PATIENCE)
    with without_database(test_server, database_url):
        began_at = time.monotonic()
        assert await asyncio.to_thread(completed, broker.url, "send", "d") == []
        # It gave up long before the broker did.
        assert time.monotonic() - began_at < ANSWER_SECONDS + PATIENCE / 2
    async with asyncio.timeout(PATIENCE):
        while await asyncio.to_thread(completed, broker.url, "send", "d") != ["default"]:
            await asyncio.sleep(0.1)
