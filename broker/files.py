"""The dashboard's files, served from memory: they are a client of `/rpc` like any other, and hold nothing secret.

A browser may keep them but asks each time whether they are still the same: so after an upgrade nobody runs old code
against a new broker. What a page may do is said by the Content-Security-Policy: run these files, use these styles,
and call this broker; nothing inline, nothing from elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from typing import NamedTuple

from aiohttp import web

FOLDER = "dashboard"
INDEX = "index.html"

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}

# Not what the system's tables say, which differ from one to the next.
CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}


class File(NamedTuple):
    """A file, of what type it is, and a name for exactly these bytes."""

    content: bytes
    content_type: str
    etag: str


class Files:
    """The files of the dashboard, as they were when the server started."""

    def __init__(self, files: Mapping[str, File]) -> None:
        self._files = files

    def routes(self) -> list[web.RouteDef]:
        """Return the routes, for aiohttp."""
        return [web.get("/", self.index), web.get(f"/{FOLDER}/{{path:.+}}", self.file)]

    async def index(self, request: web.Request) -> web.Response:
        """Serve the page."""
        return self._serve(request, INDEX)

    async def file(self, request: web.Request) -> web.Response:
        """Serve a file that the page asks for."""
        return self._serve(request, request.match_info["path"])

    def _serve(self, request: web.Request, path: str) -> web.Response:
        file = self._files.get(path)
        if file is None:
            raise web.HTTPNotFound
        headers = SECURITY_HEADERS | {"ETag": f'"{file.etag}"'}
        if any(each.value in (file.etag, "*") for each in request.if_none_match or ()):
            return web.Response(status=304, headers=headers)
        return web.Response(body=file.content, headers=headers | {"Content-Type": file.content_type})


def load_files() -> Files:
    """Read the files that lie in the package."""
    return Files(dict(_read(resources.files(__package__).joinpath(FOLDER), "")))


def _read(folder: Traversable, path: str) -> Iterator[tuple[str, File]]:
    for each in folder.iterdir():
        if each.is_dir():
            yield from _read(each, f"{path}{each.name}/")
            continue
        content_type = CONTENT_TYPES.get(each.name[each.name.rfind(".") :])
        if content_type is not None:
            content = each.read_bytes()
            yield f"{path}{each.name}", File(content, content_type, hashlib.sha256(content).hexdigest()[:32])
