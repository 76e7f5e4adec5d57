"""A gate in the database: a statement that has its snapshot waits there before it locks or stores anything.

Whoever keeps the gate holds the advisory lock GATE, for which the others ask: where there is a `Gate`, by reading the
queues, which every statement of the broker does first; or else in statements of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar

from broker.storage.database import Connection

T = TypeVar("T")

# Only catches a hang.
PATIENCE = 20.0
GATE = 4711
MAKE_GATE = f"""
CREATE FUNCTION broker.gate() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('test.is_held_back', true) = 'yes' THEN
        PERFORM pg_advisory_lock_shared({GATE});
        PERFORM pg_advisory_unlock_shared({GATE});
    END IF;
    RETURN true;
END
$$;
ALTER TABLE broker.queues RENAME TO queues_behind_the_gate;
CREATE VIEW broker.queues AS
SELECT * FROM broker.queues_behind_the_gate WHERE broker.gate();
"""


@asynccontextmanager
async def gate_closed(keeper: Connection) -> AsyncIterator[None]:
    """Let nobody pass until the block ends."""
    await keeper.execute("SELECT pg_advisory_lock(%s)", [GATE])
    try:
        yield
    finally:
        await keeper.execute("SELECT pg_advisory_unlock(%s)", [GATE])


async def wait_until_blocked(observer: Connection, blocked: Connection) -> None:
    """Return when a connection's statement waits for a lock."""
    async with asyncio.timeout(PATIENCE):
        while True:
            cursor = await observer.execute(
                "SELECT wait_event_type FROM pg_stat_activity WHERE pid = %s", [blocked.info.backend_pid]
            )
            if await cursor.fetchone() == ("Lock",):
                return


class Gate:
    """Holds one connection's statement back between its snapshot and its first lock."""

    def __init__(self, keeper: Connection) -> None:
        self.keeper = keeper

    @asynccontextmanager
    async def holding_back(self, connection: Connection, work: Awaitable[T]) -> AsyncIterator[asyncio.Future[T]]:
        """Start the work; enter when it has its snapshot; let it go on at the end."""
        await connection.execute("SET test.is_held_back = 'yes'")
        async with gate_closed(self.keeper):
            task = asyncio.ensure_future(work)
            await wait_until_blocked(self.keeper, connection)
            yield task
        await asyncio.wait({task}, timeout=PATIENCE)
        await connection.execute("SET test.is_held_back = 'no'")
