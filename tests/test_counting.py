"""Counts: what is exact, how good estimates are, and how much is read for them.

Estimates are checked on tables a few times as large as a sample, with rows and pages counted and no time measured. A
sample takes the same blocks every time, so what is estimated without statistics is the same every time too; ANALYZE
takes others every time, and is allowed for by four times the deviation that its 30,000 rows have.
"""

from __future__ import annotations

import re
from statistics import mean, stdev
from typing import Any, cast

import pytest

from broker.model import FRESH, RETURNED, Counts
from broker.storage import counting, queues, totals
from broker.storage.counting import EXACT_UP_TO, FIRST_ENTRIES, LONGEST_WALK, Counted
from broker.storage.database import Connection
from conftest import Broker

# About 28 of these rows fill a block. `in_run` of them come one after the other in each of the queues in turn.
FILL = """
INSERT INTO broker.messages (
    queue_id, id, enqueued_at, visible_at, expires_at, first_received_at, lease_token, receive_count, body_bytes,
    lane, body
)
SELECT
    queues[1 + n / %(in_run)s %% cardinality(queues)], nextval('broker.message_ids'), now(),
    now() + %(visible_in)s * interval '1 second' + n * interval '1 microsecond',
    now() + %(expires_in)s::float8 * interval '1 second', now(), gen_random_uuid(), %(lane)s::int, 200,
    %(lane)s::int, to_json(repeat('x', 198))
FROM
    (SELECT array_agg(id ORDER BY name) FROM broker.queues WHERE name = ANY (%(queues)s)) AS q (queues),
    generate_series(0, %(messages)s::int - 1) AS n
"""

READY: dict[str, Any] = {"lane": FRESH, "visible_in": -100}
RETURNED_ONES: dict[str, Any] = {"lane": RETURNED, "visible_in": -100}
DELAYED: dict[str, Any] = {"lane": FRESH, "visible_in": 1000}
LEASED: dict[str, Any] = {"lane": RETURNED, "visible_in": 1000}
EXPIRED: dict[str, Any] = {"lane": FRESH, "visible_in": -500, "expires_in": -1}

# With so many rows a sample has a fourth of the table, or less.
MANY = 60_000


@pytest.fixture
async def table(connection: Connection) -> Connection:
    """A connection to an empty table that only this test analyses, and three queues."""
    await connection.execute("ALTER TABLE broker.messages SET (autovacuum_enabled = off, fillfactor = 100)")
    for name in ("work", "other"):
        await queues.create(connection, name, {})
    return connection


async def fill(
    connection: Connection,
    messages: int,
    *names: str,
    lane: int = FRESH,
    visible_in: float = -100,
    expires_in: float | None = None,
    in_run: int = 100,
) -> None:
    params = {"messages": messages, "queues": list(names or ("work",)), "lane": lane, "in_run": in_run}
    await connection.execute(FILL, {**params, "visible_in": visible_in, "expires_in": expires_in})


async def count(connection: Connection, name: str = "work") -> Counted:
    return (await counting.count(connection, [name]))[name]


async def many_queues(connection: Connection, how_many: int) -> list[str]:
    names = [f"q{n:04}" for n in range(how_many)]
    await connection.execute("INSERT INTO broker.queues (name) SELECT unnest(%s::text[])", [names])
    return names


class Spy:
    """Stands for a connection; adds up how many entries of the index were walked over."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.walked = 0

    async def execute(self, statement: str, params: Any = None) -> Any:
        if "entries" in (params or {}):
            cursor = await self._connection.execute(statement, params)
            self.walked += sum(alive + expired for _, _, _, _, alive, expired, *_ in await cursor.fetchall())
        return await self._connection.execute(statement, params)


async def walked(connection: Connection, names: list[str], entries: int) -> int:
    """Return how many entries are walked over to count these queues."""
    spy = Spy(connection)
    await counting.count(cast(Connection, spy), names, entries=entries)
    return spy.walked


# What is exact


async def test_each_status_is_exact_up_to_ten_thousand_however_large_the_table(table: Connection) -> None:
    await fill(table, MANY, "other")
    for how in (READY, DELAYED, LEASED):
        await fill(table, 10_000, **how)
    counted = await count(table)
    counts = counted.counts
    assert (counts.ready, counts.delayed, counts.leased) == (10_000, 10_000, 10_000)
    assert (counts.total, counts.exact) == (30_000, True)
    await fill(table, 1, **DELAYED)
    counted = await count(table)
    assert (counted.counts.ready, counted.counts.leased, counted.counts.exact) == (10_000, 10_000, False)
    assert counted.counts.delayed > 10_000
    assert counted.of_status("ready") == {"total": 10_000, "exact": True}
    assert counted.of_status("delayed")["exact"] is False


async def test_a_table_no_larger_than_a_sample_is_counted_exactly(table: Connection) -> None:
    await fill(table, EXACT_UP_TO + 5)
    await fill(table, EXACT_UP_TO + 3, "other", **LEASED)
    await fill(table, 1000, "other", **EXPIRED)
    await fill(table, 1000, "default")
    await table.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'default'")
    found = await counting.count(table, ["work", "other", "default"])
    assert set(found) == {"work", "other"}
    assert found["work"].counts == Counts(EXACT_UP_TO + 5, 0, 0, EXACT_UP_TO + 5, exact=True)
    assert found["other"].counts == Counts(0, 0, EXACT_UP_TO + 3, EXACT_UP_TO + 3, exact=True)
    everything = (await totals.count_all(table)).counts
    assert everything == Counts(EXACT_UP_TO + 5, 0, EXACT_UP_TO + 3, 2 * EXACT_UP_TO + 8, exact=True)


async def test_what_is_rare_among_very_many_messages_is_counted_exactly(table: Connection) -> None:
    """Whether the sample, which has one block in four, sees some of it, or none."""
    names = await many_queues(table, 300)
    await fill(table, MANY, names[-1])
    await fill(table, 3, names[100], **DELAYED)
    await fill(table, 2_002, names[200], **LEASED)
    await fill(table, 5, "default", **DELAYED)
    await table.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'default'")
    counted = await totals.count_all(table)
    assert (counted.counts.delayed, counted.counts.leased, counted.counts.exact) == (3, 2_002, False)
    assert counted.of_status("leased") == {"total": 2_002, "exact": True}
    assert counted.counts.ready == pytest.approx(MANY, rel=0.05)


async def test_a_few_messages_behind_thousands_of_expired_ones_are_counted_exactly(table: Connection) -> None:
    await fill(table, MANY, "other", **LEASED)
    await fill(table, 2 * EXACT_UP_TO, **EXPIRED)
    await fill(table, 5, **READY)
    await fill(table, 2, **RETURNED_ONES)
    counted = await count(table)
    assert counted.counts == Counts(7, 0, 0, 7, exact=True)
    assert counted.oldest_ready_age == pytest.approx(100, abs=30)
    everything = await totals.count_all(table)
    assert everything.of_status("ready") == {"total": 7, "exact": True}


# Estimates


async def test_statuses_are_told_apart_in_a_table_that_was_never_analysed_and_in_one_that_was(
    table: Connection,
) -> None:
    for how in (EXPIRED, READY, DELAYED, LEASED, RETURNED_ONES):
        await fill(table, 20_000, **how)
    await fill(table, 20_000, **READY)
    await fill(table, 30_000, "default")
    await table.execute("UPDATE broker.queues SET deleted_at = now() WHERE name = 'default'")
    for is_analysed in (False, True):
        if is_analysed:
            await table.execute("ANALYZE broker.messages")
        await check_estimates_of_every_status(table)


async def check_estimates_of_every_status(table: Connection) -> None:
    for counted in (await count(table), await totals.count_all(table)):
        counts = counted.counts
        assert counts.exact is False
        assert "ready" in counted.estimated
        assert counts.ready == pytest.approx(60_000, rel=0.1)
        assert counts.delayed == pytest.approx(20_000, rel=0.1)
        assert counts.leased == pytest.approx(20_000, rel=0.1)
        assert counts.total == counts.ready + counts.delayed + counts.leased


async def test_nothing_but_expired_messages_is_about_nothing(table: Connection) -> None:
    await fill(table, LONGEST_WALK + 20_000, **EXPIRED)
    counted = await count(table)
    assert counted.counts == Counts(0, 0, 0, 0, exact=False)
    assert counted.oldest_ready_age is None
    assert (await totals.count_all(table)).counts == Counts(0, 0, 0, 0, exact=False)
    # Some there are, but nobody knows since when: since the last expired one that was met, at most.
    await fill(table, 20_000)
    counted = await count(table)
    assert counted.counts.ready == pytest.approx(20_000, rel=0.1)
    assert counted.oldest_ready_age == pytest.approx(500, abs=30)


async def test_analyzed_shares_tell_queues_apart_of_which_a_sample_sees_too_little(table: Connection) -> None:
    """A hundred queues, whose messages came in runs of as many as fill three or four blocks."""
    names = await many_queues(table, 100)
    for how in (READY, LEASED):
        await fill(table, MANY // 2, *names, **how)

    async def furthest_off() -> float:
        found = await counting.count(table, names, entries=100 * FIRST_ENTRIES)
        figures = [figure for each in found.values() for figure in (each.counts.ready, each.counts.leased)]
        assert min(figures) >= FIRST_ENTRIES
        return max(abs(figure / 300 - 1) for figure in figures)

    assert await furthest_off() > 0.5
    await table.execute("ANALYZE broker.messages")
    assert await furthest_off() < 0.4


async def test_a_status_that_the_sample_has_missed_in_a_small_queue_is_taken_for_as_common_as_elsewhere(
    table: Connection,
) -> None:
    names = await many_queues(table, 100)
    for how in (LEASED, RETURNED_ONES):
        await fill(table, MANY // 2, *names, **how)
    await table.execute("ANALYZE broker.messages")
    found = await counting.count(table, names, entries=100 * FIRST_ENTRIES)
    figures = [figure for each in found.values() for figure in (each.counts.ready, each.counts.leased)]
    assert mean(figures) == pytest.approx(300, rel=0.05)
    # By the sample alone it is 69 here.
    assert stdev(figures) < 61


@pytest.mark.parametrize("change", ["filled", "drained"])
async def test_statistics_that_are_out_of_date_are_not_believed(table: Connection, change: str) -> None:
    if change == "filled":
        await fill(table, MANY, "other")
        await table.execute("ANALYZE broker.messages")
        await fill(table, MANY)
        expected = MANY
    else:
        await fill(table, MANY)
        await fill(table, MANY, "other")
        await table.execute("ANALYZE broker.messages")
        await table.execute("DELETE FROM broker.messages WHERE id > 15000 AND id <= %s", [MANY])
        expected = 15_000
    counts = (await count(table)).counts
    assert counts.exact is False
    assert counts.ready == pytest.approx(expected, rel=0.1)


async def test_queues_that_came_since_the_last_analyze_are_estimated_by_the_sample(table: Connection) -> None:
    names = await many_queues(table, 100)
    await fill(table, MANY, "other")
    await table.execute("ANALYZE broker.messages")
    await fill(table, 100 * 300, *names)
    found = await counting.count(table, names, entries=100 * FIRST_ENTRIES)
    assert sum(each.counts.ready for each in found.values()) == pytest.approx(30_000, rel=0.1)


async def test_a_queue_that_the_sample_misses_has_no_less_than_was_counted(table: Connection) -> None:
    names = await many_queues(table, 200)
    await fill(table, MANY, "other")
    await fill(table, 70 * 200, *names, in_run=70)
    found = await counting.count(table, names, entries=1)
    figures = [each.counts.ready for each in found.values()]
    assert FIRST_ENTRIES in figures
    assert min(figures) == FIRST_ENTRIES
    assert not any(each.counts.exact for each in found.values())


# What is read


async def test_many_queues_together_read_little_more_than_what_they_are_given(table: Connection) -> None:
    names = await many_queues(table, 100)
    await fill(table, 10_000, *names[:5])
    await fill(table, MANY, *names[5:])
    assert await walked(table, names[:5], 20_000) <= 20_000
    assert await walked(table, names, 20_000) <= 20_000
    # In any case so many of each.
    assert await walked(table, names, 0) == 100 * FIRST_ENTRIES
    # Those that are small leave what they do not need to those that are not.
    found = await counting.count(table, [*names[:5], "work", "other", "default"], entries=20_000)
    assert all(each.counts.exact for each in found.values())


async def test_the_metrics_show_an_estimate_of_what_is_many(table: Connection, broker: Broker) -> None:
    await fill(table, 7)
    await fill(table, MANY, "default", **LEASED)
    async with broker.http.get(f"{broker.url}/metrics") as response:
        text = await response.text()
    assert 'wonderq_queue_messages{queue="work",status="ready"} 7.0' in text
    found = re.search(r'wonderq_queue_messages\{queue="default",status="leased"\} (.*)', text)
    assert found is not None
    assert float(found[1]) == pytest.approx(MANY, rel=0.1)
