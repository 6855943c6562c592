"""
The tasks at the moments when Redis goes away: the message is given back, and no job ends for it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import pytest
import redis
from celery import Celery
from celery.exceptions import Ignore, Reject

from common import keys
from common.celery_app import create_app
from common.errors import InvalidRequest
from common.job_store import MemoryJobStore
from common.schemas import JobRequest, JobState, OfferedModel, Outcome, Route
from common.settings import Settings
from worker.jobs.failures import RouteAgain
from worker.jobs.runner import JobRunner
from worker.routing.router import Router
from worker.routing.rules_file import load_rules
from worker.tasks import add_generate_task, add_submit_task, body_of

BODY = {"messages": [{"role": "user", "content": "Hi"}]}
ROUTE = {"model": "small", "complexity": 0.5, "why": "simple enough"}
SMALL = OfferedModel(id="small", tier=1, complexity_up_to=1.0, max_model_len=1000, capabilities=("chat",))


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Celery:
    """An app whose Redis is not there."""
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setattr("worker.tasks._REDIS_AWAY_PAUSE_S", 0)
    made = create_app(Settings.from_env())
    made.conf.task_publish_retry_policy = {"max_retries": 1, "interval_start": 0}
    return made


def submit(app: Celery, store: MemoryJobStore, offers: Any) -> object:
    """Run the router task for one job, as a worker does."""
    router = Router(store=store, offers=offers, rules=load_rules())
    add_submit_task(app, router, store)
    task = app.tasks[keys.SUBMIT_TASK]
    task.push_request(id="job", args=[BODY], kwargs={}, called_directly=False)
    try:
        return task.run(BODY)
    finally:
        task.pop_request()


def test_redis_gone_between_routing_and_sending_on_gives_the_job_back(app: Celery) -> None:
    """Celery would store a failure and acknowledge: the job would be nowhere."""
    store = MemoryJobStore()
    with pytest.raises(Reject) as rejected:
        submit(app, store, lambda: [SMALL])
    assert rejected.value.requeue
    assert store.outcome("job") is None


def test_redis_gone_while_the_offers_are_read_gives_the_job_back(app: Celery) -> None:
    """An outage is no fault of the job, and no fault of ours either."""

    def offers() -> Sequence[OfferedModel]:
        raise redis.ConnectionError("gone")

    store = MemoryJobStore()
    with pytest.raises(Reject):
        submit(app, store, offers)
    assert store.outcome("job") is None


def test_a_fault_of_ours_ends_the_job_with_its_name(app: Celery) -> None:
    """It is stored as what it is, so that the producer does not wait for ever."""

    def offers() -> Sequence[OfferedModel]:
        raise ZeroDivisionError("a bug")

    store = MemoryJobStore()
    with pytest.raises(Exception, match="ZeroDivisionError: a bug"):
        submit(app, store, offers)
    outcome = store.outcome("job")
    assert outcome is not None
    assert outcome.state is JobState.FAILED
    assert outcome.error is not None
    assert outcome.error.kind == "InternalError"


def test_a_fault_of_ours_under_a_running_job_ends_it_and_its_way_is_told(app: Celery) -> None:
    """How it came to its model is known, and stands beside the fault."""

    class Broken(JobRunner):
        def __init__(self) -> None: ...

        def run(self, *_: Any, **__: Any) -> Outcome:
            raise ZeroDivisionError("a bug")

    store = MemoryJobStore()
    store.note_queued("job")
    store.note_routed("job", Route.model_validate(ROUTE))
    add_generate_task(app, Broken(), store)
    task = app.tasks[keys.GENERATE_TASK]
    task.push_request(id="job", args=[BODY, ROUTE], kwargs={}, called_directly=False)
    try:
        with pytest.raises(Exception, match="ZeroDivisionError: a bug"):
            task.run(BODY, ROUTE)
    finally:
        task.pop_request()
    outcome = store.outcome("job")
    assert outcome is not None
    assert (outcome.ledger.model, outcome.ledger.why) == ("small", "simple enough")
    assert outcome.ledger.queued_at is not None


def test_a_job_that_must_be_routed_again_goes_to_the_router_under_its_own_id(
    monkeypatch: pytest.MonkeyPatch, redis_url: str, redis_client: Any
) -> None:
    """With the body as it came: the producer waits for the same id, and the router sees the newest offers."""

    class ShorterNow(JobRunner):
        def __init__(self) -> None: ...

        def run(self, *_: Any, **__: Any) -> Outcome:
            raise RouteAgain

    monkeypatch.setenv("REDIS_URL", redis_url)
    app = create_app(Settings.from_env())
    add_submit_task(app, Router(store=MemoryJobStore(), offers=list, rules=load_rules()), MemoryJobStore())
    add_generate_task(app, ShorterNow(), MemoryJobStore())
    task = app.tasks[keys.GENERATE_TASK]
    task.push_request(id="job", args=[BODY, ROUTE], kwargs={}, called_directly=False, is_eager=False)
    try:
        with pytest.raises(Ignore):
            task.run(BODY, ROUTE)
    finally:
        task.pop_request()

    (message,) = redis_client.lrange(keys.SUBMIT_QUEUE, 0, -1)
    sent = json.loads(message)
    assert (sent["headers"]["task"], sent["headers"]["id"]) == (keys.SUBMIT_TASK, "job")
    (body,) = json.loads(base64.b64decode(sent["body"]))[0]
    assert JobRequest.parse(body) == JobRequest.parse(BODY)


def test_the_body_comes_as_one_argument_or_as_fields() -> None:
    """Both ways in which producers call a task by name; anything else is refused with the two named."""
    assert body_of((BODY,), {}) == BODY
    assert body_of((), BODY) == BODY
    for before in ({"id": "x", "ledger": {}}, [{"ledger": {}}, {"ledger": {}}]):  # as Celery's chain and chord do
        assert body_of((before, BODY), {}) == BODY
        assert body_of((before,), BODY) == BODY
    for args, fields in (((), {}), ((BODY, BODY), {}), ((BODY,), BODY)):
        with pytest.raises(InvalidRequest, match=r"args=\[body\]"):
            body_of(args, fields)


@pytest.mark.parametrize(
    ("args", "fields"),
    [
        ((), {}),
        ((BODY,), {}),
        ((BODY, {"model": "small"}), {}),
        ((BODY, [1]), {}),
        ((BODY, ROUTE, ROUTE), {}),
        ((BODY, ROUTE), {"more": 1}),
        ((), {"request": BODY, "route": ROUTE}),
        (("Hi", ROUTE), {}),
        (({"prompt": 1}, ROUTE), {}),
    ],
)
def test_what_no_router_has_sent_to_a_model_ends_as_refused(app: Celery, args: Any, fields: Any) -> None:
    """A hand-made message in a model's queue: its job has a stored outcome, as every other one."""
    store = MemoryJobStore()
    add_generate_task(app, object(), store)  # type: ignore[arg-type] # it is not asked
    task = app.tasks[keys.GENERATE_TASK]
    task.push_request(id="job", args=args, kwargs=fields, called_directly=False)
    try:
        with pytest.raises(InvalidRequest):
            task.run(*args, **fields)
    finally:
        task.pop_request()
    outcome = store.outcome("job")
    assert outcome is not None
    assert outcome.state is JobState.FAILED
