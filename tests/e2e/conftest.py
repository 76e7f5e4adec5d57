"""What `browser` offers to the tests."""

from browser import broker, chromium, dashboard, open_dashboard, start_broker

__all__ = ["broker", "chromium", "dashboard", "open_dashboard", "start_broker"]
