"""The generated pages are what their sources say, complete, and free of dead links."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import LeaseLost
from broker.settings import settings_table

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = ("rpc.md", "settings.md", "metrics.md", "wonderq.postman_collection.json")

Json = dict[str, Any]
DOCUMENT: Json = json.loads((ROOT / "rpc_schema.json").read_text("utf-8"))
COLLECTION: Json = json.loads((DOCS / "wonderq.postman_collection.json").read_text("utf-8"))
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "tests" / "data" / "README.md"])

FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(<?([^)\s>]+)>?[^)]*\)")
HEADING = re.compile(r"^#{1,6} +(.+?) *$", re.MULTILINE)
# Where a text was written, and where packages were loaded from there, is nobody's business.
FOREIGN = re.compile(
    r"/(?:work|root|home|Users)/|\bregistry\.|pypi\.org|pythonhosted\.org|npmjs\.|proxy\.golang\.org|index-url"
)


def generate(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the generator of a tree."""
    return subprocess.run(
        [sys.executable, "docs/generate.py", *arguments],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def copy_of_the_tree(tmp_path: Path) -> Path:
    """Return a tree that may be spoilt: the docs and what they are made from."""
    without = shutil.ignore_patterns("__pycache__")
    for name in ("docs", "broker"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=without, symlinks=True)
    shutil.copy(ROOT / "rpc_schema.json", tmp_path)
    return tmp_path


def test_the_generated_docs_are_up_to_date() -> None:
    result = generate(ROOT, "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", GENERATED)
def test_a_stale_file_is_named_with_the_command_to_run(copy_of_the_tree: Path, name: str) -> None:
    stale = copy_of_the_tree / "docs" / name
    stale.write_text(stale.read_text("utf-8") + "\nAnother line.\n", "utf-8")
    result = generate(copy_of_the_tree, "--check")
    assert result.returncode == 1
    assert result.stderr == f"docs/{name} is stale; run: python docs/generate.py\n"
    assert "Another line." in stale.read_text("utf-8"), "a check writes nothing"

    assert generate(copy_of_the_tree).returncode == 0
    assert stale.read_text("utf-8") == (DOCS / name).read_text("utf-8")
    assert generate(copy_of_the_tree, "--check").returncode == 0


def test_a_missing_file_is_stale(copy_of_the_tree: Path) -> None:
    (copy_of_the_tree / "docs" / "settings.md").unlink()
    result = generate(copy_of_the_tree, "--check")
    assert result.returncode == 1
    assert "docs/settings.md is stale" in result.stderr


def test_a_change_of_the_schema_makes_the_docs_stale(copy_of_the_tree: Path) -> None:
    schema = copy_of_the_tree / "rpc_schema.json"
    schema.write_text(schema.read_text("utf-8").replace("Store one message.", "Keep one message."), "utf-8")
    result = generate(copy_of_the_tree, "--check")
    assert result.returncode == 1
    assert "docs/rpc.md" in result.stderr
    assert "docs/wonderq.postman_collection.json" in result.stderr
    assert "docs/settings.md" not in result.stderr


def test_the_generator_never_overwrites_a_page_whose_prose_it_cannot_find(copy_of_the_tree: Path) -> None:
    page = copy_of_the_tree / "docs" / "rpc.md"
    page.write_text("# Only prose\n", "utf-8")
    assert generate(copy_of_the_tree).returncode != 0
    assert page.read_text("utf-8") == "# Only prose\n"


def test_a_change_of_the_outcomes_makes_their_page_stale(copy_of_the_tree: Path) -> None:
    table = copy_of_the_tree / "broker" / "storage" / "outcomes.py"
    table.write_text(table.read_text("utf-8").replace('"57P01": Failure(', '"57P99": Failure('), "utf-8")
    result = generate(copy_of_the_tree, "--check")
    assert result.returncode == 1
    assert result.stderr == "docs/reliability.md is stale; run: python docs/generate.py\n"


def test_the_docs_do_not_depend_on_the_machine(tmp_path: Path) -> None:
    elsewhere = str(tmp_path)
    environment = {
        "HOME": elsewhere,
        "XDG_DATA_HOME": elsewhere,
        "DATABASE_URL": "postgresql://elsewhere/",
        "BROKER_PORT": "1",
        "PYTHONHASHSEED": "7",
        "LC_ALL": "C",
    }
    assert generate(ROOT, "--check", **environment).returncode == 0


def test_every_setting_is_documented() -> None:
    lines = (DOCS / "settings.md").read_text("utf-8").splitlines()
    for _, setting, _ in settings_table():
        (line,) = (line for line in lines if line.startswith(f"| `{setting.flag}` |"))
        assert f"| `{setting.variable}` |" in line
        assert setting.help in line


def sections(page: str) -> dict[str, str]:
    """Return the text below each heading of the third level."""
    parts = re.split(r"^### (.+)\n", page, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("method", DOCUMENT["methods"], ids=[m["name"] for m in DOCUMENT["methods"]])
def test_every_method_is_documented_with_its_params_errors_and_examples(method: Json) -> None:
    text = sections((DOCS / "rpc.md").read_text("utf-8"))[method["name"]]
    assert method["summary"] in text
    assert method.get("description", "") in text
    assert f"Permission: `{method['x-permission']}`." in text
    params = text.partition("**Result.**")[0].splitlines()
    for param in method["params"]:
        (line,) = (line for line in params if line.startswith(f"| `{param['name']}` |"))
        assert param.get("description", "") in line
        assert ("**required**" in line) == param["required"]
    for error in method["errors"]:
        name = error["$ref"].rpartition("/")[2]
        about = DOCUMENT["components"]["errors"][name]
        assert f"| {about['code']} | `{name}` | {about['message']} |" in text
    assert text.count("curl ") == len(method["examples"])


def test_every_error_and_every_shared_type_is_documented() -> None:
    page = (DOCS / "rpc.md").read_text("utf-8")
    table = page.partition("\n## Errors\n")[2]
    for name, error in DOCUMENT["components"]["errors"].items():
        assert f"| {error['code']} | `{name}` | {error['message']} |" in table
    assert DOCUMENT["components"]["schemas"].keys() <= sections(page).keys()


def test_the_json_on_the_page_of_the_methods_is_valid() -> None:
    page = (DOCS / "rpc.md").read_text("utf-8")
    blocks = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) > len(DOCUMENT["methods"])
    for block in blocks:
        assert json.loads(block)["jsonrpc"] == "2.0"


def test_the_error_that_explains_errors_is_what_the_broker_says() -> None:
    page = (DOCS / "rpc.md").read_text("utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith('{"jsonrpc": "2.0", "id": 1, "error"'))
    real = LeaseLost()
    assert json.loads(line)["error"] == {"code": real.code, "message": real.message, "data": real.data}


def folder(name: str) -> list[Json]:
    """Return the requests of one folder of the Postman collection."""
    (found,) = (part["item"] for part in COLLECTION["item"] if part["name"] == name)
    requests: list[Json] = found
    return requests


def test_the_postman_collection_is_one_of_version_2_1() -> None:
    """Structure only: the schema of collections is in no package that could be pinned."""
    assert COLLECTION.keys() == {"info", "item", "variable"}
    assert COLLECTION["info"]["schema"].endswith("/collection/v2.1.0/collection.json")
    assert COLLECTION["info"]["name"]
    (variable,) = COLLECTION["variable"]
    assert (variable["key"], variable["value"]) == ("broker_url", "http://127.0.0.1:8080")
    for item in [*folder("Methods"), *folder("Pages")]:
        assert item.keys() == {"name", "request", "response"}
        request = item["request"]
        assert request["method"] in {"GET", "POST"}
        url = request["url"]
        assert url["host"] == ["{{broker_url}}"]
        assert url["raw"] == "{{broker_url}}/" + "/".join(url["path"])
        for response in item["response"]:
            assert {"name", "originalRequest", "status", "code", "header", "body"} <= response.keys()
            assert isinstance(response["code"], int)


def test_the_postman_collection_calls_every_method_with_its_first_example() -> None:
    items = folder("Methods")
    assert [item["name"] for item in items] == [method["name"] for method in DOCUMENT["methods"]]
    for item, method in zip(items, DOCUMENT["methods"], strict=True):
        request = item["request"]
        assert (request["method"], request["url"]["raw"]) == ("POST", "{{broker_url}}/rpc")
        assert {"key": "Content-Type", "value": "application/json"} in request["header"]
        assert request["body"]["mode"] == "raw"
        call = json.loads(request["body"]["raw"])
        assert (call["jsonrpc"], call["method"]) == ("2.0", method["name"])
        assert call["params"] == {p["name"]: p["value"] for p in method["examples"][0]["params"]}
        answers = [json.loads(response["body"])["result"] for response in item["response"]]
        assert answers == [example["result"]["value"] for example in method["examples"]]


def test_the_postman_collection_reads_every_page() -> None:
    found = {item["request"]["url"]["raw"]: item["request"]["method"] for item in folder("Pages")}
    pages = ("/livez", "/readyz", "/healthz", "/metrics", "/openrpc.json")
    assert found == {"{{broker_url}}" + page: "GET" for page in pages}


def test_the_design_names_every_module_with_its_job() -> None:
    page = (DOCS / "design.md").read_text("utf-8")
    rows = page.partition("| module | its one job |\n")[2].partition("\n\n")[0]
    modules = (path.relative_to(ROOT / "broker").with_suffix("") for path in (ROOT / "broker").rglob("*.py"))
    named = {module.as_posix() for module in modules if not module.name.startswith("__")}
    assert named == set(re.findall(r"`([a-z_/]*[a-z_])`", rows)) - {"rpc_schema"}


def anchors(page: Path) -> set[str]:
    """Return the fragments under which the headings of a page can be reached, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(FENCED.sub("", page.read_text("utf-8"))):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if slug in found else slug)
        found[slug] = found.get(slug, 0) + 1
    return names


def dead_links(page: Path) -> Iterator[str]:
    """Yield the links of a page that lead to no file or to no heading of this tree."""
    for target in LINK.findall(CODE.sub("", FENCED.sub("", page.read_text("utf-8")))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        has_anchors = file.suffix == ".md" and bool(fragment)
        if not file.exists() or (has_anchors and fragment not in anchors(file)):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    assert list(dead_links(page)) == []


def test_a_dead_link_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`\n[a](page.md#one-two) [b](#one-two) [c](https://example.org/none.md) `[d](none.md)`\n"
        "```\n[e](none.md)\n```\n[f](none.md) [g](page.md#three) [`h`](#four)\n",
        "utf-8",
    )
    assert list(dead_links(page)) == ["none.md", "page.md#three", "#four"]


@pytest.mark.parametrize("page", [*PAGES, DOCS / GENERATED[2]], ids=lambda page: page.name)
def test_no_page_tells_of_the_machine_it_was_written_on(page: Path) -> None:
    assert FOREIGN.findall(page.read_text("utf-8")) == []
