"""`wonderq token`: made once, shown once, listed without secrets, revoked by name."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import psycopg
import pytest
from click.testing import Result

from broker.credentials import read_token
from broker.storage import tokens
from broker.storage.tokens import Grant
from conftest import Connect
from test_cli import run


def token(url: str, *words: str) -> Result:
    return run("token", *words, "--database-url", url)


def test_a_token_is_printed_alone_and_once(database_url: str) -> None:
    made = token(database_url, "create", "ada", "--send", "mail.*", "--send", "news", "--receive", "mail.in", "--admin")
    assert made.exit_code == 0
    text = made.stdout.removesuffix("\n")
    presented = read_token(text)
    assert presented is not None
    listed = token(database_url, "list", "--json")
    assert text not in listed.stdout
    assert text.split(".")[1] not in listed.stdout
    (row,) = json.loads(listed.stdout)
    assert (row["name"], row["id"], row["state"], row["expires_at"]) == ("ada", presented.id, "valid", None)
    assert [row[verb] for verb in ("send", "receive", "manage", "admin")] == [["mail.*", "news"], ["mail.in"], [], True]


def test_that_a_token_was_made_or_revoked_is_written_down_by_the_command(database_url: str) -> None:
    made = token(database_url, "create", "ada")
    presented = read_token(made.stdout.strip())
    assert presented is not None
    who = f"caller={getpass.getuser()} address={socket.gethostname()}"
    assert made.stderr.split(" ", 1)[1] == f"token_create {who} name=ada token_id={presented.id} outcome=ok\n"
    assert datetime.fromisoformat(made.stderr.split()[0]).tzinfo is not None
    revoked = token(database_url, "revoke", "ada")
    assert revoked.stderr.split(" ", 1)[1] == f"token_revoke {who} name=ada revoked=1 outcome=ok\n"


def test_tokens_are_listed_for_people(database_url: str) -> None:
    token(database_url, "create", "ada", "--manage", "*", "--expires-in", "60")
    token(database_url, "create", "bob")
    token(database_url, "revoke", "bob")
    ada, bob = token(database_url, "list").stdout.splitlines()
    assert ada.split()[0::2][:2] == ["ada", "valid"]
    assert ada.endswith("--manage *")
    assert bob.split()[0::2][:2] == ["bob", "revoked"]
    assert "never expires" in bob


def test_one_token_takes_the_place_of_another(database_url: str) -> None:
    token(database_url, "create", "ada", "--send", "old")
    new = token(database_url, "create", "ada", "--send", "new").stdout.strip()
    third = token(database_url, "create", "ada")
    assert third.exit_code == 1
    assert "token revoke ada --older" in third.stderr
    assert token(database_url, "revoke", "ada", "--older").stdout == "revoked 1\n"
    states = {row["id"]: row["state"] for row in json.loads(token(database_url, "list", "--json").stdout)}
    presented = read_token(new)
    assert presented is not None
    assert states.pop(presented.id) == "valid"
    assert list(states.values()) == ["revoked"]
    assert token(database_url, "revoke", "ada").stdout == "revoked 1\n"
    gone = token(database_url, "revoke", "ada")
    assert (gone.exit_code, "token list" in gone.stderr) == (1, True)


@pytest.mark.parametrize(
    "words",
    [
        ("create", "a b"),
        ("create", "*"),
        ("create", "-a"),
        ("create", "a", "--send", "a b"),
        ("create", "a", "--manage", "100%"),
        ("create", "a", "--receive", ""),
        ("create", "a", "--expires-in", "0"),
        ("create",),
        ("revoke",),
    ],
)
def test_what_cannot_be_meant_is_a_mistake_of_the_command_line(database_url: str, words: tuple[str, ...]) -> None:
    done = token(database_url, *words)
    assert done.exit_code == 2
    assert token(database_url, "list", "--json").stdout == "[]\n"


def test_a_database_that_is_not_there_is_named_in_one_line() -> None:
    done = run("token", "list", "--database-url", "postgresql://nobody@127.0.0.1:1/none")
    assert done.exit_code == 1
    assert "--database-url" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_without_tables_gets_them(empty_database_url: str) -> None:
    assert token(empty_database_url, "create", "first").exit_code == 0
    with psycopg.connect(empty_database_url) as connection:
        assert connection.execute("SELECT count(*) FROM broker.tokens").fetchone() == (1,)


async def test_of_a_name_two_are_made_and_not_more_however_many_ask(connect: Connect) -> None:
    connections = [await connect() for _ in range(6)]
    made = await asyncio.gather(
        *(tokens.create(connection, "ada", Grant(), None) for connection in connections), return_exceptions=True
    )
    assert sum(isinstance(each, str) for each in made) == 2


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder that PostgreSQL's account may enter."""
    with tempfile.TemporaryDirectory(prefix="wonderq-test-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        yield Path(folder) / "data"


def test_tokens_are_made_beside_a_broker_that_runs_its_own_postgresql(data_dir: Path) -> None:
    """The command joins the server of a data directory by its socket; the running broker lets the token in."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "DATABASE"))}
    words = [sys.executable, "-m", "broker"]
    folder = ["--data-dir", str(data_dir)]
    serving = [*words, "serve", "--port", "0", "--auth", "required", *folder]
    with subprocess.Popen(
        serving, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as broker:
        try:
            assert broker.stdout is not None
            url = broker.stdout.readline().split()[-1]
            create = [*words, "token", "create", "ada", "--manage", "*", *folder]
            made = subprocess.run(create, env=environment, capture_output=True, text=True, timeout=60, check=True)
            calling = {**environment, "BROKER_URL": url, "BROKER_TOKEN": made.stdout.strip()}
            call = [*words, "call", "list_queues"]
            done = subprocess.run(call, env=calling, capture_output=True, text=True, timeout=60, check=False)
            assert (done.returncode, done.stderr) == (0, "")
            refused = subprocess.run(
                call, env={**calling, "BROKER_TOKEN": ""}, capture_output=True, text=True, timeout=60, check=False
            )
            assert refused.returncode == 1
            assert "token" in refused.stderr
        finally:
            broker.terminate()
            broker.wait(60)
