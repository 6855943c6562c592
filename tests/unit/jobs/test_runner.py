"""
One job to its one outcome: each question of `JobRunner.run`, in order.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from common.errors import DeadlineExceeded, EngineFailed, JobCancelled
from common.schemas import ErrorBody, JobState, Ledger, Outcome, utc_now
from tests.runner_world import BODY, LONG_S, World, error_of, told_not_to_wait
from worker.engines.base import Call
from worker.jobs.failures import DuplicateDelivery, HandBack, outcome_of


def test_a_job_is_answered_and_its_way_is_told() -> None:
    """Every field of the ledger that can be known."""
    world = World()
    before = utc_now()
    outcome = world.run()
    ledger = outcome.ledger

    assert outcome.state is JobState.ANSWERED
    assert (outcome.answer or "").endswith("count the birds")
    assert (ledger.model, ledger.complexity, ledger.why) == ("small", 0.2, "simple enough")
    assert (ledger.worker, ledger.attempt) == ("here", 1)
    assert (ledger.prompt_tokens, ledger.completion_tokens, ledger.prefill_s) == (3, 4, 0.0)
    assert ledger.run_s is not None
    assert ledger.queued_at is not None
    assert ledger.waited_s == pytest.approx((before - ledger.queued_at).total_seconds(), abs=0.5)
    assert ledger.switch_s == 1.5
    assert world.waits[0][0] == ledger.queued_at
    assert ledger.finished_at is not None
    assert ledger.finished_at >= before
    assert world.store.outcome("job") == outcome
    assert world.store.view("job").state is JobState.ANSWERED
    assert world.board.read().residents[0].in_flight == 0


def test_the_engine_gets_openai_s_body_and_the_job_s_time() -> None:
    """Nothing of ours; the model resolved; not longer than the job may take."""
    world = World()
    world.run(tenant="x", temperature=0)

    assert world.engine.calls == [
        Call(
            path="/v1/chat/completions",
            body={**BODY, "temperature": 0, "model": "small", "stream": False},
            timeout_s=LONG_S,
        )
    ]


def test_the_deadline_shortens_the_job_s_time() -> None:
    """What is left until then is all that the engine gets."""
    world = World()
    world.run(deadline=(utc_now() + timedelta(seconds=20)).isoformat())

    assert world.engine.calls[0].timeout_s == pytest.approx(20, abs=1)


def test_1_an_answered_job_is_not_run_again() -> None:
    """A second delivery gets the outcome of record, and the engine is not asked; not even if the model is gone."""
    world = World()
    first = world.run()
    world.board.remove("small")

    assert world.run(delivery="another") == first
    assert len(world.engine.calls) == 1


def test_a_job_that_was_cancelled_while_it_was_routed_owes_its_webhook() -> None:
    """Whoever stored its end did not know of it; the delivery that comes afterwards does."""
    world = World()
    ended = world.store.finish(outcome_of(JobCancelled("cancelled"), "job", Ledger()))
    assert world.store.webhooks == {}
    assert world.run(webhook="https://example.com/hook") == ended
    assert world.store.webhooks == {"job": "https://example.com/hook"}
    assert world.engine.calls == []


def test_2_a_job_cancelled_while_it_waited_never_runs() -> None:
    """Cancelled comes before everything but an outcome."""
    world = World()
    world.store.ask_cancel("job")
    outcome = world.run(deadline="2020-01-01T00:00:00Z")

    assert outcome.state is JobState.CANCELLED
    assert isinstance(error_of(outcome).as_exception(), JobCancelled)
    assert world.engine.calls == []


def test_3_a_job_whose_deadline_passed_while_it_waited_never_runs() -> None:
    """The message has the deadline."""
    world = World()
    outcome = world.run(deadline="2020-01-01T00:00:00Z")

    assert outcome.state is JobState.EXPIRED
    assert isinstance(error_of(outcome).as_exception(), DeadlineExceeded)
    assert "2020-01-01T00:00:00+00:00, passed while the job waited" in error_of(outcome).message
    assert world.engine.calls == []


@pytest.mark.parametrize("how", ["not on the board", "dead, and the board does not know"])
def test_4_a_job_whose_model_is_not_ready_goes_back(how: str) -> None:
    """It is no attempt and nobody's fault, however often it happens."""
    world = World()
    if how == "not on the board":
        world.board.remove("small")
    else:
        world.engine.die("small")

    for _ in range(world.limits.max_attempts + 1):
        with pytest.raises(HandBack):
            world.run(stop=told_not_to_wait())
    assert world.engine.calls == []
    assert world.store.view("job").state is JobState.ROUTED
    assert world.store.view("job").attempts == 0
    assert world.store.view("job").faults == ()


def test_5_a_copy_of_a_job_in_flight_is_dropped() -> None:
    """Another message with the same job is being worked on."""
    world = World(run_s=LONG_S)
    with world.running(delivery="first"):
        with pytest.raises(DuplicateDelivery):
            world.run(delivery="copy")
        assert world.engine.in_flight("small") == 1
        assert world.board.read().residents[0].in_flight == 1


def test_5_a_message_that_comes_again_while_it_runs_here_goes_back() -> None:
    """The lease ran out while the job ran: one run of it at a time, and it is not its end when that one fails."""
    world = World(run_s=LONG_S)
    with world.running() as first:
        with pytest.raises(HandBack):
            world.run(stop=told_not_to_wait())
        assert len(world.engine.calls) == 1
        world.engine.die("small")
        with pytest.raises(HandBack):
            first.result(timeout=5)
    assert world.store.outcome("job") is None


def test_5_the_same_message_again_is_the_next_attempt() -> None:
    """And so is another message, once the first is not in flight any more."""
    world = World(in_flight=lambda _tag: False)
    for attempt, delivery in enumerate(("tag", "tag", "other"), start=1):
        world.engine.errors = [EngineFailed("HTTP 500")]
        if attempt < world.limits.max_attempts:
            with pytest.raises(HandBack):
                world.run(delivery=delivery)
        else:
            assert world.run(delivery=delivery).ledger.attempt == attempt


def test_the_first_outcome_wins() -> None:
    """Cancelled by the producer just before the answer came: the answer is not stored, and not given."""
    cancelled = Outcome(job_id="job", state=JobState.CANCELLED, error=ErrorBody.of(JobCancelled("cancelled")))
    world = World()
    world.as_it_starts = lambda: world.store.finish(cancelled)

    assert world.run() == cancelled
    assert len(world.engine.calls) == 1
    assert world.store.view("job").state is JobState.CANCELLED
