"""
How a process proves from outside that its loop turns: a file it touches, and the age of that file.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

TOUCH_EVERY_S = 5.0
ALIVE_S = 20.0  # three touches may be late


def alive_file(role: str) -> Path:
    """The file that a process of *role* (worker or router) touches on this machine."""
    folder = Path(tempfile.gettempdir()) / f"shiftworker-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / f"{role}.alive"


def is_alive(role: str) -> bool:
    """Has a process of *role* touched its file lately?"""
    try:
        return time.time() - alive_file(role).stat().st_mtime < ALIVE_S
    except OSError:
        return False
