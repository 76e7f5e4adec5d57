"""The database, or the whole broker, goes away and comes back while somebody looks."""

from __future__ import annotations

import re

from playwright.sync_api import expect

from browser import Broker, Dashboard, OpenDashboard, StartBroker, stock
from outside import without_database

BANNER = re.compile("Unavailable, trying again")


def test_the_database_goes_away_and_comes_back_and_the_page_follows_without_being_loaded_again(
    start_broker: StartBroker, open_dashboard: OpenDashboard, test_server: str, database_url: str
) -> None:
    broker = start_broker(request_timeout=1.0, webhook_allow=("127.0.0.0/8",))
    stock(broker)
    dashboard = open_dashboard(broker)
    page = dashboard.open()
    page.evaluate("window.isTheSamePage = true")
    before = dashboard.cells("orders")
    banner = page.get_by_role("alert").filter(has_text=BANNER)
    expect(banner).to_have_count(0)
    with without_database(test_server, database_url):
        expect(banner).to_be_visible()
        expect(banner).to_contain_text("What you see is as of")
        expect(page.locator(".liveness.away")).to_be_visible()
        expect(page.locator("main.stale")).to_be_visible()
        assert dashboard.cells("orders")[:4] == before[:4], "what was known stays"
        page.get_by_role("link", name="orders", exact=True).click()
        dashboard.heading("orders")
        expect(banner).to_be_visible()
    dashboard.is_live()
    expect(banner).to_have_count(0)
    expect(dashboard.figure("Ready")).to_have_text("32")
    assert page.evaluate("window.isTheSamePage") is True


def test_while_the_broker_is_away_nothing_is_shown_as_an_answer_to_another_question(
    broker: Broker, dashboard: Dashboard
) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders")
    expect(page.get_by_role("article")).to_have_count(20)
    page.route("**/rpc", lambda route: route.abort())
    page.get_by_role("link", name="Leased").click()
    expect(page.get_by_role("alert").filter(has_text=BANNER)).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(0)
    expect(dashboard.figure("Ready")).to_have_text("32")
    page.unroute_all()
    expect(page.get_by_role("article")).to_have_count(5)


def test_the_broker_stops_and_another_one_serves_on_its_port(
    broker: Broker, start_broker: StartBroker, open_dashboard: OpenDashboard
) -> None:
    """Requests are cut off on the way to it, which to a page is the same."""
    dashboard = open_dashboard(broker)
    page = dashboard.open()
    banner = page.get_by_role("alert").filter(has_text=BANNER)
    page.route("**/rpc", lambda route: route.abort())
    expect(banner).to_contain_text("The broker does not answer")
    page.unroute_all()
    dashboard.is_live()
    page.route("**/rpc", lambda route: route.fulfill(status=503, headers={"Retry-After": "1"}, body="<b>proxy</b>"))
    expect(banner).to_contain_text("HTTP 503")
    assert page.locator(".banner b").count() == 0
    page.unroute_all()
    dashboard.is_live()


def test_while_the_broker_is_away_it_is_asked_less_and_less_often(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.page
    page.clock.install()
    dashboard.open()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.route("**/rpc", lambda route: route.abort())
    asked.clear()
    for _ in range(120):
        page.clock.run_for(1_000)
    assert 6 <= len(asked) <= 16, "first after 1 s, 2 s, 4 s, 8 s, then every 15 s or so"
    page.unroute_all()
