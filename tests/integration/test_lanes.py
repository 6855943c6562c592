"""
The two lanes on a real Redis: what they do with plain jobs, and what they leave to the ordinary way untouched.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from common import keys
from common.backlog import RedisBacklog
from common.celery_app import create_app
from common.errors import EngineDied, EngineTimeout, JobCancelled
from common.job_stream import START, read_stream
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import ErrorBody, Fault, JobRequest, JobState, OfferedModel, Outcome, Route
from common.settings import Settings
from tests.factories import make_placement, make_spec
from tests.runs import OWNER, Told, in_hand, make_run
from tests.waiting import eventually
from worker.catalog.spec import EngineKind
from worker.delivery.redis_steps import RedisSteps
from worker.engines.base import Call, Completion, JobStopped, OnAnswer, StopSignal
from worker.engines.stub import StubEngine
from worker.jobs.failures import HandBack, JobLimits
from worker.jobs.job_lane import JobLane
from worker.jobs.runner import JobRunner
from worker.jobs.submit_lane import SubmitLane
from worker.residency.board import ResidencyBoard
from worker.routing.router import Router
from worker.routing.rules_file import load_rules
from worker.state.residency import Level, Resident

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "count the birds"}]}
ROUTE = Route(model="small", complexity=0.2, why="simple enough")
SMALL = OfferedModel(id="small", tier=1, complexity_up_to=1.0, max_model_len=1000, capabilities=("chat",))
TTL_S = 60.0


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Iterator[Celery]:
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = create_app(Settings.from_env())
    yield made
    made.close()


@pytest.fixture
def steps(app: Celery, redis_client: RedisClient) -> RedisSteps:
    return RedisSteps(redis_client, app, owner=OWNER, ttl_s=TTL_S)


@pytest.fixture
def store(redis_client: RedisClient) -> RedisJobStore:
    return RedisJobStore(redis_client, ttl_s=TTL_S)


# --- Submit ------------------------------------------------------------------------------------------------


@pytest.fixture
def submit(steps: RedisSteps, store: RedisJobStore) -> Iterator[SubmitLane]:
    lane = SubmitLane(Router(store=store, offers=lambda: [SMALL], rules=load_rules()), steps)
    lane.lane.start()
    yield lane
    lane.lane.end()


def test_a_routed_job_lies_in_its_models_queue_under_its_own_headers(
    submit: SubmitLane, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """Its message has moved: same id, the task that answers it, the priority's class, nothing left behind."""
    told = make_run(redis_client, "job", {**BODY, "priority": 6, "stream": True}, mine="kept", redelivered=True)
    submit.lane.put(told.run)
    told.run.ended.result(10)

    assert told.words == ["moved on"]
    assert in_hand(redis_client) == set()
    backlog, queue = RedisBacklog(redis_client), keys.model_queue("small")
    [(sums, _, _)] = backlog.read(queue)
    assert "jobs 6*:default" in sums
    message = json.loads(backlog.find(queue, "job") or "")
    headers, properties = message["headers"], message["properties"]
    assert (headers["id"], headers["task"], headers["mine"]) == ("job", keys.GENERATE_TASK, "kept")
    assert "redelivered" not in headers
    assert "birds" not in headers["argsrepr"]
    assert properties["delivery_tag"] != told.run.delivery
    assert (properties["priority"], properties["correlation_id"]) == (6, "job")
    (body, route), kwargs, _embed = json.loads(base64.b64decode(message["body"]))
    assert body["messages"] == BODY["messages"]
    assert (Route.model_validate(route).model, kwargs) == ("small", {})
    view = store.view("job")
    assert (view.state, view.model) == (JobState.ROUTED, "small")
    assert view.queued_at is not None
    assert redis_client.hget(keys.job("job"), "stream") == "1"


@pytest.mark.parametrize(
    "args",
    [
        (),
        ("no object",),
        ({**BODY, "model": "unknown"},),
        ({"messages": []},),
        ({"prompt": "too long " * 5000},),
    ],
)
def test_what_cannot_be_routed_goes_the_ordinary_way_untouched(
    submit: SubmitLane, redis_client: RedisClient, args: tuple[Any, ...]
) -> None:
    """The task itself says what is wrong with it; until then it has not been seen."""
    told = make_run(redis_client, "job", *args)
    submit.lane.put(told.run)
    eventually(lambda: told.words == ["ordinary"])
    assert in_hand(redis_client) == {told.run.delivery}
    assert not redis_client.exists(keys.job("job"), keys.model_queue("small"))


def test_a_job_that_has_ended_is_not_routed_again(
    submit: SubmitLane, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """Its outcome must be told, which the task does."""
    store.finish(Outcome(job_id="job", state=JobState.ANSWERED, response={}))
    told = make_run(redis_client, "job", BODY)
    submit.lane.put(told.run)
    eventually(lambda: told.words == ["ordinary"])
    assert in_hand(redis_client) == {told.run.delivery}


def test_a_delivery_that_was_taken_away_is_routed_by_whoever_has_it_now(
    submit: SubmitLane, redis_client: RedisClient
) -> None:
    """Ours was thought dead for a while: a second copy of the job would be made for nothing."""
    told = make_run(redis_client, "job", BODY, owner="another")
    submit.lane.put(told.run)
    told.run.ended.result(10)
    assert in_hand(redis_client) == {told.run.delivery}
    assert not redis_client.exists(keys.model_queue("small"))


# --- Generate ----------------------------------------------------------------------------------------------


class AskedEngine(StubEngine):
    """A stub that is asked without a thread; the test gives the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Call, StopSignal, OnAnswer]] = []
        self.answers_at_once = True

    def channel(self, model_id: str) -> AskedEngine:
        return self

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def ask(self, call: Call, stop: StopSignal, done: OnAnswer) -> Callable[[], object]:
        def stopped() -> Completion:
            raise JobStopped(stop.reason or "")

        stop.on_stop(lambda: done(stopped))
        self.asked.append((call, stop, done))
        if self.answers_at_once:
            self.answer()
        return lambda: self.fail(EngineTimeout("too long"), done)

    def answer(self, number: int = -1) -> None:
        """Answer a request as the stub would have done."""
        call, _, done = self.asked[number]
        completion = self.generate("small", call, StopSignal())
        done(lambda: completion)

    def fail(self, error: Exception, done: OnAnswer | None = None) -> None:
        def read() -> Completion:
            raise error

        (done or self.asked[-1][2])(read)


class World:
    """A lane with everything it touches; one model is ready."""

    def __init__(self, app: Celery, client: RedisClient, steps: RedisSteps, store: RedisJobStore) -> None:
        self.app, self.client, self.store = app, client, store
        placement = make_placement(spec=make_spec(engine=EngineKind.STUB))
        self.engine = AskedEngine()
        self.engine.ensure_ready(placement, timeout_s=1)
        self.board = ResidencyBoard(capacity=9, max_residents=1)
        self.board.put(Resident(model_id="small", level=Level.READY, bytes=1, since=0.0))
        self.runner = JobRunner(
            worker="here",
            store=store,
            board=self.board,
            placements={"small": placement},
            engines={EngineKind.STUB: self.engine},
            limits=JobLimits(timeout_s=60, max_attempts=3),
            switch_seconds=lambda _start, _end: 1.5,
        )
        self.lane = JobLane(self.runner, steps, hostname="worker@here")

    def start(self, job_id: str, route: Route = ROUTE, **ours: Any) -> Told:
        """Route the job and hand its message to the lane."""
        self.store.note_queued(job_id)
        if ours.get("stream"):
            self.store.note_streams(job_id)
        self.store.note_routed(job_id, route)
        told = make_run(self.client, job_id, {**BODY, **ours}, route.model_dump(mode="json"))
        self.lane.lane.put(told.run)
        return told

    def run_ordinary(self, told: Told) -> Outcome:
        """What the task does on a thread, once the lane has left the job to it."""
        eventually(lambda: told.words[-1:] == ["ordinary"], what="left to the ordinary way")
        run = told.run
        request = JobRequest.parse(run.args[0])
        return self.runner.run(run.task_id, request, ROUTE, delivery=run.delivery, stop=run.signal)

    @property
    def in_flight(self) -> int:
        return self.board.read().residents[0].in_flight


@pytest.fixture
def world(app: Celery, redis_client: RedisClient, steps: RedisSteps, store: RedisJobStore) -> Iterator[World]:
    made = World(app, redis_client, steps, store)
    made.lane.lane.start()
    yield made
    made.lane.lane.end()


def test_many_jobs_are_answered_stored_and_acknowledged(world: World) -> None:
    """Each has its outcome of record, Celery's copy of it, and its ledger; nothing is left in hand."""
    runs = [world.start(f"job {number}") for number in range(50)]
    for told in runs:
        told.run.ended.result(10)

    assert [told.words for told in runs] == [["accepted", "succeeded"]] * 50
    assert in_hand(world.client) == set()
    assert world.in_flight == 0
    for told in runs:
        outcome = world.store.outcome(told.run.task_id)
        assert outcome is not None
        assert outcome.state is JobState.ANSWERED
        assert (outcome.answer or "").endswith("count the birds")
        assert (outcome.ledger.attempt, outcome.ledger.switch_s, outcome.ledger.worker) == (1, 1.5, "here")
        copy: AsyncResult[Any] = world.app.AsyncResult(told.run.task_id)
        assert (copy.state, copy.result) == ("SUCCESS", outcome.result())
        assert copy.date_done is not None


def test_a_job_in_the_engine_counts_as_running(world: World) -> None:
    """For whoever asks us, for Celery, and for a switch that waits until the model is free."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    assert world.store.view("job").state is JobState.RUNNING
    assert world.app.AsyncResult("job").state == "STARTED"
    assert world.in_flight == 1
    assert in_hand(world.client) == {told.run.delivery}
    world.engine.answer()
    told.run.ended.result(10)


def ended(world: World) -> None:
    world.store.finish(Outcome(job_id="job", state=JobState.ANSWERED, response={}))


def cancelled(world: World) -> None:
    world.store.ask_cancel("job")


def claimed(world: World) -> None:
    make_run(world.client, "job")
    (tag,) = world.client.hkeys(keys.UNACKED)
    world.store.begin("job", delivery=tag)


def not_ready(world: World) -> None:
    world.board.set_level("small", Level.STARTING)


def late(_: World) -> None: ...


def in_the_cloud(_: World) -> None: ...


@pytest.mark.parametrize("before", [ended, cancelled, claimed, not_ready, late, in_the_cloud])
def test_a_job_that_may_not_simply_run_is_left_untouched(world: World, before: Callable[[World], None]) -> None:
    """No attempt is counted and no engine asked: the ordinary way decides."""
    before(world)
    attempts = world.store.view("job").attempts
    route = ROUTE.model_copy(update={"cloud": "no model is ready"}) if before is in_the_cloud else ROUTE
    past = {"deadline": (datetime.now(UTC) - timedelta(seconds=1)).isoformat()} if before is late else {}
    told = world.start("job", route, **past)
    eventually(lambda: told.words == ["ordinary"])
    assert told.run.delivery in in_hand(world.client)
    assert world.store.view("job").attempts == attempts
    assert world.engine.asked == []
    assert world.in_flight == 0


def test_an_engine_that_dies_costs_one_fault_and_the_job_is_handed_back(world: World) -> None:
    """The lane's attempt is the one that counts; the ordinary way does not ask the engine again."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    world.engine.fail(EngineDied("gone"))
    with pytest.raises(HandBack):
        world.run_ordinary(told)
    assert len(world.engine.asked) == 1
    assert world.store.view("job").attempts == 1
    assert [fault.attempt for fault in world.store.view("job").faults] == [1]
    assert world.in_flight == 0


def test_a_cancelled_job_ends_as_cancelled(world: World) -> None:
    """The runtime asks the runner who was cancelled, and that knows the lane's jobs too."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    world.store.ask_cancel("job")
    world.runner.stop_cancelled()
    outcome = world.run_ordinary(told)
    assert outcome.state is JobState.CANCELLED


def test_jobs_are_handed_back_when_their_model_leaves(world: World) -> None:
    """As those on threads are."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    world.runner.hand_back("small")
    with pytest.raises(HandBack):
        world.run_ordinary(told)
    assert world.store.outcome("job") is None


def test_an_outcome_of_somebody_else_stays(world: World) -> None:
    """Cancelled in the very moment of its answer: the first outcome wins, and Celery is told by the ordinary way."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    error = JobCancelled("never mind")
    world.store.finish(Outcome(job_id="job", state=JobState.CANCELLED, error=ErrorBody.of(error)))
    world.engine.answer()
    assert world.run_ordinary(told).state is JobState.CANCELLED
    assert world.app.AsyncResult("job").state == "STARTED"


def test_an_answer_that_comes_after_another_attempt_began_is_told_whole(world: World) -> None:
    """The process was paused: its answer is the first, and the stream has no word of the attempt that it cut short."""
    world.engine.answers_at_once = False
    told = world.start("job", stream=True)
    eventually(lambda: world.engine.asked)
    assert world.store.begin("job", delivery=told.run.delivery) == 2
    world.store.add_chunks({("job", 2): {"choices": [{"index": 0, "delta": {"content": "another begins"}}]}})
    world.engine.answer()
    outcome = world.run_ordinary(told)

    assert outcome.ledger.attempt == 1
    events = list(read_stream(world.client, "job", after=START, timeout_s=5))
    assert [(event.kind, event.attempt) for event in events] == [("reset", 1), ("chunk", 1), ("end", None)]
    assert events[1].text == outcome.answer
    assert len(world.engine.asked) == 1


def test_a_death_that_comes_after_another_attempt_began_is_not_its_own(world: World) -> None:
    """The process was paused: the job runs elsewhere under the same tag, and nothing of that is changed."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    assert world.store.begin("job", delivery=told.run.delivery) == 2
    world.engine.fail(EngineDied("gone"))
    with pytest.raises(HandBack):
        world.run_ordinary(told)
    view = world.store.view("job")
    assert (view.state, view.attempts, view.faults) == (JobState.RUNNING, 2, ())


def test_a_job_under_which_something_has_failed_goes_the_ordinary_way(world: World) -> None:
    """Untouched: in which company it may run is decided there."""
    world.engine.answers_at_once = False
    told = world.start("job")
    eventually(lambda: world.engine.asked)
    world.engine.fail(EngineDied("gone"))
    with pytest.raises(HandBack):
        world.run_ordinary(told)

    again = make_run(world.client, "job", BODY, ROUTE.model_dump(mode="json"))
    world.lane.lane.put(again.run)
    eventually(lambda: again.words == ["ordinary"])
    assert world.store.view("job").attempts == 1
    assert world.in_flight == 0


def test_nobody_goes_in_beside_a_suspect(world: World) -> None:
    """The lane leaves the job to a thread, which can wait at the door; the suspect's place is untouched."""
    death = Fault(at=datetime.now(UTC), worker="here", attempt=1, kind="EngineDied", message="gone", company=2)
    request = JobRequest.parse(BODY)
    with world.runner.enter("suspect", request, ROUTE, StopSignal(), "tag", faults=[death]):
        told = world.start("job")
        eventually(lambda: told.words == ["ordinary"])
        assert world.engine.asked == []
        assert world.in_flight == 1
    assert world.run_ordinary(told).state is JobState.ANSWERED


def test_a_job_that_takes_too_long_is_given_up(world: World) -> None:
    """At its deadline or its time limit, whichever is nearer: nobody else looks at the clock."""
    world.engine.answers_at_once = False
    soon = (datetime.now(UTC) + timedelta(seconds=0.4)).isoformat()
    told = world.start("job", deadline=soon)
    outcome = world.run_ordinary(told)
    assert outcome.state is JobState.EXPIRED
    assert len(world.engine.asked) == 1


def test_a_fault_of_ours_leaves_no_job_on_the_board(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A switch waits until the board says that nobody is in; the job itself goes the ordinary way."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(RedisSteps, "begin", broken)
    told = world.start("job")
    eventually(lambda: told.words == ["ordinary"])
    assert world.in_flight == 0
    assert not world.runner.runs("job")


def test_a_stream_has_all_its_tokens_before_its_end(world: World) -> None:
    """Whoever follows it sees the reset, the answer, and the end as the last."""
    told = world.start("job", stream=True)
    told.run.ended.result(10)
    events = list(read_stream(world.client, "job", after=START, timeout_s=5))
    outcome = world.store.outcome("job")
    assert outcome is not None
    assert [events[0].kind, events[-1].kind] == ["reset", "end"]
    assert "".join(event.text for event in events) == outcome.answer


def test_an_attempt_whose_answer_was_lost_on_the_way_is_not_counted_twice(
    steps: RedisSteps, store: RedisJobStore
) -> None:
    """The connection broke, and the step is asked for again; given back in between, it is another attempt."""
    store.note_routed("job", Route(model="small", complexity=0.5, why="simple enough"))

    def begin() -> int | None:
        found = steps.begin({"job": "delivery"}, hostname="box")["job"]
        return None if found is None else found.attempt

    assert [begin(), begin()] == [1, 1]
    assert store.hand_back("job", attempt=1)
    assert begin() == 2
