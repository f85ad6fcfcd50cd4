"""Waits for what a page shows, also where its policy forbids Playwright's own wait_for_function."""

import time
from typing import Any

GUARD_S = 120.0  # only a test that hangs gets there
STEP_MS = 30


def wait_until(page: Any, expression: str) -> None:
    """Returns when a JavaScript expression is true."""
    deadline = time.monotonic() + GUARD_S
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"never true: {expression}"
        page.wait_for_timeout(STEP_MS)
