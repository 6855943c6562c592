"""
When a larger model that is ready takes a smaller one's jobs: a row for each question.
"""

from __future__ import annotations

import pytest

from worker.scheduling.substitute import choose_substitute
from worker.state.backlog import Backlog, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

LARGER = {"small": ("middle", "large"), "middle": ("large",)}


def choose(
    waiting: dict[str, int], ready: str | None, *, job_s: dict[str, float], switch_s: float | None = 10.0
) -> tuple[str | None, str | None]:
    residents = (Resident(model_id=ready, level=Level.READY, bytes=1, since=0),) if ready else ()
    residency = Residency(
        capacity=9, max_residents=1, residents=residents,
        switch_s={} if switch_s is None else dict.fromkeys(("small", "middle", "large"), switch_s),
    )  # fmt: skip
    backlog = Backlog(
        by_model={model: Waiting(count=count, oldest_at=100.0 - count) for model, count in waiting.items()}
    )
    paces = {model: Pace(job_s=seconds) for model, seconds in job_s.items()}
    found = choose_substitute(backlog, residency, LARGER, paces=paces, now=200.0)
    return found.model_id, found.by


JOB_S = {"small": 1.0, "middle": 2.0, "large": 4.0}


@pytest.mark.parametrize(
    ("waiting", "ready", "taken"),
    [
        ({"small": 3}, "large", ("small", "large")),  # 3 x 4 = 12 s, against 10 + 3 x 1 = 13 s
        ({"small": 4}, "large", (None, None)),  # 16 s against 14 s
        ({"small": 9}, "middle", ("small", "middle")),  # 18 s against 19 s
        ({"small": 3}, None, (None, None)),  # nobody is ready
        ({"small": 3}, "small", (None, None)),  # it is ready itself
        ({"large": 1}, "small", (None, None)),  # a smaller model takes nothing from a larger one
        ({"small": 1, "middle": 2}, "large", ("middle", "large")),  # the one that waits longest first
    ],
)
def test_who_takes_whose_jobs(waiting: dict[str, int], ready: str | None, taken: tuple[str | None, str | None]) -> None:
    """A larger model that is ready takes them if that ends them sooner than a switch would."""
    assert choose(waiting, ready, job_s=JOB_S) == taken


def test_what_nobody_has_measured_is_no_reason() -> None:
    """Neither an unknown switch nor an unknown pace."""
    assert choose({"small": 1}, "large", job_s=JOB_S, switch_s=None) == (None, None)
    assert choose({"small": 1}, "large", job_s={"small": 1.0}) == (None, None)
