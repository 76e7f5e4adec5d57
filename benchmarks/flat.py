"""The cells of `make bench-flat`: what lies in the queues must not make taking messages slower.

Rows are put into the table by INSERT … SELECT; over HTTP it would take hours. Each state is measured in turn with an
empty queue, in another database of the same PostgreSQL, that has just enough messages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import psycopg

from benchmarks.bench import Bench, create_queue, prepare, processes
from benchmarks.caller import Caller
from benchmarks.cells import RATE, SMALL, Plan, commit_milliseconds, rounds
from benchmarks.load import read_bodies, wrk
from benchmarks.processes import Server, one
from benchmarks.results import US, Cell, Check, Sample, percentile

QUEUE = "measured"
TAKEN = 10  # messages by one dequeue
WARM_UP = 40  # calls of dequeue that do not count
EMPTY = "empty queue"
LIMIT_MS = 50.0
# What was there an hour ago lies before what is enqueued now.
READY = "now() - interval '1 hour' + n * interval '100 microseconds'"
NEVER_SWEPT = ("--sweep-interval", "3600")

FILL = """
INSERT INTO broker.messages (
    queue_id, id, enqueued_at, visible_at, expires_at, first_received_at, lease_token, receive_count, lane,
    body_bytes, body
)
SELECT
    q.id, nextval('broker.message_ids'), {ready}, {visible}, {expires}, {received}, {token}, {lane}, {lane},
    octet_length(b.body), b.body::json
FROM generate_series(1, %(count)s) AS n
JOIN pool b ON b.i = n %% %(pool)s
JOIN broker.queues q ON q.name = {queue}
ORDER BY n
"""


def calls(bench: Bench) -> int:
    """Return how many times `dequeue` is called in a round."""
    return 20 if bench.options.smoke else 500


def fill(
    bench: Bench,
    conninfo: str,
    count: int,
    *,
    queue: str = f"'{QUEUE}'",
    visible: str = READY,
    expires: str = "NULL::timestamptz",
    leased: bool = False,
) -> None:
    """Put so many messages into the table, as if they had come an hour ago; `queue` and times are SQL."""
    statement = FILL.format(
        ready=READY,
        visible=visible,
        expires=expires,
        queue=queue,
        received=READY if leased else "NULL::timestamptz",
        token="gen_random_uuid()" if leased else "NULL::uuid",
        lane="1" if leased else "0",
    )
    bodies = read_bodies(bench.bodies(SMALL))
    began_at = time.monotonic()
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("CREATE TEMPORARY TABLE pool (i bigint, body text)")
        with connection.cursor().copy("COPY pool FROM STDIN") as copy:
            for n, body in enumerate(bodies):
                copy.write_row((n, body))
        connection.execute("ANALYZE pool")
        connection.execute(statement.encode(), {"count": count, "pool": len(bodies)})
    bench.progress(f"stored {count:,} messages in {time.monotonic() - began_at:.0f} s")


def settle(conninfo: str) -> None:
    """Do what autovacuum does after a while."""
    with psycopg.connect(conninfo, autocommit=True) as connection:
        connection.execute("VACUUM (ANALYZE) broker.messages")
        connection.execute("VACUUM (ANALYZE) broker.queues")
        connection.execute("CHECKPOINT")


def add_ready(bench: Bench, conninfo: str) -> None:
    """Put in just enough messages for all calls of a cell, ready and behind all others that are."""
    count = TAKEN * (calls(bench) * bench.options.rounds + 2 * WARM_UP)
    fill(bench, conninfo, count, visible="now() - interval '1 minute' + n * interval '1 microsecond'")


def dequeue_request(caller: Caller) -> bytes:
    return caller.request("dequeue", queue=QUEUE, max_messages=TAKEN, visibility_timeout=3600)


def timed_dequeues(caller: Caller, count: int) -> list[float]:
    """Return how many milliseconds each of so many calls took. Raises RuntimeError where one did not get all."""
    request = dequeue_request(caller)
    taken = []
    for _ in range(count):
        result, milliseconds = caller.timed(request)
        if len(result["messages"]) != TAKEN:
            raise RuntimeError(f"{len(result['messages'])} messages instead of {TAKEN}")
        taken.append(milliseconds)
    return taken


def add_latencies(cell: Cell, case: str, who: str, round_: int, taken: Sequence[float], **more: float) -> None:
    """Append a sample of latencies."""
    figures = {"p50_ms": percentile(taken, 0.5), "p99_ms": percentile(taken, 0.99), "max_ms": max(taken), **more}
    cell.samples.append(Sample(case, who, round_, figures))


@contextmanager
def prepared(bench: Bench, put: Callable[[str], None] | None = None, *flags: str) -> Iterator[Server]:
    """Run a broker on a database that was filled before by `put`, and has just enough messages behind that.

    It starts when all is there: a broker that saw an empty queue need not look for messages that come from the past.
    """
    with bench.cluster.database() as conninfo:
        prepare(conninfo, [QUEUE])
        if put is not None:
            put(conninfo)
        add_ready(bench, conninfo)
        settle(conninfo)
        with bench.broker_on(conninfo, *flags) as broker:
            yield broker


def compare(bench: Bench, cell: Cell, case: str, broker: Server, empty: Server) -> None:
    """Measure dequeue on a filled database and on an empty one, ten calls here and ten there in turn."""
    with Caller(broker.url) as filled_caller, Caller(empty.url) as empty_caller:
        first = timed_dequeues(filled_caller, 1)[0]
        timed_dequeues(filled_caller, WARM_UP)
        timed_dequeues(empty_caller, WARM_UP)
        for round_ in rounds(bench):
            filled_taken: list[float] = []
            empty_taken: list[float] = []
            for _ in range(calls(bench) // 10):
                filled_taken += timed_dequeues(filled_caller, 10)
                empty_taken += timed_dequeues(empty_caller, 10)
            add_latencies(cell, case, US, round_, filled_taken, first_ms=first)
            add_latencies(cell, case, EMPTY, round_, empty_taken)
    ratio = cell.ratio("p50_ms", (case, US), (case, EMPTY))
    cell.checks.append(Check(f"p50 ÷ empty queue, {case}", ratio, "×", at_most=1.15))
    cell.checks.append(Check(f"p99, {case}", cell.median(case, US, "p99_ms"), "ms"))
    bench.progress(f"{cell.name}: {case}: {ratio or 0:.2f} ×")


def flat_dequeue(bench: Bench, cell: Cell) -> None:
    """Dequeue of 10 with delayed, leased and expired messages, and with many queues."""
    million, queues = bench.rows(1_000_000), bench.rows(10_000)
    others = [f"other{n}" for n in range(queues)]
    later = "now() + interval '1 day' + n * interval '100 microseconds'"

    def in_many_queues(conninfo: str) -> None:
        prepare(conninfo, others)
        fill(bench, conninfo, million, queue=f"'other' || mod(n, {queues})")

    states: dict[str, Callable[[str], None]] = {
        f"{million:,} delayed": lambda conninfo: fill(bench, conninfo, million, visible=later),
        f"{million:,} in flight": lambda conninfo: fill(bench, conninfo, million, visible=later, leased=True),
        f"{queues:,} queues": in_many_queues,
    }
    for case, put in states.items():
        with prepared(bench, put, *NEVER_SWEPT) as broker, prepared(bench, None, *NEVER_SWEPT) as empty:
            compare(bench, cell, case, broker, empty)
    with expired(bench, million) as broker, prepared(bench, None, *NEVER_SWEPT) as empty:
        compare(bench, cell, f"{million:,} expired, not swept", broker, empty)


@contextmanager
def expired(bench: Bench, count: int) -> Iterator[Server]:
    """Yield a broker whose first and only sweep was before so many messages expired; they are given time for that."""
    seconds = 4 if bench.options.smoke else 120
    while True:
        put = partial(fill, bench, count=count, expires=f"now() + interval '{seconds} seconds'")
        with prepared(bench, put, *NEVER_SWEPT) as broker:
            with psycopg.connect(broker.conninfo) as connection:
                statement = "SELECT extract(epoch FROM max(expires_at) - clock_timestamp())::text FROM broker.messages"
                left = float(one(connection, statement))
            if left > 0:
                time.sleep(left + 0.5)
                yield broker
                return
        seconds *= 3
        bench.progress(f"they expired before the broker had started; the next ones have {seconds} s")


def flat_backlog(bench: Bench, cell: Cell) -> None:
    """Dequeue of 10, and the answers that people and dashboards ask for, with 10 million messages."""
    count = bench.rows(10_000_000)
    case = f"{count:,} backlog"
    with prepared(bench, lambda conninfo: fill(bench, conninfo, count)) as broker, prepared(bench) as empty:
        compare(bench, cell, case, broker, empty)
        with Caller(broker.url) as caller:
            requests = {
                "get_queue": caller.request("get_queue", queue=QUEUE),
                "count_messages of a queue": caller.request("count_messages", queue=QUEUE),
                "count_messages of all": caller.request("count_messages"),
            }
            for round_ in rounds(bench):
                for name, request in requests.items():
                    add_latencies(cell, case, name, round_, [caller.timed(request)[1] for _ in range(50)])
                add_latencies(cell, case, "/metrics", round_, [caller.get("/metrics") for _ in range(50)])
    for name in (*requests, "/metrics"):
        slowest = cell.median(case, name, "max_ms")
        cell.checks.append(Check(f"slowest of 50, {name}", slowest, "ms", at_most=LIMIT_MS))


def old_snapshot(bench: Bench, cell: Cell) -> None:
    """Dequeue of 10 before and after a million messages passed through, while one transaction sees them all."""
    count = bench.rows(1_000_000)
    case = f"{count:,} messages pass through"
    bodies = read_bodies(bench.bodies(SMALL))
    with bench.broker() as broker, psycopg.connect(broker.conninfo) as snapshot:
        bench.warm_up(broker)
        create_queue(broker, QUEUE)
        snapshot.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        snapshot.execute("SELECT count(*) FROM broker.queues")
        oldest = oldest_seen(broker.conninfo, snapshot)
        for who, goal in (("at the start", 0), ("at the end", count)):
            passed, began_at = 0, time.monotonic()
            while passed < goal:
                tally = wrk(
                    "life", broker.url, 8, 10 if not bench.options.smoke else 1,
                    queue=QUEUE, batch=100, bodies=bench.bodies(SMALL),
                )  # fmt: skip
                passed += tally.messages
                if tally.errors or not tally.messages:
                    raise RuntimeError(f"messages do not pass through: {tally.errors}")
            if goal:
                bench.progress(f"{passed:,} messages passed through in {time.monotonic() - began_at:.0f} s")
            with Caller(broker.url) as caller:
                dequeues_of_enqueued(caller, bodies, WARM_UP)
                for round_ in rounds(bench):
                    # Shows whether the machine was as fast at the end as at the start.
                    taken = commit_milliseconds(broker.conninfo, calls(bench))
                    add_latencies(cell, case, f"durable commit {who}", round_, taken)
                    add_latencies(cell, case, who, round_, dequeues_of_enqueued(caller, bodies, calls(bench)))
        if oldest_seen(broker.conninfo, snapshot) != oldest:
            raise RuntimeError("the snapshot was not held until the end")
    ratio = cell.ratio("p50_ms", (case, "at the end"), (case, "at the start"))
    cell.checks.append(Check("dequeue p50, at the end ÷ at the start", ratio, "×", at_most=1.3))


def oldest_seen(conninfo: str, snapshot: psycopg.Connection) -> str:
    """Return the oldest transaction whose work a session may still have to see, and so keeps vacuum from removing."""
    with psycopg.connect(conninfo) as connection:
        where = f"pid = {snapshot.info.backend_pid} AND backend_xmin IS NOT NULL"
        return one(connection, f"SELECT backend_xmin::text FROM pg_stat_activity WHERE {where}")


def dequeues_of_enqueued(caller: Caller, bodies: Sequence[str], count: int) -> list[float]:
    """Enqueue what is then taken, ten by ten, and deleted; return the milliseconds of each dequeue."""
    request, taken = dequeue_request(caller), []
    messages = [{"body": json.loads(body)} for body in bodies[: TAKEN * 10]]
    for _ in range(count // 10):
        caller.call("enqueue_batch", queue=QUEUE, messages=messages)
        for _ in range(10):
            result, milliseconds = caller.timed(request)
            taken.append(milliseconds)
            receipts = [message["receipt"] for message in result["messages"]]
            if len(receipts) != TAKEN:
                raise RuntimeError(f"{len(receipts)} messages instead of {TAKEN}")
            caller.call("delete_batch", receipts=receipts)
    return taken


# What the second migration sets, and the same without a part of it.
TABLE_SETTINGS = {
    US: "",
    "autovacuum's defaults": """
        ALTER TABLE broker.messages RESET (
            autovacuum_vacuum_scale_factor, autovacuum_vacuum_threshold, autovacuum_vacuum_cost_limit
        )
    """,
    "fillfactor 100": "ALTER TABLE broker.messages SET (fillfactor = 100)",
}


def table_settings(bench: Bench, cell: Cell) -> None:
    """Messages pass through in batches beside a backlog, with the settings of the table and without a part of them."""
    backlog = bench.rows(1_000_000)
    case = f"beside {backlog:,} messages"
    seconds = 1 if bench.options.smoke else 150
    for who, statement in TABLE_SETTINGS.items():
        with bench.cluster.database() as conninfo:
            prepare(conninfo, ["backlog", QUEUE])
            with psycopg.connect(conninfo, autocommit=True) as connection:
                connection.execute(statement.encode())
            fill(bench, conninfo, backlog, queue="'backlog'")
            settle(conninfo)
            before, _ = size_and_vacuums(conninfo)
            with bench.broker_on(conninfo) as broker:
                bench.warm_up(broker)
                load = partial(
                    wrk, "life", broker.url, 8, seconds, queue=QUEUE, batch=100, bodies=bench.bodies(SMALL)
                )  # fmt: skip
                sample = bench.measure(cell, case, who, 1, load, processes(broker, bench.cluster))
            after, vacuums = size_and_vacuums(conninfo)
            sample.figures |= {"grown_megabytes": (after - before) / 1e6, "vacuums": vacuums}
    for who in list(TABLE_SETTINGS)[1:]:
        ratio = cell.ratio(RATE, (case, US), (case, who))
        cell.checks.append(Check(f"rate ÷ {who}", ratio, "×"))


def size_and_vacuums(conninfo: str) -> tuple[int, int]:
    """Return the bytes of the messages on disk, indexes included, and how often they were vacuumed by themselves."""
    with psycopg.connect(conninfo) as connection:
        statement = """
            SELECT pg_total_relation_size(relid), autovacuum_count
            FROM pg_stat_user_tables
            WHERE schemaname = 'broker' AND relname = 'messages'
        """
        row = connection.execute(statement).fetchone()
    assert row is not None, "the table is there"
    return row[0], row[1]


FLAT_PLANS = (
    Plan("flat-dequeue", "dequeue of 10 with delayed, leased, expired messages and many queues", flat_dequeue, True),
    Plan("flat-backlog", "dequeue of 10, and what dashboards ask, with 10 M backlog", flat_backlog, True),
    Plan(
        "table-settings", "batches beside 1 M backlog, with and without what the table is set to", table_settings, True
    ),
    Plan("old-snapshot", "an old snapshot held open while 1 M messages pass through", old_snapshot, True),
)
