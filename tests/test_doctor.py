"""`wonderq doctor`: each finding, provoked on a real PostgreSQL that keeps what it commits."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from broker import __version__
from broker.cli import database_findings, findings
from broker.embedded import EmbeddedPostgres
from broker.storage import durability, examination
from broker.storage.durability import ServerFacts
from broker.storage.migrate import available_migrations, migrate
from broker.storage.sessions import Connection
from conftest import TEMPLATE, Broker, StartBroker, new_database, private_server, with_template
from outside import PATIENCE, without_database
from test_cli import run

NOBODY = "http://127.0.0.1:1"
NEWEST = available_migrations()[-1][0]


def make_durable(folder: Path, settings: Mapping[str, str]) -> EmbeddedPostgres:
    """Return a PostgreSQL that keeps what it commits, and can prepare transactions."""
    return EmbeddedPostgres(folder, settings={"max_prepared_transactions": "5", "max_connections": "200"})


@pytest.fixture(scope="module")
def test_server() -> Iterator[str]:
    """A server that is set as it should be, unlike that of the other tests; the fixtures that build on it follow."""
    with private_server(make_durable) as server, with_template(server) as conninfo:
        yield conninfo


@pytest.fixture
def database_url(test_server: str) -> Iterator[str]:
    with new_database(test_server, TEMPLATE) as conninfo:
        yield conninfo


Found = list[dict[str, Any]]


def look(url: str, database_url: str | None, *words: str, token: str | None = None) -> tuple[Found, int]:
    """Run doctor; return its findings and its exit code."""
    database = ["--database-url", database_url] if database_url else []
    env = {"BROKER_URL": url, "BROKER_DATA_DIR": "/nowhere", "BROKER_TOKEN": token}
    done = run("doctor", "--json", *database, *words, env={name: value for name, value in env.items() if value})
    assert done.stderr == ""
    found: Found = json.loads(done.stdout)["findings"]
    assert (done.exit_code == 1) == any(each["severity"] == "needs_action" for each in found)
    assert all(each["to_do"] for each in found if each["severity"] != "ok")
    return found, done.exit_code


async def doctor(broker: Broker | None, database_url: str | None, *, token: str | None = None) -> Found:
    """Run doctor while a broker runs in this process; return the findings."""
    url = NOBODY if broker is None else broker.url
    return (await asyncio.to_thread(look, url, database_url, token=token))[0]


def check(found: Found, severity: str, about: str, what: str, to_do: str = "") -> None:
    """Fail unless exactly one finding says this."""
    fitting = [each for each in found if each["about"] == about and what in each["what"]]
    assert [each["severity"] for each in fitting] == [severity], json.dumps(found, indent=1)
    assert to_do in (fitting[0]["to_do"] or "")


def abouts(found: Found, *, severity: str) -> set[str]:
    return {each["about"] for each in found if each["severity"] == severity}


# ----------------------------------------------------------------------------------------------------- all in order


async def test_where_all_is_well_nothing_needs_action(broker: Broker, database_url: str) -> None:
    found, code = await asyncio.to_thread(look, broker.url, database_url)
    assert (code, abouts(found, severity="needs_action")) == (0, set())
    areas = {"broker", "settings", "versions", "durability", "connections", "clock", "snapshots", "vacuum", "sweeper"}
    assert areas | {"database", "queues"} == abouts(found, severity="ok")
    # The tests connect as one.
    check(found, "note", "database", "is a superuser", "--runtime-role")


async def test_people_get_lines_with_what_to_do_and_a_sum(broker: Broker, database_url: str) -> None:
    env = {"BROKER_URL": broker.url, "DATABASE_URL": database_url}
    done = await asyncio.to_thread(run, "doctor", env=env)
    assert (done.exit_code, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["ok", "broker", broker.url]
    assert any(line.startswith("              → wonderq migrate --runtime-role") for line in lines)
    assert last == "0 findings need action; 1 note."


def test_an_embedded_database_is_joined_by_its_socket() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BROKER_", "DATABASE"))}
    with tempfile.TemporaryDirectory(prefix="wonderq-test-", ignore_cleanup_errors=True) as folder:
        os.chmod(folder, 0o755)
        data = ["--data-dir", f"{folder}/data"]
        serving = [sys.executable, "-m", "broker", "serve", "--port", "0", *data]
        with subprocess.Popen(
            serving, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as broker:
            try:
                assert broker.stdout is not None
                url = broker.stdout.readline().split()[-1]
                found, code = look(url, None, *data)
                assert (code, abouts(found, severity="note")) == (0, set())
                check(found, "ok", "durability", "on disk here")
            finally:
                broker.terminate()
                broker.wait(PATIENCE)


# ------------------------------------------------------------------------------------------------------- the broker


async def test_a_broker_that_is_away_needs_action_and_the_database_is_looked_at_all_the_same(database_url: str) -> None:
    found = await doctor(None, database_url)
    check(found, "needs_action", "broker", f"No broker answers at {NOBODY}", "wonderq serve")
    check(found, "ok", "versions", "up to date")


async def test_a_database_that_cannot_be_reached_is_a_note(broker: Broker, tmp_path: Path) -> None:
    check(await doctor(broker, None), "note", "database", "no database was named", "--database-url")
    found = await doctor(broker, f"host={tmp_path}")
    check(found, "note", "database", "Not looked at", "--database-url")
    assert abouts(found, severity="needs_action") == set()


async def test_what_is_no_broker_is_told(broker: Broker) -> None:
    async with serving_nonsense() as url:
        found = (await asyncio.to_thread(look, url, None))[0]
    check(found, "needs_action", "broker", "is no broker (HTTP 200)")


@asynccontextmanager
async def serving_nonsense() -> AsyncIterator[str]:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_broker_without_its_database_is_not_ready(
    start_broker: StartBroker, test_server: str, database_url: str
) -> None:
    broker = await start_broker(request_timeout=0.5)
    with without_database(test_server, database_url):
        found = await doctor(broker, database_url)
    check(found, "needs_action", "broker", "It is not ready")
    check(found, "note", "settings", "does not say how it is set")
    check(found, "note", "broker", "queues and subscriptions")


def test_writes_that_are_refused_and_losses_that_were_allowed_need_action() -> None:
    ready = {"status": "read_only", "writes_refused": "the standby is away", "durability": "at_risk"}
    facts = findings.BrokerFacts("http://127.0.0.1", livez={"version": __version__}, readyz=ready)
    what = [each.what for each in findings.broker_findings(facts) if each.severity == "needs_action"]
    assert len(what) == 2
    assert "writes are refused: the standby is away" in what[0]
    assert "--allow-data-loss" in what[1]


async def test_another_version_of_the_broker_is_noted(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "__version__", "99.0")
    check(await doctor(broker, None), "note", "versions", f"The broker is {__version__} and this wonderq is 99.0")


async def test_a_broker_for_everybody_on_an_open_address_needs_action(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "is_loopback", lambda url: False)
    check(await doctor(broker, None), "needs_action", "settings", "Whoever reaches the broker", "token create")
    # Who shows a token to a broker that wants none must not take it for safe.
    found = await doctor(broker, None, token="x" * 43)
    check(found, "needs_action", "settings", "Whoever reaches the broker")
    check(found, "note", "settings", "plain http", "--tls-certificate")


async def test_a_token_that_may_not_ask_is_told_and_one_that_may_gets_all(
    start_broker: StartBroker, database_url: str
) -> None:
    broker = await start_broker(auth="required")
    found = await doctor(broker, database_url)
    check(found, "note", "settings", "does not say how it is set", "--admin")
    check(found, "note", "broker", "queues and subscriptions")
    create = ["token", "create", "operator", "--admin", "--manage", "*", "--database-url", database_url]
    token = (await asyncio.to_thread(run, *create)).stdout.strip()

    async def is_let_in() -> bool:
        answer = await broker.http.post(
            f"{broker.url}/rpc",
            json={"jsonrpc": "2.0", "id": 1, "method": "get_server"},
            headers={"Authorization": f"Bearer {token}"},
        )
        return bool(answer.status == 200)

    async with asyncio.timeout(PATIENCE):
        while not await is_let_in():
            await asyncio.sleep(0.05)
    found = await doctor(broker, database_url, token=token)
    check(found, "ok", "settings", "It asks for tokens")
    check(found, "ok", "queues", "1 queue")


@pytest.mark.parametrize(
    ("url", "is_so"),
    [
        ("http://127.0.0.1:8080", True),
        ("http://[::1]:8080", True),
        ("http://localhost", True),
        ("http://10.0.0.1", False),
        ("https://broker.example", False),
    ],
)
def test_loopback_is_known_by_the_url(url: str, is_so: bool) -> None:
    assert findings.is_loopback(url) is is_so


# ------------------------------------------------------------------------------------------ queues and subscriptions


async def test_dead_letters_need_action_and_dropping_them_is_noted(broker: Broker, database_url: str) -> None:
    await broker.call("create_queue", queue="dead")
    await broker.call("create_queue", queue="mail", max_receives=3, dead_letter_queue="dead")
    await broker.call("create_queue", queue="careless", max_receives=2)
    found = await doctor(broker, None)
    check(found, "note", "dead letters", "What fails 2 times in careless is dropped", "--dead-letter-queue")
    assert abouts(found, severity="needs_action") == set()
    await broker.call("enqueue_batch", queue="dead", messages=[{"body": 1}, {"body": 2}])
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE broker.messages SET visible_at = now() - interval '3 hours'")
    found = await doctor(broker, None)
    check(found, "needs_action", "dead letters", "dead has 2 dead letters", "wonderq redrive dead")
    # Nobody is expected to receive them, so their age is no second finding.
    assert not [each for each in found if "has been ready" in each["what"]]


async def test_a_queue_that_is_paused_or_nearly_full_is_noted_and_a_full_one_needs_action(broker: Broker) -> None:
    await broker.call("create_queue", queue="still", paused=True)
    await broker.call("create_queue", queue="small", max_messages=10)
    await broker.call("enqueue", queue="still", body=1)
    await broker.call("enqueue_batch", queue="small", messages=[{"body": n} for n in range(9)])
    found = await doctor(broker, None)
    check(found, "note", "queues", "still is paused, and has 1 message", "--paused false")
    check(found, "note", "queues", "small is nearly full: 9 of 10", "max_messages")
    await broker.call("enqueue", queue="small", body=1)
    check(await doctor(broker, None), "needs_action", "queues", "small is full: 10 of 10")


async def test_what_has_been_ready_for_long_is_noted_and_for_an_hour_needs_action(
    broker: Broker, database_url: str
) -> None:
    await broker.call("enqueue", body=1)
    for minutes, severity, said in ((15, "note", "15 min"), (180, "needs_action", "3 h")):
        with psycopg.connect(database_url) as connection:
            then = "now() - %(minutes)s * interval '1 minute'"
            move = f"UPDATE broker.messages SET enqueued_at = {then}, visible_at = {then}"
            connection.execute(move, {"minutes": minutes})
        found = await doctor(broker, None)
        check(found, severity, "queues", f"The oldest message of default has been ready for {said}", "consumer")


async def test_an_endpoint_that_fails_or_has_ended_needs_action(start_broker: StartBroker, database_url: str) -> None:
    broker = await start_broker(webhook_allow=("127.0.0.0/8",))
    await broker.call("create_topic", topic="news")
    for name in ("fails", "gone", "fine"):
        await broker.call("subscribe", topic="news", name=name, url=f"http://127.0.0.1:9/{name}")
    with psycopg.connect(database_url) as connection:
        state = "UPDATE broker.subscriptions SET state = %s, probe_at = now() + interval '1 hour' WHERE name = %s"
        connection.execute(state, ["failing", "fails"])
        connection.execute(state, ["ended", "gone"])
    found = await doctor(broker, None)
    check(found, "needs_action", "subscriptions", "fails (topic news) takes no messages: http://127.0.0.1:9/fails")
    check(found, "needs_action", "subscriptions", "gone (topic news)", "unsubscribe --subscription-id")


async def test_of_many_findings_of_one_kind_the_first_are_told_and_the_others_counted(
    broker: Broker, database_url: str
) -> None:
    with psycopg.connect(database_url) as connection:
        connection.execute(
            "INSERT INTO broker.queues (name, max_receives) SELECT 'q' || n, 3 FROM generate_series(1, 100) n"
        )
    found = await doctor(broker, None)
    assert sum(each["about"] == "dead letters" for each in found) == findings.SHOWN + 1
    check(found, "note", "dead letters", "and 80 more of the same kind")


# ------------------------------------------------------------------------------------------------------ the database


async def test_settings_that_lose_messages_need_action(database_url: str) -> None:
    name = sql.Identifier(str(conninfo_to_dict(database_url)["dbname"]))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET synchronous_commit = off").format(name))
    check(await doctor(None, database_url), "needs_action", "durability", "synchronous_commit is off", "to on")


async def test_a_schema_that_is_behind_or_ahead_needs_action(database_url: str, empty_database_url: str) -> None:
    check(await doctor(None, empty_database_url), "needs_action", "versions", "migrated to 0", "wonderq migrate")
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO broker.migrations (number, name) VALUES (999, 'of the future')")
        check(await doctor(None, database_url), "needs_action", "versions", "by a newer version", "Install")
        connection.execute("DELETE FROM broker.migrations WHERE number >= %s", [NEWEST])
        check(await doctor(None, database_url), "needs_action", "versions", f"needs {NEWEST}", "wonderq migrate")


async def test_a_version_of_postgresql_that_is_too_old_needs_action_and_a_new_one_is_noted(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_findings, "OLDEST_SUPPORTED", 99)
    check(await doctor(None, database_url), "needs_action", "versions", "older than 99", "Upgrade")
    monkeypatch.setattr(database_findings, "OLDEST_SUPPORTED", 1)
    monkeypatch.setattr(database_findings, "NEWEST_TESTED", 1)
    check(await doctor(None, database_url), "note", "versions", "newer than 1")


async def test_another_database_than_the_brokers_is_noted(
    broker: Broker, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = durability.server_facts

    async def other(connection: Connection) -> ServerFacts:
        return replace(await real(connection), version="15.9 (Debian 15.9-1)")

    monkeypatch.setattr(examination, "durability", SimpleNamespace(server_facts=other))
    check(await doctor(broker, database_url), "note", "database", "and this is 15.9", "--database-url")


async def test_connections_that_are_nearly_used_up_need_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_findings, "NEARLY_ALL_CONNECTIONS", 0.0)
    check(await doctor(None, database_url), "note", "connections", "connections are in use", "max_connections")
    monkeypatch.setattr(database_findings, "MOST_CONNECTIONS", 0.0)
    check(await doctor(None, database_url), "needs_action", "connections", "connections are in use")


async def test_a_far_database_is_noted(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_findings, "SLOW_SECONDS", 0.0)
    check(await doctor(None, database_url), "note", "database", "A round trip to the database takes", "near")


@pytest.mark.parametrize(
    ("ahead", "severity", "said"),
    [
        (0, "ok", "agrees"),
        (-10, "note", "10.0 s ahead of"),
        (10, "note", "10.0 s behind"),
        (600, "needs_action", "10 min"),
    ],
)
async def test_a_clock_that_differs_is_noted_and_by_a_minute_needs_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch, ahead: float, severity: str, said: str
) -> None:
    """This machine's clock is set, as seen by doctor; the database's is left alone."""
    clock = SimpleNamespace(time=lambda: time.time() + ahead, monotonic=time.monotonic)
    monkeypatch.setattr(examination, "time", clock)
    check(await doctor(None, database_url), severity, "clock", said)


async def test_an_old_snapshot_is_noted_and_an_hour_of_it_needs_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database_url, application_name="a long report") as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1 FROM broker.queues")
        check(await doctor(None, database_url), "ok", "snapshots", "No old snapshot")
        monkeypatch.setattr(database_findings, "SNAPSHOT_NOTE_SECONDS", 0.001)
        pid = connection.info.backend_pid
        check(await doctor(None, database_url), "note", "snapshots", "a long report", f"pg_terminate_backend({pid})")
        monkeypatch.setattr(database_findings, "SNAPSHOT_ACTION_SECONDS", 0.001)
        check(await doctor(None, database_url), "needs_action", "snapshots", "a long report")


async def test_a_prepared_transaction_that_nobody_ends_needs_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT pg_current_xact_id()")
        connection.execute("PREPARE TRANSACTION 'left behind'")
        try:
            check(await doctor(None, database_url), "ok", "snapshots", "No old snapshot")
            monkeypatch.setattr(database_findings, "PREPARED_SECONDS", 0.0)
            found = await doctor(None, database_url)
        finally:
            connection.execute("ROLLBACK PREPARED 'left behind'")
    check(found, "needs_action", "snapshots", "left behind", "ROLLBACK PREPARED 'left behind'")


async def test_a_replication_slot_that_nobody_reads_is_noted_and_one_that_keeps_much_needs_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("SELECT pg_create_physical_replication_slot('old_standby', true)")
        try:
            drop = "pg_drop_replication_slot('old_standby')"
            check(await doctor(None, database_url), "note", "replication", "old_standby is read by nobody", drop)
            monkeypatch.setattr(database_findings, "SLOT_BYTES", 0)
            check(await doctor(None, database_url), "needs_action", "replication", "old_standby is read by nobody")
        finally:
            connection.execute(f"SELECT {drop}")


async def test_dead_rows_are_noted_and_many_of_them_need_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE broker.queues SET (autovacuum_enabled = off)")
        check(await doctor(None, database_url), "needs_action", "vacuum", "off for broker.queues", "RESET")
        connection.execute("INSERT INTO broker.queues (name) SELECT 'q' || n FROM generate_series(1, 500) n")
        connection.execute("DELETE FROM broker.queues WHERE name LIKE 'q%'")
        connection.execute("SELECT pg_stat_force_next_flush()")
    monkeypatch.setattr(database_findings, "DEAD_ROWS_NOTE", 500)
    check(await doctor(None, database_url), "note", "vacuum", "broker.queues has 500 dead rows", "VACUUM broker.queues")
    monkeypatch.setattr(database_findings, "DEAD_ROWS_ACTION", 500)
    check(await doctor(None, database_url), "needs_action", "vacuum", "it was vacuumed never")


async def test_indexes_that_are_much_larger_than_their_rows_are_noted(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_findings, "INDEX_BYTES", 1)
    found = await doctor(None, database_url)
    check(found, "note", "vacuum", "The indexes of broker.messages", "REINDEX TABLE CONCURRENTLY broker.messages")


async def test_autovacuum_that_is_off_and_rows_that_were_never_frozen_need_action(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = sql.Identifier(str(conninfo_to_dict(database_url)["dbname"]))
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER DATABASE {} SET track_counts = off").format(name))
    check(await doctor(None, database_url), "needs_action", "vacuum", "track_counts is off", "to on")
    monkeypatch.setattr(database_findings, "FROZEN_AGE", 0)
    check(await doctor(None, database_url), "needs_action", "vacuum", "was not frozen", "FREEZE")


async def test_a_database_that_no_broker_looks_after_is_noted_and_needs_action_in_the_end(database_url: str) -> None:
    swept = "UPDATE broker.sweeps SET ended_leases_seen_until = now() - %s * interval '1 minute'"
    with psycopg.connect(database_url, autocommit=True) as connection:
        for minutes, severity in ((1, "ok"), (10, "note"), (180, "needs_action")):
            connection.execute(swept, [minutes])
            what = "A broker looks after" if severity == "ok" else "No broker has looked after"
            check(await doctor(None, database_url), severity, "sweeper", what)


async def test_a_role_for_brokers_sees_less_and_is_told_so(database_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    await migrate(database_url, runtime_role="wonderq_runtime")
    as_role = make_conninfo(database_url, user="wonderq_runtime")
    with psycopg.connect(database_url) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT 1 FROM broker.queues")
        monkeypatch.setattr(database_findings, "OLD_TRANSACTIONS", 0)
        found = await doctor(None, as_role)
    check(found, "note", "database", "does not see what other sessions do", "GRANT pg_monitor TO wonderq_runtime")
    # Not since when, but that it is held.
    check(found, "needs_action", "snapshots", "transactions")
    check(found, "ok", "versions", "up to date")


async def test_what_a_role_may_not_ask_is_named(database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS stranger")
        connection.execute("CREATE ROLE stranger LOGIN")
    found = await doctor(None, make_conninfo(database_url, user="stranger"))
    check(found, "note", "database", "Not answered: the schema")
    check(found, "ok", "connections", "connections are in use")


async def test_doctor_writes_nothing(broker: Broker, database_url: str) -> None:
    with psycopg.connect(database_url, autocommit=True) as connection:
        assert await connection_is_read_only(database_url)
        before = connection.execute("SELECT count(*) FROM broker.queues").fetchone()
        await doctor(broker, database_url)
        assert connection.execute("SELECT count(*) FROM broker.queues").fetchone() == before


async def connection_is_read_only(database_url: str) -> bool:
    """Whether the connection that examines could write at all."""
    tried: list[BaseException] = []
    real = examination.Examiner.examine

    async def writing(self: examination.Examiner) -> examination.Facts:
        try:
            await self._connection.execute("DELETE FROM broker.queues")
        except psycopg.Error as error:
            tried.append(error)
        return await real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examination.Examiner, "examine", writing)
        await examination.examine(database_url)
    return isinstance(tried[0], psycopg.errors.ReadOnlySqlTransaction)
