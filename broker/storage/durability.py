"""The PostgreSQL behind the broker, and how safe an acknowledged message is there.

Levels: "replicated", on disk here and on a synchronous standby; "durable", on disk here; "at_risk", PostgreSQL is set
so that acknowledged messages can be lost: in a crash, or with the primary although there is a standby.
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.storage.sessions import Connection, configure, connect, deadline, with_defaults

LEVELS = ("replicated", "durable", "at_risk")
ANSWER_SECONDS = 10.0

# What synchronous_commit is for this role and this database. A server is known by when it was started.
_SERVER_FACTS = """
SELECT
    current_setting('server_version'),
    extract(epoch FROM pg_postmaster_start_time())::text,
    current_setting('fsync'),
    current_setting('full_page_writes'),
    current_setting('synchronous_commit'),
    current_setting('synchronous_standby_names')
"""


@dataclass(frozen=True)
class ServerFacts:
    """The PostgreSQL behind the broker: its version, which run of which server it is, and its settings."""

    version: str
    started: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    synchronous_standby_names: str

    @property
    def risks(self) -> list[str]:
        """Say what makes acknowledged messages unsafe, setting by setting; nothing where nothing does."""
        risks = [f"{name} is off" for name in ("fsync", "full_page_writes") if getattr(self, name) == "off"]
        if self.synchronous_commit == "off":
            risks.append("synchronous_commit is off for this role and database")
        if self.synchronous_commit == "local" and self.synchronous_standby_names:
            risks.append("synchronous_commit is local for this role and database, so that no standby is waited for")
        return risks

    @property
    def level(self) -> str:
        """How safe an acknowledged message is: one of LEVELS."""
        if self.risks:
            return "at_risk"
        return "replicated" if self.synchronous_standby_names else "durable"

    @property
    def durability(self) -> dict[str, str]:
        """The level and what it rests on."""
        return {
            "level": self.level,
            "fsync": self.fsync,
            "full_page_writes": self.full_page_writes,
            "synchronous_commit": self.synchronous_commit,
            "synchronous_standby_names": self.synchronous_standby_names,
        }


async def server_facts(connection: Connection) -> ServerFacts:
    """Return the version of PostgreSQL and the settings that durability rests on."""
    row = await (await connection.execute(_SERVER_FACTS)).fetchone()
    assert row is not None, "the statement returns one row"
    return ServerFacts(*row)


async def facts_of(conninfo: str) -> ServerFacts:
    """Return the facts of a server that nothing is connected to yet. Raises psycopg.Error where it does not answer."""
    async with await connect(with_defaults(conninfo)) as connection:
        with deadline(connection, ANSWER_SECONDS):
            await configure(connection)
            return await server_facts(connection)
