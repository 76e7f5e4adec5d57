"""The pictures of README and docs: `make screenshots` writes them, and `make e2e` sees that they can be made."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import psycopg
import pytest
from playwright.sync_api import expect

from browser import DESKTOP, PHONE, Broker, OpenDashboard, stock

# A picture is looked at in a README, also over a slow line.
MOST_BYTES = 150_000
PICTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "dashboard-light": ("#/", {"color_scheme": "light"}),
    "dashboard-dark": ("#/", {"color_scheme": "dark"}),
    "dashboard-queue": ("#/queues/orders.dead", {"viewport": {**DESKTOP, "height": 980}}),
    "dashboard-topics": ("#/topics", {"viewport": {**DESKTOP, "height": 490}}),
    "dashboard-phone": ("#/", {"viewport": PHONE, "is_mobile": True, "has_touch": True, "device_scale_factor": 1.5}),
}

# A quarter of an hour of a shop: what comes in waves is handled a little later, and now and then something is not.
HISTORY = """
INSERT INTO broker.statistics (
    minute, queue_id, enqueued, delivered, deleted, returned, dead, expired, queues, is_sum
)
SELECT
    extract(epoch FROM now())::int / 60 - ago, q.id,
    360 + 190 * sin(ago / 2.2), 360 + 190 * sin((ago + 1) / 2.2), 352 + 190 * sin((ago + 1.3) / 2.2), ago % 4,
    (ago IN (3, 9))::int, 0, 0, true
FROM generate_series(0, 14) AS ago
CROSS JOIN (SELECT 0 AS id UNION ALL SELECT id FROM broker.queues WHERE name = 'orders.dead') AS q
"""


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_small(broker: Broker, open_dashboard: OpenDashboard, tmp_path: Path, name: str) -> None:
    stock(broker)
    with psycopg.connect(broker.database_url, autocommit=True) as connection:
        connection.execute(HISTORY)
    route, options = PICTURES[name]
    page = open_dashboard(broker, **options).open(route)
    expect(page.locator("footer")).to_contain_text("PostgreSQL")
    if route != "#/topics":
        expect(page.locator(".plot")).to_be_visible()
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    page.screenshot(path=path)
    assert path.stat().st_size < MOST_BYTES
