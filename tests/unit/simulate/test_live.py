"""
The dry run of what waits now.
"""

from __future__ import annotations

import pytest

from common.errors import BadSetting
from tests.traces import make_costs
from worker.simulate.live import LivePlan, plan_backlog
from worker.state.backlog import Backlog, Lane, Waiting

NOW = 5000.0
COSTS = {"a": make_costs(), "b": make_costs()}


def plan(*, ready: str | None = None, tokens: int | None = 100, **counts: int) -> LivePlan:
    def waiting(count: int) -> Waiting:
        total = None if tokens is None else tokens * count
        lane = Lane(count=count, oldest_at=NOW - 9, newest_at=NOW, prompt_tokens=total, output_tokens=total)
        return Waiting(count=count, oldest_at=NOW - 9, lanes=(lane,))

    backlog = Backlog(by_model={model: waiting(count) for model, count in counts.items()})
    return plan_backlog(backlog, COSTS, now=NOW, ready=ready, max_wait_s=600, min_turn_s=30)


def test_switches_and_finish_are_told_before_anything_runs() -> None:
    """Loads of 10 s, jobs of 1 s: 10 + 20, then 10 + 5."""
    found = plan(a=20, b=5)

    assert found.switches == 2
    assert found.as_dict() == {
        "switches": 2,
        "finish_s": pytest.approx(45, abs=0.01),
        "models": {
            "a": {"jobs": 20, "finish_s": pytest.approx(30, abs=0.01)},
            "b": {"jobs": 5, "finish_s": pytest.approx(45, abs=0.01)},
        },
    }


def test_what_is_ready_needs_no_switch() -> None:
    """Five jobs of b, then a is loaded; a ready model that the costs do not name is another one's."""
    assert plan(ready="b", a=20, b=5).switches == 1
    assert plan(ready="b", a=20, b=5).finish_s["b"] == pytest.approx(5)
    assert plan(ready="c", a=20).switches == 1


def test_an_empty_backlog_is_done() -> None:
    """Nothing waits, nothing is loaded."""
    assert plan().as_dict() == {"switches": 0, "finish_s": 0.0, "models": {}}


def test_no_plan_without_costs_or_tokens() -> None:
    """It says which are missing."""
    with pytest.raises(BadSetting, match="Jobs wait for z, and the costs have no table"):
        plan(z=1)
    with pytest.raises(BadSetting, match="tokens of 3 jobs for a are not counted"):
        plan(a=3, tokens=None)
