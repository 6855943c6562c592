"""
One job on its way to the cloud endpoint: the last door before it, and what each of its answers means for the job.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
from celery.exceptions import Ignore

from common import keys
from common.backlog import PLACE_HEADER, Place, RedisBacklog
from common.celery_app import create_app
from common.errors import EngineNotReady
from common.job_store import MemoryJobStore
from common.schemas import Fault, JobRequest, JobState, Outcome, Route, utc_now
from common.settings import Settings
from tests.factories import make_placement
from tests.fakes.endpoint import ANSWER, Endpoint
from worker.engines.base import StopSignal
from worker.engines.remote import RemoteEngine
from worker.jobs.cloud_lane import StandIn
from worker.jobs.failures import HandBack, JobLimits, StaysHere
from worker.jobs.runner import JobRunner
from worker.jobs.seats import Seat
from worker.residency.board import ResidencyBoard
from worker.residency.may_leave import Cloud
from worker.tasks import add_generate_task

BODY = {"messages": [{"role": "user", "content": "Hello"}], "privacy_required": False, "tenant": "us"}
ROUTE = Route(model="small", complexity=0.2, why="simple enough", cloud="theirs stands in for small")


class World:
    """A runner whose one model is not ready, and an endpoint."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.now = 0.0
        self.engine = RemoteEngine(url=endpoint.url, api_key=None, model="theirs", clock=lambda: self.now)
        self.store = MemoryJobStore()
        self.store.note_queued("job")
        self.store.note_routed("job", ROUTE)

    def runner(self, *, with_endpoint: bool = True) -> JobRunner:
        stand_in = StandIn(engine=self.engine, cloud=Cloud(model="theirs"), parallel=8)
        return JobRunner(
            worker="here",
            store=self.store,
            board=ResidencyBoard(capacity=9, max_residents=1),
            placements={"small": make_placement()},
            engines={},
            limits=JobLimits(timeout_s=5, max_attempts=3),
            switch_seconds=lambda _start, _end: 0.0,
            stand_in=stand_in if with_endpoint else None,
        )

    def run(self, *, route: Route = ROUTE, with_endpoint: bool = True, **fields: Any) -> Outcome:
        request = JobRequest.parse({**BODY, **fields})
        return self.runner(with_endpoint=with_endpoint).run("job", request, route, delivery="tag", stop=StopSignal())

    def later(self) -> None:
        """The endpoint has rested."""
        self.now += 10_000


@pytest.fixture
def world() -> Iterator[World]:
    endpoint = Endpoint()
    made = World(endpoint)
    yield made
    made.engine.close()
    endpoint.close()


def test_the_ledger_says_who_was_meant_who_answered_and_why(world: World) -> None:
    """And the endpoint gets OpenAI's body with its own model, nothing of ours."""
    outcome = world.run()

    assert (outcome.state, outcome.answer) == (JobState.ANSWERED, "yes")
    assert (outcome.ledger.model, outcome.ledger.cloud) == ("small", "theirs")
    assert outcome.ledger.why == "simple enough; theirs stands in for small"
    [body] = world.endpoint.bodies
    assert json.loads(body) == {"messages": BODY["messages"], "model": "theirs", "stream": False}


@pytest.mark.parametrize(
    ("fields", "route", "with_endpoint"),
    [
        ({"privacy_required": True}, ROUTE, True),
        ({}, ROUTE.model_copy(update={"stays": True}), True),
        ({"model": "small"}, ROUTE, True),
        ({}, ROUTE, False),
    ],
    ids=["private", "refused before", "named", "no endpoint any more"],
)
def test_at_the_last_door_it_is_asked_again_whether_the_job_may_leave(
    world: World, fields: dict[str, Any], route: Route, *, with_endpoint: bool
) -> None:
    """Whatever put the message into this queue; the endpoint hears nothing at all."""
    with pytest.raises(StaysHere):
        world.run(route=route, with_endpoint=with_endpoint, **fields)

    assert world.endpoint.seen == []
    assert world.store.view("job").state is JobState.ROUTED


def test_a_body_that_is_refused_is_no_failed_job(world: World) -> None:
    """Its own model may take it."""
    world.endpoint.says(400, '{"error": {"message": "what is top_k?"}}')
    with pytest.raises(StaysHere, match=r"what is top_k\?"):
        world.run(top_k=1)

    assert world.store.outcome("job") is None
    assert world.store.view("job").state is JobState.ROUTED


@pytest.mark.parametrize("status", [401, 404, 429, 503])
def test_an_endpoint_that_takes_nothing_now_is_no_fault_of_the_job(world: World, status: int) -> None:
    """However often that happens; while it rests it is not asked."""
    world.endpoint.says(status)
    for _ in range(5):
        with pytest.raises(HandBack):
            world.run()
        with pytest.raises(HandBack):
            world.run()
        world.later()

    assert len(world.endpoint.bodies) == world.store.view("job").attempts == 5
    assert world.store.view("job").faults == ()


def test_an_endpoint_that_fails_under_a_job_too_often_ends_it(world: World) -> None:
    """As a local engine would; between two attempts it rests."""
    world.endpoint.says(500, '{"error": {"message": "boom"}}')
    for _ in range(2):
        with pytest.raises(HandBack):
            world.run()
        world.later()
    outcome = world.run()

    assert outcome.error is not None
    assert outcome.error.kind == "AttemptsExhausted"
    assert "boom" in outcome.error.message


def test_whose_workers_died_is_alone_at_the_endpoint_too_and_whose_engine_died_is_not(world: World) -> None:
    """What the endpoint says may kill a worker; of what an engine here died, it says nothing."""
    runner, request = world.runner(), JobRequest.parse(BODY)

    def enter(job_id: str, *kinds: str) -> AbstractContextManager[Seat]:
        deaths = [Fault(at=utc_now(), worker="here", attempt=1, kind=kind, message="gone", company=1) for kind in kinds]
        return runner.enter(job_id, request, ROUTE, StopSignal(), job_id, faults=deaths or None)

    with enter("suspect", "WorkerDied", "WorkerDied"), pytest.raises(EngineNotReady), enter("other"):
        pass
    with enter("suspect", "EngineDied"), enter("other"):
        pass


def test_an_endpoint_that_is_not_there_is_looked_for_before_the_first_job(world: World) -> None:
    """No attempt of the job is spent on it."""
    world.endpoint.list_status = 503
    with pytest.raises(HandBack):
        world.run()
    assert world.store.view("job").attempts == 0

    world.endpoint.list_status = 200
    world.endpoint.says(200, ANSWER)
    world.later()
    assert world.run().state is JobState.ANSWERED


def test_a_job_that_stays_goes_back_to_its_model_s_queue(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, redis_client: Any
) -> None:
    """Under its own id, marked, so that it is not sent again; it has waited since it was routed first."""

    class Refusing(JobRunner):
        def __init__(self) -> None: ...

        def run(self, *_: Any, **__: Any) -> Outcome:
            raise StaysHere

    monkeypatch.setenv("REDIS_URL", redis_url)
    app = create_app(Settings.from_env())
    add_generate_task(app, Refusing(), MemoryJobStore())
    task = app.tasks[keys.GENERATE_TASK]
    arguments = [BODY, ROUTE.model_dump(mode="json")]
    came = Place(queued_at=1000.0, tenant="t").header()
    task.push_request(id="job", args=arguments, kwargs={}, called_directly=False, is_eager=False, **came)
    try:
        with pytest.raises(Ignore):
            task.run(*arguments)
    finally:
        task.pop_request()

    message = RedisBacklog(redis_client).find(keys.model_queue("small"), "job")
    assert message is not None
    sent = json.loads(message)
    request, route = json.loads(base64.b64decode(sent["body"]))[0]
    assert (sent["headers"]["task"], sent["headers"]["id"]) == (keys.GENERATE_TASK, "job")
    assert request["messages"] == BODY["messages"]
    assert (route["stays"], route["cloud"], route["model"]) == (True, None, "small")
    assert sent["headers"][PLACE_HEADER]["queued_at"] == 1000.0
