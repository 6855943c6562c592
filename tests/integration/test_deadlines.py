"""
A deadline that passes while a job waits, on a real Redis: the job ends then, wherever it lies, and Celery is told.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from celery import Celery
from celery.result import AsyncResult

from common import JobClient, keys
from common.backlog import RedisBacklog
from common.errors import DeadlineExceeded, EngineNotReady
from common.may_enter import Entry
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import JobRequest, JobState, Outcome, Route, utc_now
from common.settings import LimitSettings
from common.waiting_jobs import RedisWaitingJobs
from worker.jobs.deadlines import DeadlineSweep
from worker.jobs.unread import UnreadJobs
from worker.routing.router import Router
from worker.routing.rules_file import load_rules

NOW = 1_000_000.0
BODY = {"messages": [{"role": "user", "content": "Hi"}]}
ROUTE = Route(model="small", complexity=0.5, why="simple enough")
QUEUE = keys.model_queue("small")


@pytest.fixture(autouse=True)
def _collected(redis_url: str) -> Iterator[None]:
    """Celery's AsyncResult unsubscribes when it is collected; with Redis gone that takes 20 s."""
    yield
    gc.collect()


class World:
    """Jobs in Redis, and a sweep whose clock the test sets."""

    def __init__(self, url: str, redis_client: RedisClient) -> None:
        self.redis, self.now = redis_client, NOW
        self.client = JobClient(url)
        self.celery = Celery(broker=url, backend=url, set_as_current=False)
        self.store = RedisJobStore(redis_client, ttl_s=100)
        waiting = RedisWaitingJobs(redis_client, ttl_s=100)
        self.sweep = DeadlineSweep(redis_client, self.store, waiting, clock=lambda: self.now).sweep
        self.backlog = RedisBacklog(redis_client)

    def route(self, job_id: str, *, deadline: float | None = NOW, queue: str = QUEUE, **options: Any) -> None:
        """Bring a job to its model's queue, as the router does."""
        body = {**BODY, "deadline": deadline}
        self.store.note_routed(job_id, ROUTE, Entry.of(JobRequest.parse(body), LimitSettings()))
        arguments = [body, ROUTE.model_dump(mode="json")]
        self.client._app.send_task(keys.GENERATE_TASK, args=arguments, task_id=job_id, queue=queue, **options)

    def begin(self, job_id: str, *, held: bool = True) -> None:
        """Take the job up as a worker does; not *held* = the worker died, and its message waits again."""
        self.store.begin(job_id, delivery=f"tag of {job_id}")
        if held:
            self.redis.hset(keys.UNACKED, f"tag of {job_id}", "[]")

    def result(self, job_id: str) -> AsyncResult[Any]:
        return self.celery.AsyncResult(job_id)

    @property
    def waiting(self) -> list[str]:
        return [job_id for queue in (QUEUE, keys.cloud_queue("small")) for job_id, _ in self.backlog.walk(queue)]


@pytest.fixture
def world(redis_url: str, redis_client: RedisClient) -> Iterator[World]:
    made = World(redis_url, redis_client)
    yield made
    made.client.close()


def test_a_job_ends_at_its_deadline_and_not_before(world: World) -> None:
    """Its outcome, Celery's copy, its message and its share of the limits, all at once; the others wait on."""
    world.route("later", deadline=NOW + 1)
    world.route("now")
    world.route("whenever", deadline=None)
    world.now = NOW - 0.001
    assert world.sweep() == 0
    assert len(world.waiting) == 3

    world.now = NOW
    assert world.sweep() == 1
    assert sorted(world.waiting) == ["later", "whenever"]
    outcome = world.store.outcome("now")
    assert outcome is not None
    assert (outcome.state, outcome.ledger.model) == (JobState.EXPIRED, "small")
    assert outcome.ledger.finished_at is not None
    with pytest.raises(DeadlineExceeded, match=r"1970-01-12T13:46:40\+00:00, passed while the job waited"):
        world.result("now").get(timeout=5)
    assert set(world.redis.hkeys(keys.HELD)) == {"later", "whenever"}
    assert world.redis.zrange(keys.DEADLINES, 0, -1) == ["later"]
    assert world.sweep() == 0


def test_many_end_together(world: World) -> None:
    """Whoever sends a thousand jobs for a meeting at nine gives them one deadline."""
    for number in range(1000):
        world.route(str(number))
    world.redis.config_resetstat()
    assert [world.sweep(), world.sweep(), world.sweep()] == [500, 500, 0]
    assert world.waiting == []
    assert not world.redis.exists(keys.HELD, keys.TENANTS, keys.DEADLINES)


def test_a_job_that_the_router_has_not_read_ends_too(world: World) -> None:
    """The client says when it is due; its message ends what is left of it when the router gets there."""
    job_id = world.client.submit({**BODY, "deadline": NOW})
    assert world.sweep() == 1
    with pytest.raises(DeadlineExceeded):
        world.client.wait(job_id, timeout=5)
    assert world.redis.llen(keys.SUBMIT_QUEUE) == 1
    assert not world.redis.exists(keys.DEADLINES)


def test_a_job_that_was_sent_by_name_and_not_read_ends_too(world: World) -> None:
    """Its deadline, or its task's `expires`, stands in its message only; each message is looked at once."""
    unread = UnreadJobs(world.redis, world.store)

    def send(**options: Any) -> str:
        return str(world.celery.send_task(keys.SUBMIT_TASK, queue=keys.SUBMIT_QUEUE, **options).id)

    for number in range(250):
        send(args=[{**BODY, "user": f"x{number}", "deadline": None}])
    due = [send(args=[{**BODY, "user": "u" * n, "deadline": NOW}]) for n in range(4)]  # at each place in base64
    due += [send(kwargs={**BODY, "deadline": "1970-01-12T13:46:40Z"}), send(args=[BODY], expires=0.001)]
    send(args=[{**BODY, "deadline": NOW + 9}], priority=9)
    world.redis.lpush(keys.SUBMIT_QUEUE, b"\xff deadline", '{"body": "deadline"}', "[" * 9999 + "deadline")

    assert unread.note_deadlines() == len(due) + 1
    assert unread.note_deadlines() == 0
    send(args=[{**BODY, "deadline": NOW + 9}])
    assert unread.note_deadlines() == 1
    world.now = utc_now().timestamp()
    world.redis.zremrangebyscore(keys.DEADLINES, NOW + 9, NOW + 9)
    assert world.sweep() == len(due)
    assert {world.client.status(job_id).state for job_id in due} == {JobState.EXPIRED}


@pytest.mark.parametrize("body", ['"no base64"', '"WzFd"', "[1]", "null"])
def test_a_message_that_nobody_can_read_keeps_no_other_job_from_its_end(world: World, body: str) -> None:
    """Somebody has pushed it under a job's id: that job ends too, and the message waits for its turn."""
    for job_id in ("spoilt", "sound"):
        world.route(job_id)
    about = '{"delivery_tag": "tag", "delivery_info": {"exchange": "", "routing_key": "model.small"}}'
    world.redis.lpush(QUEUE, f'{{"headers": {{"id": "spoilt"}}, "properties": {about}, "body": {body}}}')
    world.backlog.adopt(QUEUE, now=NOW)
    assert world.sweep() == 2
    assert world.waiting == ["spoilt"]


def test_a_job_that_nobody_can_route_yet_ends_too(world: World) -> None:
    """It goes round in the router's queue until a worker offers something."""
    router = Router(store=world.store, offers=list, rules=load_rules())
    with pytest.raises(EngineNotReady):
        router.route("job", {**BODY, "deadline": NOW})
    with pytest.raises(EngineNotReady):
        router.route("expires", BODY, expires=datetime.fromtimestamp(NOW, UTC).replace(tzinfo=None))
    assert world.sweep() == 2
    assert world.client.status("expires").state is JobState.EXPIRED


def test_a_job_on_its_way_to_the_cloud_ends_too(world: World) -> None:
    """It waits in another queue of the same model."""
    world.route("job", queue=keys.cloud_queue("small"))
    assert world.sweep() == 1
    assert world.waiting == []


def test_who_runs_a_job_ends_it(world: World) -> None:
    """At its deadline, and says so; only when he is silent for seconds the sweep does it for him."""
    world.route("job")
    world.begin("job")
    assert world.sweep() == 0
    world.now = NOW + 4.9
    assert world.sweep() == 0
    assert world.store.outcome("job") is None

    world.now = NOW + 5.1
    assert world.sweep() == 1
    outcome = world.store.outcome("job")
    assert outcome is not None
    assert outcome.error is not None
    assert "whoever ran it is silent" in outcome.error.message


def test_a_job_whose_worker_died_waits_again(world: World) -> None:
    """Its message has come back, so nobody runs it."""
    world.route("job")
    world.begin("job", held=False)
    assert world.sweep() == 1
    assert world.waiting == []


def test_a_job_that_has_ended_is_left_alone(world: World) -> None:
    """Answered in the very last moment; nothing of the deadline is left."""
    world.route("job")
    answer = world.store.finish(Outcome(job_id="job", state=JobState.ANSWERED, response={}))
    assert not world.redis.exists(keys.DEADLINES)
    world.redis.zadd(keys.DEADLINES, {"job": NOW})
    assert world.sweep() == 0
    assert world.store.outcome("job") == answer
    assert not world.redis.exists(keys.DEADLINES)


@pytest.mark.parametrize("how", ["group", "chain", "errback"])
def test_a_message_that_others_wait_for_stays_until_its_turn(world: World, how: str) -> None:
    """The job has ended for whoever asks, but a chord, a chain or an errback is told by the worker that takes it."""
    other = world.celery.signature("other", queue="elsewhere")
    options: dict[str, dict[str, Any]] = {
        "group": {"group_id": "g"},
        "chain": {"chain": [dict(other)]},
        "errback": {"link_error": [dict(other)]},
    }
    world.route("job", **options[how])
    assert world.sweep() == 1
    assert world.client.status("job").state is JobState.EXPIRED
    assert world.waiting == ["job"]


def test_a_message_that_changed_in_between_stays(world: World) -> None:
    """It came back from a worker, say; then its turn ends it."""
    world.route("job")
    message = world.backlog.find(QUEUE, "job")
    assert message is not None
    changed = json.loads(message)
    changed["headers"]["redelivered"] = True
    waiting = RedisWaitingJobs(world.redis, ttl_s=100)
    found = waiting._messages

    def late(views: Any) -> Any:
        seen = found(views)
        world.redis.hset(keys.backlog_messages(QUEUE), "job", json.dumps(changed))
        return seen

    waiting._messages = late  # type: ignore[method-assign]
    assert DeadlineSweep(world.redis, world.store, waiting, clock=lambda: NOW).sweep() == 1
    assert world.store.outcome("job") is not None
    assert world.waiting == ["job"]
