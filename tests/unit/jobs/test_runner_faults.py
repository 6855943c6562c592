"""
What each fault under an attempt means: who is tried again, who is routed again, and who is set aside.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from common.errors import (
    EngineDied,
    EngineFailed,
    EngineTimeout,
    InvalidRequest,
    JobCancelled,
    PromptTooLong,
    ShiftworkerError,
)
from common.schemas import ErrorBody, Fault, JobRequest, JobState, Outcome, utc_now
from tests.runner_world import BODY, LONG_S, ROUTE, World, error_of
from tests.waiting import eventually
from worker.engines.base import StopSignal
from worker.jobs.failures import HandBack, JobLimits, RouteAgain
from worker.state.residency import Level, Resident


def test_a_job_whose_engine_dies_goes_back() -> None:
    """At once, and the fault is counted."""
    world = World(run_s=LONG_S)
    with world.running() as first:
        world.engine.die("small")
        with pytest.raises(HandBack):
            first.result(10)

    assert world.store.view("job").state is JobState.ROUTED
    assert [found.kind for found in world.store.view("job").faults] == ["EngineDied"]


def test_the_attempt_after_a_fault_is_answered() -> None:
    """And says which it was."""
    world = World()
    world.engine.errors = [EngineDied("it ended")]
    with pytest.raises(HandBack):
        world.run()

    assert (world.run().state, world.run().ledger.attempt) == (JobState.ANSWERED, 2)


@pytest.mark.parametrize("error", [EngineFailed("HTTP 500"), EngineTimeout("too slow")])
def test_a_job_that_fails_too_often_is_set_aside(error: ShiftworkerError) -> None:
    """Two times it goes back; the third time it ends, with the last reason, its history, and what to do about it."""
    world = World()
    world.engine.errors = [error] * 3
    for _ in range(2):
        with pytest.raises(HandBack):
            world.run()
        assert world.store.view("job").state is JobState.ROUTED
    outcome = world.run()

    assert outcome.state is JobState.FAILED
    assert error_of(outcome).kind == "AttemptsExhausted"
    assert (
        f"3 times it failed in engines that lived on, the last time with: {error.message}" in error_of(outcome).message
    )
    assert "`shiftworker dead retry job` runs it again" in error_of(outcome).message
    assert outcome.ledger.attempt == 3
    letter = world.store.dead["job"]
    assert (letter.model, letter.error) == ("small", error_of(outcome))
    assert [(found.attempt, found.kind, found.company) for found in letter.faults] == [
        (attempt, error.kind, None) for attempt in (1, 2, 3)
    ]
    assert JobRequest.parse(letter.body).messages == BODY["messages"]


def test_a_job_alone_in_an_engine_that_dies_twice_is_poison() -> None:
    """Once may be bad luck."""
    world = World()
    world.engine.errors = [EngineDied("it ended")] * 2
    with pytest.raises(HandBack):
        world.run()
    outcome = world.run()

    assert error_of(outcome).kind == "PoisonJob"
    assert (
        "the engine died 2 times with this job alone in it, the last time with: it ended" in error_of(outcome).message
    )
    assert [found.company for found in world.store.dead["job"].faults] == [1, 1]


@pytest.mark.parametrize("deaths", [1, 2, 3])
def test_a_job_alone_in_three_workers_that_died_is_poison(deaths: int) -> None:
    """Their deaths are noted by others; whoever gets it next sets it aside, and does not run it."""
    world = World()
    for attempt in range(1, deaths + 1):
        world.store.begin("job", delivery="tag")
        gone = f"The worker number {attempt} was gone."
        death = Fault(at=utc_now(), worker="there", attempt=attempt, kind="WorkerDied", message=gone, company=1)
        assert world.store.lose("job", death)
    outcome = world.run()

    if deaths < 3:
        assert (outcome.state, outcome.ledger.attempt) == (JobState.ANSWERED, deaths + 1)
        return
    assert error_of(outcome).kind == "PoisonJob"
    assert "3 times with this job alone in it, the last time with: The worker number 3" in error_of(outcome).message
    assert [found.worker for found in world.store.dead["job"].faults] == ["there"] * 3
    assert (outcome.ledger.attempt, world.engine.calls) == (3, [])


def test_a_suspect_waits_for_its_place_and_may_end_meanwhile() -> None:
    """It does not join somebody who is no suspect; cancelled at the door, it never runs."""
    world, stop = World(run_s=LONG_S), StopSignal()
    world.store.begin("suspect", delivery="suspect")
    death = Fault(at=utc_now(), worker="here", attempt=1, kind="EngineDied", message="gone", company=2)
    world.store.add_fault("suspect", death)
    with world.running(stop=stop), ThreadPoolExecutor(1) as pool:
        request = JobRequest.parse(BODY)
        waits = pool.submit(world.runner.run, "suspect", request, ROUTE, delivery="suspect", stop=StopSignal())
        eventually(lambda: world.runner.runs("suspect"))
        error = ErrorBody.of(JobCancelled("never mind"))
        ended = world.store.finish(Outcome(job_id="suspect", state=JobState.CANCELLED, error=error))
        assert not waits.done()
        stop.stop("handback")
        assert waits.result(10) == ended
    assert len(world.engine.calls) == 1


def test_an_engine_that_is_ended_on_purpose_is_no_death() -> None:
    """Its jobs were told to leave, and would not in time: they go back, and nothing is held against them."""
    world, stop = World(), StopSignal()
    world.engine.errors = [EngineDied("it was ended")] * 3
    stop.stop("handback")
    for _ in range(3):
        with pytest.raises(HandBack):
            world.run(stop=stop)
    assert world.store.view("job").faults == ()


def test_a_pause_after_a_failure_doubles_and_a_cancel_is_not_kept_waiting() -> None:
    """The job waits as one that anybody may cancel, and the pause itself ends when it is told to."""
    world = World(limits=JobLimits(timeout_s=LONG_S, max_attempts=3, first_pause_s=LONG_S))
    world.engine.errors = [EngineFailed("HTTP 500")]
    stop = StopSignal()
    with ThreadPoolExecutor(1) as pool:
        failed = pool.submit(world.run, stop=stop)
        eventually(lambda: world.store.view("job").faults)
        eventually(lambda: world.store.view("job").state is JobState.ROUTED)
        assert not failed.done()
        stop.stop("cancelled")
        with pytest.raises(HandBack):
            failed.result(timeout=5)


def test_a_body_that_the_engine_refuses_fails_the_job() -> None:
    """A retry cannot help: one attempt, the engine's own words."""
    world = World()
    world.engine.errors = [InvalidRequest("temperature must be positive")]
    outcome = world.run()

    assert outcome.state is JobState.FAILED
    assert error_of(outcome) == ErrorBody(
        kind="InvalidRequest", message="temperature must be positive", retry_helps=False
    )
    assert outcome.ledger.attempt == 1
    assert outcome.ledger.finished_at is not None


def test_a_prompt_too_long_for_a_model_that_was_loaded_short_is_routed_again_once() -> None:
    """Another model may be longer. The second time nobody is: the reason says why this one was not."""
    world = World()
    world.board.put(Resident(model_id="small", level=Level.READY, bytes=1, since=0.0, max_model_len=2))
    world.engine.errors = [PromptTooLong("it has 9 tokens."), PromptTooLong("it has 9 tokens.")]

    with pytest.raises(RouteAgain):
        world.run()
    assert world.store.outcome("job") is None
    assert world.store.view("job").state is JobState.ROUTED
    ended = world.run(delivery="the router's next message")

    assert ended.error is not None
    assert ended.error.kind == "PromptTooLong"
    assert ended.error.message.startswith("it has 9 tokens. For want of memory small is loaded with 2 tokens for now")


def test_a_prompt_too_long_for_a_model_as_it_was_offered_ends_the_job() -> None:
    """The router would choose the same again."""
    world = World()
    world.engine.errors = [PromptTooLong("it has 9,999 tokens.")]

    ended = world.run()

    assert ended.error is not None
    assert ended.error.message == "it has 9,999 tokens."
