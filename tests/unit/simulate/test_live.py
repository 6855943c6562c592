"""
The dry run of what waits now.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import pytest

from common.errors import BadSetting
from common.schemas import HardwareStatus, ResidentStatus, SwitchTime, WorkerState, utc_now
from tests.traces import make_costs
from worker.simulate.live import LivePlan, Measured, know_models, plan_backlog
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level

NOW = 5000.0
COSTS = {"a": make_costs(), "b": make_costs()}
AS_SAID = know_models({}, (), COSTS)


def worker(
    name: str = "w",
    *,
    ready: str | None = None,
    to: str | None = None,
    in_flight: int = 0,
    state: WorkerState = WorkerState.IDLE,
) -> HardwareStatus:
    there = {"level": "ready", "bytes": 1, "in_flight": in_flight, "since": utc_now()}
    residents = (ResidentStatus(model=ready, **there),) if ready else ()
    return HardwareStatus(
        worker=name, at=utc_now(), state=state, source="none", gpus=(), ram_total_bytes=1,
        ram_available_bytes=1, stage=None, switching_to=to, residents=residents, backlog={}, switches=(), alerts=(),
    )  # fmt: skip


def plan(
    *workers: HardwareStatus,
    tokens: int | None = 100,
    measured: Measured = AS_SAID,
    offers: Mapping[str, Collection[str]] | None = None,
    **counts: int,
) -> LivePlan:
    def waiting(count: int) -> Waiting:
        total = None if tokens is None else tokens * count
        lane = Lane(count=count, oldest_at=NOW - 9, newest_at=NOW, prompt_tokens=total, output_tokens=total)
        return Waiting(count=count, oldest_at=NOW - 9, lanes=(lane,))

    backlog = Backlog(by_model={model: waiting(count) for model, count in counts.items()})
    everything = {worker.worker: COSTS for worker in workers}
    return plan_backlog(
        backlog, measured, workers=workers, offers=offers or everything, now=NOW, max_wait_s=600, min_turn_s=30
    )


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
        "unserved": {},
    }
    [first, second] = found.as_dict(turns=True)["turns"]
    assert (first["model"], first["asked_s"], first["jobs"]) == ("a", 0, 20)
    assert (second["model"], second["ready_s"], second["jobs"]) == ("b", pytest.approx(40, abs=0.01), 5)


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


def test_a_bound_and_a_deadline_are_planned_for() -> None:
    """A hundred jobs of 1 s, and one of another model: it waits for all of them, or for as long as it may."""

    def ends_s(**promise: float) -> float:
        lanes = {
            "a": Lane(count=100, oldest_at=NOW - 1, prompt_tokens=10_000, output_tokens=10_000),
            "b": Lane(count=1, oldest_at=NOW, prompt_tokens=100, output_tokens=100, **promise),
        }
        waiting = {m: Waiting(count=lane.count, oldest_at=lane.oldest_at, lanes=(lane,)) for m, lane in lanes.items()}
        found = plan_backlog(
            Backlog(by_model=waiting), AS_SAID, workers=(), offers={}, now=NOW, max_wait_s=600, min_turn_s=30
        )
        return found.finish_s["b"]

    assert ends_s() == pytest.approx(10 + 100 + 10 + 1)
    assert ends_s(max_wait_s=60.0) < 60 + 1 + 10 + 1
    assert ends_s(deadline_at=NOW + 60) <= 60


def test_an_empty_backlog_is_done() -> None:
    """Nothing waits, nothing is loaded."""
    assert plan().as_dict() == {"workers": 1, "switches": 0, "finish_s": 0.0, "models": {}, "unserved": {}}


def test_jobs_in_flight_are_waited_for() -> None:
    """The last of four ends when a usual one does that begins now; then the other model is loaded."""
    times = [switch(model, 10.0, Level.COLD) for model in ("a", "b")]
    measured = know_models({"a": Pace(job_s=1), "b": Pace(job_s=1)}, times, {})
    assert plan(worker(ready="b", in_flight=4), measured=measured, a=20).finish_s["a"] == pytest.approx(1 + 10 + 20)


def test_each_worker_takes_what_it_offers() -> None:
    """And one that drains takes nothing. What nobody offers is told, and no part of the plan."""
    v, w = worker("v"), worker("w")
    found = plan(v, w, offers={"v": ["a"], "w": ["a", "b"]}, a=20, b=5)
    assert found.finish_s == pytest.approx({"a": 30, "b": 15})
    assert {(turn.worker, turn.model) for turn in found.turns} == {("v", "a"), ("w", "b")}

    found = plan(v, worker("w", state=WorkerState.DRAINING), offers={"v": ["a"], "w": ["b"]}, a=20, b=5)
    assert (found.workers, found.jobs, found.unserved) == (1, {"a": 20}, {"b": 5})


def test_what_was_measured_is_enough() -> None:
    """First from the files, then from where it went to sleep; rates, and answers half as long as they might be."""
    pace = Pace(prefill_tokens_per_s=1e6, decode_tokens_per_s=100, job_s=0.5, output_share=0.5)
    measured = know_models({"a": pace}, [switch("a", 20.0, Level.SPARE), switch("a", 3.0, Level.ASLEEP_1)], {})

    assert (measured.load_s, measured.wake_s) == ({"a": 20.0}, {"a": 3.0})
    assert plan(measured=measured, a=20).finish_s == pytest.approx({"a": 20 + 10}, abs=0.01)
    assert plan(measured=measured, a=20, tokens=None).finish_s == pytest.approx({"a": 20 + 10}, abs=0.01)


def test_what_somebody_says_counts_more_than_what_was_measured() -> None:
    """But for the length of answers that nothing is said of."""
    pace = Pace(prefill_tokens_per_s=1, decode_tokens_per_s=1, output_tokens=200)
    measured = know_models({"a": pace}, [switch("a", 99.0, Level.COLD)], COSTS)

    assert plan(measured=measured, a=20).finish_s == pytest.approx({"a": 10 + 20}, abs=0.01)
    assert measured.paces["a"].output_tokens == 200


def switch(model: str, seconds: float, level: Level) -> SwitchTime:
    return SwitchTime(
        from_model=None, to_model=model, level=level, mean_s=seconds, last_s=seconds, load_s=seconds, load_bytes=1,
        count=1, at=utc_now(),
    )  # fmt: skip


def test_no_plan_of_what_nobody_knows() -> None:
    """It says what is missing, and what to do."""
    with pytest.raises(BadSetting, match="Jobs wait for z, and no worker has measured it yet"):
        plan(z=1)
    with pytest.raises(BadSetting, match="Of 3 jobs for a nobody knows"):
        plan(a=3, tokens=None)
