"""
The dry run of what waits now.
"""

from __future__ import annotations

import pytest

from common.errors import BadSetting
from common.schemas import HardwareStatus, ResidentStatus, WorkerState, utc_now
from tests.traces import make_costs
from worker.simulate.live import LivePlan, plan_backlog
from worker.state.backlog import Backlog, Lane, Waiting

NOW = 5000.0
COSTS = {"a": make_costs(), "b": make_costs()}


def worker(name: str = "w", *, ready: str | None = None, to: str | None = None) -> HardwareStatus:
    residents = (ResidentStatus(model=ready, level="ready", bytes=1, in_flight=0, since=utc_now()),) if ready else ()
    return HardwareStatus(
        worker=name, at=utc_now(), state=WorkerState.IDLE, source="none", gpus=(), ram_total_bytes=1,
        ram_available_bytes=1, stage=None, switching_to=to, residents=residents, backlog={}, switches=(), alerts=(),
    )  # fmt: skip


def plan(*workers: HardwareStatus, tokens: int | None = 100, **counts: int) -> LivePlan:
    def waiting(count: int) -> Waiting:
        total = None if tokens is None else tokens * count
        lane = Lane(count=count, oldest_at=NOW - 9, newest_at=NOW, prompt_tokens=total, output_tokens=total)
        return Waiting(count=count, oldest_at=NOW - 9, lanes=(lane,))

    backlog = Backlog(by_model={model: waiting(count) for model, count in counts.items()})
    return plan_backlog(backlog, COSTS, workers=workers, now=NOW, max_wait_s=600, min_turn_s=30)


def test_switches_and_finish_are_told_before_anything_runs() -> None:
    """Loads of 10 s, jobs of 1 s: 10 + 20, then 10 + 5."""
    found = plan(a=20, b=5)

    assert found.switches == 2
    assert found.as_dict() == {
        "workers": 1,
        "switches": 2,
        "finish_s": pytest.approx(45, abs=0.01),
        "models": {
            "a": {"jobs": 20, "finish_s": pytest.approx(30, abs=0.01)},
            "b": {"jobs": 5, "finish_s": pytest.approx(45, abs=0.01)},
        },
    }


def test_what_is_ready_needs_no_switch() -> None:
    """Five jobs of b, then a is loaded; a ready model that the costs do not name is another one's."""
    assert plan(worker(ready="b"), a=20, b=5).switches == 1
    assert plan(worker(ready="b"), a=20, b=5).finish_s["b"] == pytest.approx(5)
    assert plan(worker(ready="c"), a=20).switches == 1


def test_two_workers_share_the_models_that_wait() -> None:
    """Nothing loaded: each loads one. One of them ready there: the other worker loads the other."""
    both = plan(worker("v"), worker("w"), a=20, b=5)
    assert (both.workers, both.switches) == (2, 2)
    assert both.finish_s == pytest.approx({"a": 30, "b": 15})

    ready = plan(worker("v", ready="a"), worker("w"), a=20, b=5)
    assert ready.switches == 1
    assert ready.finish_s == pytest.approx({"a": 20, "b": 15})


def test_a_switch_under_way_counts_and_is_waited_for() -> None:
    """10 s from now, for nobody knows how long it has gone on; no other one is needed."""
    found = plan(worker(to="a"), a=20)
    assert found.switches == 1
    assert found.finish_s == pytest.approx({"a": 30})


def test_a_lane_is_planned_under_its_own_bound() -> None:
    """A hundred jobs of 1 s, and one of another model: it waits for all of them, or for as long as it may."""

    def ends_s(bound_s: float | None) -> float:
        lanes = {
            "a": Lane(count=100, oldest_at=NOW - 1, prompt_tokens=10_000, output_tokens=10_000),
            "b": Lane(count=1, oldest_at=NOW, prompt_tokens=100, output_tokens=100, max_wait_s=bound_s),
        }
        waiting = {m: Waiting(count=lane.count, oldest_at=lane.oldest_at, lanes=(lane,)) for m, lane in lanes.items()}
        backlog = Backlog(by_model=waiting)
        return plan_backlog(backlog, COSTS, workers=(), now=NOW, max_wait_s=600, min_turn_s=30).finish_s["b"]

    assert ends_s(None) == pytest.approx(10 + 100 + 10 + 1)
    assert ends_s(60.0) < 60 + 1 + 10 + 1


def test_an_empty_backlog_is_done() -> None:
    """Nothing waits, nothing is loaded."""
    assert plan().as_dict() == {"workers": 1, "switches": 0, "finish_s": 0.0, "models": {}}


def test_no_plan_without_costs_or_tokens() -> None:
    """It says which are missing."""
    with pytest.raises(BadSetting, match="Jobs wait for z, and the costs have no table"):
        plan(z=1)
    with pytest.raises(BadSetting, match="tokens of 3 jobs for a are not counted"):
        plan(a=3, tokens=None)
