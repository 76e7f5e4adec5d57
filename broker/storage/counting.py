"""How many messages there are: exact up to 10,000, beyond that an estimate.

A message that has expired and is held by nobody does not count, swept or not.

Counting walks the index of the lanes, through the past and the future part of each lane and never further than a
given number of entries: it costs the same in a queue of ten million as in one of ten thousand. What a walk did not
come to the end of is estimated, from two sources:

- A sample of the table: all rows of some hundred blocks, evenly spread. It knows what each row is now, needs no
  statistics, and is the whole table, and so exact, where that is small. Of a queue that has one message in a hundred
  it says little: its rows may lie in a handful of these blocks.
- How the messages are shared out among the lanes, as ANALYZE has found it, which looks at many more blocks. It knows
  nothing of what is ready, delayed, leased or expired by now. It is not asked where it was never run, nor believed
  where the walk or the sample contradicts it.

No estimate is less than what was counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import NamedTuple, Self

from broker.model import FRESH, LAST, RETURNED, Counts
from broker.storage.database import Connection
from broker.storage.messages import IS_ALIVE

# What one queue has of a status is counted to its end up to here.
EXACT_UP_TO = 10_000
# What a walk was too short for is walked through again where no more than this are expected of it; and further, where
# it met expired messages, which may hide how few there are behind them.
SHORT = 2 * EXACT_UP_TO
LONGEST_WALK = 40_000
# Entries that one call reads of the index: 200,000 take about 50 ms. Of each part of each queue it reads a few, in
# any case, so that small queues are always counted exactly.
ENTRIES_IN_A_CALL = 200_000
FIRST_ENTRIES = 51
# Blocks in a sample: more than half as many as this, or all that there are.
SAMPLED_BLOCKS = 1024

STATUSES = ("ready", "delayed", "leased")


class Part(NamedTuple):
    """The past or the future of a lane."""

    lane: int
    is_future: bool


STATUS = {
    Part(FRESH, is_future=False): "ready",
    Part(RETURNED, is_future=False): "ready",
    Part(FRESH, is_future=True): "delayed",
    Part(RETURNED, is_future=True): "leased",
    Part(LAST, is_future=False): "ready",  # none is: what lies there has used up its deliveries
    Part(LAST, is_future=True): "leased",
}


@dataclass(frozen=True)
class Counted:
    """What lies in a queue, or in all, and for how many seconds the oldest ready message of a queue has been ready.

    The figures of the statuses in `estimated` are estimates; the counts are exact where there are none.
    """

    counts: Counts
    oldest_ready_age: float | None
    estimated: frozenset[str]

    @classmethod
    def of(cls, figures: Mapping[str, int], age: float | None, estimated: Collection[str]) -> Self:
        """Add the figures of the statuses up; those of `estimated` are estimates."""
        counts = Counts(**figures, total=sum(figures.values()), exact=not estimated)
        return cls(counts, age, frozenset(estimated))

    def of_status(self, status: str) -> dict[str, int | bool]:
        """Return the figure of one status."""
        return {"total": getattr(self.counts, status), "exact": status not in self.estimated}


def walk_through(lanes: str, since: str, until: str, order: str = "") -> str:
    """Return a statement that walks through a part of lanes, not beyond %(entries)s of its entries."""
    return f"""
SELECT m.visible_at, {IS_ALIVE} AS is_alive
FROM broker.messages m
WHERE (m.queue_id * 4::bigint + m.lane) {lanes} AND m.lane >= 0
    AND m.visible_at > {since} AND m.visible_at <= {until}
{order}
LIMIT %(entries)s
"""


# No locks. One walk through each part of each queue, from its oldest entry.
_WALK = f"""
SELECT
    q.name, q.id, part.lane, part.is_future,
    met.alive, met.entries - met.alive, met.entries = %(entries)s,
    extract(epoch FROM statement_timestamp() - met.oldest)::float8,
    extract(epoch FROM statement_timestamp() - met.newest)::float8
FROM broker.queues q
CROSS JOIN unnest(%(lanes)s::int[], %(futures)s::boolean[]) AS part (lane, is_future)
CROSS JOIN LATERAL (
    SELECT
        count(*) AS entries,
        count(*) FILTER (WHERE e.is_alive) AS alive,
        min(e.visible_at) FILTER (WHERE e.is_alive) AS oldest,
        max(e.visible_at) AS newest
    FROM ({
    walk_through(
        "= q.id * 4::bigint + part.lane",
        "CASE WHEN part.is_future THEN statement_timestamp() ELSE '-infinity' END",
        "CASE WHEN part.is_future THEN 'infinity' ELSE statement_timestamp() END",
        "ORDER BY m.visible_at, m.id",
    )
}) AS e
) AS met
WHERE q.deleted_at IS NULL AND q.name = ANY (%(queues)s::text[])
"""


class _Walk(NamedTuple):
    """What a walk met: how many messages, how many expired ones; `is_cut` where it did not come to the end.

    For how many seconds the oldest message that it counted has been ready, and the newest entry that it met.
    """

    counted: int
    expired: int
    is_cut: bool
    oldest: float | None
    newest: float | None


@dataclass
class _Queue:
    """A queue while it is counted."""

    id: int
    walks: dict[Part, _Walk] = field(default_factory=dict)

    def cut(self) -> list[Part]:
        """Return the parts whose end no walk came to."""
        return [part for part, walk in self.walks.items() if walk.is_cut]


async def count(
    connection: Connection, queues: Sequence[str], *, entries: int = ENTRIES_IN_A_CALL
) -> dict[str, Counted]:
    """Return what lies in each queue; one that does not exist is missing.

    Reads about `entries` of the index. For one queue that is enough to be exact up to 10,000. Of many, each is exact
    up to 50, and those that have more share what is left.
    """
    if not queues:
        return {}
    found: dict[str, _Queue] = {}
    first = min(EXACT_UP_TO + 1, max(FIRST_ENTRIES, entries // (len(STATUS) * len(queues))))
    walked = await _walk(connection, found, queues, STATUS, first)
    cut = [queue.id * 4 + part.lane for queue in found.values() for part in queue.cut()]
    if not cut:
        return {name: _result(queue, None) for name, queue in found.items()}
    sample = await _sample(connection, cut)
    left = entries - walked
    if left >= 2 * first and not sample.is_everything:
        # Worth another walk is what may be exact after it.
        short = {
            (name, part): queue.walks[part].expired > 0
            for name, queue in found.items()
            for part in queue.cut()
            if sample.estimate(queue, part) <= SHORT
        }
        furthest = LONGEST_WALK if any(short.values()) else EXACT_UP_TO + 1
        further = min(furthest, left // max(1, len(short)))
        if short and further >= 2 * first:
            await _walk(connection, found, {name for name, _ in short}, {part for _, part in short}, further)
    return {name: _result(queue, sample) for name, queue in found.items()}


async def _walk(
    connection: Connection, found: dict[str, _Queue], queues: Collection[str], parts: Collection[Part], entries: int
) -> int:
    """Walk through these parts of these queues, `entries` of each at most; return how many there were."""
    params = {
        "queues": list(queues),
        "lanes": [part.lane for part in parts],
        "futures": [part.is_future for part in parts],
        "entries": entries,
    }
    walked = 0
    for name, queue_id, lane, is_future, *met in await (await connection.execute(_WALK, params)).fetchall():
        walk = _Walk(*met)
        found.setdefault(name, _Queue(queue_id)).walks[Part(lane, is_future)] = walk
        walked += walk.counted + walk.expired
    return walked


def _result(queue: _Queue, sample: _Sample | None) -> Counted:
    figures = dict.fromkeys(STATUSES, 0)
    estimated = set()
    for part, walk in queue.walks.items():
        if walk.is_cut and sample:
            figures[STATUS[part]] += sample.estimate(queue, part)
            if not sample.is_everything:
                estimated.add(STATUS[part])
        else:
            figures[STATUS[part]] += walk.counted
    return Counted.of(figures, _oldest_ready_age(queue) if figures["ready"] else None, estimated)


def _oldest_ready_age(queue: _Queue) -> float | None:
    """Return for how many seconds a message has been ready; at most, where too many expired ones lie before it."""
    ages = []
    for part, walk in queue.walks.items():
        age = walk.newest if walk.is_cut and walk.oldest is None else walk.oldest
        if STATUS[part] == "ready" and age is not None:
            ages.append(max(age, 0.0))
    return max(ages, default=None)


# The rows of a sample: those of one block out of every `stride`, a power of two, at a place in it that a hash gives.
# So they are spread evenly, and a queue whose messages came in one go is met in proportion; and they are the same
# blocks until the table has doubled, so that they are in memory, and what differs between two samples has changed.
# Plan: a range of ctids for each block. There is no other, because nothing in it is indexed, and sessions have
# sequential scans disabled.
SAMPLED = f"""
WITH size AS MATERIALIZED (
    SELECT t.blocks, s.stride, (t.blocks + s.stride - 1) / s.stride AS sampled
    FROM (SELECT pg_relation_size('broker.messages') / current_setting('block_size')::bigint AS blocks) AS t
    CROSS JOIN LATERAL (
        SELECT min(1::bigint << n) AS stride
        FROM generate_series(0, 40) AS n
        WHERE t.blocks <= {SAMPLED_BLOCKS}::bigint << n
    ) AS s
),
sample AS (
    SELECT n, met.lane, met.is_future, met.is_alive
    FROM size s
    CROSS JOIN LATERAL generate_series(0, s.sampled - 1) AS n
    CROSS JOIN LATERAL (SELECT n * s.stride + (hashint8(n) & (s.stride - 1)) AS number) AS block
    CROSS JOIN LATERAL (
        SELECT
            m.queue_id * 4::bigint + m.lane AS lane,
            m.visible_at > statement_timestamp() AS is_future,
            {IS_ALIVE} AS is_alive
        FROM broker.messages m
        WHERE m.ctid >= ('(' || block.number || ',0)')::tid AND m.ctid < ('(' || block.number + 1 || ',0)')::tid
        OFFSET 0
    ) AS met
),
"""

# The lanes that are asked for one by one, the others together as 0 and 1; `blocks` is in how many of them a row was.
_SAMPLE = (
    SAMPLED
    + """
in_block AS (
    SELECT
        n, CASE WHEN lane IN (SELECT unnest(%(lanes)s::bigint[])) THEN lane ELSE lane & 3 END AS lane,
        is_future, is_alive, count(*) AS rows
    FROM sample
    GROUP BY 1, 2, 3, 4
),
in_all AS (
    SELECT lane, is_future, is_alive, sum(rows)::bigint AS rows, count(*) AS blocks
    FROM in_block
    GROUP BY lane, is_future, is_alive
)
SELECT s.stride, s.sampled, a.lane, a.is_future, a.is_alive, a.rows, a.blocks
FROM size s
LEFT JOIN in_all a ON true
"""
)

# How many lanes there are (where negative: for each message), the commonest, and which share of all messages each of
# these has. Statistics of the index, whose first column is a number that no other knows. Of what is not to be had,
# because the table was never analysed, there is no row.
_SHARES = """
SELECT lanes, commonest, shares
FROM broker.lane_shares()
"""


class _State(NamedTuple):
    """What a row of a lane is."""

    is_future: bool
    is_alive: bool


@dataclass
class _Seen:
    """What a sample saw of a lane: how many rows in each state and in all, in how many blocks."""

    of_state: dict[_State, int] = field(default_factory=dict)
    rows: int = 0
    blocks: int = 0

    def add(self, state: _State, rows: int, blocks: int) -> None:
        self.of_state[state] = self.of_state.get(state, 0) + rows
        self.rows += rows
        self.blocks += blocks

    def rows_in_block(self) -> float:
        return self.rows / self.blocks if self.blocks else 0.0


@dataclass(frozen=True)
class _Shares:
    """Which share of all messages lies in each of the commonest lanes, and in each of the others."""

    common: Mapping[int, float]
    other: float

    def of(self, lane: int) -> float:
        return self.common.get(lane, self.other)


class _Sample:
    """What a sample of the table saw, and what it makes of that."""

    def __init__(self, stride: int, blocks: int) -> None:
        self.stride = stride
        self._blocks = blocks
        self._of_lane: defaultdict[int, _Seen] = defaultdict(_Seen)
        # Of all fresh lanes together, and of all returned ones.
        self._of_kind: defaultdict[int, _Seen] = defaultdict(_Seen)
        self.rows = 0
        self.shares: _Shares | None = None

    @property
    def is_everything(self) -> bool:
        """Whether this was the whole table."""
        return self.stride == 1

    def add(self, lane: int, state: _State, rows: int, blocks: int) -> None:
        self._of_lane[lane].add(state, rows, blocks)
        self._of_kind[lane & 3].add(state, rows, blocks)
        self.rows += rows

    def estimate(self, queue: _Queue, part: Part) -> int:
        """Return how many messages lie in a part whose end no walk came to: no fewer than were counted."""
        lane = queue.id * 4 + part.lane
        state = _State(part.is_future, is_alive=True)
        seen = self._of_lane[lane]
        if self.is_everything:
            return seen.of_state.get(state, 0)
        counted = queue.walks[part].counted
        in_lane = self._analysed(lane)
        walks = {is_future: queue.walks[Part(part.lane, is_future)] for is_future in (False, True)}
        if in_lane is None or in_lane < sum(walk.counted + walk.expired for walk in walks.values()):
            return max(counted, self.stride * seen.of_state.get(state, 0))
        # What lies in the lane, less what is known of it, is shared out in proportion to what the sample saw.
        weights = {
            _State(is_future, is_alive): max(met, self._weight(seen, part.lane, _State(is_future, is_alive)))
            for is_future, walk in walks.items()
            for is_alive, met in ((True, walk.counted), (False, walk.expired))
            if walk.is_cut or not is_alive
        }
        known = sum(walk.counted for walk in walks.values() if not walk.is_cut)
        return max(counted, round((in_lane - known) * weights[state] / sum(weights.values())))

    def _weight(self, seen: _Seen, kind: int, state: _State) -> float:
        """Return how many messages of a lane are in a state, by the sample and as if it had met the lane twice more.

        It may have met a small lane so seldom that it has missed this state; in these two blocks more the lane is like
        all lanes of its kind.
        """
        alike = self._of_kind[kind]
        more = 2 * (seen.rows_in_block() or alike.rows_in_block())
        return self.stride * (seen.of_state.get(state, 0) + more * alike.of_state.get(state, 0) / max(1, alike.rows))

    def _analysed(self, lane: int) -> float | None:
        """Return how many messages a lane has as ANALYZE found it; None where it is not known, or not so any more.

        In how many blocks a sample meets the lane varies by about the root of that number. What is three times as
        far from what it should have been was changed since.
        """
        if self.shares is None or not self.rows:
            return None
        seen = self._of_lane[lane]
        expected = self.shares.of(lane) * self.rows
        rows_in_block = seen.rows_in_block() or self.rows / self._blocks
        if abs(expected - seen.rows) > 3 * sqrt(max(expected, seen.rows) * rows_in_block):
            return None
        return expected * self.stride


async def _sample(connection: Connection, lanes: Sequence[int]) -> _Sample:
    """Look at a sample of the table for these lanes."""
    rows = await (await connection.execute(_SAMPLE, {"lanes": lanes})).fetchall()
    sample = _Sample(*rows[0][:2])
    for _, _, lane, is_future, is_alive, met, blocks in rows:
        if lane is not None:
            sample.add(lane, _State(is_future, is_alive), met, blocks)
    if not sample.is_everything:
        sample.shares = await _read_shares(connection, sample.stride * sample.rows)
    return sample


async def _read_shares(connection: Connection, messages: int) -> _Shares | None:
    row = await (await connection.execute(_SHARES)).fetchone()
    if row is None:
        return None
    distinct, lanes, shares = row
    common = dict(zip(lanes or (), shares or (), strict=True))
    others = (distinct if distinct >= 0 else -distinct * messages) - len(common)
    return _Shares(common, max(0.0, 1 - sum(common.values())) / others if others >= 1 else 0.0)
