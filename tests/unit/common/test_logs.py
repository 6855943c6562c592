"""
Every line of a process in one form: an event, its fields, and the job it is about.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import logging
import structlog
from common.logs import configure, get_logger

configure("INFO", "{style}")
logger = get_logger("ours")
with structlog.contextvars.bound_contextvars(job_id="42"):
    logger.info("jobs.ended", state="answered")
logger.debug("too.quiet")
try:
    1 / 0
except ZeroDivisionError:
    logger.exception("jobs.internal_error")
logging.getLogger("theirs").warning("a library says %s", "so")
logging.getLogger("celery.app.trace").info("Task succeeded: the whole answer")
logging.getLogger("httpx").info("POST /v1/chat/completions")
"""


def log(style: str) -> list[str]:
    """What a process of its own prints: logging is set up once per process."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(style=style)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == ""
    return done.stderr.splitlines()


@pytest.mark.parametrize("style", ["json", "auto"])  # auto = json, where nobody looks on
def test_json_lines_carry_the_event_and_its_fields(style: str) -> None:
    """Ours and the libraries' alike; tracebacks as text; answers and every request to an engine left out."""
    ended, failed, theirs = (json.loads(line) for line in log(style))

    assert ended.pop("timestamp").endswith("Z")
    assert ended == {"event": "jobs.ended", "state": "answered", "job_id": "42", "level": "info"}
    assert failed["event"] == "jobs.internal_error"
    assert "ZeroDivisionError" in failed["exception"]
    assert "job_id" not in failed
    assert (theirs["event"], theirs["level"]) == ("a library says so", "warning")


def test_the_console_has_the_same_lines() -> None:
    """For people: no braces, no colours in a file."""
    lines = log("console")
    text = "\n".join(lines)

    assert "jobs.ended" in lines[0]
    assert "job_id=42" in lines[0]
    assert "ZeroDivisionError" in text
    assert "a library says so" in text
    assert "\x1b" not in text
    assert "the whole answer" not in text
