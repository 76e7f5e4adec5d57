"""TLS without a proxy: certificates from files, and a limit on how long a handshake may take."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

from aiohttp import web

# As long as a first byte, or a head, may take where there is no TLS.
HANDSHAKE_SECONDS = 15.0


class CertificateError(Exception):
    """The files cannot be used; the message says why."""


def server_context(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """Return what connections are protected with: TLS 1.2 and later; None where no files are named.

    Raises CertificateError.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise CertificateError("--tls-certificate and --tls-key go together: name both files.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise CertificateError(
            f"{certificate} and {key} cannot be used: {error}. Both are files in PEM form."
        ) from error
    return context


class Site(web.TCPSite):
    """A port of this process alone."""

    async def start(self) -> None:
        """Begin to listen."""
        await web.BaseSite.start(self)
        assert self._runner.server is not None, "the runner is set up"
        limits: dict[str, Any] = {}
        if self._ssl_context is not None:
            limits = {"ssl": self._ssl_context, "ssl_handshake_timeout": HANDSHAKE_SECONDS}
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server, self._host, self._port, backlog=self._backlog, **limits
        )
