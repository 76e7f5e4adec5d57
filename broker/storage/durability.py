"""The PostgreSQL behind the broker, and how safe an acknowledged message is there."""

from __future__ import annotations

from dataclasses import dataclass

from broker.storage.database import Connection

_SERVER_FACTS = """
SELECT
    current_setting('server_version'),
    current_setting('fsync'),
    current_setting('full_page_writes'),
    current_setting('synchronous_commit'),
    current_setting('synchronous_standby_names')
"""


@dataclass(frozen=True)
class ServerFacts:
    """The PostgreSQL behind the broker, and how safe an acknowledged message is there."""

    version: str
    durability: dict[str, str]


async def server_facts(connection: Connection) -> ServerFacts:
    """Return the version of PostgreSQL and the settings that durability rests on."""
    row = await (await connection.execute(_SERVER_FACTS)).fetchone()
    assert row is not None, "the statement returns one row"
    version, fsync, full_page_writes, synchronous_commit, standbys = row
    if "off" in (fsync, full_page_writes) or synchronous_commit == "off":
        level = "at_risk"
    elif standbys and synchronous_commit != "local":
        level = "replicated"
    else:
        level = "durable"
    return ServerFacts(
        version,
        {
            "level": level,
            "fsync": fsync,
            "full_page_writes": full_page_writes,
            "synchronous_commit": synchronous_commit,
            "synchronous_standby_names": standbys,
        },
    )
