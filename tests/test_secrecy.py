"""That the search for secrets finds them: it goes over every log and table of a test run when that ends."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path

import psycopg

import secrecy
from broker.storage import tokens
from broker.storage.database import Connection
from broker.storage.tokens import Grant
from conftest import Broker
from secrecy import Secrets, Watch

TOKEN = "wq_0123456789abcdef." + "aB3_-" * 8 + "xyz"


def test_a_token_s_secret_is_found_in_whatever_surrounds_it() -> None:
    secrets = Secrets()
    secrets.remember_token(TOKEN)
    secrets.remember("a body of a message")
    secret = TOKEN.split(".")[1]
    for text in (TOKEN, f'{{"event": "Bearer {TOKEN}"}}', f"\n{secret}\n", f"('{secret}',)", "x: a body of a message."):
        assert len(secrets.found_in(text)) == 1, text
    assert secrets.found_in(f"{TOKEN[:20]} {secret[:-1]} {secret}x") == []


async def test_what_is_made_is_known(connection: Connection, broker: Broker) -> None:
    await broker.call("enqueue", body=1)
    (message,) = (await broker.call("dequeue"))["messages"]
    assert message["receipt"] in secrecy.KNOWN.alike
    token = await tokens.create(connection, "ada", Grant(), None)
    assert token.split(".")[1] in secrecy.KNOWN.alike


async def test_a_secret_in_a_table_is_found(connection: Connection, database_url: str) -> None:
    secrets = Secrets()
    secrets.remember_token(TOKEN)
    assert await asyncio.to_thread(secrets.found_in_database, database_url) == []
    name = TOKEN.split(".")[1]
    await connection.execute("UPDATE broker.queues SET name = %s", [name])
    (found,) = await asyncio.to_thread(secrets.found_in_database, database_url)
    assert found.startswith("queues: ")
    assert secrets.searched_tables > 10


def test_a_secret_in_a_log_of_this_process_or_another_is_found(tmp_path: Path) -> None:
    secrecy.KNOWN.remember(marker := f"a secret of this test, {tmp_path}")
    (tmp_path / "kept").mkdir()
    watch = Watch(tmp_path / "kept")
    try:
        logging.getLogger("broker.test").warning("%s", marker.upper())
        log = tmp_path / "broker.log"
        log.write_bytes(b"\xff" + marker.encode())
        watch.keep(log)
        watch.keep(tmp_path / "is-not-there.log")
        assert [each.split(":")[0] for each in watch.end()] == ["processes.log"]
    finally:
        secrecy.KNOWN.others.discard(marker)


RUN = """
import logging
from broker.credentials import new_token
def test_it():
    logging.getLogger("broker").error("%s", new_token().text)
"""


def test_a_run_that_has_logged_a_token_fails(tmp_path: Path) -> None:
    """A run of pytest of its own, with one test that does it."""
    (tmp_path / "test_one.py").write_text(RUN)
    here = Path(__file__).parent
    (tmp_path / "conftest.py").write_text((here / "conftest.py").read_text("utf-8"), "utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(here.parent / "setup.cfg")]
    more = ["--rootdir", str(tmp_path), "-o", f"pythonpath={here} {here.parent}", str(tmp_path / "test_one.py")]
    for processes in ("0", "1"):
        done = subprocess.run(
            [*command, "-n", processes, *more], capture_output=True, text=True, timeout=120, check=False
        )
        assert "1 passed" in done.stdout, done.stdout + done.stderr
        assert "a secret can be read" in done.stdout
        assert done.returncode == 1


def test_a_database_that_must_hold_secrets_is_the_only_exception(database_url: str) -> None:
    with psycopg.connect(database_url) as connection:
        found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'broker'").fetchall()
    assert set(secrecy.MUST_HOLD_SECRETS) <= {name for (name,) in found}
