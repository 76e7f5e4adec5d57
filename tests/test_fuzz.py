"""Ten thousand requests that nobody would send who means well: each is answered, and the broker is none the worse.

Half are made from the schema, half from bytes; they go over kept-alive connections, with and without a token, to a
broker that is a process of its own, so that its memory is known. FUZZ_SEED makes others; what fails is told with the
seed and its number, from which `request_of` makes it again.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fuzzing
from broker.storage import tokens
from broker.storage.database import Connection
from broker.storage.tokens import Grant
from broker_process import Process, Start
from conftest import PATIENCE

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")

SEED = int(os.environ.get("FUZZ_SEED", "1"))
REQUESTS = 10_000
CONNECTIONS = 24
GROWTH_BYTES = 20 * 2**20
# What no broker of the contract answers without being the worse for it.
NEVER_CODES = (-32603, -32001)


def request_of(number: int, token: str) -> bytes:
    """Return the request of this number: an even one is made from the schema, an odd one from bytes."""
    rng = random.Random(f"{SEED}-{number}")
    fields = [f"Authorization: Bearer {token if rng.random() < 0.97 else token[::-1]}"] if rng.random() < 0.95 else []
    if number % 2:
        return fuzzing.from_bytes(rng, *fields)
    return fuzzing.request(fuzzing.body(rng), *fields)


class Line:
    """A connection that is made again when the broker has closed it."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._token = token
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(self, number: int) -> list[tuple[int, bytes]]:
        """Send a request and behind it one that is right; return the status and body of each answer before that's."""
        if self._writer is None or self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        last = {"jsonrpc": "2.0", "id": f"last-{number}", "method": "list_topics", "params": {"limit": 1}}
        behind = fuzzing.request(json.dumps(last).encode(), f"Authorization: Bearer {self._token}")
        self._writer.write(request_of(number, self._token) + behind)
        answers: list[tuple[int, bytes]] = []
        while (answer := await read_answer(self._reader)) is not None:
            if f'"last-{number}"'.encode() in answer[1]:
                return answers
            answers.append(answer)
        self.close()
        return answers

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes] | None:
    """Return the next answer's status and body, None where the broker has closed in good order."""
    while True:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError as error:
            if error.partial:
                raise
            return None
        found = re.match(r"HTTP/1\.[01] (\d{3}) ", head)
        assert found, head
        if found[1] != "100":
            break
    length = re.search(r"^Content-Length: (\d+)\r$", head, re.MULTILINE | re.IGNORECASE)
    assert length or found[1] == "204", head
    return int(found[1]), await reader.readexactly(int(length[1]) if length else 0)


def check(status: int, body: bytes) -> str:
    """Fail unless this is an answer of the contract's; return in a word what it is."""
    assert 200 <= status < 500, (status, body)
    if status == 204:
        assert body == b""
        return "204"
    if status == 200 and not body.startswith((b'{"jsonrpc"', b"[")):
        return "page"
    answers = json.loads(body)
    assert answers != []
    for each in answers if isinstance(answers, list) else [answers]:
        assert each["jsonrpc"] == "2.0"
        assert ("result" in each) is not ("error" in each)
        assert status == 200 or each["id"] is None
        if "error" in each:
            error = each["error"]
            assert set(error) == {"code", "message", "data"}
            assert {"type", "retryable", "outcome"} <= set(error["data"])
            assert error["code"] not in NEVER_CODES, error
    if status != 200:
        return str(status)
    first = answers[0] if isinstance(answers, list) else answers
    return "result" if "result" in first else str(first["error"]["data"]["type"])


async def fuzz(process: Process, token: str, numbers: range, found: Counter[str]) -> None:
    """Send these requests over several connections."""
    waiting = iter(numbers)

    async def use_one() -> None:
        line = Line(process.port, token)
        for number in waiting:
            try:
                async with asyncio.timeout(PATIENCE):
                    answers = await line.ask(number)
                kinds = [check(*answer) for answer in answers]
                assert number % 2 or len(kinds) == 1, "a request that is HTTP is answered once, and not closed upon"
                assert kinds, "closed without an answer"
            except (Exception, asyncio.CancelledError) as error:
                error.add_note(f"seed {SEED}, request {number}: {request_of(number, token)!r:.2000}")
                raise
            found.update(kinds)
        line.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(use_one())


def resident_bytes(pid: int) -> int:
    found = re.search(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


async def test_ten_thousand_hostile_requests_are_each_answered_and_leave_nothing_behind(
    start: Start, database_url: str, connection: Connection, record_property: Callable[[str, Any], None]
) -> None:
    token = await tokens.create(connection, "everything", Grant(["*"], ["*"], ["*"], admin=True), None)
    flags = ["--database-url", database_url, "--auth", "required", "--max-request-bytes", "256KiB"]
    flags += ["--header-timeout", "3", "--body-timeout", "5", "--body-stall-timeout", "3", "--max-failed-logins", "200"]
    process = await (await start(*flags)).ready()
    found: Counter[str] = Counter()
    await fuzz(process, token, range(REQUESTS // 2), found)
    before = resident_bytes(process.pid)
    await fuzz(process, token, range(REQUESTS // 2, REQUESTS), found)
    growth = resident_bytes(process.pid) - before
    kinds = ", ".join(f"{kind} {number}" for kind, number in found.most_common())
    record_property("fuzz", f"seed {SEED}, {REQUESTS} requests, {growth / 2**20:+.1f} MiB: {kinds}")
    assert growth < GROWTH_BYTES
    # That requests come far enough to be refused for many reasons, and some are carried out.
    assert found.keys() >= {"result", "204", "400", "401", "408", "413", "415", "429", "parse_error", "invalid_params"}
    assert found["result"] > REQUESTS / 20
    line = Line(process.port, token)
    assert await line.ask(0) is not None
    line.close()
    for entry in process.log.splitlines():
        assert json.loads(entry)["level"] in ("info", "warning"), entry
    assert "Traceback" not in process.log
