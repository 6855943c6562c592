"""
What a forecast begins with: the backlog in tokens or times, and the workers as they are seen.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.schemas import SwitchStage
from worker.simulate.price import expect_traffic, price_backlog, see_workers
from worker.simulate.run import Start
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident, Switching

NOW = 1000.0
TOKENS = Pace(prefill_tokens_per_s=100, decode_tokens_per_s=10, job_s=1.0, at_once=4, output_share=0.5)
TIMES = Pace(job_s=0.5, at_once=4)
NOTHING = Residency(capacity=9, max_residents=1, switch_s={"a": 10.0, "b": 20.0})
BUSY = Resident(
    model_id="a", level=Level.READY, bytes=1, since=NOW - 5, in_flight=3, begun=(NOW - 2.5, NOW - 1.5, NOW - 0.5)
)
READY_A = replace(NOTHING, residents=(BUSY,))


def waiting(**counts: int) -> Backlog:
    return Backlog(
        by_model={
            model: Waiting(
                count=n, oldest_at=0.0, lanes=(Lane(count=n, prompt_tokens=100 * n, output_tokens=40 * n),) if n else ()
            )
            for model, n in counts.items()
        }
    )


def test_tokens_are_priced_as_answers_turn_out() -> None:
    """Half of what the jobs allow is what they use."""
    found = price_backlog(waiting(a=5), {"a": TOKENS}, NOTHING)
    [lane] = found.backlog.by_model["a"].lanes
    assert (lane.prompt_tokens, lane.output_tokens) == (500, 100)
    costs = found.costs["a"]
    assert (costs.prefill_tokens_per_s, costs.decode_tokens_per_s, costs.max_num_seqs) == (100, 10, 4)
    assert costs.load_s == costs.wake_s == 10.0


@pytest.mark.parametrize("lane", [Lane(count=5), Lane(count=5, prompt_tokens=1, output_tokens=1)])
def test_without_rates_or_tokens_each_job_takes_its_usual_time(lane: Lane) -> None:
    """0.5 s for each of four at once: 2 s from start to end."""
    backlog = Backlog(by_model={"a": Waiting(count=5, oldest_at=0.0, lanes=(lane,))})
    found = price_backlog(backlog, {"a": TIMES}, NOTHING)
    [priced], costs = found.backlog.by_model["a"].lanes, found.costs["a"]
    assert priced.prompt_tokens == 0
    assert (priced.output_tokens or 0) / 5 / costs.decode_tokens_per_s == pytest.approx(2.0)
    assert found.usual_s == {"a": 2.0}


def test_what_nobody_has_measured_hides_what_comes_behind_it() -> None:
    """Jobs wait for b, and its pace or its switch is unknown: only the model that is ready is foreseen."""
    both = {"a": TIMES, "b": TIMES}
    assert set(price_backlog(waiting(a=1, b=1), both, READY_A).costs) == {"a", "b"}
    assert set(price_backlog(waiting(a=1, b=1), {"a": TIMES}, READY_A).costs) == {"a"}
    assert set(price_backlog(waiting(a=1, b=1), both, replace(READY_A, switch_s={})).costs) == {"a"}
    assert set(price_backlog(waiting(a=1, b=0), {"a": TIMES}, NOTHING).costs) == {"a"}
    assert set(price_backlog(waiting(a=1, b=1), {"a": TIMES}, NOTHING).costs) == set()


def test_each_worker_is_seen_as_it_is() -> None:
    """Its model with the jobs in flight; those that are idle, by what they offer; one with two models side by side."""
    priced = price_backlog(waiting(a=1, b=1), {"a": TIMES, "b": TIMES}, READY_A)
    others = {"v": ["b"], "w": [], "x": ["a", "b"], "y": ["z"]}
    offered = {"v": frozenset("b"), "w": frozenset("ab"), "y": frozenset("az"), "z": frozenset("b")}
    here, *there = see_workers(READY_A, others, offered, priced, now=NOW)
    assert (here.ready, here.since_s, here.target) == ("a", NOW - 5, None)
    assert here.ends_s == pytest.approx((NOW + 0.2, NOW + 0.5, NOW + 1.5))  # three of 2 s; the first one is overdue
    assert [(start.ready, start.serves) for start in there] == [
        ("b", {"b"}), (None, {"a", "b"}), ("a", None), ("b", None), (None, {"a", "z"}),
    ]  # fmt: skip
    assert see_workers(NOTHING, {}, {}, priced, now=NOW) == (Start(at_s=NOW),)


SWITCH = Switching(to_model="b", epoch=1, since=NOW - 7)
LOADING = replace(SWITCH, begun=True, stage=SwitchStage.LOADING, priced_since=NOW - 7)


@pytest.mark.parametrize(
    ("switching", "beside", "target_at", "in_flight"),
    [
        (SWITCH, set(), None, 3),  # asked for: it waits for the jobs in flight
        (replace(SWITCH, begun=True, stage=SwitchStage.DRAINING), set(), None, 3),
        (replace(SWITCH, begun=True), set(), None, 3),  # files come
        (LOADING, set(), NOW + 13, 0),  # 20 s, of which 7 have gone
        (
            replace(LOADING, stage=SwitchStage.VERIFYING, since=NOW),
            set(),
            NOW + 13,
            0,
        ),  # a later stage: no more of them
        (LOADING, {"b"}, NOW + 13, 0),  # what is ready stays so
    ],
)
def test_a_switch_under_way_is_waited_for(
    switching: Switching, beside: set[str], target_at: float | None, in_flight: int
) -> None:
    """While it waits for jobs nobody knows how long; then, as long as such switches take."""
    residency = replace(READY_A, switching=switching, beside=frozenset(beside))
    priced = price_backlog(waiting(a=1, b=1), {"a": TIMES, "b": TIMES}, residency)
    found = see_workers(residency, {}, {}, priced, now=NOW)
    assert len(found) == 1 + len(beside)
    assert (found[0].target, found[0].target_at_s, len(found[0].ends_s)) == ("b", target_at, in_flight)


@pytest.mark.parametrize("stage", [SwitchStage.READY, SwitchStage.FAILED])
def test_a_switch_that_has_just_ended_is_waited_for_no_more(stage: SwitchStage) -> None:
    """It stands on the board for a moment, while its end is told."""
    residency = replace(READY_A, switching=replace(LOADING, to_model="a", stage=stage))
    priced = price_backlog(waiting(a=1), {"a": TIMES}, residency)
    [found] = see_workers(residency, {}, {}, priced, now=NOW)
    assert (found.ready, found.target) == ("a", None)


def test_traffic_is_of_usual_jobs() -> None:
    """Two a second, of 2 s each; of a model that nothing comes for, nothing."""
    priced = price_backlog(waiting(a=1, b=1), {"a": TIMES, "b": TIMES}, READY_A)
    found = expect_traffic({"a": 2.0, "b": 0.0, "unknown": 1.0}, priced)
    assert set(found) == {"a"}
    assert found["a"].per_s == 2.0
    assert found["a"].output_tokens / priced.costs["a"].decode_tokens_per_s == pytest.approx(2.0)
