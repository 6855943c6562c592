"""
What an operator reads in the terminal.
"""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from common.schemas import SwitchRecord
from tests.factories import make_machine
from worker.show import status_panel
from worker.state.backlog import Backlog
from worker.state.residency import Quarantine, Residency
from worker.telemetry.summarize import summarize

WHY = "14b ended while it was loading (exit code 1). [rank0]: RuntimeError in [/usr/lib/libcuda.so]"


def test_status_says_why_a_model_is_left_alone() -> None:
    """Word for word, and for how long: an engine's last words may hold whatever they like, brackets too."""
    status = summarize(
        worker="w",
        machine=make_machine(24),
        residency=Residency(
            capacity=1, max_residents=1, quarantined={"14b": Quarantine(since=1000, until=1120, failures=2, reason=WHY)}
        ),
        backlog=Backlog(),
        switches=[
            SwitchRecord.model_validate(
                {"from_model": None, "to_model": "14b", "outcome": "failed", "seconds": 3, "stages": {}, "attempts": 3,
                 "reason": WHY, "at": "2026-11-21T00:00:00Z", "level": "cold", "load_bytes": None}
            )
        ],
        max_temperature_c=85,
        stopping=False,
        now=1060,
    )  # fmt: skip
    screen = StringIO()
    Console(file=screen, width=300).print(status_panel(status))

    said = screen.getvalue()
    assert f"14b failed to load 2 times and is left alone for 60 s: {WHY}" in said
    assert said.count(WHY) == 2
