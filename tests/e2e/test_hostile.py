"""What clients send is shown as text and does nothing, whatever it is."""

from __future__ import annotations

import json

import psycopg
import pytest
from playwright.sync_api import expect

from browser import Broker, Dashboard

MARKUP = [
    "<script>window.wasRun = true; alert(1)</script>",
    "<img src=x onerror='window.wasRun = true; alert(1)'>",
    "<svg onload=window.wasRun=true><style>*{display:none}</style>",
    "</pre></article></li></ul><iframe srcdoc='<script>parent.wasRun = true</script>'></iframe>",
    "javascript:window.wasRun=true",
    "${window.wasRun = true} {{constructor.constructor('window.wasRun = true')()}}",
    '{"type":"script","props":{"dangerouslySetInnerHTML":{"__html":"<img src=x onerror=wasRun=true>"}}}',
]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_in_bodies_headers_and_senders_is_shown_as_text(broker: Broker, dashboard: Dashboard, text: str) -> None:
    broker.call("enqueue", queue="default", body={"text": text, text: 1}, headers={text: text}, sender=text[:128])
    page = dashboard.open("#/queues/default")
    message = page.get_by_role("article")
    expect(message.get_by_role("region")).to_have_text(json.dumps({"text": text, text: 1}))
    expect(message.locator(".headers")).to_contain_text(text)
    expect(message).to_contain_text(text[:128])
    page.get_by_label("Indent JSON").check()
    expect(message.get_by_role("region")).to_contain_text(json.dumps(text))
    assert page.evaluate("window.wasRun") is None
    assert page.locator("main script, main iframe, main img, main style, main svg[onload]").count() == 0


def test_what_would_not_be_seen_is_named(broker: Broker, dashboard: Dashboard) -> None:
    """Turned round, invisible or joined, a text could say to a person what it does not say to a program."""
    hidden = "invoice\u202efdp.exe\u202c \u200bzero\u2060width\ufeff \u2066isolate\u2069 \x7f\x85 \U000e0041tag"
    broker.call("enqueue", queue="default", body=hidden, sender="\u202eevil", headers={"a\u200b": "b\u202e"})
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute("UPDATE broker.messages SET body = %s::json", [json.dumps(hidden, ensure_ascii=False)])
    page = dashboard.open("#/queues/default")
    shown = page.get_by_role("article").inner_text()
    for code in ("202E", "202C", "200B", "2060", "FEFF", "2066", "2069", "7F", "85", "E0041"):
        assert f"⟨U+{code.rjust(4, '0')}⟩" in shown
    assert not set(shown) & set("\u202e\u202c\u200b\u2060\ufeff\u2066\u2069\x7f\x85\U000e0041")
    assert "invoice⟨U+202E⟩fdp.exe⟨U+202C⟩" in shown


@pytest.mark.parametrize(
    "body",
    [
        *(
            '"\\u0000"',
            "1.0",
            "1e400",
            "-0",
            "123456789012345678901234567890",
            '{"a":1,"a":2}',
            '{ "b" :\t1 , "a":[ ] }',
        ),
        *('"\\ud83d\\ude00 \\u0041"', '{"__proto__":{"x":1},"constructor":null}', "[" * 100 + "]" * 100, "null", '""'),
        *('{"body":1,"messages":[{"body":2}]}', '"\\"}],\\\\"', '"text that is מימין לשמאל"'),
    ],
)
def test_a_body_is_shown_as_the_very_text_that_was_sent(broker: Broker, dashboard: Dashboard, body: str) -> None:
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute("SELECT broker.enqueue('default', %s::json)", [body])
    page = dashboard.open("#/queues/default")
    region = page.get_by_role("region", name="Body of message")
    expect(region).to_be_visible()
    assert region.text_content() == body
    page.get_by_label("Indent JSON").check()
    compact = "".join(body.split()) if '"' not in body else None
    if compact is not None:
        assert "".join((region.text_content() or "").split()) == compact


def test_a_body_of_a_mebibyte_is_cut_and_shown_whole_when_asked_for(broker: Broker, dashboard: Dashboard) -> None:
    broker.call("update_queue", queue="default", max_message_bytes=2**20)
    start = "<b>" + "\u202e" * 10
    body = json.dumps(start + "x" * (2**20 - 2 - 3 - 60), ensure_ascii=True)
    assert len(body) == 2**20
    broker.call("enqueue", queue="default", body=json.loads(body))
    with psycopg.connect(broker.database_url) as connection:
        row = connection.execute("SELECT body::text FROM broker.messages").fetchone()
    assert row is not None
    page = dashboard.open("#/queues/default")
    region = page.get_by_role("region", name="Body of message")
    expect(region).to_be_visible()
    assert len(region.text_content() or "") == 4096 + len("…")
    page.get_by_role("button", name="Show all 1 MiB").click()
    expect(page.get_by_role("button", name="Show the beginning only")).to_be_visible()
    assert region.text_content() == row[0]
    # So much is not asked for again every five seconds, but when somebody wants it.
    expect(page.get_by_text("not asked for every five seconds")).to_be_visible()
    broker.call("enqueue", queue="default", body="another")
    page.get_by_role("button", name="Refresh").click()
    expect(page.get_by_role("article")).to_have_count(2)


def test_a_message_full_of_controls_makes_no_page_of_elements(broker: Broker, dashboard: Dashboard) -> None:
    broker.call("update_queue", queue="default", max_message_bytes=2**20)
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute("SELECT broker.enqueue('default', to_json(repeat(%s, 100000)))", ["\u202e"])
    page = dashboard.open("#/queues/default")
    page.get_by_role("button", name="Show all").click()
    expect(page.get_by_role("button", name="Show the beginning only")).to_be_visible()
    region = page.get_by_role("region", name="Body of message")
    assert (region.text_content() or "").count("⟨U+202E⟩") == 100_000
    assert page.locator(".unseeable").count() == 0


def test_names_in_the_address_are_text_too(broker: Broker, dashboard: Dashboard) -> None:
    for name in ("<img src=x onerror=wasRun=true>", "..%2f..%2frpc", "%", "a?b#c"):
        page = dashboard.page
        page.goto(f"{broker.url}/#/queues/{name}")
        dashboard.is_live()
        expect(page.locator(".refusal")).to_be_visible()
        page.goto(f"{broker.url}/#/")
    assert page.evaluate("window.wasRun") is None


def test_the_policy_refuses_what_is_written_into_the_page(broker: Broker, dashboard: Dashboard) -> None:
    """As an injection would: a script, an attribute, a style, and a request to elsewhere."""
    page = dashboard.open()
    refused = page.evaluate("""async () => {
        const main = document.querySelector("main");
        const script = document.createElement("script");
        script.textContent = "window.wasRun = true";
        main.append(script);
        const markup = "<img src='data:,' onerror='window.wasRun = true'><i style='color: red'>x</i>";
        main.insertAdjacentHTML("beforeend", markup);
        const fetched = await fetch("http://127.0.0.1:1/").then(() => "sent", () => "refused");
        await new Promise((resolve) => setTimeout(resolve, 100));
        const directives = window.refusedByPolicy.map((each) => each.split(" ")[0]);
        window.refusedByPolicy.length = 0;
        return { fetched, directives, wasRun: window.wasRun === true };
    }""")
    assert refused["wasRun"] is False
    assert refused["fetched"] == "refused"
    assert {"script-src-elem", "script-src-attr", "style-src-attr", "connect-src"} <= set(refused["directives"])
    dashboard.forget_wrongs()
