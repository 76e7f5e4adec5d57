"""The least that aiohttp can do for a call: read the body, answer a constant.

    python -m benchmarks.constant_server [--uvloop]

Prints where it listens. What a broker with the same aiohttp does is measured against it. The answer is one of
`enqueue`, so that the same script for wrk judges both.
"""

from __future__ import annotations

import argparse
import asyncio

from aiohttp import web

ANSWER = b'{"jsonrpc":"2.0","result":{"message_id":"000000000000002a","duplicate":false},"id":1}'


async def answer(request: web.Request) -> web.Response:
    await request.read()
    return web.Response(body=ANSWER, content_type="application/json")


async def serve() -> None:
    application = web.Application()
    application.router.add_post("/rpc", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    print(f"listening on http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uvloop", action="store_true", help="run on uvloop")
    if parser.parse_args().uvloop:
        import uvloop

        uvloop.run(serve())
    else:
        asyncio.run(serve())


if __name__ == "__main__":
    main()
