"""
What ends a run before the engine does: a deadline, a time limit, a cancel, a hand-back.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from common.schemas import JobState, utc_now
from tests.runner_world import LONG_S, World, error_of
from worker.engines.base import StopSignal
from worker.jobs.failures import HandBack, JobLimits


def test_a_deadline_that_passes_in_the_engine_expires_the_job() -> None:
    """The engine's timeout is then not the engine's fault."""
    world = World(run_s=LONG_S)
    outcome = world.run(deadline=(utc_now() + timedelta(seconds=0.05)).isoformat())

    assert outcome.state is JobState.EXPIRED
    assert "passed while the engine worked on it" in error_of(outcome).message


def test_a_job_over_its_own_time_limit_fails_by_that_name() -> None:
    """At its first attempt: it is no fault of the engine, and a second one would take as long."""
    world = World(run_s=LONG_S)
    outcome = world.run(time_limit=0.05, deadline=(utc_now() + timedelta(seconds=LONG_S)).isoformat())

    assert (outcome.state, error_of(outcome).kind) == (JobState.FAILED, "TimeLimitExceeded")
    assert "0.05 s in the engine" in error_of(outcome).message
    assert world.store.view("job").attempts == 1


def test_the_operators_time_limit_stays_a_fault_of_the_engine() -> None:
    """A longer one of the job does not change it: the job is tried again."""
    world = World(run_s=LONG_S, limits=JobLimits(timeout_s=0.05, max_attempts=3))
    with pytest.raises(HandBack):
        world.run(time_limit=LONG_S)


@pytest.mark.parametrize(
    ("reason", "state", "kind"),
    [("cancelled", JobState.CANCELLED, "JobCancelled"), ("time limit", JobState.FAILED, "TimeLimitExceeded")],
)
def test_a_running_job_that_is_stopped_ends(reason: str, state: JobState, kind: str) -> None:
    """Aborted in the engine, and stored with the reason."""
    world, stop = World(run_s=LONG_S), StopSignal()
    with world.running(stop=stop) as running:
        stop.stop(reason)
        outcome = running.result(10)

    assert (outcome.state, error_of(outcome).kind) == (state, kind)
    assert world.store.outcome("job") == outcome


def test_a_running_job_that_is_handed_back_has_no_outcome() -> None:
    """It is nobody's fault, and another attempt."""
    world = World(run_s=LONG_S)
    with world.running() as running:
        world.runner.hand_back("another model")
        assert not running.done()
        world.runner.hand_back("small")
        with pytest.raises(HandBack):
            running.result(10)

    assert world.store.outcome("job") is None
    assert world.store.view("job").state is JobState.ROUTED
    assert world.store.view("job").faults == ()


def test_a_running_job_is_cancelled_through_the_store() -> None:
    """Whoever asked, on whatever machine."""
    world = World(run_s=LONG_S)
    with world.running() as running:
        world.runner.stop_cancelled()
        assert not running.done()
        world.store.ask_cancel("job")
        world.runner.stop_cancelled()
        assert running.result(10).state is JobState.CANCELLED
    world.runner.stop_cancelled()  # nothing runs any more


@pytest.mark.parametrize("reason", ["time limit", "handback"])
def test_a_stop_after_another_attempt_began_is_nobody_s_end(reason: str) -> None:
    """The process was paused, so the job's time has passed here and not where it runs now."""
    world, stop = World(run_s=LONG_S), StopSignal()
    with world.running(stop=stop) as running:
        world.store.begin("job", delivery="tag")
        stop.stop(reason)
        with pytest.raises(HandBack):
            running.result(10)
    assert world.store.outcome("job") is None
    assert world.store.view("job").state is JobState.RUNNING
