"""Every page and dialog in light and dark, by the rules of WCAG 2 at levels A and AA, as axe-core checks them."""

from __future__ import annotations

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from browser import PHONE, Broker, Dashboard, OpenDashboard, StartBroker, stock

RULES = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]},
    "resultTypes": ["violations"],
}
ROUTES = {
    "queues": "#/",
    "search": "#/?prefix=orders",
    "nothing found": "#/?prefix=zzz",
    "dead-letter queues": "#/?only=dead",
    "queue": "#/queues/orders",
    "dead letters": "#/queues/orders.dead",
    "no queue": "#/queues/nobody",
    "topics": "#/topics",
    "topic": "#/topics/orders.placed",
    "nothing": "#/nothing",
}
THEMES = ("light", "dark")


def assert_accessible(page: Page, what: str) -> None:
    """Fail where axe-core finds something."""
    page.evaluate("document.getAnimations().forEach((animation) => animation.finish())")
    results = Axe().run(page, options=RULES)
    found = [
        f"{what}: {each['id']} ({each['help']}): {node['html'][:150]} {node.get('failureSummary', '')}"
        for each in results.response["violations"]
        for node in each["nodes"]
    ]
    assert found == [], "\n".join(found)
    assert page.get_by_role("heading", level=1).count() == 1


@pytest.mark.parametrize("theme", THEMES)
def test_every_page_is_accessible(broker: Broker, open_dashboard: OpenDashboard, theme: str) -> None:
    stock(broker)
    broker.call("enqueue", queue="orders", body="\u202eevil\u200b", headers={"a": "b"})
    dashboard = open_dashboard(broker, color_scheme=theme)
    for what, route in ROUTES.items():
        dashboard.open(route)
        assert_accessible(dashboard.page, what)
    dashboard.page.set_viewport_size(PHONE)
    for what in ("queues", "queue", "topics"):
        dashboard.open(ROUTES[what])
        assert_accessible(dashboard.page, f"{what} on a phone")


@pytest.mark.parametrize("theme", THEMES)
def test_every_dialog_is_accessible(broker: Broker, open_dashboard: OpenDashboard, theme: str) -> None:
    stock(broker)
    page = open_dashboard(broker, color_scheme=theme).open("#/queues/orders.dead")
    for name in ("Purge …", "Redrive …", "Send a message …", "Delete message"):
        page.get_by_role("button", name=name).first.click()
        expect(page.get_by_role("dialog")).to_be_visible()
        assert_accessible(page, name)
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)


@pytest.mark.parametrize("theme", THEMES)
def test_signing_in_and_an_outage_are_accessible(
    start_broker: StartBroker, open_dashboard: OpenDashboard, theme: str
) -> None:
    asks = open_dashboard(start_broker(auth="required"), color_scheme=theme)
    asks.page.goto(asks.url)
    asks.page.get_by_label("Token").fill("w" * 50)
    asks.page.get_by_role("button", name="Sign in").click()
    expect(asks.page.get_by_text("This token does not count")).to_be_visible()
    assert_accessible(asks.page, "sign in")
    dashboard: Dashboard = open_dashboard(start_broker(), color_scheme=theme)
    page = dashboard.open()
    page.route("**/rpc", lambda route: route.abort())
    expect(page.get_by_text("Unavailable, trying again")).to_be_visible()
    assert_accessible(page, "outage")
    page.unroute_all()
