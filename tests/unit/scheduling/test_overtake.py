"""
Which jobs overtake at the end of a turn: row by row, and on every small turn beside the best order there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from heapq import heapreplace
from itertools import permutations, product
from typing import Any

import pytest

from tests.traces import World, make_costs, make_job
from worker.scheduling.overtake import choose_overtaking, find_long_s
from worker.scheduling.pick import Knowledge
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

NEAR: dict[str, Any] = {  # the end of a turn of 4 places: 40 s of work, so 10 s to its end
    "waiting": 8, "elsewhere": 32, "places": 4, "reading_s": 1.0, "whole_s": 40.0, "came_s": 2.0, "quiet_s": 20.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "long_s"),
    [
        ({}, 10.0),
        ({"waiting": 33}, None),  # far from the end
        ({"waiting": 32}, 10.0),
        ({"waiting": 1}, None),  # nobody to overtake
        ({"places": 1}, None),  # no place can be empty while another works
        ({"elsewhere": 31}, None),  # few would gain
        ({"came_s": 2.1}, None),  # more may come
        ({"came_s": 0.0, "quiet_s": 0.0}, 10.0),  # all at once, and just now
        ({"reading_s": 12.0}, 12.0),  # prompts take longer than the places
        ({"look_s": 0.5}, 9.5),  # what must begin by the next look begins now
        ({"look_s": 10.0}, None),  # the turn is over by then
        ({"places": 128, "waiting": 513, "elsewhere": 9999}, None),  # more than can be looked at
    ],
)
def test_long_is_what_takes_as_long_as_all_that_is_left(changed: dict[str, float], long_s: float | None) -> None:
    """On all places; where the end is near, as many wait elsewhere, and nothing has come for long."""
    assert find_long_s(**{**NEAR, **changed}) == long_s


def turn_s(order: tuple[int, ...], places: int) -> float:
    """What a turn takes whose jobs begin in this order."""
    free = [0.0] * places
    for size in order:
        heapreplace(free, free[0] + size)
    return max(free)


@cache
def best_turn_s(sizes: tuple[int, ...], places: int) -> float:
    """What it takes in the best order."""
    return min(turn_s(order, places) for order in set(permutations(sizes)))


@pytest.mark.parametrize("places", [2, 3])
def test_no_small_turn_ends_later_and_fewer_end_late(places: int) -> None:
    """
    Every turn of five jobs of 1, 2, 4 and 7 s, with enough that waits for another model, beside the best order.

    Never later than in the order of arrival; and of the turns that took over a tenth longer than the best, about half
    at most still do.
    """
    late_in_order = late = 0
    for sizes in product((1, 2, 4, 7), repeat=5):
        jobs = [make_job(n, "a", size=size) for n, size in enumerate(sizes)]
        jobs += [make_job(len(jobs) + n, "b") for n in range(8 * places)]
        costs = make_costs(load_s=0, wake_s=0, at_once=places)
        run = World(jobs=jobs, costs={"a": costs, "b": costs}).run()
        in_order_s, ours_s = turn_s(sizes, places), max(run.ends[: len(sizes)])
        allowed_s = 1.1 * best_turn_s(tuple(sorted(sizes)), places)

        assert ours_s <= in_order_s + 1e-6, sizes
        late_in_order += in_order_s > allowed_s
        late += ours_s > allowed_s

    assert late <= 0.55 * late_in_order


READY = Resident(model_id="a", level=Level.READY, bytes=1, since=0.0, in_flight=4)
RESIDENCY = Residency(capacity=9, max_residents=2, residents=(READY,))
LANE = Lane(count=8, oldest_at=90.0, newest_at=92.0, prompt_tokens=800, output_tokens=1600)
PACE = Pace(prefill_tokens_per_s=800, decode_tokens_per_s=25, at_once=4, output_share=0.5)  # a job: 1/8 + 4 s


def choose(
    lane: Lane = LANE, residency: Residency = RESIDENCY, *, now: float = 200.0, look_s: float = 0.0, **known: Any
) -> Mapping[str, float]:
    """From which length on jobs of each model overtake."""
    backlog = Backlog(
        by_model={
            "a": Waiting(count=lane.count, oldest_at=lane.oldest_at, lanes=(lane,)),
            "b": Waiting(count=99, oldest_at=91.0, lanes=(replace(LANE, count=99),)),
        }
    )
    knowledge = Knowledge(**{"paces": {"a": PACE}, **known})
    found = choose_overtaking(backlog, residency, known=knowledge, look_s=look_s, now=now)
    return {some.model_id: some.long_s for some in found}


def test_the_ready_model_s_end_counts_the_jobs_in_flight_as_half_done() -> None:
    """Eight jobs of 4 1/8 s and four halves on four places; of those that stand behind in the engine, all of it."""
    assert choose() == pytest.approx({"a": (8 + 4 / 2) * 4.125 / 4})
    more = replace(RESIDENCY, residents=(replace(READY, in_flight=6),))
    assert choose(residency=more) == pytest.approx({"a": (8 + 4 / 2 + 2) * 4.125 / 4 - 2 * 4.125 / 4})
    assert choose(look_s=0.5) == pytest.approx({"a": (8 + 4 / 2) * 4.125 / 4 - 0.5})


def test_a_turn_of_two_workers_ends_sooner() -> None:
    """Each is taken to have as much in flight; what others serve does not wait for this turn's end."""
    assert choose(elsewhere={"a": 1}) == pytest.approx({"a": (8 + 2 * 4 / 2) * 4.125 / 8})
    assert choose(elsewhere={"b": 1}) == {}


@pytest.mark.parametrize(
    "changed",
    [
        {"output_tokens": None},
        {"prompt_tokens": None},
        {"oldest_at": None},
        {"newest_at": None},
        {"newest_at": 190.0},  # it came a moment ago, beside the hundred seconds in which all has come
    ],
)
def test_what_nobody_knows_lets_nobody_overtake(changed: dict[str, Any]) -> None:
    """How long a job is, or when it came."""
    assert choose(replace(LANE, **changed)) == {}


def test_a_model_that_is_asleep_or_unmeasured_has_no_turn_to_end() -> None:
    """Nor one whose engine does not tell reading from writing: all of its jobs are alike."""
    asleep = replace(RESIDENCY, residents=(replace(READY, level=Level.ASLEEP_1),))
    assert choose(residency=asleep) == {}
    assert choose(paces={}) == {}
    assert choose(paces={"a": Pace(job_s=1.0, at_once=4)}) == {}
