"""A broker, and a browser that looks at its dashboard: the Chromium of the system, driven by Playwright.

Whatever a test does, at its end nothing may have gone wrong in the page: no error, no dialog of the browser, nothing
that the Content-Security-Policy refused, and no request that left for another host.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import uvloop
from playwright.sync_api import Browser, BrowserContext, Dialog, Page, expect, sync_playwright

from broker import draining
from broker.server import Server
from broker.settings import Settings
from broker.storage import tokens
from broker.storage.tokens import Grant

# Only catches a hang, many times longer than anything takes.
PATIENCE = 60.0
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
# The last ones keep it from asking its makers for anything.
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
DESKTOP: Any = {"width": 1200, "height": 800}
PHONE: Any = {"width": 390, "height": 844}

# Runs before the page's own code; where a policy refuses something, it says so.
WATCH_POLICY = """
window.refusedByPolicy = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.refusedByPolicy.push(`${event.violatedDirective} ${event.blockedURI} ${event.sourceFile ?? ""}`);
});
"""
# What a browser writes of answers like 401 and 503, which are answers like any other.
NOT_WRONG = "Failed to load resource"

expect.set_options(timeout=PATIENCE * 1000)


@dataclass
class Broker:
    """A broker that serves in a thread of its own."""

    url: str
    server: Server
    loop: asyncio.AbstractEventLoop
    database_url: str
    token: str | None = None

    def answer(self, method: str, /, **params: Any) -> dict[str, Any]:
        """Call a method; return the whole answer."""
        headers = {"Content-Type": "application/json"}
        if self.token is not None:
            headers["Authorization"] = f"Bearer {self.token}"
        data = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": params}).encode()
        request = urllib.request.Request(f"{self.url}/rpc", data, headers)
        with urllib.request.urlopen(request, timeout=PATIENCE) as response:
            answer: dict[str, Any] = json.load(response)
        return answer

    def call(self, method: str, /, **params: Any) -> Any:
        """Call a method; return its result."""
        answer = self.answer(method, **params)
        assert "result" in answer, answer
        return answer["result"]

    def make_token(self, name: str, grant: Grant) -> str:
        """Make a token that counts at once."""

        async def make() -> str:
            async with await psycopg.AsyncConnection.connect(self.database_url, autocommit=True) as connection:
                made = await tokens.create(connection, name, grant, None)
            await self.server.auth.refresh()
            return made

        return asyncio.run_coroutine_threadsafe(make(), self.loop).result(PATIENCE)

    def revoke(self, name: str) -> None:
        """Revoke a token, as of at once."""

        async def revoke() -> None:
            async with await psycopg.AsyncConnection.connect(self.database_url, autocommit=True) as connection:
                await connection.execute("UPDATE broker.tokens SET revoked_at = now() WHERE name = %s", [name])
            await self.server.auth.refresh()

        asyncio.run_coroutine_threadsafe(revoke(), self.loop).result(PATIENCE)


@contextmanager
def broker_on(database_url: str, **settings: Any) -> Iterator[Broker]:
    """Run a broker on a database until the block ends."""
    loop = uvloop.new_event_loop()
    stop = asyncio.Event()
    started: Future[Server] = Future()

    async def serve() -> None:
        try:
            async with Server(database_url, replace(Settings(host="127.0.0.1", port=0), **settings)) as server:
                started.set_result(server)
                await stop.wait()
        except BaseException as error:
            if not started.done():
                started.set_exception(error)
            raise

    thread = Thread(target=loop.run_until_complete, args=(serve(),), daemon=True)
    thread.start()
    server = started.result(timeout=PATIENCE)
    try:
        yield Broker(server.url, server, loop, database_url)
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=PATIENCE)
        loop.close()


StartBroker = Callable[..., Broker]


@pytest.fixture
def start_broker(database_url: str) -> Iterator[StartBroker]:
    """Start brokers on one database: `start_broker(auth="required")`."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        yield lambda **settings: stack.enter_context(broker_on(database_url, **settings))
        # The test is over: there is nobody whose request could still be on its way.
        patch.setattr(draining, "QUIET_TIME", 0.0)


@pytest.fixture
def broker(start_broker: StartBroker) -> Broker:
    """A broker on an empty database."""
    return start_broker(webhook_allow=("127.0.0.0/8",))


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser, with a new profile."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@dataclass
class Wrongs:
    """What went wrong in a page."""

    found: list[str] = field(default_factory=list)

    def watch(self, context: BrowserContext, host: str) -> None:
        """Note what goes wrong in every page of a context, whose requests may go to this host alone."""
        context.add_init_script(WATCH_POLICY)
        context.on("weberror", lambda error: self.found.append(f"error: {error.error}"))
        context.on("console", lambda message: self._said(message.type, message.text))
        context.on("dialog", self._opened)
        context.on("request", lambda request: self._asked(request.url, host))

    def _said(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and NOT_WRONG not in text:
            self.found.append(f"console: {text}")

    def _opened(self, dialog: Dialog) -> None:
        self.found.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _asked(self, url: str, host: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            self.found.append(f"request: {url}")


class Dashboard:
    """A page that shows the dashboard of a broker."""

    def __init__(self, page: Page, url: str, wrongs: Wrongs) -> None:
        self.page = page
        self.url = url
        self._wrongs = wrongs

    def open(self, route: str = "#/") -> Page:
        """Load the page at a route; return when it shows what the broker said."""
        self.page.goto(f"{self.url}/{route}")
        self.is_live()
        return self.page

    def is_live(self) -> None:
        """Wait until the page shows what the broker says now."""
        expect(self.page.locator(".liveness.live")).to_be_visible()

    def heading(self, name: str) -> None:
        """Wait until the page has this heading."""
        expect(self.page.get_by_role("heading", level=1)).to_have_text(name)

    def figure(self, name: str) -> Any:
        """Return where one of the numbers stands."""
        box = self.page.locator(".figures > div").filter(has=self.page.locator("dt", has_text=name))
        return box.locator("dd").first

    def cells(self, name: str) -> list[str]:
        """Return the texts of a row of a table, which its first cell names."""
        row = self.page.get_by_role("row").filter(has=self.page.get_by_role("rowheader", name=name, exact=True))
        texts: list[str] = row.get_by_role("cell").all_inner_texts()
        return [" ".join(text.split()) for text in texts]

    def forget_wrongs(self) -> None:
        """Let be what went wrong until now: it was meant to."""
        self._wrongs.found.clear()

    def said(self, words: str) -> None:
        """Wait until the page has said this."""
        expect(self.page.locator(".said")).to_contain_text(words)


OpenDashboard = Callable[..., Dashboard]


@pytest.fixture
def open_dashboard(chromium: Browser) -> Iterator[OpenDashboard]:
    """Open pages: `open_dashboard(broker, color_scheme="dark")`; at the end nothing may have gone wrong in them."""
    wrongs = Wrongs()
    contexts: list[BrowserContext] = []

    def open_one(broker: Broker, **options: Any) -> Dashboard:
        context = chromium.new_context(**({"viewport": DESKTOP} | options))
        contexts.append(context)
        context.set_default_timeout(PATIENCE * 1000)
        wrongs.watch(context, urlsplit(broker.url).netloc)
        return Dashboard(context.new_page(), broker.url, wrongs)

    yield open_one
    for context in contexts:
        for page in context.pages:
            with suppress(Exception):  # One that was never opened has nothing.
                wrongs.found += page.evaluate("window.refusedByPolicy")
        context.close()
    assert wrongs.found == []


@pytest.fixture
def dashboard(broker: Broker, open_dashboard: OpenDashboard) -> Dashboard:
    """The dashboard of a broker on an empty database."""
    return open_dashboard(broker)


def stock(broker: Broker) -> None:
    """Give a broker queues, messages in every status, dead letters, topics and subscriptions in every state."""
    call = broker.call
    call("create_queue", queue="orders.dead")
    call("create_queue", queue="orders", max_receives=1, dead_letter_queue="orders.dead", delay=0)
    for name in ("audit", "billing", "emails.newsletter", "emails.welcome", "exports", "thumbnails"):
        call("create_queue", queue=name)
    call("update_queue", queue="exports", paused=True)
    for name, messages in (("orders", 40), ("billing", 12), ("emails.welcome", 134), ("exports", 3)):
        bodies = [{"body": {"id": 7_000 + n, "total": 19.5 + n}, "sender": "shop"} for n in range(messages)]
        call("enqueue_batch", queue=name, messages=bodies)
    call("enqueue", queue="orders", body="tomorrow", delay=86_400)
    taken = call("dequeue", queue="orders", max_messages=8, visibility_timeout=3_600)["messages"]
    receipts = [message["receipt"] for message in taken[:3]]
    call("extend_visibility_batch", receipts=receipts, visibility_timeout=0)
    call("create_topic", topic="orders.placed")
    call("create_topic", topic="nightly", delivery="on_broadcast")
    call("subscribe", topic="orders.placed", name="billing", queue="billing", filter={"country": ["NO", "SE"]})
    for n, state in enumerate(("active", "failing", "ended")):
        call("subscribe", topic="orders.placed", name=f"hook-{state}", url=f"http://127.0.0.1:{9 + n}/{state}")
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        change = "UPDATE broker.subscriptions SET state = %s, probe_at = 'infinity' WHERE name = %s"
        for state in ("failing", "ended"):
            connection.execute(change, [state, f"hook-{state}"])
    eventually(lambda: call("count_messages", queue="orders.dead")["total"] == 3)


def eventually(fact: Callable[[], bool]) -> None:
    """Ask until it is so; the sweeper works once a second."""
    done = Future[None]()
    for _ in range(int(PATIENCE * 20)):
        if fact():
            return
        with suppress(TimeoutError):
            done.result(timeout=0.05)
    raise AssertionError("it did not come about")
