"""What can be done with a queue: each thing, and each way to leave it undone."""

from __future__ import annotations

import psycopg
from playwright.sync_api import Page, Route, expect

from browser import Broker, Dashboard, stock


def press(page: Page, name: str) -> None:
    """Press one of the buttons of a queue."""
    page.get_by_role("group", name="What can be done with this queue").get_by_role("button", name=name).click()


def test_a_queue_is_paused_and_resumed(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders")
    press(page, "Pause")
    dashboard.said("orders is paused")
    expect(page.locator(".title .chip")).to_have_text("paused")
    assert broker.call("get_queue", queue="orders")["paused"] is True
    press(page, "Resume")
    dashboard.said("orders hands out messages again")
    expect(page.locator(".title .chip")).to_have_count(0)
    assert broker.call("get_queue", queue="orders")["paused"] is False


def test_a_purge_asks_for_the_name_of_the_queue_and_deletes_everything(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders")
    press(page, "Purge")
    dialog = page.get_by_role("dialog", name="Purge orders?")
    expect(dialog).to_contain_text("38")
    purge = dialog.get_by_role("button", name="Purge orders")
    expect(purge).to_be_disabled()
    name = dialog.get_by_label("Type the name of the queue to confirm")
    name.fill("order")
    expect(purge).to_be_disabled()
    name.press("Enter")
    assert broker.call("count_messages", queue="orders")["total"] == 38
    name.fill("orders")
    purge.click()
    expect(dialog).to_have_count(0)
    dashboard.said("orders was purged: 38 messages were deleted.")
    expect(dashboard.figure("Total")).to_have_text("0")
    expect(page.get_by_text("There is no message.")).to_be_visible()
    assert broker.call("count_messages", queue="orders")["total"] == 0
    assert broker.call("count_messages", queue="billing")["total"] == 12


def test_a_purge_that_is_called_off_deletes_nothing(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/billing")
    for leave in ("Cancel", "Escape"):
        press(page, "Purge")
        page.get_by_label("Type the name of the queue to confirm").fill("billing")
        if leave == "Escape":
            page.keyboard.press(leave)
        else:
            page.get_by_role("button", name=leave).click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        expect(page.get_by_role("button", name="Purge …")).to_be_focused()
    assert broker.call("count_messages", queue="billing")["total"] == 12


def test_a_purge_goes_on_until_it_is_complete(broker: Broker, dashboard: Dashboard) -> None:
    """The first answers are made to say that there is more; the last one is the broker's own."""
    stock(broker)
    page = dashboard.open("#/queues/billing")
    answers = [{"purged": 5_000, "complete": False}, {"purged": 700, "complete": False}]

    def answer(route: Route) -> None:
        request = route.request
        if "purge_queue" in (request.post_data or "") and answers:
            route.fulfill(json=[{"jsonrpc": "2.0", "id": 0, "result": answers.pop(0)}])
        else:
            route.continue_()

    page.route("**/rpc", answer)
    press(page, "Purge")
    page.get_by_label("Type the name of the queue to confirm").fill("billing")
    page.keyboard.press("Enter")
    dashboard.said("billing was purged: 5,712 messages were deleted.")
    page.unroute_all()


def test_dead_letters_go_back_to_where_they_came_from(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders.dead")
    press(page, "Redrive")
    dialog = page.get_by_role("dialog", name="Redrive orders.dead?")
    dialog.get_by_role("button", name="Cancel").click()
    expect(dialog).to_have_count(0)
    assert broker.call("count_messages", queue="orders.dead")["total"] == 3
    press(page, "Redrive")
    dialog.get_by_role("button", name="Redrive orders.dead").click()
    dashboard.said("3 dead letters of orders.dead were moved back to where they came from.")
    expect(dashboard.figure("Total")).to_have_text("0")
    assert broker.call("count_messages", queue="orders")["total"] == 41


def test_dead_letters_go_to_another_queue_where_one_is_named(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders.dead")
    press(page, "Redrive")
    target = page.get_by_label("To another queue instead")
    target.fill("nobody")
    target.press("Enter")
    expect(page.get_by_role("alert").filter(has_text="There is no queue nobody")).to_be_visible()
    target.fill("audit")
    target.press("Enter")
    dashboard.said("3 dead letters of orders.dead were moved to audit.")
    assert broker.call("count_messages", queue="audit")["total"] == 3


def test_a_queue_without_dead_letters_offers_no_redrive(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.open("#/queues/default")
    expect(page.get_by_role("button", name="Purge …")).to_be_visible()
    expect(page.get_by_role("button", name="Redrive …")).to_have_count(0)


def test_one_message_is_deleted_but_not_one_that_a_consumer_holds(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/orders?status=leased")
    expect(page.get_by_role("article")).to_have_count(5)
    expect(page.get_by_role("button", name="Delete message")).to_have_count(0)
    page.get_by_role("link", name="Delayed").click()
    expect(page.get_by_role("article")).to_have_count(1)
    page.get_by_role("button", name="Delete message").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    dashboard.said("was deleted")
    expect(page.get_by_text("No message is delayed.")).to_be_visible()
    assert broker.call("count_messages", queue="orders")["delayed"] == 0


def test_a_message_is_sent_as_the_very_bytes_that_were_typed(broker: Broker, dashboard: Dashboard) -> None:
    page = dashboard.open("#/queues/default")
    press(page, "Send a message")
    body = page.get_by_label("Body, as JSON")
    body.fill("{nonsense")
    page.get_by_role("dialog").get_by_role("button", name="Send").click()
    expect(page.get_by_role("alert").filter(has_text="This is not JSON")).to_be_visible()
    typed = '{"a": 1.0,  "a": 123456789012345678901234567890}'
    body.fill(typed)
    page.get_by_role("dialog").get_by_role("button", name="Send").click()
    dashboard.said("was sent to default")
    expect(page.get_by_role("region", name="Body of message")).to_have_text(typed)
    with psycopg.connect(broker.database_url) as connection:
        assert connection.execute("SELECT body::text FROM broker.messages").fetchone() == (typed,)


def test_what_the_broker_refuses_is_said_in_its_words(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open("#/queues/audit")
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    # While the page still shows it, somebody else deletes it.
    page.route("**/rpc", lambda route: route.continue_() if "update_queue" in route.request.post_data else None)
    broker.call("delete_queue", queue="audit")
    press(page, "Pause")
    expect(page.get_by_role("alert").filter(has_text="There is no queue audit")).to_be_visible()
    page.unroute_all()


def test_every_page_and_dialog_is_reached_by_keyboard_alone(broker: Broker, dashboard: Dashboard) -> None:
    stock(broker)
    page = dashboard.open()
    expect(page.get_by_role("rowheader", name="audit")).to_be_visible()

    def tab_to(name: str) -> None:
        seen = []
        for _ in range(80):
            page.keyboard.press("Tab")
            focused = "document.activeElement.innerText || document.activeElement.id || document.activeElement.tagName"
            seen.append(page.evaluate(focused))
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or page.evaluate("document.activeElement === document.body"), seen
            if seen[-1] == name:
                return
        raise AssertionError(f"{name} is not among {seen}")

    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    tab_to("prefix")
    page.keyboard.type("orders.d")
    expect(page.locator("section[aria-label='Queues by name'] tbody").get_by_role("rowheader")).to_have_count(1)
    tab_to("orders.dead")
    page.keyboard.press("Enter")
    dashboard.heading("orders.dead")
    expect(page.get_by_role("heading", level=1)).to_be_focused()
    expect(page.get_by_role("article")).to_have_count(3)
    tab_to("Purge …")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    for _ in range(12):  # The focus stays within the dialog, or leaves the page altogether.
        page.keyboard.press("Tab")
        inside = "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
        assert page.evaluate(inside)
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Purge …")).to_be_focused()
    page.keyboard.press("Enter")
    tab_to("purge-name") if page.evaluate("document.activeElement.id !== 'purge-name'") else None
    page.keyboard.type("orders.dead")
    page.keyboard.press("Enter")
    dashboard.said("orders.dead was purged")
    assert broker.call("count_messages", queue="orders.dead")["total"] == 0
