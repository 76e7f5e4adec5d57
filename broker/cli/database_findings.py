"""What `wonderq doctor` finds in the database: from the facts of `storage.examination` to findings.

The bounds are where experience says that it begins to hurt, and each stands here with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from broker.cli.findings import Finding, clock
from broker.cli.output import count_of, duration
from broker.storage.examination import Facts, Snapshot, Table
from broker.storage.migrate import available_migrations

OLDEST_SUPPORTED, NEWEST_TESTED = 15, 18
# Every call waits for one of these at least.
SLOW_SECONDS = 0.01
# What is left are a few for people and for connections that are being replaced.
NEARLY_ALL_CONNECTIONS, MOST_CONNECTIONS = 0.75, 0.9
# A report runs for minutes; what runs for an hour lets tables grow.
SNAPSHOT_NOTE_SECONDS, SNAPSHOT_ACTION_SECONDS = 300.0, 3_600.0
# Where this role may not see since when: so many transactions later.
OLD_TRANSACTIONS = 1_000_000
# Between the two phases of a commit there are seconds.
PREPARED_SECONDS = 300.0
SLOT_BYTES = 2**30
# Vacuum begins at 10,000 dead rows and a hundredth of the table; it is far behind where these are more than the live.
DEAD_ROWS_NOTE, DEAD_ROWS_ACTION = 100_000, 1_000_000
# An index entry has some 30 bytes; three indexes, half filled.
INDEX_BYTES_A_ROW, INDEX_BYTES = 1_000, 2**30
# The server stops at 2 billion, and begins to hurry at 200 million.
FROZEN_AGE = 1_000_000_000
# The sweeper notes a time once a minute, however often it runs; the longest interval is an hour.
SWEEP_NOTE_SECONDS, SWEEP_ACTION_SECONDS = 300.0, 7_500.0


def database_findings(facts: Facts, broker_version: str | None, *, is_embedded: bool) -> list[Finding]:
    """Return what a database says; `broker_version` is the PostgreSQL that the broker says it uses, if it said."""
    return [
        *reach(facts, broker_version, is_embedded=is_embedded),
        *schema(facts),
        *durability(facts),
        *connections(facts),
        *clock("database", facts.clock_difference),
        *snapshots(facts),
        *slots(facts),
        *vacuum(facts),
        *sweeper(facts),
        *(Finding("note", "database", f"Not answered: {what}", "The role may not ask, or the server is busy.")
          for what in facts.unanswered),
    ]  # fmt: skip


def reach(facts: Facts, broker_version: str | None, *, is_embedded: bool) -> Iterable[Finding]:
    """How far the database is, who we are there, and which version it is."""
    assert facts.durability is not None, "it was asked first"
    version = facts.durability.version
    milliseconds = facts.seconds * 1000
    if facts.seconds >= SLOW_SECONDS:
        yield Finding(
            "note",
            "database",
            f"A round trip to the database takes {milliseconds:.1f} ms",
            "Every call waits for one at least: let the brokers run near the database. From the broker it may be less.",
        )
    else:
        yield Finding("ok", "database", f"PostgreSQL {version} answers in {milliseconds:.1f} ms")
    if broker_version is not None and broker_version.split()[0] != version.split()[0]:
        yield Finding(
            "note",
            "database",
            f"The broker uses PostgreSQL {broker_version}, and this is {version}: it may be another one",
            "Give doctor the --database-url or --data-dir of that broker.",
        )
    if is_embedded:
        return  # a superuser's, as it must be, and of a version that we brought along
    if facts.role is not None and facts.role.is_superuser:
        yield Finding(
            "note",
            "database",
            f"{facts.role.name} is a superuser; if brokers connect as it, they may do more than they need",
            "wonderq migrate --runtime-role NAME makes a role for them.",
        )
    elif facts.role is not None and not facts.role.sees_all:
        yield Finding(
            "note",
            "database",
            f"{facts.role.name} does not see what other sessions do",
            f"For a full picture: GRANT pg_monitor TO {facts.role.name}, or give doctor another role.",
        )
    major = facts.server.version_number // 10_000 if facts.server is not None else OLDEST_SUPPORTED
    if major < OLDEST_SUPPORTED:
        what = f"PostgreSQL {version} is older than {OLDEST_SUPPORTED}, the oldest that is supported"
        yield Finding("needs_action", "versions", what, "Upgrade PostgreSQL.")
    elif major > NEWEST_TESTED:
        what = f"PostgreSQL {version} is newer than {NEWEST_TESTED}, the newest that this version was tested with"
        yield Finding("note", "versions", what, "Look whether there is a newer version of wonderq.")


def schema(facts: Facts) -> Iterable[Finding]:
    """Whether the tables are those of this version."""
    newest = available_migrations()[-1][0]
    if facts.newest_migration is None:
        return
    if facts.newest_migration < newest:
        yield Finding(
            "needs_action",
            "versions",
            f"The database is migrated to {facts.newest_migration}, and this version needs {newest}",
            "wonderq migrate, or start a broker of this version; brokers of the version before go on meanwhile.",
        )
    elif facts.newest_migration > newest:
        yield Finding(
            "needs_action",
            "versions",
            f"The database is migrated to {facts.newest_migration} by a newer version; this one knows {newest}",
            "Install that version here.",
        )
    else:
        yield Finding("ok", "versions", f"The schema is up to date ({newest})")


def durability(facts: Facts) -> Iterable[Finding]:
    """How safe an acknowledged message is."""
    assert facts.durability is not None, "it was asked first"
    for risk in facts.durability.risks:
        yield Finding(
            "needs_action",
            "durability",
            f"Acknowledged messages can be lost: {risk}",
            f"Set {risk.split()[0]} to on in PostgreSQL.",
        )
    if not facts.durability.risks:
        meaning = {"durable": "on disk here", "replicated": "on disk here and on a synchronous standby"}
        level = facts.durability.level
        yield Finding("ok", "durability", f"An acknowledged message is {level}: {meaning[level]}")


def connections(facts: Facts) -> Iterable[Finding]:
    """Whether there is room for more sessions."""
    if facts.connections is None:
        return
    used, most = facts.connections
    what = f"{used:,} of {most:,} connections are in use"
    to_do = (
        "Raise max_connections, or lower --database-connections or --processes: a process of a broker uses its"
        " --database-connections and three more."
    )
    share = used / most
    if share >= NEARLY_ALL_CONNECTIONS:
        yield Finding("needs_action" if share >= MOST_CONNECTIONS else "note", "connections", what, to_do)
    else:
        yield Finding("ok", "connections", what)


def snapshots(facts: Facts) -> Iterable[Finding]:
    """Who keeps vacuum from its work."""
    count = 0
    for each in facts.snapshots:
        is_old = (each.seconds or 0) >= SNAPSHOT_NOTE_SECONDS
        if is_old or (each.seconds is None and each.transactions >= OLD_TRANSACTIONS):
            count += 1
            yield snapshot(each)
    for name, seconds in facts.prepared:
        if seconds >= PREPARED_SECONDS:
            count += 1
            yield Finding(
                "needs_action",
                "snapshots",
                f"The prepared transaction {name} has waited for its second phase for {duration(seconds)}",
                f"COMMIT PREPARED '{name}' or ROLLBACK PREPARED '{name}': until then vacuum stands still.",
            )
    if not count:
        yield Finding("ok", "snapshots", "No old snapshot keeps vacuum from its work")


def snapshot(each: Snapshot) -> Finding:
    """Say of one session what it keeps up."""
    since = f"for {duration(each.seconds)}" if each.seconds is not None else f"for {each.transactions:,} transactions"
    who = f"Session {each.pid} ({', '.join(filter(None, (each.role, each.application, each.state)))})"
    is_very_old = each.seconds is None or each.seconds >= SNAPSHOT_ACTION_SECONDS
    return Finding(
        "needs_action" if is_very_old else "note",
        "snapshots",
        f"{who} has held a snapshot {since}: tables and indexes grow until it ends",
        f"Ask who it is, and end it: SELECT pg_terminate_backend({each.pid}). Long reports belong on a standby.",
    )


def slots(facts: Facts) -> Iterable[Finding]:
    """Whether a replication slot that nobody reads keeps WAL or dead rows."""
    for each in facts.slots:
        kept = each.wal_bytes or 0
        is_old = (each.transactions or 0) >= OLD_TRANSACTIONS
        if each.is_active and kept < SLOT_BYTES and not is_old:
            continue
        is_bad = kept >= SLOT_BYTES or is_old or each.wal_status in ("unreserved", "lost")
        said = "is read by nobody" if not each.is_active else "is far behind"
        rows = f", and dead rows of {each.transactions:,} transactions" if each.transactions else ""
        yield Finding(
            "needs_action" if is_bad else "note",
            "replication",
            f"The replication slot {each.name} {said}, and keeps {kept / 2**20:,.0f} MiB of WAL{rows}",
            f"Start who reads it, or drop it: SELECT pg_drop_replication_slot('{each.name}'). The disk fills up else.",
        )


def vacuum(facts: Facts) -> Iterable[Finding]:
    """Whether dead rows are cleaned up."""
    server = facts.server
    if server is not None and "off" in (server.autovacuum, server.track_counts):
        name = "autovacuum" if server.autovacuum == "off" else "track_counts"
        yield Finding(
            "needs_action", "vacuum", f"{name} is off: tables and indexes grow without end", f"Set {name} to on."
        )
    if server is not None and server.frozen_age >= FROZEN_AGE:
        what = f"The oldest row was not frozen for {server.frozen_age:,} transactions; at 2 billion the server stops"
        yield Finding("needs_action", "vacuum", what, "VACUUM (FREEZE) the database, and end what keeps vacuum back.")
    found = [finding for table in facts.tables for finding in findings_of_table(table)]
    if facts.tables and not found:
        dead, live = (sum(getattr(each, name) for each in facts.tables) for name in ("dead", "live"))
        found = [Finding("ok", "vacuum", f"{count_of(dead, 'dead row')} beside {count_of(live, 'row')} in use")]
    yield from found


def findings_of_table(table: Table) -> Iterable[Finding]:
    """What one table says."""
    name = f"broker.{table.name}"
    if not table.has_autovacuum:
        what = f"autovacuum is switched off for {name}"
        yield Finding("needs_action", "vacuum", what, f"ALTER TABLE {name} RESET (autovacuum_enabled)")
    if table.dead >= DEAD_ROWS_NOTE and table.dead > table.live:
        when = (
            duration((datetime.now(UTC) - table.last_vacuum).total_seconds()) + " ago" if table.last_vacuum else "never"
        )
        yield Finding(
            "needs_action" if table.dead >= DEAD_ROWS_ACTION else "note",
            "vacuum",
            f"{name} has {table.dead:,} dead rows and {table.live:,} in use; it was vacuumed {when}",
            f"End what holds old snapshots (above), then VACUUM {name}. If it comes back, allow more workers.",
        )
    if table.index_bytes >= INDEX_BYTES and table.index_bytes > INDEX_BYTES_A_ROW * (table.live + table.dead):
        yield Finding(
            "note",
            "vacuum",
            f"The indexes of {name} have {table.index_bytes / 2**20:,.0f} MiB, many times what its rows need",
            f"REINDEX TABLE CONCURRENTLY {name} gives that back, while brokers go on.",
        )


def sweeper(facts: Facts) -> Iterable[Finding]:
    """Whether a broker looks after the database."""
    seconds = facts.sweep_seconds
    if seconds is None:
        return
    if seconds < SWEEP_NOTE_SECONDS:
        yield Finding("ok", "sweeper", "A broker looks after ended leases and expired messages")
        return
    yield Finding(
        "needs_action" if seconds >= SWEEP_ACTION_SECONDS else "note",
        "sweeper",
        f"No broker has looked after ended leases and expired messages for {duration(seconds)}",
        "Does a broker run on this database? Its log says why its sweeper fails. Dead letters move when it runs again.",
    )
