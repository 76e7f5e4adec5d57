"""The dashboard's files: what a browser gets, and what its page may do. What it does is tested in tests/e2e."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import broker as package
from conftest import Broker
from outside import Answer, request, send

FOLDER = Path(package.__file__).parent / "dashboard"
FILES = sorted(str(path.relative_to(FOLDER)) for path in FOLDER.rglob("*") if path.is_file())
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
MODULES = [path for path in FILES if path.endswith(".js") and not path.startswith("vendor/")]


async def get(broker: Broker, path: str, *fields: str, method: str = "GET") -> Answer:
    return await send(broker.url, request(method, path, b"", *fields, content_type=None))


@pytest.mark.parametrize("path", FILES)
async def test_every_file_is_served_as_it_is_with_its_type(standing_broker: Broker, path: str) -> None:
    answer = await get(standing_broker, f"/dashboard/{path}")
    assert (answer.status, answer.body) == (200, (FOLDER / path).read_bytes())
    assert answer.headers["content-type"].split(";")[0] == TYPES.get(Path(path).suffix, "text/plain")
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_the_page_may_run_its_own_files_call_its_own_broker_and_nothing_else(standing_broker: Broker) -> None:
    answer = await get(standing_broker, "/")
    assert (answer.status, answer.body) == (200, (FOLDER / "index.html").read_bytes())
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_a_browser_asks_each_time_and_is_sent_only_what_is_new(standing_broker: Broker) -> None:
    first = await get(standing_broker, "/dashboard/app.js")
    assert first.headers["cache-control"] == "no-cache"
    etag = first.headers["etag"]
    same = await get(standing_broker, "/dashboard/app.js", f'If-None-Match: "other", {etag}')
    assert (same.status, same.body, same.headers["etag"]) == (304, b"", etag)
    other = await get(standing_broker, "/dashboard/app.js", 'If-None-Match: "other"')
    assert (other.status, other.body) == (200, first.body)
    assert (await get(standing_broker, "/")).headers["etag"] != etag


async def test_head_tells_what_get_would_and_other_methods_are_refused(standing_broker: Broker) -> None:
    for path in ("/", "/dashboard/style.css"):
        got, told = await get(standing_broker, path), await get(standing_broker, path, method="HEAD")
        assert (told.status, told.body) == (200, b"")
        for name in ("content-length", "content-type", "etag", "content-security-policy"):
            assert told.headers[name] == got.headers[name]
        refused = await get(standing_broker, path, method="POST")
        assert (refused.status, refused.error["data"]["type"]) == (405, "invalid_request")
        assert set(refused.headers["allow"].split(",")) == {"GET", "HEAD"}


@pytest.mark.parametrize(
    "path",
    [
        *("/dashboard", "/dashboard/", "/dashboard/nothing.js", "/dashboard/vendor", "/dashboard//app.js"),
        *("/dashboard/../rpc_schema.json", "/dashboard/%2e%2e/rpc_schema.json", "/dashboard/..%2frpc_schema.json"),
        *("/dashboard/%2fetc%2fpasswd", "/app.js"),
    ],
)
async def test_there_is_nothing_else(standing_broker: Broker, path: str) -> None:
    answer = await get(standing_broker, path)
    assert (answer.status, answer.error["data"]["type"]) == (404, "invalid_request")


async def test_a_page_of_a_foreign_site_cannot_name_us_by_that_sites_name(standing_broker: Broker) -> None:
    refused = request("GET", "/dashboard/app.js", b"", host="evil.example", content_type=None)
    assert (await send(standing_broker.url, refused)).status == 421


def test_nothing_is_written_into_the_page_that_the_policy_would_refuse() -> None:
    page = (FOLDER / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?![^>]* src=)|<style|style=|\bon\w+=|https?:", page) == []


def test_the_page_asks_for_all_its_modules_at_once() -> None:
    """Else a browser would learn of them one after the other, each from the one before."""
    page = (FOLDER / "index.html").read_text("utf-8")
    asked = set(re.findall(r' (?:href|src)="dashboard/([^"]+\.js)"', page))
    assert asked == {path for path in FILES if path.endswith(".js")}


@pytest.mark.parametrize("path", MODULES)
def test_text_of_strangers_never_becomes_markup(path: str) -> None:
    """Elements are made by Preact, which sets text as text; what could make markup of it is not used at all."""
    text = (FOLDER / path).read_text("utf-8")
    assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text) == []


@pytest.mark.parametrize("path", MODULES)
def test_the_page_needs_nothing_from_elsewhere(path: str) -> None:
    text = (FOLDER / path).read_text("utf-8")
    assert re.findall(r"https?://", text) == []
    imported = re.findall(r'from "([^"]+)"', text)
    assert [each for each in imported if each.removeprefix("./") not in FILES] == []
    assert re.findall(r'fetch\(\s*"(.*?)"', text) == (["rpc"] if path == "rpc.js" else [])


def test_what_is_vendored_has_its_licence_beside_it() -> None:
    vendored = [path for path in FILES if path.startswith("vendor/")]
    licences = (FOLDER / "vendor" / "LICENSES.txt").read_text("utf-8")
    for path in vendored:
        assert Path(path).name in licences or path.endswith("LICENSES.txt")
    assert "Apache License" in licences
    assert "MIT License" in licences
