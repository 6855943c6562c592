"""
One job to its one outcome: each question of `JobRunner.run`, and what each fault and each stop means.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from common.errors import (
    DeadlineExceeded,
    EngineDied,
    EngineFailed,
    EngineTimeout,
    InvalidRequest,
    JobCancelled,
    PromptTooLong,
    ShiftworkerError,
)
from common.job_store import MemoryJobStore
from common.schemas import ErrorBody, Fault, JobRequest, JobState, Ledger, Outcome, Route, utc_now
from tests.factories import make_placement, make_spec
from tests.waiting import eventually
from worker.catalog.spec import EngineKind
from worker.engines.base import Call, Completion, StopSignal
from worker.engines.stub import StubEngine
from worker.jobs.failures import DuplicateDelivery, HandBack, JobLimits, RouteAgain, outcome_of
from worker.jobs.runner import JobRunner
from worker.residency.board import ResidencyBoard
from worker.state.residency import Level, Resident

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "count the birds"}]}
ROUTE = Route(model="small", complexity=0.2, why="simple enough")
LONG_S = 60.0  # a run that only a stop or a death ends


class FaultyEngine(StubEngine):
    """A stub that counts its calls, and raises what it is told to."""

    def __init__(self, **options: float) -> None:
        super().__init__(**options)
        self.errors: list[Exception] = []
        self.calls: list[Call] = []

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        self.calls.append(call)
        if self.errors:
            raise self.errors.pop(0)
        return super().generate(model_id, call, stop)


@dataclass
class World:
    """A runner with everything it touches; one model is ready."""

    run_s: float = 0.0
    in_flight: Callable[[str], bool] = lambda _tag: True
    as_it_starts: Callable[[], object] = lambda: None
    limits: JobLimits = field(default_factory=lambda: JobLimits(timeout_s=LONG_S, max_attempts=3, first_pause_s=0))

    def __post_init__(self) -> None:
        placement = make_placement(spec=make_spec(engine=EngineKind.STUB))
        self.store = MemoryJobStore(self.in_flight)
        self.board = ResidencyBoard(capacity=9, max_residents=1)
        self.board.put(Resident(model_id="small", level=Level.READY, bytes=1, since=0.0))
        self.engine = FaultyEngine(run_s=self.run_s)
        self.engine.ensure_ready(placement, timeout_s=1)
        self.waits: list[tuple[datetime, datetime]] = []
        self.runner = JobRunner(
            worker="here",
            store=self.store,
            board=self.board,
            placements={"small": placement},
            engines={EngineKind.STUB: self.engine},
            limits=self.limits,
            switch_seconds=self._switch_seconds,
        )
        self.store.note_queued("job")
        self.store.note_routed("job", ROUTE)

    def _switch_seconds(self, start: datetime, end: datetime) -> float:
        self.waits.append((start, end))
        self.as_it_starts()
        return 1.5

    def run(self, *, delivery: str = "tag", stop: StopSignal | None = None, **ours: Any) -> Outcome:
        request = JobRequest.parse({**BODY, **ours})
        return self.runner.run("job", request, ROUTE, delivery=delivery, stop=stop or StopSignal())

    @contextmanager
    def running(self, **options: Any) -> Any:
        """Run the job on a thread; inside, the engine works on it."""
        with ThreadPoolExecutor(1) as pool:
            future: Future[Outcome] = pool.submit(self.run, **options)
            eventually(lambda: self.engine.in_flight("small"))
            yield future
            self.engine.close()  # whatever the test did: no thread stays


def told_not_to_wait() -> StopSignal:
    """A signal already set: the pause before a hand-back is over at once."""
    signal = StopSignal()
    signal.stop("handback")
    return signal


def error_of(outcome: Outcome) -> ErrorBody:
    assert outcome.error is not None
    assert outcome.response is None
    return outcome.error


def test_a_job_that_was_cancelled_while_it_was_routed_owes_its_webhook() -> None:
    """Whoever stored its end did not know of it; the delivery that comes afterwards does."""
    world = World()
    ended = world.store.finish(outcome_of(JobCancelled("cancelled"), "job", Ledger()))
    assert world.store.webhooks == {}
    assert world.run(webhook="https://example.com/hook") == ended
    assert world.store.webhooks == {"job": "https://example.com/hook"}
    assert world.engine.calls == []


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


def test_the_first_outcome_wins() -> None:
    """Cancelled by the producer just before the answer came: the answer is not stored, and not given."""
    cancelled = Outcome(job_id="job", state=JobState.CANCELLED, error=ErrorBody.of(JobCancelled("cancelled")))
    world = World()
    world.as_it_starts = lambda: world.store.finish(cancelled)

    assert world.run() == cancelled
    assert len(world.engine.calls) == 1
    assert world.store.view("job").state is JobState.CANCELLED


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


STREAMED = {"stream": True}


def heard(world: World) -> list[tuple[str, Any]]:
    """The job's stream: the attempts, each attempt's text, and how it ended."""
    return [
        (event.kind, {"reset": event.attempt, "chunk": event.text, "end": event.state}[event.kind])
        for event in world.store.stream("job")
    ]


def spoken(world: World) -> str:
    return "".join(event.text for event in world.store.stream("job"))


def test_a_job_that_streams_says_its_whole_answer_and_then_ends() -> None:
    """The outcome is the same as without; the engine was asked for a stream."""
    plain, world = World(), World()
    world.store.note_streams("job")
    outcome = world.run(**STREAMED)

    assert outcome.response == plain.run().response
    assert spoken(world) == outcome.answer
    assert heard(world)[0] == ("reset", 1)
    assert heard(world)[-1] == ("end", JobState.ANSWERED)
    assert [event.chunk["usage"] for event in world.store.stream("job") if event.chunk and "usage" in event.chunk]
    assert world.engine.calls[0].body["stream"] is True
    assert plain.engine.calls[0].on_chunk is None
    assert plain.store.stream("job") == ()


def test_tokens_are_there_before_the_job_ends() -> None:
    """A reader has the first words while the engine works on the others."""
    world = World(run_s=2.0)
    world.store.note_streams("job")
    with world.running(**STREAMED) as running:
        eventually(lambda: spoken(world))
        assert not running.done()
        assert heard(world)[-1][0] == "chunk"
        assert running.result(10).answer == spoken(world)


def test_an_engine_that_dies_in_mid_stream_resets_it() -> None:
    """The next attempt begins anew, and only its words stay."""
    world = World(run_s=1.0)
    world.store.note_streams("job")
    with world.running(**STREAMED) as first:
        eventually(lambda: spoken(world))
        world.engine.die("small")
        with pytest.raises(HandBack):
            first.result(10)
    position = world.store.stream("job")[-1].position
    world.engine.ensure_ready(make_placement(spec=make_spec(engine=EngineKind.STUB)), timeout_s=1)
    outcome = world.run(**STREAMED)

    later = world.store.stream("job")
    assert all(int(event.position) > int(position) for event in later)
    assert heard(world)[0] == ("reset", 2)
    assert spoken(world) == outcome.answer


@pytest.mark.parametrize("reason", ["cancelled", "time limit"])
def test_a_job_stopped_in_mid_stream_ends_it(reason: str) -> None:
    """What was said stays; the end says why there is no more."""
    world, stop = World(run_s=LONG_S), StopSignal()
    world.store.note_streams("job")
    with world.running(stop=stop, **STREAMED) as running:
        stop.stop(reason)
        outcome = running.result(10)

    assert heard(world)[-1] == ("end", outcome.state)


def test_a_job_that_never_ran_ends_its_stream_too() -> None:
    """A reader does not wait for ever for what will not come."""
    world = World()
    world.store.note_streams("job")
    outcome = world.run(deadline="2020-01-01T00:00:00Z", **STREAMED)

    assert heard(world) == [("end", outcome.state)]
