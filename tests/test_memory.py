"""A large request costs what reading it costs, and not that of getting its memory from the kernel each time."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import aiohttp
import pytest

from broker_process import Start

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told to keep memory")

BYTES = 7 * 2**20
TIMES = 10
# A body of seven MiB has 1,792 pages, and lies in several buffers.
PAGES = BYTES // 4096


@pytest.mark.parametrize("processes", [1, 2])
async def test_large_requests_do_not_get_their_pages_anew(start: Start, database_url: str, processes: int) -> None:
    broker = await (await start("--database-url", database_url, "--processes", str(processes))).ready()
    call = b'{"jsonrpc":"2.0","id":1,"method":"enqueue","params":{"body":"' + b"x" * BYTES + b'"}}'
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as http:

        async def send_some() -> int:
            """Return how many pages were got meanwhile, by all processes."""
            before = sum(map(faults, broker.workers.values() or [broker.pid]))
            for _ in range(TIMES):
                async with http.post(f"{broker.url}/rpc", data=io.BytesIO(call)) as response:
                    assert (await response.json())["error"]["data"]["type"] == "message_too_large"
            return sum(map(faults, broker.workers.values() or [broker.pid])) - before

        await send_some()
        assert await send_some() < TIMES * PAGES / 10


def faults(pid: int) -> int:
    """Return how many pages a process has got that needed no disk: the field minflt of proc(5)."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])
