"""
Waiting for something to become true, with an end.
"""

from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], object], *, within_s: float = 10.0, what: str = "") -> float:
    """Look until *condition* holds; returns how long that took, in seconds. Fails after *within_s*."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < within_s, f"not within {within_s} s: {what or condition}"
        time.sleep(0.01)
    return time.monotonic() - began
