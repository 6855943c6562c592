"""
A model that cannot be made ready: another one takes its place, and the worker is not left without any.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import EngineTimeout, LoadFailed, ModelMissing, OutOfMemory
from tests.factories import make_gpu, make_machine, make_placement, make_spec
from tests.switch_world import LIMITS, World, raising
from worker.catalog.spec import EngineKind
from worker.selection.placement import Placement

TIERS = {"4b": 1, "8b": 2, "14b": 3, "30b": 4}


def cascade(*not_auto: str) -> dict[str, Placement]:
    return {
        name: make_placement(
            name, spec=make_spec(name, engine=EngineKind.STUB, tier=tier), gpus=(0,), auto=name not in not_auto
        )
        for name, tier in TIERS.items()
    }


def world(*not_auto: str, **options: object) -> World:
    return World(placements=cascade(*not_auto), limits=replace(LIMITS, attempts=1), **options)  # type: ignore[arg-type]


def outcomes(of: World) -> list[tuple[str, str]]:
    return [(record.to_model, record.outcome) for record in of.records]


def test_the_previous_model_comes_back() -> None:
    """The jobs that wait name the broken model: they wait on, and the others have theirs."""
    w = world()
    w.switch("14b")
    w.engine.load_errors = [LoadFailed("broken")]
    record = w.switch("30b")

    assert (record.to_model, record.outcome, record.reason) == ("30b", "failed", "broken")
    assert w.residency.ready_models == ("14b",)
    assert w.records[-1].reason.startswith("previous model: 30b failed, it was ready before")
    assert set(w.residency.quarantined) == {"30b"}


def test_the_next_of_the_cascade_takes_the_jobs_that_may_go_elsewhere() -> None:
    """Downwards, the largest first; each that fails is left alone, and the one before is not asked again."""
    w = world(waits={"30b", "14b"}.__contains__)
    w.switch("4b")
    w.engine.load_errors = [LoadFailed("broken"), LoadFailed("broken too")]
    w.switch("30b")

    assert outcomes(w)[1:] == [("30b", "failed"), ("14b", "failed"), ("8b", "ready")]
    assert w.residency.ready_models == ("8b",)
    assert "next model of the cascade: 14b failed, 8b is the next smaller one" in w.records[-1].reason


def test_a_model_that_only_jobs_by_name_get_is_no_substitute() -> None:
    """And neither is one that failed a short while ago."""
    w = world("14b", waits={"30b"}.__contains__)
    w.engine.load_errors = [LoadFailed("broken")]
    w.switch("8b")
    w.switch("4b")
    w.engine.load_errors = [LoadFailed("broken")]
    w.switch("30b")

    assert outcomes(w)[-2:] == [("30b", "failed"), ("4b", "ready")]


def test_the_first_load_of_a_worker_ends_with_some_model() -> None:
    """Nothing was ready before, so there is nothing to come back to: the largest that can be loaded."""
    w = world()
    w.engine.load_errors = [OutOfMemory("full"), OutOfMemory("full")]
    w.switch("30b")

    assert outcomes(w) == [("30b", "failed"), ("14b", "failed"), ("8b", "ready")]


def test_when_everything_fails_every_model_was_tried_once_and_the_jobs_wait() -> None:
    """The ladder has an end; each reason is kept."""
    w = world(waits={"30b"}.__contains__)
    w.switch("14b")
    w.engine.load_errors = [LoadFailed(f"error {number}") for number in range(9)]
    record = w.switch("30b")

    assert outcomes(w)[1:] == [("30b", "failed"), ("14b", "failed"), ("8b", "failed"), ("4b", "failed")]
    assert record.reason == "error 0"
    assert set(w.residency.quarantined) == set(TIERS)
    assert w.residency.residents == ()
    assert w.residency.switching is None


def test_what_is_still_ready_is_left_to_work() -> None:
    """The files did not come, so nothing was stopped; jobs that may go elsewhere are the router's."""
    w = world(waits={"30b"}.__contains__)
    w.switch("4b")
    w.on_fetch = raising(ModelMissing("no such file"))
    w.switch("30b")

    assert outcomes(w)[1:] == [("30b", "failed")]
    assert w.residency.ready_models == ("4b",)


def test_a_hot_card_gets_no_other_model_either() -> None:
    """It became hot between the old model's end and the load of the new one."""
    w = world(waits={"30b"}.__contains__)
    w.switch("4b")

    def look() -> None:
        if "stop 4b" in w.deeds:
            w.machine = replace(make_machine(24), gpus=(make_gpu(24, temperature_c=99.0),))

    w.on_look = look
    w.switch("30b")

    assert outcomes(w)[1:] == [("30b", "failed")]
    assert w.residency.ready_models == ()


def test_an_old_engine_that_will_not_end_at_first_comes_back() -> None:
    """It is ended before it is loaded anew: never two engines on one card."""
    w = world()
    w.switch("4b")
    w.deeds.clear()
    w.engine.stop_errors = [EngineTimeout("process 7 is still there")]
    w.switch("30b")

    assert [deed for deed in w.deeds if deed.startswith(("stop", "load"))] == ["stop 4b", "stop 4b", "load 4b"]
    assert w.residency.ready_models == ("4b",)


@pytest.mark.parametrize("fault", [OSError("Redis is away"), RuntimeError("whatever")])
def test_a_queue_that_cannot_be_read_leaves_no_worker_without_a_model(fault: Exception) -> None:
    """The previous one comes back then."""
    w = world(waits=raising(fault))
    w.switch("14b")
    w.engine.load_errors = [LoadFailed("broken")]
    w.switch("30b")

    assert w.residency.ready_models == ("14b",)


def test_a_worker_that_leaves_takes_no_further_rung() -> None:
    """No other model is begun."""
    w = world()
    w.switch("14b")
    w.records.clear()
    w.engine.on_load = lambda: (w.switcher._leaving.set(), raising(LoadFailed("stopped"))())
    w.switch("30b")

    assert outcomes(w) == [("30b", "failed")]
    assert w.residency.quarantined == {}
