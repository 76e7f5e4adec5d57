"""Group commit: who shares a statement, who is kept out of it, and what becomes of each call.

Method: a statement is held back by a lock that the test holds, so that the calls which come meanwhile are gathered;
what a statement carried is recorded by the function that carries it out. Nothing sleeps to be sure.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from broker.errors import (
    BrokerError,
    InternalError,
    LeaseLost,
    MessageTooLarge,
    Overloaded,
    QueueFull,
    QueueNotFound,
    Unavailable,
)
from broker.model import MAX_BODY_BYTES_PER_ANSWER, NewMessage
from broker.storage import calls as calls_module
from broker.storage import group_commit, queues
from broker.storage.calls import Calls
from broker.storage.database import Connection, Database
from broker.storage.group_commit import GroupCommit
from broker.storage.handing_out import Delivery
from broker.storage.storing import Stored
from conftest import PATIENCE, Connect, new
from gate import GATE, gate_closed


class Statements:
    """Carries out calls that are numbers, and remembers which came together. A call of 0 fails in PostgreSQL."""

    def __init__(self) -> None:
        self.carried: list[list[int]] = []

    async def __call__(self, connection: Connection, calls: Sequence[int]) -> list[float | BrokerError | Any]:
        self.carried.append(list(calls))
        cursor = await connection.execute(
            "SELECT 1 / n FROM (SELECT pg_advisory_xact_lock_shared(%s)) AS gate, unnest(%s::int[]) AS n",
            [GATE, list(calls)],
        )
        return [n for (n,) in await cursor.fetchall()]


@pytest.fixture
async def keeper(connect: Connect) -> Connection:
    connection: Connection = await connect()
    return connection


@pytest.fixture
def patient_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let statements wait for the gate as if its lock were nobody's business."""
    monkeypatch.setattr("broker.storage.database.LOCK_TIMEOUT_MILLISECONDS", 60_000)


async def until(fact: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not fact():
            await asyncio.sleep(0.005)


def start(group: GroupCommit[int, float], *numbers: int, line: str = "q", **how: Any) -> list[asyncio.Task[float]]:
    return [asyncio.create_task(group.call(n, line=line, **how)) for n in numbers]


async def results(tasks: Sequence[Awaitable[Any]]) -> list[Any]:
    async with asyncio.timeout(PATIENCE):
        return await asyncio.gather(*tasks, return_exceptions=True)


# Who shares a statement


async def test_a_lone_call_is_a_statement_of_its_own(database: Database) -> None:
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=10)
    for n in (1, 1, 1):
        assert await group.call(n, line="q") == 1
    assert statements.carried == [[1], [1], [1]]


async def test_calls_that_arrive_together_share_a_statement(database: Database) -> None:
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=1000)
    assert await results(start(group, *[1] * 100)) == [1] * 100
    assert statements.carried == [[1] * 100]


async def test_what_comes_while_statements_are_under_way_becomes_the_next_one(
    database: Database, keeper: Connection, patient_for_long: None
) -> None:
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=1000)
    async with gate_closed(keeper):
        tasks = []
        for n in range(group_commit.STATEMENTS):
            tasks += start(group, 1, size=group_commit.PARALLEL_SIZE)
            await until(lambda n=n: len(statements.carried) == n + 1)  # type: ignore[misc]
        tasks += start(group, *range(1, 51))
        await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        assert len(statements.carried) == group_commit.STATEMENTS, "no more than these at once"
    answers = await results(tasks)
    assert answers[group_commit.STATEMENTS :] == [1] + [0] * 49
    assert statements.carried[group_commit.STATEMENTS] == list(range(1, 51))
    assert len(statements.carried) == group_commit.STATEMENTS + 1


async def test_the_watcher_hears_how_many_calls_each_statement_carried(database: Database) -> None:
    heard: list[tuple[int, float]] = []
    watch = lambda calls, seconds: heard.append((calls, seconds))  # noqa: E731
    group: GroupCommit[int, float] = GroupCommit(database, Statements(), max_calls=1000, watch=watch)
    began_at = time.perf_counter()
    await results(start(group, *[1] * 7))
    await results(start(group, 1))
    assert [calls for calls, _ in heard] == [7, 1]
    assert 0 < sum(seconds for _, seconds in heard) < time.perf_counter() - began_at


# Fairness and limits


async def test_queues_are_served_in_turn_whatever_waits_in_one_of_them(
    database: Database, keeper: Connection, patient_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STATEMENTS", 1)
    monkeypatch.setattr(group_commit, "MAX_SIZE", 4)
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=1000)
    async with gate_closed(keeper):
        tasks = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        tasks += start(group, *[10] * 20, line="busy")
        tasks += start(group, 20, 21, line="quiet")
        tasks += start(group, 30, line="other")
        await asyncio.sleep(0)
    await results(tasks)
    assert sorted(statements.carried[1]) == [10, 10, 20, 30]
    assert 21 in statements.carried[2]
    assert [len(carried) for carried in statements.carried[1:]] == [4, 4, 4, 4, 4, 3]


async def test_a_large_call_is_carried_alone_and_does_not_starve(
    database: Database, keeper: Connection, patient_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STATEMENTS", 1)
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=1000)
    async with gate_closed(keeper):
        tasks = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        tasks += start(group, 2, 3, line="a")
        tasks += start(group, 9, line="b", size=group_commit.MAX_SIZE + 1)
        tasks += start(group, 4, 5, line="a")
        await asyncio.sleep(0)
    await results(tasks)
    assert statements.carried[1:] == [[2], [9], [3, 4, 5]]


async def test_calls_of_one_queue_with_other_options_come_in_another_statement(
    database: Database, keeper: Connection, patient_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STATEMENTS", 1)
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=1000)
    async with gate_closed(keeper):
        tasks = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        tasks += start(group, 2, options=30) + start(group, 3, options=60) + start(group, 4, options=30)
        tasks += start(group, 5, line="another", options=60)
        await asyncio.sleep(0)
    await results(tasks)
    assert statements.carried[1:] == [[2, 5], [3], [4]]


async def test_too_many_calls_are_refused_and_those_of_a_quiet_queue_are_not(
    database: Database, keeper: Connection, patient_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STATEMENTS", 1)
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=10)
    async with gate_closed(keeper):
        first = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        flood = start(group, *[2] * 15, line="busy")
        await asyncio.sleep(0)
        quiet = start(group, 3, 3, line="quiet")
        await asyncio.sleep(0)
    assert await results(quiet) == [0, 0]
    assert await results(first) == [1]
    answers = await results(flood)
    assert answers[:8] == [0] * 8
    assert [type(answer) for answer in answers[8:]] == [Overloaded] * 7
    assert answers[8].data["outcome"] == "none"
    assert answers[8].data["retry_after"] > 0
    assert await results(start(group, 1)) == [1], "room again"


# What goes wrong


async def test_a_call_that_fails_spoils_none_of_its_neighbours(database: Database) -> None:
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=100)
    answers = await results(start(group, 1, 1, 0, 1, 0, 1))
    assert [type(answer) for answer in answers] == [int, int, InternalError, int, InternalError, int]
    assert {answer.data["outcome"] for answer in answers if isinstance(answer, InternalError)} == {"none"}
    assert answers[2] is not answers[4]
    assert statements.carried[0] == [1, 1, 0, 1, 0, 1]
    assert sorted(map(len, statements.carried[1:])) == [1] * 6


async def test_a_lost_connection_leaves_every_call_of_the_statement_unknown(
    database: Database, keeper: Connection, patient_for_long: None
) -> None:
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=100)
    async with gate_closed(keeper):
        tasks = start(group, 1, 1, 1)
        await until(lambda: len(statements.carried) == 1)
        blocked: list[Any] = []
        while not blocked:
            cursor = await keeper.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            blocked = await cursor.fetchall()
        answers = await results(tasks)
    assert [answer.data["outcome"] for answer in answers] == ["unknown"] * 3
    assert await results(start(group, 1)) == [1]


async def test_a_call_is_answered_by_its_deadline_and_says_whether_it_was_sent(
    database: Database, keeper: Connection, patient_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STATEMENTS", 1)
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=100)
    async with gate_closed(keeper):
        sent = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        monkeypatch.setattr(database, "request_timeout", 0.3)
        waiting = start(group, 1)
        (late,) = await results(waiting)
        assert isinstance(late, Unavailable)
        assert late.data["outcome"] == "none"
    assert await results(sent) == [1]
    assert statements.carried == [[1]], "what was answered in vain is not carried out any more"


async def test_a_caller_that_goes_away_before_its_call_is_sent_takes_it_along(
    database: Database, keeper: Connection, patient_for_long: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "STATEMENTS", 1)
    statements = Statements()
    abandoned: list[tuple[int, float]] = []
    group: GroupCommit[int, float] = GroupCommit(
        database, statements, max_calls=100, abandon=lambda call, result: abandoned.append((call, result))
    )
    async with gate_closed(keeper):
        sent = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        (waiting,) = start(group, 2)
        await asyncio.sleep(0)
        waiting.cancel()
        sent[0].cancel()
        await results([waiting, *sent])
    await until(lambda: bool(abandoned))
    assert await results(start(group, 3)) == [0]
    assert statements.carried == [[1], [3]]
    assert abandoned == [(1, 1)], "what was carried out for nobody is told"


# The calls themselves


async def test_consumers_that_ask_together_get_what_is_there_the_first_ones_first(calls: Calls) -> None:
    await calls.enqueue("default", new(*range(10)))
    deliveries: list[Delivery] = await results([calls.dequeue("default", 3, 30) for _ in range(5)])
    taken = [[int(bytes(message.body)) for message in delivery.messages] for delivery in deliveries]
    assert taken == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9], []]
    assert [len(delivery.leases) for delivery in deliveries] == [3, 3, 3, 1, 0]


async def test_consumers_of_many_queues_share_a_statement(database: Database, connect: Connect) -> None:
    heard: list[tuple[str, int]] = []
    calls = Calls(database, watch=lambda kind, carried, _: heard.append((kind, carried)))
    connection = await connect()
    for n in range(20):
        await queues.create(connection, f"q{n}", {})
    await results([calls.enqueue(f"q{n}", new(n)) for n in range(20)])
    deliveries = await results([calls.dequeue(f"q{n}", 1, None) for n in range(20)])
    assert [bytes(delivery.messages[0].body) for delivery in deliveries] == [str(n).encode() for n in range(20)]
    assert heard == [("enqueue", 20), ("dequeue", 20)]


async def test_consumers_with_different_visibility_timeouts_get_their_own(calls: Calls) -> None:
    await calls.enqueue("default", new(1, 2, 3))
    deliveries: list[Delivery] = await results([calls.dequeue("default", 1, seconds) for seconds in (30, 300, 30)])
    assert sorted(delivery.lease_seconds for delivery in deliveries) == [30, 30, 300]
    assert all(delivery.messages for delivery in deliveries)


async def test_an_answer_that_is_full_leaves_the_next_consumers_theirs(calls: Calls, connect: Connect) -> None:
    """Twelve bodies of one mebibyte, for three consumers that could take four each: eight fit into one statement."""
    await queues.create(await connect(), "large", {"max_message_bytes": 2**20})
    body = '"' + "x" * (2**20 - 2) + '"'
    for _ in range(12):
        await calls.enqueue("large", new(body))
    deliveries: list[Delivery] = await results([calls.dequeue("large", 4, 30) for _ in range(3)])
    assert [len(delivery.messages) for delivery in deliveries] == [4, 4, 4]
    size = sum(len(bytes(message.body)) for message in deliveries[0].messages)
    assert size <= MAX_BODY_BYTES_PER_ANSWER


async def test_one_refused_enqueue_refuses_no_other(calls: Calls, connect: Connect) -> None:
    connection = await connect()
    await queues.create(connection, "full", {"max_messages": 1})
    answers = await results(
        [
            calls.enqueue("full", new(1)),
            calls.enqueue("nowhere", new(2)),
            calls.enqueue("default", new(3, 4)),
            calls.enqueue("full", new(5)),
            calls.enqueue("default", [NewMessage('"' + "x" * 5000 + '"', None, None, None, None), *new(6)]),
            calls.enqueue("default", new(7)),
        ]
    )
    kinds = [answer.type if isinstance(answer, BrokerError) else len(answer.ids) for answer in answers]
    assert kinds == [1, "queue_not_found", 2, "queue_full", "message_too_large", 1]
    assert isinstance(answers[1], QueueNotFound)
    assert isinstance(answers[3], QueueFull)
    assert answers[4].index == 0
    delivery = await calls.dequeue("default", 10, 30)
    assert [bytes(message.body) for message in delivery.messages] == [b"3", b"4", b"7"]


async def test_a_message_that_somebody_has_locked_keeps_no_other_from_being_deleted(
    calls: Calls, connect: Connect
) -> None:
    holder = await connect()
    await calls.enqueue("default", new(*range(10)))
    held = (await calls.dequeue("default", 10, 30)).leases
    await holder.execute("BEGIN")
    await holder.execute(
        "SELECT FROM broker.messages WHERE id = ANY (%s) FOR UPDATE", [[lease.id for lease in held[:3]]]
    )
    deleting = [asyncio.create_task(calls.delete([lease])) for lease in held]
    assert await results(deleting[3:]) == [[True]] * 7
    # More of them wait than calls may be patient at one time; others go on all the same.
    await calls.enqueue("default", new(11))
    (lease,) = (await calls.dequeue("default", 1, 30)).leases
    assert await calls.delete([lease]) == [True]
    assert not any(task.done() for task in deleting[:3])
    await holder.execute("COMMIT")
    assert await results(deleting[:3]) == [[True]] * 3


async def test_of_the_same_receipt_in_two_calls_at_once_one_deletes(calls: Calls) -> None:
    await calls.enqueue("default", new(1))
    (lease,) = (await calls.dequeue("default", 1, 30)).leases
    answers = await results([calls.delete([lease]), calls.delete([lease, lease])])
    assert sorted(answer for each in answers for answer in each) == [False, False, True]


async def test_two_extensions_of_one_lease_at_once_end_with_the_shorter(calls: Calls) -> None:
    await calls.enqueue("default", new(1))
    (lease,) = (await calls.dequeue("default", 1, 30)).leases
    (long,), (short,) = await results([calls.extend([lease], 300), calls.extend([lease], 0)])
    assert long == short
    delivery = await calls.dequeue("default", 1, 30)
    assert len(delivery.messages) == 1
    ((lost,),) = await results([calls.extend([lease], 30)])
    assert isinstance(lost, LeaseLost)


async def test_returned_messages_do_not_starve_fresh_ones(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    await calls.enqueue("default", new(*["0"] * 30))
    held = (await calls.dequeue("default", 30, 30)).leases
    await calls.extend(held, 0)
    await calls.enqueue("default", new(*["1"] * 30))
    taken = [bytes((await calls.dequeue("default", 1, 30)).messages[0].body) for _ in range(15)]
    # The first hand-out was the one that took the thirty.
    assert [n for n, body in enumerate(taken, start=2) if body == b"1"] == [8, 16]
    assert calls_module.FRESH_FIRST_EVERY == 8


async def test_what_was_leased_for_a_caller_who_is_gone_is_told(database: Database, connect: Connect) -> None:
    undelivered: list[tuple[str, Delivery]] = []
    calls = Calls(database, undelivered=lambda queue, delivery: undelivered.append((queue, delivery)))
    await calls.enqueue("default", new(1))
    locker = await connect()
    await locker.execute("BEGIN")
    await locker.execute("LOCK TABLE broker.queues IN ACCESS EXCLUSIVE MODE")
    taking = asyncio.create_task(calls.dequeue("default", 1, 30))
    waiting: list[Any] = []
    while not waiting:
        cursor = await locker.execute(
            "SELECT pg_stat_clear_snapshot(), pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        waiting = await cursor.fetchall()
    taking.cancel()
    await results([taking])
    await locker.execute("COMMIT")
    # Whether the lock timeout came first decides if it was ever carried out.
    await asyncio.sleep(0.2)
    delivery = await calls.dequeue("default", 1, 30)
    told = [message for _, each in undelivered for message in each.messages]
    assert len(told) + len(delivery.messages) == 1


async def test_a_call_that_is_refused_takes_no_room_from_its_neighbours(calls: Calls, connect: Connect) -> None:
    await queues.create(await connect(), "small", {"max_messages": 5})
    large = NewMessage('"' + "x" * 5000 + '"', None, None, None, None)
    answers = await results([calls.enqueue("small", new(*range(6))), calls.enqueue("small", new(1))])
    assert [type(answer) for answer in answers] == [QueueFull, Stored]
    answers = await results([calls.enqueue("small", [*new(1, 2, 3), large]), calls.enqueue("small", new(1, 2, 3, 4))])
    assert [type(answer) for answer in answers] == [MessageTooLarge, Stored]


async def test_calls_that_wait_for_a_lock_leave_no_connection_behind(database_url: str, connect: Connect) -> None:
    """Whoever locks a message and goes for a walk must not use up the server's connections."""
    database = Database(database_url, request_timeout=0.5)
    await database.open(PATIENCE)
    calls = Calls(database)
    holder, observer = await connect(), await connect()
    await calls.enqueue("default", new(1))
    (lease,) = (await calls.dequeue("default", 1, 600)).leases
    await holder.execute("BEGIN")
    await holder.execute("SELECT FROM broker.messages FOR UPDATE")
    for _ in range(6):
        (answer,) = await results([calls.delete([lease])])
        assert isinstance(answer, Unavailable)
    waiting = [(99,)]
    async with asyncio.timeout(PATIENCE):
        while waiting != [(0,)]:
            await asyncio.sleep(0.1)
            cursor = await observer.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
            )
            waiting = await cursor.fetchall()
    await holder.execute("ROLLBACK")
    assert await calls.delete([lease]) == [True]
    assert database.lost_connections == 0, "what we have cut ourselves says nothing about the server"
    await database.close()


async def test_what_was_only_tried_with_others_was_not_sent(
    database: Database, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls wait for a lock as long as they may; the others wait for their turn, and nothing of them was done."""
    monkeypatch.setattr(database, "request_timeout", 1.0)
    calls = Calls(database)
    holder = await connect()
    await calls.enqueue("default", new(*range(4)))
    held = (await calls.dequeue("default", 4, 600)).leases
    await holder.execute("BEGIN")
    await holder.execute("SELECT FROM broker.messages FOR UPDATE")
    answers = await results([calls.delete([lease]) for lease in held])
    assert sorted(answer.data["outcome"] for answer in answers) == ["none", "none", "unknown", "unknown"]
    await holder.execute("ROLLBACK")


async def test_a_statement_that_takes_long_does_not_hold_up_the_next_one(
    database: Database, keeper: Connection, patient_for_long: None
) -> None:
    statements = Statements()
    group: GroupCommit[int, float] = GroupCommit(database, statements, max_calls=100)
    async with gate_closed(keeper):
        tasks = start(group, 1)
        await until(lambda: len(statements.carried) == 1)
        tasks += start(group, 2)
        await until(lambda: len(statements.carried) == 2)
    await results(tasks)
