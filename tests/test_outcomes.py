"""What a failure of PostgreSQL means to the caller, and what keeps a broker from waiting for ever.

What needs a standby, or a server that hangs, is in tests/faults/test_standby.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from psycopg.errors import lookup

from broker.errors import BrokerError, InternalError, Overloaded, Unavailable
from broker.storage import outcomes, queues, sessions
from broker.storage.breaker import NO_ANSWER, NO_STANDBY, Breaker
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database, translate
from broker.storage.durability import ServerFacts
from broker.storage.notifications import Notifications
from broker.storage.outcomes import LockedRows
from conftest import PATIENCE, Broker, Connect, StartBroker, new
from outside import eventually, locked


async def error_of(work: Awaitable[Any]) -> BrokerError:
    with pytest.raises(BrokerError) as raised:
        await work
    return raised.value


# ------------------------------------------------------------------------------------------------ the table

# As PostgreSQL documents them, and as they were seen to happen: not read from the table that is tested.
NOTHING_WAS_DONE = (
    "22001 23502 23505 23514 25006 25P02 25P03 40001 40P01 42501 42P01 53100 53200 53300 55P03 57014 57P03"
)
NOBODY_KNOWS = "08000 08003 08006 08P01 40003 57P01 57P02 57P05 58000 58030"


@pytest.mark.parametrize(
    ("state", "outcome"),
    [(state, "none") for state in NOTHING_WAS_DONE.split()] + [(state, "unknown") for state in NOBODY_KNOWS.split()],
)
def test_what_an_sqlstate_says_of_a_write(state: str, outcome: str) -> None:
    for is_sent in (False, True):
        failure = outcomes.failure(state, is_lost=True, is_sent=is_sent)
        assert failure.error(request_id="").outcome == outcome
        assert failure.error(is_write=False, request_id="").outcome == "none"


@pytest.mark.parametrize(("is_sent", "outcome"), [(False, "none"), (True, "unknown")])
def test_a_lost_connection_and_a_deadline_leave_in_doubt_only_what_was_sent(is_sent: bool, outcome: str) -> None:
    for error in (psycopg.OperationalError("gone"), psycopg.InterfaceError("the connection is closed")):
        translated = translate(error, is_sent=is_sent, is_write=True)
        assert (type(translated), translated.outcome) == (Unavailable, outcome)
        assert translate(error, is_sent=is_sent, is_write=False).outcome == "none"
    assert outcomes.late(is_sent=is_sent).error().outcome == outcome


def test_each_answer_has_its_class() -> None:
    """Who may try again is told so; what is our own mistake is not said to clients."""
    for state, kind in (
        ("23505", InternalError),
        ("53100", Unavailable),
        ("55P03", LockedRows),
        ("57P01", Unavailable),
    ):
        error = translate(lookup(state)("words of the server"), is_sent=True, is_write=True)
        assert type(error) is kind
        assert "words of the server" not in error.message
        assert error.data["retryable"] is (kind is not InternalError)


def test_an_answer_that_cannot_be_read_may_have_been_committed() -> None:
    error = translate(psycopg.DataError("cannot be loaded"), is_sent=True, is_write=True)
    assert (type(error), error.outcome) == (InternalError, "unknown")


async def test_a_terminated_session_leaves_its_write_in_doubt_and_not_its_read(
    database: Database, connect: Connect
) -> None:
    killer: Connection = await connect()

    async def sleep(connection: Connection) -> None:
        await connection.execute("SELECT pg_sleep(600) /* to be terminated */")

    for run, outcome in ((database.write, "unknown"), (database.read, "none")):
        failing = asyncio.create_task(error_of(run(sleep)))
        while not failing.done():
            await killer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE query LIKE '%to be terminated%' AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.01)
        assert (await failing).outcome == outcome


# ------------------------------------------------------------------------------------------------ connecting


def test_what_a_connection_string_leaves_open_has_a_default() -> None:
    made = conninfo_to_dict(sessions.with_defaults("postgresql://a,b:6432/c"))
    assert (made["host"], made["port"], made["target_session_attrs"]) == ("a,b", ",6432", "read-write")
    assert {"keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"} <= made.keys()


def test_a_connection_string_wins_over_the_defaults() -> None:
    given = "host=a target_session_attrs=any keepalives_idle=99 tcp_user_timeout=1"
    made = conninfo_to_dict(sessions.with_defaults(given))
    assert made.items() >= conninfo_to_dict(given).items()


@pytest.mark.parametrize(("given", "seconds"), [("", 5), ("2", 2), ("5", 5), ("60", 5), ("0", 5), ("-1", 5)])
def test_the_time_to_connect_is_bounded_whatever_was_said(given: str, seconds: int) -> None:
    made = conninfo_to_dict(sessions.with_defaults(f"host=a connect_timeout='{given}'" if given else "host=a"))
    assert int(str(made["connect_timeout"])) == seconds


@pytest.mark.parametrize(
    ("given", "reached", "hosts"),
    [
        ("host=a,b,c port=1,2,3", ("b", 2), ("b,a,c", "2,1,3")),
        ("host=a,b", ("b", 5432), ("b,a", None)),
        ("host=a,b port=7", ("b", 7), ("b,a", "7")),
        ("host=a,a port=1,2", ("a", 2), ("a,a", "2,1")),
        ("host=a,b port=1,", ("b", 5432), ("b,a", ",1")),
        ("host=a,b port=1,2", ("c", 1), ("a,b", "1,2")),
        ("host=a", ("a", 5432), ("a", None)),
        ("", ("/run/postgresql", 5432), (None, None)),
    ],
)
def test_the_server_that_was_reached_last_is_tried_first(
    given: str, reached: tuple[str, int], hosts: tuple[str | None, str | None]
) -> None:
    made = conninfo_to_dict(sessions.beginning_with(given, *reached))
    assert (made.get("host"), made.get("port")) == hosts


async def test_statements_of_a_connection_end_at_their_deadline(connection: Connection) -> None:
    with pytest.raises(psycopg.OperationalError), sessions.deadline(connection, 0.1):
        await connection.execute("SELECT pg_sleep(600)")


async def test_news_that_the_server_does_not_take_are_given_up_and_sent_on_a_new_connection(
    database: Database, test_server: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who listens takes part in a lock; where somebody else has it for himself, the statement does not end."""
    monkeypatch.setattr("broker.storage.notifications.ANSWER_SECONDS", 0.2)
    reconnected = asyncio.Event()
    news = Notifications(database, lambda _: None, reconnected.set)
    holder: Connection = await connect()
    await holder.execute("SELECT pg_advisory_lock(%s)", [0x57_6F_6E_64_65_72_4C])
    running = asyncio.create_task(news.run())

    async def gave_up() -> bool:
        assert not reconnected.is_set()
        pids.update(await waiting_listeners(holder))
        return len(pids) > 1

    pids: set[int] = set()
    await eventually(gave_up)
    await holder.execute("SELECT pg_advisory_unlock_all()")
    async with asyncio.timeout(PATIENCE):
        await reconnected.wait()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


async def waiting_listeners(observer: Connection) -> list[int]:
    cursor = await observer.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    )
    return [pid for (pid,) in await cursor.fetchall()]


# ------------------------------------------------------------------------------------------------ the breaker


async def test_whatever_waits_for_a_server_that_was_left_is_cut(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new connection finds another server than the one before; here it is told so."""
    listener = await database.connect()
    listening = asyncio.create_task(listener.execute("SELECT pg_sleep(600)"))

    async def elsewhere(connection: Connection) -> ServerFacts:
        return replace(DURABLE, started="elsewhere")

    async with locked(database_url, "broker.messages"):
        stuck = asyncio.create_task(error_of(database.write(count_messages, timeout=600)))
        await until(lambda: database._is_overdue(0))
        lost = database.lost_connections
        monkeypatch.setattr("broker.storage.durability.server_facts", elsewhere)
        newest = await database.connect()
        async with asyncio.timeout(PATIENCE):
            assert (await stuck).outcome == "unknown"
            with pytest.raises(psycopg.OperationalError):
                await listening
    assert database.lost_connections > lost, "low-water hints are of the other server"
    assert await one(newest) == (1,), "what has found it stays"
    assert await database.read(one) == (1,)
    for connection in (listener, newest):
        await connection.close()


@asynccontextmanager
async def open_database(conninfo: str, **settings: Any) -> AsyncIterator[Database]:
    database = Database(conninfo, **settings)
    await database.open(PATIENCE)
    try:
        yield database
    finally:
        await database.close()


@asynccontextmanager
async def watched(breaker: Breaker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[str | None]]:
    """Let a breaker run; yield what its looks have found."""
    found: list[str | None] = []
    take_note = breaker._found

    def noted(reason: str | None) -> None:
        found.append(reason)
        take_note(reason)

    monkeypatch.setattr(breaker, "_found", noted)
    running = asyncio.create_task(breaker.run())
    try:
        yield found
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def until(fact: Any) -> None:
    async with asyncio.timeout(PATIENCE):
        while not fact():
            await asyncio.sleep(0.01)


async def test_a_statement_that_waits_for_a_lock_is_looked_at_and_does_not_open_the_breaker(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.storage.breaker.OVERDUE_SECONDS", 0.05)
    monkeypatch.setattr("broker.storage.breaker.LOOK_EVERY_SECONDS", 0.02)
    async with open_database(database_url, request_timeout=PATIENCE) as database:
        async with watched(database.breaker, monkeypatch) as found:
            assert await Calls(database).enqueue("default", new(1))
            assert not found, "there was no reason to look"
            async with locked(database_url, "broker.messages"):
                waiting = asyncio.create_task(Calls(database).enqueue("default", new(2)))
                await until(lambda: len(found) > 5)
                assert not waiting.done()
            assert await waiting
        assert set(found) == {None}


async def test_a_server_that_does_not_answer_opens_the_breaker_until_it_does(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look itself is kept from answering, by a lock on what it reads: a statement of ours in its place."""
    monkeypatch.setattr("broker.storage.breaker.LOOK_SECONDS", 0.2)
    monkeypatch.setattr("broker.storage.breaker._LOOK", "SELECT false, ARRAY[]::text[] FROM broker.queues LIMIT 1")
    async with open_database(database_url, request_timeout=0.8) as database:
        openings = []
        database.breaker.opened.append(lambda: openings.append(database.breaker.reason))
        async with watched(database.breaker, monkeypatch), locked(database_url, "broker.queues"):
            error = await error_of(Calls(database).enqueue("default", new(1)))
            await until(lambda: database.breaker.reason)
        async with watched(database.breaker, monkeypatch):
            assert error.outcome == "unknown", "it was sent before"
            refused = await error_of(Calls(database).enqueue("default", new(2)))
            assert (type(refused), refused.data["outcome"]) == (Unavailable, "none")
            assert refused.data["retry_after"] > 0
            await until(lambda: database.breaker.reason is None)
            assert await Calls(database).enqueue("default", new(3))
        assert openings == [NO_ANSWER]


async def test_calls_that_wait_behind_stuck_ones_are_answered_when_the_breaker_opens(
    database: Database, database_url: str
) -> None:
    calls = Calls(database)
    async with locked(database_url, "broker.messages"):
        sent = [asyncio.create_task(calls.enqueue("default", new(n))) for n in range(2)]
        await until(lambda: calls._enqueue._under_way and not calls._enqueue._waiting)
        sent.append(asyncio.create_task(calls.enqueue("default", new(3))))
        await until(lambda: calls._enqueue._under_way == 2)
        waiting = [asyncio.create_task(error_of(calls.enqueue("default", new(n)))) for n in range(4, 7)]
        await until(lambda: calls._enqueue._waiting == 3)
        database.breaker._found(NO_STANDBY)
        async with asyncio.timeout(PATIENCE / 2):
            assert [error.outcome for error in await asyncio.gather(*waiting)] == ["none"] * 3
            assert (await error_of(calls.enqueue("default", new(8)))).outcome == "none"
        assert not any(each.done() for each in sent)
    assert all(await asyncio.gather(*sent)), "what was sent may still succeed"
    database.breaker._found(None)
    assert await calls.enqueue("default", new(7))


async def test_reads_are_served_while_every_write_is_stuck(database_url: str) -> None:
    async with open_database(database_url, connections=4, request_timeout=PATIENCE) as database:
        async with locked(database_url, "broker.messages"):
            stuck = [asyncio.create_task(database.write(count_messages)) for _ in range(20)]
            await until(lambda: database.writing.locked())
            for _ in range(20):
                assert await database.read(one) == (1,)
            database.breaker._found(NO_STANDBY)
            async with asyncio.timeout(PATIENCE / 2):
                assert (await error_of(database.write(one))).outcome == "none"
            database.breaker._found(None)
        await asyncio.gather(*stuck)


async def test_a_call_that_is_given_up_leaves_its_place_to_the_next(database_url: str) -> None:
    """One write at a time here: who waits comes when the one before is given up, whatever the server does with it."""
    async with open_database(database_url, connections=3, request_timeout=PATIENCE) as database:
        assert await database.write(one) == (1,)
        async with locked(database_url, "broker.messages"):
            await error_of(database.write(count_messages, timeout=0.5))
            assert await database.write(one) == (1,)


async def test_one_connection_is_enough_for_reads_and_writes(database_url: str) -> None:
    async with open_database(database_url, connections=1, request_timeout=PATIENCE) as database:
        assert await asyncio.gather(*(run(one) for run in (database.read, database.write) * 5)) == [(1,)] * 10


async def test_writes_that_wait_for_their_turn_are_bounded(database_url: str) -> None:
    async with open_database(database_url, connections=2, max_calls=3, request_timeout=PATIENCE) as database:
        async with locked(database_url, "broker.messages"):
            tasks = [asyncio.create_task(database.write(count_messages)) for _ in range(20)]
            await until(lambda: any(task.done() for task in tasks))
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(each) for each in answers} == {tuple, Overloaded}


async def one(connection: Connection) -> Any:
    return await (await connection.execute("SELECT 1")).fetchone()


async def count_messages(connection: Connection) -> Any:
    return await (await connection.execute("SELECT count(*) FROM broker.messages")).fetchone()


# ------------------------------------------------------------------------------------------------ what is said

DURABLE = ServerFacts("18.4", "1.5", "on", "on", "on", "")


@pytest.mark.parametrize(
    ("changed", "level", "named"),
    [
        ({}, "durable", ""),
        ({"synchronous_standby_names": "a"}, "replicated", ""),
        ({"synchronous_standby_names": "a", "synchronous_commit": "remote_apply"}, "replicated", ""),
        ({"synchronous_commit": "local"}, "durable", ""),
        ({"synchronous_commit": "local", "synchronous_standby_names": "a"}, "at_risk", "synchronous_commit is local"),
        ({"synchronous_commit": "off"}, "at_risk", "synchronous_commit is off"),
        ({"fsync": "off"}, "at_risk", "fsync is off"),
        ({"full_page_writes": "off", "synchronous_standby_names": "a"}, "at_risk", "full_page_writes is off"),
    ],
)
def test_the_level_is_what_the_settings_make_of_a_message(changed: dict[str, str], level: str, named: str) -> None:
    facts = replace(DURABLE, **changed)
    assert facts.level == facts.durability["level"] == level
    assert named in "; ".join(facts.risks)
    assert bool(facts.risks) is bool(named)


async def test_the_level_is_looked_at_anew_when_a_connection_is_made_anew(
    database: Database, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert database.facts is not None
    assert database.facts.synchronous_commit == "on"
    caplog.clear()
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        name = connection.info.dbname
        await connection.execute(f'ALTER DATABASE "{name}" SET synchronous_commit = off'.encode())
        await connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = %s AND pid <> pg_backend_pid()",
            [name],
        )
    assert await database.read(one) == (1,)
    assert database.facts.synchronous_commit == "off"
    assert "synchronous_commit is off" in caplog.text


async def test_readiness_and_metrics_say_level_and_breaker(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker()

    async def readiness() -> Any:
        async with broker.http.get(f"{broker.url}/readyz") as response:
            assert response.status == 200
            return await response.json()

    async def metrics() -> str:
        async with broker.http.get(f"{broker.url}/metrics") as response:
            return await response.text()

    level = (await broker.call("get_server"))["durability"]["level"]
    ready = await readiness()
    assert (ready["status"], ready["durability"], ready["writes_refused"]) == ("ready", level, None)
    text = await metrics()
    assert f'wonderq_durability{{level="{level}"}} 1.0' in text
    assert "wonderq_breaker_open 0.0" in text
    assert "wonderq_breaker_openings_total 0.0" in text

    # Nothing looks, and so nothing closes it.
    breaker = broker.server.database.breaker
    breaker._is_overdue = lambda _: False
    broker.server._services[0].cancel()
    breaker._found(NO_STANDBY)
    ready = await readiness()
    assert (ready["status"], ready["writes_refused"]) == ("read_only", NO_STANDBY)
    text = await metrics()
    assert "wonderq_breaker_open 1.0" in text
    assert "wonderq_breaker_openings_total 1.0" in text
    error = await broker.error("enqueue", body=1)
    assert (error["code"], error["data"]["outcome"], error["data"]["retryable"]) == (-32001, "none", True)
    assert error["data"]["retry_after"] == 1
    assert NO_STANDBY in error["message"]
    assert (await broker.call("count_messages"))["total"] == 0
    breaker._found(None)
    assert (await broker.call("enqueue", body=1))["message_id"]


async def test_a_sweep_is_no_exception_from_the_breaker(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker(sweep_interval=0.02)
    failed = broker.server.metrics.sweeps.labels("failed")
    assert failed._value.get() == 0
    broker.server._services[0].cancel()
    broker.server.database.breaker._found(NO_STANDBY)
    await until(lambda: failed._value.get() > 0)
    broker.server.database.breaker._found(None)


# ------------------------------------------------------------------------------------------------ several transactions


async def test_a_call_of_several_transactions_never_says_that_nothing_was_done_after_the_first(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The breaker opens after the first write."""
    calls = Calls(database)
    write = database.write

    async def write_once(operation: Any, **options: Any) -> Any:
        try:
            return await write(operation, **options)
        finally:
            database.breaker._found(NO_STANDBY)

    await database.write(lambda connection: queues.create(connection, "gone", {}))
    for queue in ("default", "gone"):
        await calls.enqueue(queue, new(1, 2, 3))
    monkeypatch.setattr(database, "write", write_once)
    assert await queues.purge(database, "default") == (3, False)
    assert (await error_of(queues.purge(database, "default"))).outcome == "none"
    database.breaker._found(None)
    assert await queues.delete(database, "gone") == (0, False)
    assert (await error_of(queues.delete(database, "gone"))).outcome == "none"
    monkeypatch.undo()
    database.breaker._found(None)
    assert await queues.purge(database, "default") == (0, True)
    assert await queues.delete(database, "gone") == (3, True)
