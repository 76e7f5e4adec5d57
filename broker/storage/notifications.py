"""News between brokers: LISTEN and NOTIFY on connections of their own.

News say that a queue has something to hand out, now or in so many seconds. They are hints: whoever waits
also looks for itself once a second, so a lost one costs time and never a message.

NOTIFY is never sent inside a transaction that stores messages: at its commit it takes a lock that all of
the database shares. The first news go out at once; what arrives within the next fiftieth of a second is merged and
goes out together, so that a busy broker notifies fifty times a second and not for every message.

A broker that is alone notifies nobody. Who listens holds a lock, shared by all who do, and then says so: the others
hear it at once, and once a minute each looks whether anybody else still holds the lock.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple
from uuid import uuid4

import msgspec
import psycopg
from psycopg.generators import notifies

from broker.storage.database import Connection, Database
from broker.storage.sessions import deadline

log = logging.getLogger("broker.notifications")

CHANNEL = "wonderq_news"
# NOTIFY takes at most 8,000 bytes; forty queue names of 128 characters fit.
NEWS_PER_NOTIFICATION = 40
RETRY_SECONDS = 0.5
# A server that takes longer over one of these statements hangs: the connection is given up, and made anew.
ANSWER_SECONDS = 5.0
# Held by everybody who listens. Any number will do as long as every version of the broker uses the same.
LISTENERS_LOCK = 0x57_6F_6E_64_65_72_4C
LOOK_FOR_OTHERS_SECONDS = 60.0
# After a notification, how long further news are gathered.
PAUSE_SECONDS = 0.02

# Its commit waits for no disk and no standby, because nothing but the notification is in its transaction.
_NOTIFY = "SELECT pg_notify(%(channel)s, %(payload)s)"

# Waits for nobody: all who take this lock share it.
_TAKE_PART = "SELECT pg_advisory_lock_shared(%(lock)s)"

_OTHERS = """/* listen */
SELECT EXISTS (
    SELECT
    FROM pg_locks l
    JOIN pg_database d ON d.oid = l.database
    WHERE l.locktype = 'advisory' AND d.datname = current_database() AND l.objsubid = 1
        AND (l.classid::bigint << 32 | l.objid::bigint) = %(lock)s
        AND l.pid <> pg_backend_pid()
)
"""


class News(NamedTuple):
    """In `seconds` the queue has about `messages` messages more to hand out."""

    queue: str
    seconds: float
    messages: int


class Notifications:
    """Send this broker's news to the others, and hear theirs."""

    def __init__(self, database: Database, hear: Callable[[News], object], reconnected: Callable[[], None]) -> None:
        self._database = database
        self._hear = hear
        self._reconnected = reconnected
        self._own_name = uuid4().hex
        # Nobody else listens: nobody is told.
        self._is_alone = False
        self._times_heard = 0
        self._pending: dict[str, News] = {}
        self._has_pending = asyncio.Event()

    def tell(self, news: News) -> None:
        """Send news as soon as the connection is free; what waits for the same queue is merged."""
        if self._is_alone:
            return
        waiting = self._pending.get(news.queue)
        if waiting is not None:
            news = News(
                news.queue,
                min(news.seconds, waiting.seconds),
                news.messages + waiting.messages,
            )
        self._pending[news.queue] = news
        self._has_pending.set()

    async def run(self) -> None:
        """Send and listen until cancelled, reconnecting after every failure."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forever(self._send))
            tasks.create_task(self._forever(self._listen))

    async def _forever(self, use: Callable[[Connection], object]) -> None:
        while True:
            try:
                async with await self._database.connect() as connection:
                    await use(connection)  # type: ignore[misc]
            except psycopg.Error as error:
                log.warning("news between brokers interrupted error=%s", type(error).__name__)
            await asyncio.sleep(RETRY_SECONDS)

    async def _send(self, connection: Connection) -> None:
        while True:
            await self._has_pending.wait()
            batch = [self._pending.pop(name) for name in list(self._pending)[:NEWS_PER_NOTIFICATION]]
            if not self._pending:
                self._has_pending.clear()
            with deadline(connection, ANSWER_SECONDS):
                await connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": self._payload(batch)})
            await asyncio.sleep(PAUSE_SECONDS)

    async def _listen(self, connection: Connection) -> None:
        connection.add_notify_handler(lambda notification: self._heard(notification.payload))
        try:
            with deadline(connection, ANSWER_SECONDS):
                await connection.execute(f"LISTEN {CHANNEL}")
                await connection.execute(_TAKE_PART, {"lock": LISTENERS_LOCK})
                await connection.execute(_NOTIFY, {"channel": CHANNEL, "payload": self._payload([])})
            # What was said before is lost: everybody who waits looks once.
            self._reconnected()
            while True:
                times_heard = self._times_heard
                has_others = await self._has_others(connection)
                self._is_alone = not has_others and self._times_heard == times_heard
                with suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_FOR_OTHERS_SECONDS):
                        while True:
                            # As connection.notifies(), which looks ten times a second whether its wait is to end.
                            await connection.wait(notifies(connection.pgconn), interval=LOOK_FOR_OTHERS_SECONDS)
        finally:
            self._is_alone = False

    async def _has_others(self, connection: Connection) -> bool:
        with deadline(connection, ANSWER_SECONDS):
            row = await (await connection.execute(_OTHERS, {"lock": LISTENERS_LOCK})).fetchone()
        assert row is not None, "a select without FROM returns one row"
        return bool(row[0])

    def _payload(self, batch: list[News]) -> str:
        """Return what to notify; without any news it only says that somebody is there."""
        return msgspec.json.encode([self._own_name, batch]).decode()

    def _heard(self, payload: str) -> None:
        try:
            sender, batch = msgspec.json.decode(payload, type=tuple[str, list[News]])
        except msgspec.MsgspecError:
            return  # whoever may connect may NOTIFY, also what is no news
        if sender != self._own_name:
            self._is_alone = False
            self._times_heard += 1
            for news in batch:
                self._hear(news)
