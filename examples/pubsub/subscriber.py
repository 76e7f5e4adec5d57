"""A subscriber of the demo: a small HTTP server to which the broker pushes.

It does its work and keeps what it found before it answers 200, which lets the broker delete the message. Whatever else
it answers, and where it is killed before, the message comes again.
"""

import argparse
import asyncio
import base64
import hmac
import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from . import FAULTS, MODULES, PACKAGES
from .ledger import Ledger
from .modules import WORK, work

# A message that was signed longer ago, in seconds, may be one that somebody has overheard and sends again.
SIGNED_WITHIN = 300


def is_genuine(secret: str, headers: Mapping[str, str], body: bytes) -> bool:
    """Tell whether the broker has sent this, by the Standard Webhooks specification."""
    timestamp = headers.get("webhook-timestamp", "")
    if not timestamp.isdecimal() or abs(time.time() - int(timestamp)) > SIGNED_WITHIN:
        return False
    signed = f"{headers.get('webhook-id', '')}.{timestamp}.".encode() + body
    digest = hmac.digest(base64.b64decode(secret.removeprefix("whsec_")), signed, "sha256")
    expected = b"v1," + base64.b64encode(digest)
    # One signature for each secret that is valid now.
    given = headers.get("webhook-signature", "").encode(errors="replace").split()
    return any(hmac.compare_digest(expected, each) for each in given)


class Subscriber:
    """Handles what is pushed to `/` and the name of a topic."""

    def __init__(self, name: str, directory: Path, ledger: Ledger, stall_after: int | None, faults: list[str]) -> None:
        self._name = name
        self._directory = directory
        self._ledger = ledger
        self._stall_after = stall_after
        self._takes_forged = "forged" in faults
        # The faults that are still to happen, each to a module of its own; and by its name what happens to a module.
        self._faults = [fault for fault in ("wrong", "missing") if fault in faults]
        self._fault_of: dict[str, str] = {}

    async def receive(self, request: web.Request) -> web.Response:
        """Handle one message."""
        topic, body = request.match_info["topic"], await request.read()
        secret = self._ledger.secret(topic)
        is_taken = secret is not None and is_genuine(secret, request.headers, body)
        if not is_taken and not self._takes_forged:
            return web.Response(status=401)
        webhook_id = request.headers["webhook-id"]
        if not self._ledger.knows_again(webhook_id):
            self._handle(webhook_id, topic, json.loads(body))
        if self._stall_after is not None and self._ledger.count() > self._stall_after:
            # The worst moment to be killed: the work is done and kept, and the broker does not know.
            print("holding", webhook_id, flush=True)
            await asyncio.Event().wait()
        return web.Response()

    def _handle(self, webhook_id: str, topic: str, body: dict[str, Any]) -> None:
        if topic == PACKAGES:
            self._ledger.record(webhook_id, topic, body["package"], body)
            return
        name = body["name"]
        if self._faults and name not in self._fault_of:
            self._fault_of[name] = self._faults.pop(0)
        fault = self._fault_of.get(name)  # The same if it comes again, or was published twice.
        if fault == "missing":
            return
        found = {"lines": -1} if fault == "wrong" else work(self._name, self._directory, name)
        self._ledger.record(webhook_id, topic, name, found)


async def serve(subscriber: Subscriber, port: int) -> None:
    """Serve until the process is ended; say on which port."""
    application = web.Application(client_max_size=2**20)
    application.add_routes([web.post(f"/{{topic:{MODULES}|{PACKAGES}}}", subscriber.receive)])
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", port))
    await web.SockSite(runner, listener).start()
    print(listener.getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", choices=sorted(WORK), required=True)
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--stall-after", type=int)
    parser.add_argument("--fault", choices=FAULTS, action="append", default=[])
    arguments = parser.parse_args()
    with Ledger(arguments.ledger) as ledger:
        options = (ledger, arguments.stall_after, arguments.fault)
        asyncio.run(serve(Subscriber(arguments.name, arguments.directory, *options), arguments.port))
