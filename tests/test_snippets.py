"""Every command and every snippet of README.md and docs/ runs: each page's in its order, as `pasting.py` says.

What cannot be run is named here with its reason. Pages of which a test says more are left to that test.
"""

from __future__ import annotations

import json
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from conftest import Broker, StartBroker
from pasting import ROOT, RUN, Block, Pasting, blocks_of, can_run, is_as_shown

PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
# Shown, not run: what a command prints, what is sent and answered, files of other programs.
SHOWN = {"text", "json", "ini", "nginx", "caddyfile", "yaml", "http", "mermaid", ""}
# What a test of its own runs and says more of.
ELSEWHERE = {
    "docs/topics.md": "test_readme.py",
    "docs/client.md": "test_client_docs.py",
    "docs/cli.md": "test_every_example_in_the_help_does_what_it_shows",
    "docs/rpc.md": "test_the_examples_of_the_reference_are_calls_that_the_broker_understands",
}
# By page, and how the block begins.
NOT_RUN = {
    ("docs/operations.md", "pg_dump "): "test_backup.py",
    ("docs/operations.md", "pg_restore "): "test_backup.py",
    ("docs/tutorial.md", "python3 -m venv "): "loads packages: `make first-minute`",
    ("README.md", "pip install "): "loads packages: `make first-minute`",
    ("README.md", "make demo "): "steps of CI",
    ("README.md", "make test "): "steps of CI",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that the account may enter under which root's broker runs its PostgreSQL."""
    path = Path(tempfile.mkdtemp(prefix="wonderq-test-", dir="/tmp"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def to_run(page: str) -> list[Block]:
    """Return the blocks of a page that are pasted."""
    return [block for block in blocks_of(page) if (block.name or block.language in RUN) and is_run(block)]


def is_run(block: Block) -> bool:
    return can_run(block.language) and not any(is_meant(block, *key) for key in NOT_RUN)


def is_meant(block: Block, page: str, beginning: str) -> bool:
    return block.page == page and block.text.startswith(beginning)


def url_of(conninfo: str, **changed: str) -> str:
    """Return how to connect to a database as a URL that a shell takes for one word, as another `user` where given."""
    parts = {name: quote(str(value), safe="") for name, value in (conninfo_to_dict(conninfo) | changed).items()}
    return "postgresql://{user}@{host}:{port}/{dbname}".format_map(parts)


@pytest.fixture
def new_name(test_server: str) -> Iterator[str]:
    """A name for a role and a database that a page makes."""
    name = f"wonderq_page_{uuid.uuid4().hex[:12]}"
    yield name
    with psycopg.connect(test_server, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        with suppress(psycopg.errors.DependentObjectsStillExist):  # in the test's database, which goes away after it
            connection.execute(f"DROP ROLE IF EXISTS {name}")


def addresses(page: str, conninfo: str, new_name: str) -> dict[str, str]:
    """Return what stands on a page for a database of the reader's, and what it is here."""
    return {
        "docs/operations.md": {
            "postgresql://wonderq@db1,db2/wonderq": url_of(conninfo),
            "ROLE wonderq ": f"ROLE {new_name} ",
            "DATABASE wonderq OWNER wonderq ": f"DATABASE {new_name} OWNER {new_name} ",
        },
        "docs/security.md": {
            "postgresql://wonderq_owner@db.internal/wonderq?$secure": url_of(conninfo),
            "postgresql://wonderq_runtime@db.internal/wonderq?$secure": url_of(conninfo, user=new_name),
            "wonderq_runtime": new_name,
        },
    }.get(page, {})


# What is there already where a page is read.
PREPARED = {"docs/howto/send-in-a-transaction.md": "CREATE TABLE orders (id int PRIMARY KEY, state text)"}


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ELSEWHERE and to_run(page)])
async def test_the_snippets_of_a_page_work_when_pasted(
    page: str, folder: Path, start_broker: StartBroker, database_url: str, new_name: str
) -> None:
    blocks, port = to_run(page), free_port()
    environ = {
        "DATABASE_URL": url_of(database_url),
        # The server that all tests share does without fsync.
        "BROKER_ALLOW_DATA_LOSS": "yes",
        "BROKER_PORT": str(port),
        "BROKER_DATA_DIR": str(folder / "data"),
        "BROKER_LOG_FORMAT": "console",
    }
    exchanged = {":9000": f":{(receiver := free_port())}", ", 9000)": f", {receiver})"}
    if any(block.serves for block in blocks):
        url = f"http://127.0.0.1:{port}"
    else:
        url = (await start_broker(webhook_allow=("127.0.0.0/8",))).url
    environ["BROKER_URL"] = url
    exchanged |= {"http://127.0.0.1:8080": url} | addresses(page, database_url, new_name)
    if page in PREPARED:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(PREPARED[page])

    pasted = await Pasting(folder, environ, exchanged).run(blocks)

    assert pasted.code == 0, f"{pasted.printed}\n{pasted.complaints}"
    for block in blocks_of(page):
        if block.language == "text" and block.number - 1 in pasted.printed:
            printed = pasted.printed[block.number - 1]
            assert is_as_shown(block.text, printed), f"{page} shows\n{block.text}\nand this was printed:\n{printed}"


async def test_the_examples_of_the_reference_are_calls_that_the_broker_understands(
    broker: Broker, folder: Path
) -> None:
    """What they answer depends on what was done before; what is wrong with the call itself does not."""
    blocks = [block for block in blocks_of("docs/rpc.md") if block.language == "sh"]
    pasted = await Pasting(folder, {}, {"http://127.0.0.1:8080": broker.url}).run(blocks)
    assert pasted.code == 0, pasted.complaints
    assert len(pasted.printed) == len(blocks) > 30
    for printed in pasted.printed.values():
        answer = json.loads(printed)
        assert "result" in answer or answer["error"]["code"] > 0, answer


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_is_run_or_says_why_it_is_not(page: str) -> None:
    languages = {block.language for block in blocks_of(page)}
    assert languages <= RUN | SHOWN


def test_what_is_not_run_is_there() -> None:
    for page, beginning in NOT_RUN:
        (block,) = (block for block in blocks_of(page) if is_meant(block, page, beginning))
        assert NOT_RUN[page, beginning], block


async def test_a_snippet_that_fails_and_one_that_prints_something_else_are_noticed(folder: Path) -> None:
    failing = Block("page.md", 1, "sh", "true\nfalse\ntrue\n", None)
    printing = Block("page.md", 2, "python", "print('one 2 three')\n", None)
    assert (await Pasting(folder, {}, {}).run([failing])).code != 0
    pasted = await Pasting(folder, {}, {"one": "eins"}).run([printing])
    assert pasted.code == 0
    assert pasted.printed == {2: "eins 2 three\n"}
    assert is_as_shown("eins … three", pasted.printed[2])
    assert not is_as_shown("eins … vier", pasted.printed[2])
    assert not is_as_shown("eins …", "eins\n2 three")
    assert is_as_shown("a\n…\nd", "a\nb\nc\nd")
    assert is_as_shown("a\n…\nd", "a\nd\n")
    assert not is_as_shown("a\n…\nd", "a\nb\nc")
