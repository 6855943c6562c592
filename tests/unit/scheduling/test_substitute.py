"""
When a larger model that is ready takes a smaller one's jobs: a row for each question.
"""

from __future__ import annotations

import pytest

from tests.factories import make_placement, make_spec
from worker.scheduling.pick import Knowledge
from worker.scheduling.substitute import choose_substitute, find_larger
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident, Switching

LARGER = {"small": ("middle", "large"), "middle": ("large",)}
JOB_S = {"small": 1.0, "middle": 2.0, "large": 4.0}


def choose(
    waiting: dict[str, int],
    ready: str | None,
    *,
    job_s: dict[str, float] = JOB_S,
    switch_s: float | None = 10.0,
    named: int = 0,
    asleep: tuple[str, ...] = (),
    elsewhere: tuple[str, ...] = (),
    to: str | None = None,
) -> tuple[str | None, str | None]:
    """Choose where so many jobs wait that name no model, beside *named* ones for each model that do."""
    residents = [Resident(model_id=model, level=Level.ASLEEP_1, bytes=1, since=0) for model in asleep]
    if ready:
        residents.append(Resident(model_id=ready, level=Level.READY, bytes=1, since=0))
    residency = Residency(
        capacity=9, max_residents=1, residents=tuple(residents),
        switch_s={} if switch_s is None else dict.fromkeys(("small", "middle", "large"), switch_s),
        switching=Switching(to_model=to, epoch=1, since=0) if to else None,
    )  # fmt: skip
    backlog = Backlog(
        by_model={
            model: Waiting(
                count=count + named,
                oldest_at=100.0 - count,
                lanes=(
                    *((Lane(count=count, oldest_at=100.0 - count, any_model=True),) if count else ()),
                    *((Lane(count=named, oldest_at=1.0),) if named else ()),
                ),
            )
            for model, count in waiting.items()
        }
    )
    known = Knowledge(
        paces={model: Pace(job_s=seconds) for model, seconds in job_s.items()}, elsewhere=dict.fromkeys(elsewhere, 1)
    )
    found = choose_substitute(backlog, residency, LARGER, known=known, now=200.0)
    return found.model_id, found.by


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
    assert choose(waiting, ready) == taken


def test_what_nobody_has_measured_is_no_reason() -> None:
    """Neither an unknown switch nor an unknown pace."""
    assert choose({"small": 1}, "large", switch_s=None) == (None, None)
    assert choose({"small": 1}, "large", job_s={"small": 1.0}) == (None, None)


def test_jobs_that_name_their_model_are_neither_taken_nor_counted() -> None:
    """A hundred of them wait: they say nothing, alone or beside others."""
    assert choose({"small": 0}, "large", named=100) == (None, None)
    assert choose({"small": 3}, "large", named=100) == ("small", "large")


def test_a_model_that_is_served_or_on_its_way_keeps_its_jobs() -> None:
    """On another worker, or by the switch under way; one that sleeps is priced by its waking."""
    assert choose({"small": 3}, "large", elsewhere=("small",)) == (None, None)
    assert choose({"small": 3}, "large", to="small") == (None, None)
    assert choose({"small": 3}, "large", to="middle") == (None, None)
    assert choose({"small": 3}, "large", asleep=("small",)) == ("small", "large")
    assert choose({"small": 3}, "large", asleep=("small",), switch_s=1.0) == (None, None)


def test_only_larger_models_may_take_jobs_and_only_where_the_catalogue_lets_them() -> None:
    """By tier, the next larger first; none that is trusted with less, or that "auto" may not choose."""
    tiers = {"small": (1, 0.3), "middle": (2, 0.6), "fast": (2, 0.2), "large": (3, 1.0)}
    placements = [
        make_placement(spec=make_spec(model, tier=tier, complexity_up_to=up_to))
        for model, (tier, up_to) in tiers.items()
    ]
    placements.append(make_placement(spec=make_spec("by name", tier=4, complexity_up_to=1.0), auto=False))
    placements.append(make_placement(spec=make_spec("stays", tier=1, complexity_up_to=0.1, substitute=False)))

    assert find_larger(placements) == {
        "small": ("middle", "large"),
        "fast": ("large",),
        "middle": ("large",),
        "large": (),
    }
