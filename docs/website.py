"""Build the documentation as a site: `make site` writes it to build/site.

The pages are written to be read where the source is, with links from file to file. Here they are gathered into one
folder, README.md as the first page; links to files that are no pages lead to copies of those. Then Zensical builds
the site by mkdocs.yml, strictly, and what it has built is looked through: every link leads somewhere, and nothing is
loaded from elsewhere, so that the site works without the internet and tells nobody who reads it.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "mkdocs.yml"
# Pages at the top of the tree, and their names on the site. SECURITY.md would be security.md where case does not count.
AT_THE_TOP = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "reporting.md"}
FILES = "files"  # the folder of the site for what is no page
FENCED = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s]+)(?P<after>\))")
CODE_SPAN = re.compile(r"`[^`\n]*`")
POLICY = (
    "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' 'unsafe-inline' file: data: blob:\">"
)
# What makes a browser load something, but for links that a person follows.
LOADS = {"src", "srcset", "poster", "data", "xlink:href"}
LOADING_LINKS = {"stylesheet", "preload", "prefetch", "preconnect", "dns-prefetch", "icon", "modulepreload", "manifest"}


def pages(root: Path) -> dict[Path, str]:
    """Return every page of a tree, as path and as name on the site."""
    found = {root / name: page for name, page in AT_THE_TOP.items() if (root / name).exists()}
    docs = root / "docs"
    return found | {path: path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))}


class Gathering:
    """Pages and files on their way into one folder."""

    def __init__(self, root: Path, target: Path) -> None:
        self._root, self._target = root, target
        self._pages = pages(root)

    def run(self) -> None:
        """Write the folder anew."""
        shutil.rmtree(self._target, ignore_errors=True)
        for path, name in self._pages.items():
            place = self._target / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(self._relinked(path, name), "utf-8")

    def _relinked(self, path: Path, name: str) -> str:
        """Return the text of a page with links that hold on the site."""

        def relink(found: re.Match[str]) -> str:
            return found["before"] + self._link(path, name, found["target"]) + found["after"]

        # A link's text may be code, so code spans are hidden from the search and put back.
        hidden: list[str] = []

        def hide(span: re.Match[str]) -> str:
            hidden.append(span.group())
            return f"\0{len(hidden) - 1}\0"

        text = FENCED.sub(hide, path.read_text("utf-8"))
        text = LINK.sub(relink, CODE_SPAN.sub(hide, text))
        while "\0" in text:
            text = re.sub(r"\0(\d+)\0", lambda place: hidden[int(place[1])], text)
        return text

    def _link(self, path: Path, name: str, target: str) -> str:
        parts = urlsplit(target)
        if parts.scheme or not parts.path:
            return target
        leads_to = (path.parent / parts.path).resolve()
        if not leads_to.exists():
            return target  # and is found to be dead later
        place = self._pages.get(leads_to) or self._copied(leads_to)
        link = os.path.relpath(place, Path(name).parent)
        return f"{link}#{parts.fragment}" if parts.fragment else link

    def _copied(self, path: Path) -> str:
        """Copy a file to where the site has it; return that place. A folder becomes a page that lists its files."""
        docs = self._root / "docs"
        name = path.relative_to(docs) if path.is_relative_to(docs) else Path(FILES, path.relative_to(self._root))
        place = self._target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            place = place.with_suffix(".md")
            files = sorted(one for one in path.rglob("*") if one.is_file() and "__pycache__" not in one.parts)
            lines = [f"- [{one.relative_to(path)}]({Path(self._copied(one)).relative_to(FILES)})" for one in files]
            place.write_text(f"# {path.name}\n\n" + "\n".join(lines) + "\n", "utf-8")
        else:
            shutil.copy(path, place)
        return place.relative_to(self._target).as_posix()


def forbid_loading(site: Path) -> None:
    """Tell browsers to load nothing from elsewhere, whatever the theme's scripts come upon."""
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert text.count("<head>") == 1
        page.write_text(text.replace("<head>", f"<head>{POLICY}"), "utf-8")


class Links(HTMLParser):
    """What a page links to, loads, and can be linked to at."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = {"", "__skip"}
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses and the names of a tag."""
        given = {name: value for name, value in attrs if value}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        self.loads += [given[name] for name in LOADS if name in given]
        if "href" in given:
            is_loaded = tag == "link" and set(given.get("rel", "").split()) & LOADING_LINKS
            (self.loads if is_loaded else self.links).append(given["href"])


def is_elsewhere(address: str) -> bool:
    """Whether an address leads out of the site."""
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in {"http", "https"}


def faults(site: Path) -> Iterator[str]:
    """Yield what is wrong with a site: what it loads from elsewhere, and links that lead nowhere."""
    read = {path: Links(path) for path in sorted(site.rglob("*.html"))}
    for path, page in read.items():
        name = path.relative_to(site)
        yield from (f"{name} loads {one}" for one in page.loads if is_elsewhere(one))
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if is_elsewhere(link) or parts.scheme:
                continue
            # The page for what is not found is shown at any depth, so its links begin at the root.
            base = site if parts.path.startswith("/") else path.parent
            place = (base / unquote(parts.path).lstrip("/")).resolve() if parts.path else path
            place = place / "index.html" if place.is_dir() else place
            if not place.exists() or (place in read and unquote(parts.fragment) not in read[place].anchors):
                yield f"{name} links to {link}, which is not there"
    for sheet in sorted(site.rglob("*.css")):
        found = re.findall(r"(?:url\(|@import )[\"']?(?:https?:)?//[^)\"']+", sheet.read_text("utf-8"))
        yield from (f"{sheet.relative_to(site)} loads {one}" for one in found)


def names_in(nav: object) -> Iterator[str]:
    """Yield the pages of a `nav`."""
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
            yield from names_in(part)


def faults_of_nav(root: Path) -> Iterator[str]:
    """Yield the pages that are not in the navigation exactly once, and what stands there and is none."""
    named = sorted(names_in(yaml.safe_load((root / CONFIG).read_text("utf-8"))["nav"]))
    there = set(pages(root).values())
    yield from (f"{name} is not in the nav of {CONFIG}" for name in sorted(there - set(named)))
    yield from (f"{name} is in the nav of {CONFIG} and not there" for name in sorted(set(named) - there))
    yield from (f"{name} is twice in the nav of {CONFIG}" for name in sorted({n for n in named if named.count(n) > 1}))


def build(root: Path) -> list[str]:
    """Build the site of a tree by its mkdocs.yml; return what is wrong with it."""
    Gathering(root, root / "build" / "pages").run()
    if found := list(faults_of_nav(root)):
        return found
    zensical = [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", CONFIG]
    built = subprocess.run(zensical, cwd=root, capture_output=True, text=True, check=False)
    said = built.stdout + built.stderr
    if built.returncode or "warning" in said.lower():
        return [said]
    forbid_loading(root / "build" / "site")
    return list(faults(root / "build" / "site"))


if __name__ == "__main__":
    found = build(ROOT)
    print(*found, sep="\n", file=sys.stderr)
    if not found:
        print(f"{ROOT / 'build' / 'site'}{os.sep}index.html")
    raise SystemExit(bool(found))
