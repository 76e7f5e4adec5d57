"""What happened in each minute: every figure by a real act, and what becomes of the rows.

Most tests ask a running broker until it has appended; those of rows write minutes that are long over.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import Counter
from datetime import datetime, timedelta
from typing import Any

import aiohttp
import msgspec
import pytest

from broker import tally as tallies
from broker.statistics import Statistics, tidy_once
from broker.storage import queues, statistics
from broker.storage.database import Connection, Database
from broker.tally import DEAD, DELETED, DELIVERED, ENQUEUED, EXPIRED, RETURNED, Rows, Tally
from broker_process import Start
from conftest import Broker, Connect, StartBroker
from outside import eventually, without_database
from receiver import receiving

KINDS = ("enqueued", "delivered", "deleted", "returned", "dead", "expired")


async def totals(broker: Broker, queue: str | None = "default", minutes: int = 15) -> dict[str, int]:
    """Return what has happened in the last minutes, without what has not."""
    answer = await broker.call("get_stats", queue=queue, minutes=minutes)
    counted: Counter[str] = Counter()
    for minute in answer["minutes"]:
        counted.update({kind: minute[kind] for kind in KINDS})
    return {kind: count for kind, count in counted.items() if count}


async def comes_to(broker: Broker, queue: str | None = "default", /, **expected: int) -> None:
    """Wait until so much has happened; what was appended last is not more."""

    async def has_come() -> bool:
        found.append(await totals(broker, queue))
        return found[-1] == expected

    found: list[dict[str, int]] = []
    try:
        await eventually(has_come)
    except TimeoutError:
        raise AssertionError(f"{found[-1]} and not {expected}") from None


async def now_of(connection: Connection) -> int:
    """Return the running minute, counted from 1970, on the database's clock."""
    row = await (await connection.execute("SELECT floor(extract(epoch FROM now()) / 60)::int")).fetchone()
    assert row is not None
    return int(row[0])


async def rows_of(connection: Connection) -> list[tuple[Any, ...]]:
    cursor = await connection.execute(
        "SELECT minute, queue_id, enqueued, queues, is_sum FROM broker.statistics ORDER BY minute, queue_id, is_sum"
    )
    return await cursor.fetchall()


def counts(**kinds: int) -> list[int]:
    return [kinds.get(kind, 0) for kind in KINDS]


# ------------------------------------------------------------------------------------------------ the answer


async def test_there_is_one_element_for_each_minute_oldest_first_with_zeros(
    broker: Broker, connection: Connection
) -> None:
    before = await now_of(connection)
    for minutes in (1, 15, 1440):
        answer = await broker.call("get_stats", minutes=minutes)
        assert answer["queue"] is None
        assert len(answer["minutes"]) == minutes
        starts = [datetime.fromisoformat(each["started_at"]) for each in answer["minutes"]]
        assert all(later - earlier == timedelta(minutes=1) for earlier, later in itertools.pairwise(starts))
        assert before <= starts[-1].timestamp() / 60 <= await now_of(connection)
        assert all(each == {"started_at": each["started_at"]} | dict.fromkeys(KINDS, 0) for each in answer["minutes"])
    assert len((await broker.call("get_stats"))["minutes"]) == 15


async def test_a_queue_that_does_not_exist_is_not_found(broker: Broker) -> None:
    assert (await broker.error("get_stats", queue="nowhere"))["code"] == 1001


async def test_what_is_older_than_was_asked_for_is_left_out(broker: Broker, connection: Connection) -> None:
    now = await now_of(connection)
    for minute, number in ((now - 9, 1), (now - 2, 10), (now - 1, 100), (now + 1, 1000)):
        await statistics.append(connection, {(minute, "default"): counts(enqueued=number)})
    shown = (await broker.call("get_stats", queue="default", minutes=3))["minutes"]
    # The minute may have ended meanwhile, and the next one become the running one.
    assert [each["enqueued"] for each in shown] in ([10, 100, 0], [100, 0, 1000])


# ------------------------------------------------------------------------------------------------ each figure


async def test_enqueued_counts_what_was_stored_once(broker: Broker) -> None:
    await broker.call("enqueue", body=1)
    await broker.call("enqueue_batch", messages=[{"body": 1}, {"body": 2}])
    for _ in range(2):
        await broker.call("enqueue", body=1, idempotency_key="once")
    assert "error" in await broker.answer("enqueue", body="x" * 5000)
    await comes_to(broker, "default", enqueued=4)
    await comes_to(broker, None, enqueued=4)


async def test_a_published_message_counts_in_the_queue_of_each_copy(broker: Broker) -> None:
    for queue in ("one", "two"):
        await broker.call("create_queue", queue=queue)
    for topic, delivery in (("now", "immediate"), ("later", "on_broadcast")):
        await broker.call("create_topic", topic=topic, delivery=delivery)
        for queue in ("one", "two"):
            await broker.call("subscribe", topic=topic, name=queue, queue=queue)
    await broker.call("publish", topic="now", body=1)
    await broker.call("publish", topic="later", body=1)
    await broker.call("publish", topic="later", body=2)
    await comes_to(broker, "one", enqueued=1)
    await broker.call("broadcast", topic="later")
    await comes_to(broker, "two", enqueued=3)
    await comes_to(broker, None, enqueued=6)


async def test_delivered_and_deleted_count_what_consumers_do(broker: Broker) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(6)])
    first = (await broker.call("dequeue", max_messages=4))["messages"]
    receipts = [message["receipt"] for message in first]
    await broker.call("delete", receipt=receipts[0])
    await broker.call("delete_batch", receipts=[receipts[1], receipts[1], "x"])
    await broker.call("delete", receipt=receipts[0])
    (message,) = (await broker.call("list_messages", status="ready", limit=1, queue="default"))["messages"]
    await broker.call("delete_message", queue="default", message_id=message["message_id"])
    await comes_to(broker, "default", enqueued=6, delivered=4, deleted=3)


async def test_what_is_delivered_at_most_once_is_deleted_too(broker: Broker) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(3)])
    await broker.call("dequeue", max_messages=2, delivery="at_most_once")
    await comes_to(broker, "default", enqueued=3, delivered=2, deleted=2)


async def test_what_was_pushed_counts_as_delivered_and_deleted(start_broker: StartBroker) -> None:
    broker: Broker = await start_broker(webhook_allow=("127.0.0.0/8",))
    async with receiving() as receiver:
        await broker.call("create_topic", topic="news")
        subscription = await broker.call("subscribe", topic="news", name="pushed", url=receiver.url)
        await broker.call("publish", topic="news", body=1)
        await comes_to(broker, subscription["queue"], enqueued=1, delivered=1, deleted=1)


async def test_a_lease_that_ends_counts_as_returned_whether_or_not_somebody_takes_the_message_again(
    broker: Broker,
) -> None:
    """The one is seen by the sweep, the other is taken by a consumer that waits, at the moment when the lease ends."""
    await broker.call("create_queue", queue="taken-again")
    for queue in ("default", "taken-again"):
        await broker.call("enqueue", queue=queue, body=1)
        await broker.call("dequeue", queue=queue, visibility_timeout=0.3)
    (message,) = (await broker.call("dequeue", queue="taken-again", wait=20))["messages"]
    assert message["receive_count"] == 2
    await comes_to(broker, "default", enqueued=1, delivered=1, returned=1)
    await comes_to(broker, "taken-again", enqueued=1, delivered=2, returned=1)


async def test_a_lease_that_a_sweep_has_seen_to_end_is_not_counted_again_at_the_next_delivery(
    broker: Broker,
) -> None:
    await broker.call("enqueue", body=1)
    (message,) = (await broker.call("dequeue"))["messages"]
    await broker.call("extend_visibility", receipt=message["receipt"], visibility_timeout=0)
    await comes_to(broker, "default", enqueued=1, delivered=1, returned=1)
    await broker.call("dequeue")
    await broker.call("enqueue", body=2)
    await comes_to(broker, "default", enqueued=2, delivered=2, returned=1)


async def test_what_a_client_that_hung_up_was_to_get_is_returned(
    start_broker: StartBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker: Broker = await start_broker()
    await broker.call("enqueue", body=1)
    monkeypatch.setattr("broker.rpc.client_has_hung_up", lambda request: True)
    with pytest.raises((aiohttp.ClientError, AssertionError)):
        await broker.call("dequeue")
    monkeypatch.undo()
    await comes_to(broker, "default", enqueued=1, delivered=1, returned=1)


@pytest.mark.parametrize("target", ["lost", None])
async def test_dead_counts_in_the_queue_whose_deliveries_were_used_up(broker: Broker, target: str | None) -> None:
    await broker.call("create_queue", queue="lost")
    await broker.call("create_queue", queue="work", max_receives=1, dead_letter_queue=target)
    await broker.call("enqueue", queue="work", body=1)
    await broker.call("dequeue", queue="work", visibility_timeout=0.05)
    await comes_to(broker, "work", enqueued=1, delivered=1, dead=1)
    if target is not None:
        assert (await broker.call("redrive", queue="lost"))["moved"] == 1
        await broker.call("enqueue", queue="lost", body=1)
        await comes_to(broker, "lost", enqueued=1)
        await comes_to(broker, "work", enqueued=1, delivered=1, dead=1)


async def test_expired_counts_in_the_queue_and_not_in_one_that_a_topic_shares_its_name_with(broker: Broker) -> None:
    await broker.call("create_queue", queue="same")
    await broker.call("create_topic", topic="same", delivery="on_broadcast")
    await broker.call("publish", topic="same", body=1, ttl=0.01)
    await broker.call("enqueue", queue="same", body=1, ttl=0.01)

    async def is_swept() -> bool:
        return b"wonderq_messages_expired_total 2.0" in broker.server.metrics.text()

    await eventually(is_swept)
    await comes_to(broker, "same", enqueued=1, expired=1)
    await comes_to(broker, None, enqueued=1, expired=1)


async def test_what_is_purged_is_not_deleted_by_anybody(broker: Broker) -> None:
    await broker.call("enqueue_batch", messages=[{"body": n} for n in range(3)])
    await broker.call("purge_queue", queue="default")
    await broker.call("enqueue", body=1)
    await comes_to(broker, "default", enqueued=4)


async def test_two_brokers_are_summed(start_broker: StartBroker) -> None:
    one, two = await start_broker(), await start_broker()
    await one.call("enqueue", body=1)
    await two.call("enqueue", body=2)
    (message,) = (await two.call("dequeue"))["messages"]
    await one.call("delete", receipt=message["receipt"])
    for broker in (one, two):
        await comes_to(broker, "default", enqueued=2, delivered=1, deleted=1)
        await comes_to(broker, None, enqueued=2, delivered=1, deleted=1)


async def test_a_queue_that_was_deleted_takes_its_figures_with_it(broker: Broker, connection: Connection) -> None:
    await broker.call("create_queue", queue="gone")
    await broker.call("enqueue", queue="gone", body=1)
    await comes_to(broker, "gone", enqueued=1)
    await broker.call("enqueue", queue="gone", body=1)
    await broker.call("delete_queue", queue="gone")
    assert (await broker.error("get_stats", queue="gone"))["code"] == 1001
    assert {queue_id for _, queue_id, *_ in await rows_of(connection)} == {statistics.ALL_QUEUES}
    # Another one of its name begins anew, also with what was not appended yet.
    await broker.call("create_queue", queue="gone")
    await broker.call("enqueue", queue="gone", body=1)
    await comes_to(broker, None, enqueued=3)
    assert await totals(broker, "gone") == {"enqueued": 1}


# ------------------------------------------------------------------------------------------------ what is not lost


@pytest.mark.parametrize("processes", [1, 2])
async def test_what_happened_just_before_sigterm_is_appended(
    start: Start,
    database_url: str,
    connection: Connection,
    processes: int,
) -> None:
    broker = await (await start("--processes", str(processes), DATABASE_URL=database_url)).ready()
    messages = [{"body": n} for n in range(7)]
    request = {"jsonrpc": "2.0", "id": 1, "method": "enqueue_batch", "params": {"messages": messages}}
    async with aiohttp.ClientSession() as http, http.post(f"{broker.url}/rpc", json=request) as response:
        assert "result" in await response.json()
    broker.signal(signal.SIGTERM)
    assert await broker.ended() == 0, broker.log
    shown = await statistics.read(connection, "default", 2)
    assert sum(minute.enqueued for minute in shown) == 7


async def test_what_was_counted_while_the_database_was_away_goes_to_its_minute(
    database: Database, test_server: str, database_url: str, connect: Connect
) -> None:
    tally = Tally()
    appender = Statistics(database, tally)
    began_at = time.time() // 60 * 60 - 300
    tally.hear_time(began_at)
    tally.add("default", ENQUEUED, 3)
    tally.add("default", DELETED)
    tally.hear_time(began_at + 60)
    tally.add("default", ENQUEUED)
    with without_database(test_server, database_url):
        for _ in range(3):
            assert await appender.append(0.2) == 0
        tally.add("default", ENQUEUED)

    async def is_back() -> int:
        return await appender.append()

    assert await eventually(is_back) == 2
    shown = [(each.enqueued, each.deleted) for each in await statistics.read(await connect(), "default", 8)]
    assert [each for each in shown if each != (0, 0)] == [(3, 1), (2, 0)]
    assert not tally


async def test_an_append_of_which_nobody_knows_whether_it_was_committed_is_not_repeated(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    tally = Tally()
    tally.add("default", ENQUEUED)
    # The rows wait for a lock until the deadline, when they have been sent already.
    async with connection.transaction():
        await connection.execute("LOCK TABLE broker.statistics IN ACCESS EXCLUSIVE MODE")
        assert await Statistics(database, tally).append(0.2) == 0
    assert not tally


# ------------------------------------------------------------------------------------------------ the tally


def test_what_was_counted_is_handed_out_once_by_minute_and_queue() -> None:
    tally = Tally()
    tally.hear_time(600.0)
    tally.add("a", ENQUEUED, 2)
    tally.add("a", DELIVERED)
    tally.add(7, DELETED)
    tally.hear_time(660.5)
    tally.add("a", ENQUEUED)
    assert tally.take() == {
        (10, "a"): counts(enqueued=2, delivered=1),
        (10, 7): counts(deleted=1),
        (11, "a"): counts(enqueued=1),
    }
    assert tally.take() == {}


def test_a_minute_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((5.0, 5.0, 5.4, 5.6, 65.4, 65.6))
    tally = Tally()
    monkeypatch.setattr("broker.tally.time.monotonic", lambda: next(times))
    tally.hear_time(659.5)
    for _ in range(5):
        tally.add("a", DEAD)
    assert tally.take() == {(10, "a"): counts(dead=2), (11, "a"): counts(dead=2), (12, "a"): counts(dead=1)}


def test_what_was_put_back_is_added_to_what_came_meanwhile() -> None:
    tally = Tally()
    tally.hear_time(600.0)
    tally.add("a", RETURNED)
    tally.add("b", EXPIRED)
    taken = tally.take()
    tally.add("a", RETURNED, 2)
    tally.put_back(taken)
    assert tally.take() == {(10, "a"): counts(returned=3), (10, "b"): counts(expired=1)}


def test_too_many_queues_are_counted_together_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tallies, "MOST_ROWS", 10)
    monkeypatch.setattr(tallies, "MOST_MINUTES", 3)
    tally = Tally()
    tally.hear_time(600.0)
    for n in range(25):
        tally.add(f"queue-{n}", ENQUEUED)
    assert len(tally) == 11
    for minute in range(11, 30):
        tally.hear_time(60.0 * minute)
        tally.add("late", ENQUEUED)
    assert len(tally) <= 13
    taken = tally.take()
    assert taken[29, None] == counts(enqueued=1)


# ------------------------------------------------------------------------------------------------ the rows


async def test_names_and_ids_of_one_queue_are_one_row_and_unknown_ones_count_for_all(connection: Connection) -> None:
    rows: Rows = {
        (5, "default"): counts(enqueued=1),
        (5, 1): counts(enqueued=10),
        (5, "nowhere"): counts(enqueued=100),
        (5, 77): counts(enqueued=1000),
        (5, None): counts(enqueued=10000),
    }
    await statistics.append(connection, rows)
    assert await rows_of(connection) == [(5, 0, 11111, 1, False), (5, 1, 11, 0, False)]


async def test_an_append_hears_the_time_of_the_database(connection: Connection) -> None:
    row = await (await connection.execute("SELECT extract(epoch FROM now())::float8")).fetchone()
    assert row is not None
    assert 0 <= await statistics.append(connection, {}) - row[0] < 30


async def test_minutes_that_are_over_are_summed_up_and_show_the_same(connection: Connection) -> None:
    await queues.create(connection, "other", {})
    now = await now_of(connection)
    for n in range(3):
        for minute in (now - 9, now - 8, now):
            rows: Rows = {(minute, "default"): counts(enqueued=1), (minute, "other"): counts(enqueued=10 + n)}
            await statistics.append(connection, rows)
    before = [await statistics.read(connection, queue, 60) for queue in ("default", "other", None)]
    assert await statistics.sum_up(connection) == 18
    assert await statistics.sum_up(connection) == 0
    after = [await statistics.read(connection, queue, 60) for queue in ("default", "other", None)]
    # A minute may have ended in between.
    assert [[each for each in shown if each.enqueued] for shown in after] == [
        [each for each in shown if each.enqueued] for shown in before
    ]
    summed = [row for row in await rows_of(connection) if row[-1]]
    assert [row[2:] for row in summed if row[1] == statistics.ALL_QUEUES] == [(36, 2, True)] * 2
    assert len(summed) == 6


async def test_two_that_sum_up_at_once_lose_nothing(connect: Connect) -> None:
    one, two = await connect(), await connect()
    now = await now_of(one)
    for n in range(40):
        await statistics.append(one, {(now - 10 - n % 4, "default"): counts(enqueued=1)})
    while any(await asyncio.gather(*(statistics.sum_up(each, 7) for each in (one, two)))):
        pass
    for queue in ("default", None):
        shown = await statistics.read(one, queue, 60)
        assert sum(each.enqueued for each in shown) == 40
    rows = await rows_of(one)
    assert all(is_sum for *_, is_sum in rows)
    assert sum(number for _, queue_id, _, number, _ in rows if queue_id == statistics.ALL_QUEUES) == len(
        [row for row in rows if row[1] == 1]
    )


async def test_what_is_older_than_a_day_is_removed(connection: Connection) -> None:
    now = await now_of(connection)
    for minute in (now - 3000, now - 1441, now - 1438, now):
        await statistics.append(connection, {(minute, "default"): counts(enqueued=1)})
    await tidy_once(connection)
    assert {minute for minute, *_ in await rows_of(connection)} == {now - 1438, now}


async def test_of_too_many_rows_the_oldest_of_single_queues_go_and_those_of_all_queues_stay(
    connection: Connection,
) -> None:
    for n in range(9):
        await queues.create(connection, f"queue-{n}", {})
    now = await now_of(connection)
    for minute in range(now - 20, now - 10):
        await statistics.append(connection, {(minute, f"queue-{n}"): counts(enqueued=1) for n in range(9)})
    await statistics.sum_up(connection)
    removed = 0
    while step := await statistics.trim(connection, 7, rows_kept=30):
        assert step <= 7
        removed += step
    rows = await rows_of(connection)
    assert removed == 63
    assert {minute for minute, queue_id, *_ in rows if queue_id} == set(range(now - 13, now - 10))
    assert [minute for minute, queue_id, *_ in rows if not queue_id] == list(range(now - 20, now - 10))


async def test_nobody_waits_for_who_tidies_up(connect: Connect) -> None:
    one, two = await connect(), await connect()
    now = await now_of(one)
    await statistics.append(one, {(now - 10, "default"): counts(enqueued=1)})
    async with one.transaction():
        assert await statistics.sum_up(one) == 2
        async with asyncio.timeout(20):
            assert await statistics.sum_up(two) == 0
            assert await statistics.trim(two) == 0
            await statistics.append(two, {(now - 10, "default"): counts(enqueued=2)})
            assert sum(each.enqueued for each in await statistics.read(two, "default", 60)) == 3
    assert sum(each.enqueued for each in await statistics.read(two, "default", 60)) == 3


async def test_a_broker_with_nothing_to_do_appends_nothing(start_broker: StartBroker, connection: Connection) -> None:
    broker: Broker = await start_broker(sweep_interval=0.01)
    assert await broker.server.statistics.append() == 0
    assert await rows_of(connection) == []


# ------------------------------------------------------------------------------------------------ plans

BY_QUEUE = "statistics_by_queue_and_minute"
BY_MINUTE = "statistics_by_minute"
UNSUMMED = "unsummed_statistics_by_minute"


class Explainer:
    """Stands for a connection: runs every statement under EXPLAIN ANALYZE as well, and keeps what was read."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.nodes: list[dict[str, Any]] = []

    async def execute(self, statement: str, params: Any = None) -> Any:
        async with self._connection.transaction(force_rollback=True):
            row = await (
                await self._connection.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + statement, params)
            ).fetchone()
        assert row is not None
        waiting = [msgspec.json.decode(row[0])[0]["Plan"]]
        while waiting:
            node = waiting.pop()
            waiting += node.get("Plans", [])
            if node.get("Relation Name") == "statistics" and node["Node Type"] != "ModifyTable":
                self.nodes.append(node)
        return await self._connection.execute(statement, params)

    def read(self) -> dict[str, float]:
        """Return how many rows were read by each index, or from the table itself."""
        found: Counter[str] = Counter()
        for node in self.nodes:
            name = node.get("Index Name", node["Node Type"])
            found[name] += int((node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"])
        self.nodes.clear()
        return dict(found)


@pytest.mark.parametrize("analyzed", ["empty", "full"])
async def test_whoever_asks_or_tidies_reads_what_it_needs_and_no_more(connection: Connection, analyzed: str) -> None:
    """A day of 300 queues, while the planner believes the table to be empty, and when it knows better."""
    await connection.execute("ALTER TABLE broker.statistics SET (autovacuum_enabled = off)")
    if analyzed == "empty":
        await connection.execute("ANALYZE broker.statistics")
    now = await now_of(connection)
    await connection.execute(
        """
        INSERT INTO broker.statistics
        SELECT m, q, 1, 1, 1, 1, 1, 1, CASE WHEN q = 0 THEN 300 ELSE 0 END, m < %(now)s - 2
        FROM generate_series(%(now)s - 1500, %(now)s) m, generate_series(0, 300) q
        """,
        {"now": now},
    )
    if analyzed == "full":
        await connection.execute("ANALYZE broker.statistics")
    explainer = Explainer(connection)
    as_connection: Any = explainer
    for queue in (None, "default"):
        await statistics.read(as_connection, queue, 15)
        assert set(found := explainer.read()) == {BY_QUEUE}
        assert found[BY_QUEUE] <= 15
    await statistics.sum_up(as_connection)
    found = explainer.read()
    # What was removed is read again where it lies.
    assert set(found) <= {UNSUMMED, "Tid Scan"}, found
    assert found.get(UNSUMMED, 0) <= 301 * 2
    await statistics.trim(as_connection, 1000)
    found = explainer.read()
    assert set(found) == {BY_QUEUE, BY_MINUTE, "Tid Scan"}, found
    assert (found[BY_QUEUE] <= 1440, found[BY_MINUTE], found["Tid Scan"]) == (True, 1000, 1000)
    await queues.create(connection, "gone", {})
    await statistics.forget_queues(as_connection, [77])
    found = explainer.read()
    assert set(found) == {BY_QUEUE}, found
    assert found[BY_QUEUE] <= 1501
