"""What is served by GET beside the dashboard: whether the broker lives and is ready, metrics, and the schema."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from broker import __version__
from broker.errors import BrokerError, Unavailable, error_answer
from broker.gauges import MAX_QUEUES_SHOWN, DatabaseGauges, with_others
from broker.metrics import CONTENT_TYPE, Metrics
from broker.storage import counting, durability, migrate, queues, subscriptions, totals
from broker.storage.counting import Counted
from broker.storage.database import Database

# Entries of the index that are read for the metrics: about 10 ms.
ENTRIES_IN_AN_OVERVIEW = 20_000

Gauges = Callable[[], None]


class Pages:
    """The GET routes."""

    def __init__(
        self,
        database: Database,
        metrics: Metrics,
        document: Mapping[str, Any],
        *,
        is_draining: Callable[[], bool],
        read_gauges: Gauges,
    ) -> None:
        self._database = database
        self._metrics = metrics
        self._schema = msgspec.json.encode(document)
        self._is_draining = is_draining
        self._read_gauges = read_gauges

    def routes(self) -> list[web.RouteDef]:
        """Return the routes, for aiohttp."""
        pages: dict[str, Callable[[web.Request], Awaitable[web.StreamResponse]]] = {
            "/livez": self.livez,
            "/readyz": self.readyz,
            "/healthz": self.readyz,
            "/metrics": self.show_metrics,
            "/openrpc.json": self.openrpc,
        }
        return [web.get(path, page) for path, page in pages.items()]

    async def livez(self, _request: web.Request) -> web.Response:
        """Say that the process answers."""
        return web.json_response({"status": "alive", "version": __version__})

    async def readyz(self, _request: web.Request) -> web.Response:
        """Say whether calls would be served: the database answers, its schema is ours, nothing is being stopped."""
        if self._is_draining():
            return unavailable(
                Unavailable(reason="This broker is being stopped, its database is fine").with_data(draining=True)
            )
        try:
            newest = await self._database.read(migrate.newest_applied)
            facts = await self._database.read(durability.server_facts)
        except BrokerError as error:
            return unavailable(error.with_data(database="unavailable", draining=False))
        if newest < migrate.available_migrations()[-1][0]:
            return unavailable(
                Unavailable(reason="The database is not migrated").with_data(
                    database="ok", migrations=newest, draining=False
                )
            )
        return web.json_response(
            {
                "status": "ready" if self._database.breaker.reason is None else "read_only",
                "database": "ok",
                "migrations": newest,
                "draining": False,
                "durability": facts.level,
                # Why nothing is written now: reads are served all the same.
                "writes_refused": self._database.breaker.reason,
            }
        )

    async def show_metrics(self, _request: web.Request) -> web.Response:
        """Serve the metrics; where the database does not answer, those that need none."""
        self._read_gauges()
        gauges = self._metrics.of_database
        try:
            vars(gauges).update(vars(await self._gauges()))
        except BrokerError:
            vars(gauges).update(vars(DatabaseGauges()))
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _gauges(self) -> DatabaseGauges:
        """Read what the database says of itself and its queues."""
        page, more = await self._database.read(
            lambda connection: queues.list_by_name(connection, "", MAX_QUEUES_SHOWN, None)
        )
        counted = await self._count([each.queue for each in page])
        shown = {name: (each.counts, each.oldest_ready_age) for name, each in counted.items()}
        in_all = len(page)
        if more is not None:
            everything = await self._database.read(totals.count_all)
            oldest = await self._database.read(lambda connection: totals.oldest_ready_age_after(connection, more))
            shown = with_others(shown, everything.counts, oldest)
            in_all = await self._database.read(queues.count)
        facts = await self._database.read(durability.server_facts)
        return DatabaseGauges(
            is_up=True,
            queues=shown,
            queues_in_all=in_all,
            durability=facts.level,
            postgresql=facts.version,
            subscriptions=await self._database.read(subscriptions.count_states),
        )

    async def _count(self, names: list[str]) -> dict[str, Counted]:
        return await self._database.read(
            lambda connection: counting.count(connection, names, entries=ENTRIES_IN_AN_OVERVIEW)
        )

    async def openrpc(self, _request: web.Request) -> web.Response:
        """Serve the schema."""
        return web.Response(body=self._schema, content_type="application/json")


def unavailable(error: BrokerError) -> web.Response:
    """Answer 503 with the error, and when to ask again."""
    return web.Response(
        status=503, body=error_answer(error), content_type="application/json", headers={"Retry-After": "1"}
    )
