"""What a subscriber keeps, in a file that outlives it: what it has handled, and the secrets of its subscriptions.

A message is known again by its webhook-id, the primary key. What was found is written together with it, in one
transaction and before the answer: so killed at any moment a subscriber has handled a message or has not, and one that
it has handled and not acknowledged comes again and is known.
"""

import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_TABLES = """
CREATE TABLE IF NOT EXISTS handled (
    webhook_id TEXT PRIMARY KEY,
    topic      TEXT NOT NULL,
    name       TEXT NOT NULL,
    found      TEXT NOT NULL,
    times      INTEGER NOT NULL DEFAULT 1
);
CREATE TABLE IF NOT EXISTS secrets (topic TEXT PRIMARY KEY, secret TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Entry:
    """A message that was handled, and how many times it came."""

    webhook_id: str
    topic: str
    name: str
    found: dict[str, Any]
    times: int


class Ledger:
    """The ledger of one subscriber; the demo looks into it meanwhile."""

    def __init__(self, path: Path) -> None:
        self._database = sqlite3.connect(path, isolation_level=None, timeout=30)
        self._database.execute("PRAGMA journal_mode = wal")
        self._database.executescript(_TABLES)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def knows_again(self, webhook_id: str) -> bool:
        """Count a message that comes again; return False where it was never here."""
        statement = "UPDATE handled SET times = times + 1 WHERE webhook_id = ?"
        return self._database.execute(statement, (webhook_id,)).rowcount > 0

    def record(self, webhook_id: str, topic: str, name: str, found: dict[str, Any]) -> None:
        """Keep what was found."""
        statement = "INSERT INTO handled (webhook_id, topic, name, found) VALUES (?, ?, ?, ?)"
        self._database.execute(statement, (webhook_id, topic, name, json.dumps(found)))

    def count(self) -> int:
        """Return how many messages were handled."""
        (count,) = self._database.execute("SELECT count(*) FROM handled").fetchone()
        return int(count)

    def entries(self) -> list[Entry]:
        """Return everything that was handled."""
        rows = self._database.execute("SELECT webhook_id, topic, name, found, times FROM handled")
        return [Entry(key, topic, name, json.loads(found), times) for key, topic, name, found, times in rows]

    def keep_secret(self, topic: str, secret: str) -> None:
        """Keep the secret of a subscription: the broker tells it once."""
        self._database.execute("INSERT OR REPLACE INTO secrets VALUES (?, ?)", (topic, secret))

    def secret(self, topic: str) -> str | None:
        """Return the secret of the subscription to a topic."""
        row = self._database.execute("SELECT secret FROM secrets WHERE topic = ?", (topic,)).fetchone()
        return None if row is None else str(row[0])
