"""PostgreSQL as it is set up where strangers are near: TLS with a CA of one's own, scram-sha-256, and two roles.

The scripts of the compose file make certificates and roles; the commands are those of docs/security.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest
from psycopg import errors

import secrecy
from broker_process import DEADLINE, starting
from pair import ACCOUNT, PG_BIN, Node, folder_for_servers

DOCKER = Path(__file__).resolve().parent.parent.parent / "docker"
OWNER_PASSWORD, RUNTIME_PASSWORD = "the owner's own", "the broker's own"
# Only these tests come without TLS: to start and stop the server.
HBA = """
hostnossl all postgres 127.0.0.1/32 trust
hostssl wonderq wonderq_owner 127.0.0.1/32 scram-sha-256
hostssl wonderq wonderq_runtime 127.0.0.1/32 scram-sha-256
"""


@dataclass
class Secured:
    """A PostgreSQL that is reached by TLS and password alone."""

    node: Node
    folder: Path
    ca: Path

    def url(self, role: str, *, host: str = "localhost", ca: Path | None = None) -> str:
        """Return how to connect as a role, checking whom one talks to; the password comes by PGPASSWORD."""
        rest = f"sslmode=verify-full&sslrootcert={ca or self.ca}&connect_timeout=5"
        return f"postgresql://{role}@{host}:{self.node.port}/wonderq?{rest}"

    def wonderq(self, *words: str, url: str, password: str) -> subprocess.CompletedProcess[str]:
        """Run a command."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "PG"))}
        return subprocess.run(
            [sys.executable, "-m", "broker", *words],
            env=environment | {"DATABASE_URL": url, "PGPASSWORD": password},
            capture_output=True,
            text=True,
            timeout=DEADLINE,
            check=False,
        )

    def connect(self, role: str, password: str) -> psycopg.Connection[tuple[object, ...]]:
        return psycopg.connect(self.url(role), password=password, autocommit=True)


def certificates(folder: Path, *names: str) -> Path:
    """Let the compose file's script make certificates in a new folder; return it."""
    folder.mkdir()
    subprocess.run([str(DOCKER / "certificates.sh"), str(folder), *names], check=True, timeout=DEADLINE)
    if os.geteuid() == 0:
        shutil.chown(folder / "server.key", ACCOUNT)
    return folder


@pytest.fixture
async def secured() -> AsyncIterator[Secured]:
    with folder_for_servers() as folder:
        made = certificates(folder / "certificates", "localhost")
        node = Node(folder, "secured")
        node.settings = {
            "ssl": "on",
            "ssl_cert_file": str(made / "server.pem"),
            "ssl_key_file": str(made / "server.key"),
            "hba_file": str(folder / "pg_hba.conf"),
        }
        (folder / "pg_hba.conf").write_text(HBA)
        (folder / "pg_hba.conf").chmod(0o644)
        try:
            await node.make()
            await node.start()
            environment = {
                "PATH": f"{PG_BIN}:{os.environ['PATH']}",
                "PGHOST": "127.0.0.1", "PGPORT": str(node.port), "PGUSER": "postgres", "PGSSLMODE": "disable",
                "OWNER_PASSWORD": OWNER_PASSWORD, "RUNTIME_PASSWORD": RUNTIME_PASSWORD,
            }  # fmt: skip
            subprocess.run([str(DOCKER / "roles.sh")], env=environment, check=True, timeout=DEADLINE)
            secrecy.KNOWN.others.update({OWNER_PASSWORD, RUNTIME_PASSWORD})
            yield Secured(node, folder, made / "ca.pem")
            secrecy.keep(node.log)
        finally:
            await node.close()


async def test_a_broker_serves_with_a_role_that_may_not_change_the_schema_over_a_connection_that_it_has_checked(
    secured: Secured,
) -> None:
    owner, runtime = secured.url("wonderq_owner"), secured.url("wonderq_runtime")
    early = secured.wonderq("serve", "--port", "0", "--startup-timeout", "1", url=runtime, password=RUNTIME_PASSWORD)
    assert early.returncode == 1
    assert "run wonderq migrate --runtime-role wonderq_runtime as the role that owns it" in early.stderr
    migrated = secured.wonderq("migrate", "--runtime-role", "wonderq_runtime", url=owner, password=OWNER_PASSWORD)
    assert migrated.returncode == 0, migrated.stderr
    made = secured.wonderq(
        "token", "create", "ada", "--send", "*", "--receive", "*", url=owner, password=OWNER_PASSWORD
    )
    token = made.stdout.strip()
    secrecy.KNOWN.remember_token(token)
    async with starting(secured.folder) as start:
        broker = await (
            await start("--database-url", runtime, "--auth", "required", PGPASSWORD=RUNTIME_PASSWORD)
        ).ready()
        await one_life(broker.url, token)
        log = broker.log
    for word in (OWNER_PASSWORD, RUNTIME_PASSWORD, token, "one body"):
        assert word not in log + migrated.stdout + migrated.stderr + early.stderr
    with secured.connect("wonderq_owner", OWNER_PASSWORD) as connection:
        found = connection.execute("SELECT bool_and(ssl) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
                                   " WHERE usename = 'wonderq_owner'").fetchone()  # fmt: skip
        assert found == (True,)
        stored = connection.execute("SHOW password_encryption").fetchone()
        assert stored == ("scram-sha-256",)
    may_not = [
        "CREATE TABLE broker.mine ()", "CREATE TABLE public.mine ()", "CREATE SCHEMA mine", "CREATE ROLE mine",
        "ALTER TABLE broker.messages ADD COLUMN mine int", "DROP TABLE broker.messages", "TRUNCATE broker.messages",
        "INSERT INTO broker.tokens SELECT * FROM broker.tokens", "UPDATE broker.tokens SET revoked_at = NULL",
        "DELETE FROM broker.tokens", "INSERT INTO broker.migrations (number, name) VALUES (999, 'mine')",
        "CREATE FUNCTION broker.mine() RETURNS int LANGUAGE sql RETURN 1", "SET ROLE wonderq_owner",
    ]  # fmt: skip
    with secured.connect("wonderq_runtime", RUNTIME_PASSWORD) as connection:
        for statement in may_not:
            with pytest.raises(errors.InsufficientPrivilege):
                connection.execute(statement.encode())


async def one_life(url: str, token: str) -> None:
    """Send a message, take it and delete it."""

    async def call(method: str, **params: object) -> dict[str, Any]:
        asked = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        async with http.post(f"{url}/rpc", json=asked, headers={"Authorization": f"Bearer {token}"}) as response:
            result: dict[str, Any] = json.loads(await response.read())["result"]
            return result

    async with aiohttp.ClientSession() as http:
        await call("enqueue", body="one body")
        (message,) = (await call("dequeue"))["messages"]
        assert message["body"] == "one body"
        assert await call("delete", receipt=message["receipt"]) == {"deleted": True}


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("another CA", "certificate verify failed"),
        ("another name", "does not match host name"),
        ("a wrong password", "password authentication failed"),
        ("no TLS", "no pg_hba.conf entry"),
    ],
)
async def test_a_database_that_is_not_who_it_says_or_a_broker_that_is_not_is_refused_in_one_line(
    secured: Secured, what: str, says: str
) -> None:
    url = secured.url("wonderq_owner")
    if what == "another CA":
        url = secured.url("wonderq_owner", ca=certificates(secured.folder / "others", "localhost") / "ca.pem")
    elif what == "another name":
        url = secured.url("wonderq_owner", host="127.0.0.1")
    elif what == "no TLS":
        url = url.replace("verify-full", "disable")
    password = "wrong" if what == "a wrong password" else OWNER_PASSWORD
    for words in (("migrate",), ("serve", "--port", "0", "--startup-timeout", "0")):
        done = await asyncio.to_thread(secured.wonderq, *words, url=url, password=password)
        assert done.returncode == 1
        with contextlib.suppress(json.JSONDecodeError):
            assert OWNER_PASSWORD not in done.stderr
        last = done.stderr.splitlines()[-1]
        assert says in last
        assert "Traceback" not in done.stderr
