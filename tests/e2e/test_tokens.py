"""Who is asked for a token, what is kept of it, and what those see who may do little."""

from __future__ import annotations

import pytest
from playwright.sync_api import Route, expect

from broker.storage.tokens import Grant
from browser import Broker, Dashboard, OpenDashboard, StartBroker, stock

EVERYTHING = Grant(["*"], ["*"], ["*"], admin=True)


@pytest.fixture
def closed(start_broker: StartBroker) -> Broker:
    """A broker that asks for tokens, and has things."""
    broker = start_broker(auth="required", webhook_allow=("127.0.0.0/8",))
    broker.token = broker.make_token("boss", EVERYTHING)
    stock(broker)
    return broker


def enter(dashboard: Dashboard, token: str) -> None:
    """Type a token into the form."""
    dashboard.page.get_by_label("Token").fill(token)
    dashboard.page.get_by_role("button", name="Sign in").click()


def open_with(open_dashboard: OpenDashboard, broker: Broker, grant: Grant, route: str = "#/") -> Dashboard:
    """Open a page with a new token that permits this."""
    dashboard = open_dashboard(broker)
    dashboard.page.goto(f"{broker.url}/{route}")
    enter(dashboard, broker.make_token("somebody", grant))
    dashboard.is_live()
    return dashboard


def test_who_has_no_token_is_asked_for_one_and_sees_nothing(closed: Broker, open_dashboard: OpenDashboard) -> None:
    dashboard = open_dashboard(closed)
    page = dashboard.page
    page.goto(closed.url)
    dashboard.heading("This broker asks for a token")
    assert "orders" not in page.locator("body").inner_text()
    enter(dashboard, "w" * 50)
    expect(page.get_by_role("alert").filter(has_text="This token does not count")).to_be_visible()
    dashboard.heading("This broker asks for a token")
    assert closed.token is not None
    enter(dashboard, closed.token)
    dashboard.heading("Queues")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.locator(".who")).to_have_text("boss")
    expect(page.get_by_role("rowheader", name="orders", exact=True)).to_be_visible()


def test_a_token_is_kept_for_its_tab_and_until_one_signs_out(closed: Broker, open_dashboard: OpenDashboard) -> None:
    dashboard = open_dashboard(closed)
    page = dashboard.page
    page.goto(f"{closed.url}/#/queues/orders")
    assert closed.token is not None
    enter(dashboard, closed.token)
    dashboard.heading("orders")
    page.reload()
    dashboard.heading("orders")
    assert closed.token not in page.url
    assert page.evaluate("JSON.stringify({...localStorage}) + document.cookie") == "{}"
    page.get_by_role("button", name="Sign out").click()
    dashboard.heading("This broker asks for a token")
    assert page.evaluate("JSON.stringify({...sessionStorage})") == "{}"
    page.reload()
    dashboard.heading("This broker asks for a token")


def test_a_token_that_is_revoked_is_asked_for_anew(closed: Broker, open_dashboard: OpenDashboard) -> None:
    dashboard = open_with(open_dashboard, closed, EVERYTHING)
    expect(dashboard.page.get_by_role("rowheader", name="orders", exact=True)).to_be_visible()
    closed.revoke("somebody")
    dashboard.heading("This broker asks for a token")
    assert "orders" not in dashboard.page.locator("body").inner_text()


def test_who_may_manage_some_queues_sees_those_and_no_figures_of_all(
    closed: Broker, open_dashboard: OpenDashboard
) -> None:
    dashboard = open_with(open_dashboard, closed, Grant([], [], ["orders*"]))
    page = dashboard.page
    rows = page.locator("section[aria-label='Queues by name'] tbody").get_by_role("rowheader")
    expect(rows.first).to_have_text("orders")
    assert all(name.startswith("orders") for name in rows.all_inner_texts())
    expect(page.get_by_text("Figures of all queues together need a token with admin.")).to_be_visible()
    expect(page.locator(".graph")).to_have_count(0)
    expect(page.locator(".refusal")).to_have_count(0)
    with page.expect_request("**/rpc") as asked:
        pass
    assert "list_queues" in (asked.value.post_data or "")
    assert "count_messages" not in (asked.value.post_data or ""), "what is refused is not asked for again and again"
    page.get_by_role("link", name="orders", exact=True).click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    expect(page.get_by_role("button", name="Send a message")).to_have_count(0)


def test_who_may_manage_nothing_is_told_so_and_offered_nothing(closed: Broker, open_dashboard: OpenDashboard) -> None:
    dashboard = open_with(open_dashboard, closed, Grant(["*"], ["*"], []))
    page = dashboard.page
    expect(page.get_by_text("This token manages no queue")).to_be_visible()
    page.goto(f"{closed.url}/#/queues/orders")
    expect(page.locator(".refusal")).to_contain_text("does not permit `manage` for orders")
    assert page.get_by_role("button", name="Pause").count() == 0
    page.goto(f"{closed.url}/#/topics")
    expect(page.get_by_text("There is no topic that you may see.")).to_be_visible()


def test_without_the_permission_a_queue_can_be_read_and_not_changed(
    closed: Broker, open_dashboard: OpenDashboard
) -> None:
    """Today who may see a queue may manage it; the page goes by what `get_caller` says, here by less than is so."""
    dashboard = open_with(open_dashboard, closed, EVERYTHING)
    page = dashboard.page

    def permit_less(route: Route) -> None:
        response = route.fetch()
        text = response.text().replace('"manage":["*"]', '"manage":["other*"]').replace('"send":["*"]', '"send":[]')
        route.fulfill(response=response, body=text)

    page.route("**/rpc", permit_less)
    page.goto(f"{closed.url}/#/queues/orders")
    dashboard.heading("orders")
    expect(page.get_by_text("Read-only: your token may not manage orders")).to_be_visible()
    expect(page.get_by_role("article").first).to_be_visible()
    for name in ("Pause", "Purge", "Redrive", "Send a message", "Delete message"):
        assert page.get_by_role("button", name=name).count() == 0, name
    page.unroute_all()


def test_a_refusal_that_comes_all_the_same_is_a_sentence(closed: Broker, open_dashboard: OpenDashboard) -> None:
    dashboard = open_with(open_dashboard, closed, Grant([], [], ["orders.dead"]), "#/queues/orders.dead")
    page = dashboard.page
    page.get_by_role("button", name="Redrive …").click()
    page.get_by_label("To another queue instead").fill("billing")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="does not permit `manage` for billing")).to_be_visible()


def test_too_many_wrong_tokens_are_said_to_be_too_many(
    start_broker: StartBroker, open_dashboard: OpenDashboard
) -> None:
    broker = start_broker(auth="required", max_failed_logins=2)
    dashboard = open_dashboard(broker)
    dashboard.page.goto(broker.url)
    for wrong in ("w" * 50, "v" * 50, "u" * 50):
        dashboard.heading("This broker asks for a token")
        enter(dashboard, wrong)
    expect(dashboard.page.get_by_role("alert").filter(has_text="Too many failed logins")).to_be_visible()
