"""What the pages show, and how one gets from one to the other."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from playwright.sync_api import expect

from browser import PHONE, Broker, Dashboard, OpenDashboard, eventually, stock


def test_the_first_page_shows_all_queues_in_a_line_of_numbers_a_graph_and_a_table(
    broker: Broker, dashboard: Dashboard
) -> None:
    stock(broker)
    page = dashboard.open()
    dashboard.heading("Queues")
    expect(dashboard.figure("Ready")).to_have_text("184")
    expect(dashboard.figure("Leased")).to_have_text("5")
    expect(dashboard.figure("Delayed")).to_have_text("1")
    expect(dashboard.figure("Dead")).to_have_text("3")
    expect(dashboard.figure("Oldest ready")).to_have_text(re.compile(r"^\d+ (s|min)"))
    assert dashboard.cells("orders")[:4] == ["32", "5", "1", "38"]
    assert dashboard.cells("emails.welcome")[:4] == ["134", "0", "0", "134"]
    assert dashboard.cells("exports")[-1] == "paused"
    assert dashboard.cells("orders.dead")[-1] == "dead letters"
    names = page.locator("tbody").last.get_by_role("rowheader").all_inner_texts()
    assert names == sorted(names)
    assert {"audit", "billing", "default", "orders"} < set(names)


def test_the_first_page_follows_what_happens_without_being_loaded_again(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.open()
    page.evaluate("window.isTheSamePage = true")
    expect(dashboard.figure("Ready")).to_have_text("0")
    broker.call("enqueue_batch", queue="default", messages=[{"body": n} for n in range(7)])
    expect(dashboard.figure("Ready")).to_have_text("7")
    assert dashboard.cells("default")[0] == "7"
    assert page.evaluate("window.isTheSamePage") is True


def test_a_poll_is_one_request_and_there_is_none_while_nobody_can_see_the_page(
    broker: Broker, dashboard: Dashboard
) -> None:
    page = dashboard.page
    page.clock.install()
    asked: list[Any] = []
    page.on("request", lambda request: asked.append(request.post_data_json) if request.method == "POST" else None)
    dashboard.open()
    expect(page.locator("footer")).to_contain_text("PostgreSQL")
    asked.clear()
    for polls in (1, 2, 3):
        with page.expect_response("**/rpc"):
            page.clock.run_for(6_000)
        dashboard.is_live()
        assert len(asked) == polls
    assert {each["method"] for each in asked[-1]} == {
        "get_caller", "list_queues", "count_messages", "get_stats",
    }  # fmt: skip
    hide = """(isHidden) => {
        Object.defineProperty(document, "hidden", { configurable: true, get: () => isHidden });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    page.clock.run_for(60_000)
    assert len(asked) == 3
    with page.expect_response("**/rpc"):
        page.evaluate(hide, False)


def test_with_many_queues_all_messages_are_counted_at_one_poll_out_of_three(
    broker: Broker, dashboard: Dashboard
) -> None:
    """Which is most of what such a page costs: see `make bench-flat ARGS='--cell dashboard'`."""
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO broker.queues (name) SELECT 'q' || n FROM generate_series(1, 60) n")
    page = dashboard.page
    page.clock.install()
    dashboard.open()
    expect(page.get_by_role("link", name="Next")).to_be_visible()
    asked: list[str] = []
    for _ in range(6):
        with page.expect_request("**/rpc") as sent:
            page.clock.run_for(6_000)
        assert sent.value.response() is not None
        asked.append(sent.value.post_data or "")
    assert ["count_messages" in each for each in asked].count(True) == 2
    assert all("list_queues" in each for each in asked)


def test_ten_thousand_queues_are_paged_and_searched_on_the_server(
    broker: Broker, dashboard: Dashboard, record_property: Callable[[str, object], None]
) -> None:
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO broker.queues (name) SELECT 'q' || lpad(n::text, 5, '0') FROM generate_series(1, 10000) n"
        )
    began_at = time.monotonic()
    page = dashboard.open()
    rows = page.locator("section[aria-label='Queues by name'] tbody").get_by_role("rowheader")
    expect(rows).to_have_count(50)
    record_property("first page of 10,000 queues", f"seen after {time.monotonic() - began_at:.2f} s")
    expect(rows.first).to_have_text("default")
    page.get_by_role("link", name="Next").click()
    expect(rows.first).to_have_text("q00050")
    page.get_by_role("link", name="Next").click()
    expect(rows.first).to_have_text("q00100")
    page.get_by_role("link", name="Previous").click()
    expect(rows.first).to_have_text("q00050")
    page.go_back()
    expect(rows.first).to_have_text("q00100")
    page.get_by_role("searchbox").fill("q0999")
    expect(rows).to_have_count(10)
    expect(rows.first).to_have_text("q09990")
    assert "prefix=q0999" in page.url
    page.reload()
    expect(page.get_by_role("searchbox")).to_have_value("q0999")
    expect(rows).to_have_count(10)
    page.get_by_role("searchbox").fill("nothing")
    expect(page.get_by_text("No queue that you may see has a name that begins with nothing.")).to_be_visible()
    page.get_by_role("searchbox").fill("")
    expect(rows).to_have_count(50)


def test_a_search_that_is_left_does_not_call_back(broker: Broker, dashboard: Dashboard) -> None:
    """What was typed last is sent a moment later, unless one has gone elsewhere meanwhile."""
    page = dashboard.page
    page.clock.install()
    dashboard.open()
    page.get_by_role("searchbox").fill("def")
    page.get_by_role("link", name="Topics").click()
    dashboard.heading("Topics")
    page.clock.run_for(1_000)
    dashboard.heading("Topics")
    assert page.url.endswith("#/topics")


@pytest.mark.parametrize(("address", "heading"), [("#/topics", "Topics"), ("#/queues/default", "default")])
def test_a_search_does_not_call_back_who_is_about_to_leave(dashboard: Dashboard, address: str, heading: str) -> None:
    """Its time may be up when the address has changed, and the page does not know yet."""
    page = dashboard.page
    page.add_init_script("""
        const later = setTimeout;
        window.setTimeout = (callback, ms) => {
            if (ms === 250) window.search = callback;
            return later(callback, ms);
        };
    """)
    dashboard.open()
    page.get_by_role("searchbox").fill("def")
    page.evaluate("address => { location.hash = address; window.search(); }", address)
    dashboard.heading(heading)
    assert page.url.endswith(address)


def test_typing_moves_nothing_and_the_next_page_begins_at_the_top_of_its_list(
    broker: Broker, open_dashboard: OpenDashboard
) -> None:
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute("INSERT INTO broker.queues (name) SELECT 'q' || n FROM generate_series(1, 120) n")
    dashboard = open_dashboard(broker, viewport=PHONE)
    page = dashboard.open()
    search = page.get_by_role("searchbox")
    search.scroll_into_view_if_needed()
    page.evaluate("scrollTo(0, 500)")
    search.press_sequentially("q")
    expect(page.get_by_role("rowheader", name="default")).to_have_count(0)
    assert page.evaluate("scrollY") == 500
    expect(search).to_be_focused()
    page.get_by_role("link", name="Next").click()
    expect(page.get_by_role("rowheader", name="q100", exact=True)).to_have_count(0)
    expect(search).to_be_in_viewport()


def test_dead_letter_queues_can_be_seen_alone(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open()
    page.get_by_role("link", name="Dead-letter queues only").click()
    rows = page.locator("section[aria-label='Queues by name'] tbody").get_by_role("rowheader")
    expect(rows).to_have_count(1)
    expect(rows).to_have_text("orders.dead")
    page.get_by_role("link", name="Show all queues").click()
    expect(rows.filter(has_text="billing").first).to_be_visible()


def test_the_page_of_a_queue_shows_its_counts_settings_and_messages_by_status(
    broker: Broker, dashboard: Dashboard
) -> None:
    stock(broker)
    page = dashboard.open()
    page.get_by_role("link", name="orders", exact=True).click()
    dashboard.heading("orders")
    expect(dashboard.figure("Ready")).to_have_text("32")
    settings = page.get_by_role("region", name="Settings")
    for name, value in (("max_receives", "1"), ("dead_letter_queue", "orders.dead"), ("visibility_timeout", "30 s")):
        row = settings.locator("dl > div").filter(has=page.get_by_text(name, exact=True))
        expect(row.locator("dd")).to_have_text(value)
    messages = page.get_by_role("article")
    expect(messages).to_have_count(20)
    tabs = page.get_by_role("navigation", name="Messages by status")
    for status, count in (("Leased", 5), ("Delayed", 1), ("Ready", 20)):
        tabs.get_by_role("link", name=status).click()
        expect(messages).to_have_count(count)
        expect(tabs.get_by_role("link", name=status)).to_have_attribute("aria-current", "page")
        for message in messages.all():
            expect(message.locator(".chip").first).to_have_text(status.lower())
    page.get_by_role("navigation", name="Pages of messages").get_by_role("link", name="Next").click()
    expect(messages).to_have_count(12)
    expect(page.get_by_text('{"id": 7008, "total": 27.5}')).to_have_count(0)


def test_a_dead_letter_says_where_it_came_from_and_why(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders.dead")
    letters = page.get_by_role("article")
    expect(letters).to_have_count(3)
    expect(letters.first).to_contain_text("from orders")
    expect(letters.first).to_contain_text("max_receives")
    expect(letters.first).to_contain_text("handed out once and never deleted")
    letters.first.get_by_role("link", name="orders", exact=True).click()
    dashboard.heading("orders")


def test_topics_show_their_subscriptions_and_the_state_of_each_endpoint(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.open()
    page.get_by_role("link", name="Topics").click()
    dashboard.heading("Topics")
    expect(page.get_by_text("There is no topic that you may see.")).to_be_visible()
    stock(broker)
    expect(page.get_by_role("rowheader", name="nightly")).to_be_visible()
    assert dashboard.cells("hook-active")[1] == "active"
    assert dashboard.cells("hook-failing")[1] == "failing"
    assert dashboard.cells("hook-ended")[1] == "ended"
    assert dashboard.cells("hook-ended")[2].startswith("http://127.0.0.1:11/ended")
    assert dashboard.cells("billing")[1:] == ["active", "billing", "country = NO or SE"]
    page.get_by_role("link", name="nightly").click()
    dashboard.heading("nightly")
    expect(page.get_by_text("Nobody subscribes.")).to_be_visible()


def test_addresses_are_kept_by_reload_bookmark_and_the_back_button(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders?status=leased")
    expect(page.get_by_role("article")).to_have_count(5)
    page.reload()
    expect(page.get_by_role("article")).to_have_count(5)
    expect(page).to_have_title("orders · WonderQ")
    page.get_by_role("link", name="Topics").click()
    dashboard.heading("Topics")
    page.go_back()
    dashboard.heading("orders")
    expect(page.get_by_role("article")).to_have_count(5)
    page.goto(f"{broker.url}/#/no/such/page")
    dashboard.heading("There is nothing here")
    page.goto(f"{broker.url}/#/queues/nobody")
    expect(page.get_by_text("There is no queue nobody")).to_be_visible()


@pytest.mark.parametrize("route", ["#/", "#/queues/orders", "#/queues/orders.dead", "#/topics"])
def test_on_a_phone_no_page_has_to_be_moved_sideways(broker: Broker, open_dashboard: OpenDashboard, route: str) -> None:
    stock(broker)
    broker.call("create_queue", queue="n" * 128)
    dashboard = open_dashboard(broker, viewport=PHONE, is_mobile=True, has_touch=True)
    page = dashboard.open(route)
    page.wait_for_load_state("networkidle")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    beyond = """() => [...document.querySelectorAll("main *")].filter((element) => {
        const box = element.getBoundingClientRect();
        return box.width > 1 && box.right > innerWidth + 1 && !element.closest(".scroll, .body, thead");
    }).map((element) => element.outerHTML.slice(0, 100))"""
    assert page.evaluate(beyond) == []


def test_light_and_dark_follow_the_system_or_what_was_chosen(broker: Broker, open_dashboard: OpenDashboard) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light, dark = open_dashboard(broker, color_scheme="light"), open_dashboard(broker, color_scheme="dark")
    of_light, of_dark = light.open().evaluate(ground), dark.open().evaluate(ground)
    assert of_light != of_dark
    button = light.page.get_by_role("button", name="Theme")
    button.click()
    expect(button).to_have_text(re.compile("Light"))
    button.click()
    assert light.page.evaluate(ground) == of_dark
    light.page.reload()
    light.is_live()
    assert light.page.evaluate(ground) == of_dark
    button.click()
    assert light.page.evaluate(ground) == of_light


def test_the_graph_says_the_same_as_a_table(broker: Broker, dashboard: Dashboard) -> None:
    broker.call("enqueue_batch", queue="default", messages=[{"body": n} for n in range(5)])
    eventually(lambda: sum(each["enqueued"] for each in broker.call("get_stats", minutes=15)["minutes"]) == 5)
    page = dashboard.open()
    expect(page.locator(".legend .enqueued")).to_contain_text("5")
    expect(dashboard.figure("In")).to_have_text("5/min")
    page.get_by_text("The same as a table").click()
    table = page.get_by_role("table", name="Messages by minute")
    figures = [int(text) for text in table.locator("tbody td:nth-child(2)").all_inner_texts()]
    assert sum(figures) == 5
