"""The documentation as a site: complete, without dead links, and loading nothing from elsewhere."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from website import ROOT, Gathering, build, faults, faults_of_nav

PAGE = "<html><head></head><body>{}</body></html>"


def test_every_page_is_in_the_navigation_once() -> None:
    assert list(faults_of_nav(ROOT)) == []


def test_a_page_that_nobody_finds_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "docs" / "howto").mkdir(parents=True)
    for name in ("README.md", "docs/one.md", "docs/howto/two.md"):
        (tmp_path / name).touch()
    (tmp_path / "mkdocs.yml").write_text("nav: [{Start: index.md}, {More: [one.md, {Gone: gone.md}, one.md]}]")
    assert list(faults_of_nav(tmp_path)) == [
        "howto/two.md is not in the nav of mkdocs.yml",
        "gone.md is in the nav of mkdocs.yml and not there",
        "one.md is twice in the nav of mkdocs.yml",
    ]


def test_links_from_page_to_page_and_to_files_hold_on_the_site(tmp_path: Path) -> None:
    tree, site = tmp_path / "tree", tmp_path / "site"
    (tree / "docs" / "howto").mkdir(parents=True)
    (tree / "tools").mkdir()
    (tree / "tools" / "one.sh").write_text("true")
    (tree / "docs" / "plot.svg").write_text("<svg/>")
    (tree / "docs" / "two.md").touch()
    (tree / "README.md").write_text("[`two`](docs/two.md#a) ![](docs/plot.svg)\n```sh\n# [no](docs/two.md)\n```\n")
    (tree / "docs" / "howto" / "three.md").write_text(
        "[home](../../README.md) [two](../two.md) [tools](../../tools/) [gone](gone.md) `[no](x.md)` [out](https://a.b/)"
    )
    Gathering(tree, site).run()
    assert (site / "index.md").read_text() == "[`two`](two.md#a) ![](plot.svg)\n```sh\n# [no](docs/two.md)\n```\n"
    assert (site / "howto" / "three.md").read_text() == (
        "[home](../index.md) [two](../two.md) [tools](../files/tools.md) [gone](gone.md) `[no](x.md)` [out](https://a.b/)"
    )
    assert (site / "files" / "tools" / "one.sh").read_text() == "true"
    assert (site / "files" / "tools.md").read_text() == "# tools\n\n- [one.sh](tools/one.sh)\n"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('<script src="https://cdn.example/x.js"></script>', "one.html loads https://cdn.example/x.js"),
        ('<img src="//pictures.example/x.png">', "one.html loads //pictures.example/x.png"),
        ('<link rel="preconnect stylesheet" href="https://a.b/">', "one.html loads https://a.b/"),
        ('<a href="two.html">', "one.html links to two.html, which is not there"),
        ('<a href="#here">', "one.html links to #here, which is not there"),
        ('<a href="other.html#there">', "one.html links to other.html#there, which is not there"),
        ('<img src="plot.svg">', "one.html links to plot.svg, which is not there"),
        ('<a href="https://a.b/">', None),
        ('<link rel="canonical" href="https://a.b/">', None),
        ('<p id="here"><a href="#here"></a><a href="other.html#is%20here"></a><a href="mailto:a@b.c"></a>', None),
    ],
)
def test_what_is_loaded_from_elsewhere_and_what_leads_nowhere_is_found(
    tmp_path: Path, text: str, fault: str | None
) -> None:
    (tmp_path / "one.html").write_text(PAGE.format(text))
    (tmp_path / "other.html").write_text(PAGE.format('<p id="is here">'))
    assert list(faults(tmp_path)) == ([] if fault is None else [fault])


def test_a_style_that_loads_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "main.css").write_text("@import 'https://fonts.example/x'; a{background:url(data:image/png;base64,A)}")
    assert list(faults(tmp_path)) == ["main.css loads @import 'https://fonts.example/x"]


needs_zensical = pytest.mark.skipif(importlib.util.find_spec("zensical") is None, reason="`make site` installs it")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of this tree."""
    without = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.egg-info")
    return Path(shutil.copytree(ROOT, tmp_path / "tree", ignore=without, symlinks=True))


@needs_zensical
def test_the_site_builds_without_a_warning_and_forbids_to_load_from_elsewhere(tree: Path) -> None:
    assert build(tree) == []
    built = sorted((tree / "build" / "site").rglob("*.html"))
    assert len(built) > 10
    assert all("Content-Security-Policy" in page.read_text("utf-8") for page in built)


@needs_zensical
def test_a_dead_link_keeps_the_site_from_being_built(tree: Path) -> None:
    with (tree / "docs" / "topics.md").open("a") as page:
        page.write("\n[dead](rpc.md#no-such-method)\n")
    (complaint,) = build(tree)
    assert "anchor does not exist" in complaint
