"""
One idempotency key, one job: whoever sends it again gets the outcome of the first; a router process on a real Redis.

The test itself stands in for the worker: it ends jobs as a worker does, in the store.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult

from common import JobClient, keys
from common.backlog import RedisBacklog
from common.errors import DeadlineExceeded, JobCancelled, KeyReused, QueueFull
from common.may_enter import Entry
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import ErrorBody, JobState, Offer, OfferedModel, Outcome, Route, utc_now
from tests.e2e.nodes import ProgramNode
from tests.waiting import eventually

BODY = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
SMALL = OfferedModel(id="small", tier=1, complexity_up_to=1.0, max_model_len=1000, capabilities=("chat",))
TTL_S = 24 * 3600  # JOB_RESULT_TTL_S
ANSWER = {"choices": [{"message": {"content": "Hello"}}], "tools": []}


@pytest.fixture(scope="module")
def router(shared_redis: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProgramNode]:
    """A router process, which is the same one in all tests of this file that do not kill it."""
    env = {"REDIS_URL": shared_redis.url, "WORKER_NAME": "keys", "LIMIT_TENANT_JOBS": "40", "LOG_FORMAT": "json"}
    env |= {"DELIVERY_LEASE_S": "2"}
    node = ProgramNode("router", tmp_path_factory.mktemp("router"), env, " ready.")
    node.ready()
    yield node
    node.teardown()


class World:
    """A producer that knows our client, one that knows only Celery, and the worker's side of the store."""

    def __init__(self, url: str, redis_client: RedisClient) -> None:
        self.redis = redis_client
        self.client = JobClient(url)
        self.celery = Celery(broker=url, backend=url, set_as_current=False)
        self.store = RedisJobStore(redis_client, ttl_s=TTL_S)
        offer = Offer(worker="w", models=(SMALL,), at=utc_now())
        redis_client.hset(keys.FLEET, "w", offer.model_dump_json())

    def send(self, key: str | None = "key", **fields: Any) -> AsyncResult[Any]:
        """Send a job by the task's name."""
        body = {**BODY, "idempotency_key": key, **fields}
        return self.celery.send_task(keys.SUBMIT_TASK, args=[body], queue=keys.SUBMIT_QUEUE)

    def route(self, key: str | None = "key", **fields: Any) -> AsyncResult[Any]:
        """Send a job and wait until it is routed."""
        sent = self.send(key, **fields)
        eventually(lambda: self.state(sent.id) is JobState.ROUTED, what="the first is routed")
        return sent

    def state(self, job_id: str) -> JobState:
        return self.store.view(job_id).state

    def waits_for(self, first: str) -> int:
        """How many jobs wait for the end of *first*."""
        return int(self.redis.llen(keys.twins(first)))

    @property
    def waiting(self) -> list[str]:
        """The jobs that a worker would run."""
        return [job_id for job_id, _ in RedisBacklog(self.redis).walk(keys.model_queue("small"))]

    def answer(self, job_id: str) -> Outcome:
        """End the job as a worker does."""
        ledger = self.store.view(job_id).ledger
        return self.store.finish(Outcome(job_id=job_id, state=JobState.ANSWERED, response=ANSWER, ledger=ledger))


@pytest.fixture
def world(router: ProgramNode, redis_url: str, redis_client: RedisClient) -> Iterator[World]:
    made = World(redis_url, redis_client)
    yield made
    assert router.process.poll() is None, router.logs()[-3000:]
    made.client.close()


def test_the_second_submission_ends_as_the_first_does(world: World) -> None:
    """Sent by name or by the client: one job runs, and each id has the answer, and says whose it is."""
    first = world.route()
    by_name, by_client = world.send(), world.client.submit({**BODY, "idempotency_key": "key"})
    eventually(lambda: world.waits_for(first.id) == 2)
    assert world.waiting == [first.id]
    assert not world.redis.hlen(keys.UNACKED)
    assert first.id in (world.client.status(by_client).why or "")

    world.answer(first.id)
    assert by_name.get(timeout=10)["choices"] == ANSWER["choices"]
    assert by_name.get(timeout=10)["ledger"]["same_as"] == first.id
    outcome = world.client.wait(by_client, timeout=10)
    assert (outcome.job_id, outcome.answer, outcome.ledger.same_as) == (by_client, "Hello", first.id)
    assert world.waiting == [first.id]
    eventually(lambda: not world.redis.exists(keys.HELD, keys.TENANTS, keys.UNACKED), what="nothing is held")


def test_the_work_is_compared_and_not_how_soon_it_is_wanted(world: World) -> None:
    """A producer that tries again has another deadline, and the same question."""
    first = world.route()
    later = world.send(priority=9, deadline="2099-01-01T00:00:00Z", time_limit=60, latency_sensitive=False)
    eventually(lambda: world.waits_for(first.id) == 1)
    world.answer(first.id)
    assert later.get(timeout=10)["ledger"]["same_as"] == first.id


@pytest.mark.parametrize(
    "other", [{"max_tokens": 6}, {"model": "small"}, {"messages": [{"role": "user", "content": "hi"}]}, {"x": [1]}]
)
@pytest.mark.parametrize("ended", [False, True])
def test_another_body_under_the_same_key_is_refused(world: World, other: dict[str, Any], ended: bool) -> None:  # noqa: FBT001
    """As a failure that names the job which has the key; that one is not touched."""
    first = world.route()
    if ended:
        world.answer(first.id)
    with pytest.raises(KeyReused, match=f"is that of job {first.id}, which asks for something else"):
        world.send(**other).get(timeout=10)
    with pytest.raises(KeyReused):
        world.client.wait(world.client.submit({**BODY, "idempotency_key": "key", **other}), timeout=10)
    assert world.state(first.id) is (JobState.ANSWERED if ended else JobState.ROUTED)


def test_each_tenant_has_keys_of_its_own(world: World) -> None:
    """Also where tenant and key would make the same text together."""
    sent = [world.route("b:c", tenant="a"), world.route("c", tenant="a:b"), world.route("b:c", tenant="default")]
    assert world.waiting == [one.id for one in sent]


CANCELLED = ErrorBody.of(JobCancelled("Never mind."))
LATE = ErrorBody.of(DeadlineExceeded("Too late."))


@pytest.mark.parametrize("before", [True, False], ids=["ended before", "ends later"])
@pytest.mark.parametrize(
    ("state", "error", "raised"),
    [(JobState.CANCELLED, CANCELLED, TaskRevokedError), (JobState.EXPIRED, LATE, DeadlineExceeded)],
)
def test_whatever_the_end_is_it_is_the_same(
    world: World,
    state: JobState,
    error: ErrorBody,
    raised: type[Exception],
    before: bool,  # noqa: FBT001
) -> None:
    """Cancelled, expired or failed: the key stands for that end too, as long as it is kept."""
    first, end = world.route(), Outcome.model_validate({"job_id": "", "state": state, "error": error})
    if not before:
        second = world.send()
        eventually(lambda: world.waits_for(first.id) == 1)
    world.store.finish(end.model_copy(update={"job_id": first.id}))
    if before:
        second = world.send()
    with pytest.raises(raised):
        second.get(timeout=10)
    outcome = world.store.outcome(second.id)
    assert outcome is not None
    assert (outcome.state, outcome.error) == (state, error)


def test_a_key_is_kept_as_long_as_the_outcome(world: World) -> None:
    """Without an end while the job has not ended; then both are forgotten together, and the key is free."""
    first, key = world.route(), keys.same_key("default", "key")
    assert world.redis.ttl(key) == -1
    world.answer(first.id)
    assert abs(world.redis.ttl(key) - world.redis.ttl(keys.outcome(first.id))) <= 1

    world.redis.delete(key, keys.outcome(first.id))
    again = world.route()
    assert again.id in world.waiting


def test_a_key_whose_job_is_forgotten_is_free(world: World) -> None:
    """It may outlive the outcome by a moment."""
    first = world.route()
    world.answer(first.id)
    world.redis.delete(keys.outcome(first.id))
    world.route()


def test_a_twin_that_is_cancelled_leaves_the_first_alone(world: World) -> None:
    """Somebody else asked for that one; and a cancel of the first is the end of all."""
    first = world.route()
    second, third = world.send(), world.send()
    eventually(lambda: world.waits_for(first.id) == 2)
    assert world.client.cancel(second.id)
    with pytest.raises(TaskRevokedError):
        second.get(timeout=10)
    assert world.state(first.id) is JobState.ROUTED

    assert world.client.cancel(first.id)
    with pytest.raises(TaskRevokedError):
        third.get(timeout=10)
    eventually(lambda: not world.redis.exists(keys.HELD, keys.UNACKED, keys.SUBMIT_QUEUE), what="nothing is left")
    assert world.waiting == []


def test_a_twin_ends_at_its_own_deadline(world: World) -> None:
    """Whoever sent it does not want it later, whatever the first does."""
    first = world.route()
    second = world.send(deadline=utc_now().timestamp() + 1)
    with pytest.raises(DeadlineExceeded, match="while the job waited"):
        second.get(timeout=10)
    assert world.state(first.id) is JobState.ROUTED


def test_twins_have_a_share_of_their_tenants_limits(world: World) -> None:
    """Else a key would be a way around them; who was refused is told when to try again, with the same key."""
    first = world.route()
    twins = [world.send() for _ in range(39)]
    eventually(lambda: world.waits_for(first.id) == 39)
    for key in ("key", "another", None):
        sent = world.send(key)
        with pytest.raises(QueueFull, match="LIMIT_TENANT_JOBS") as refused:
            sent.get(timeout=10)
        assert refused.value.retry_after_s
        kept = world.client.result(sent.id)
        assert kept is not None
        assert kept.error is not None
        assert kept.error.retry_after_s == refused.value.retry_after_s
    world.answer(first.id)
    for twin in twins:
        assert twin.get(timeout=10)["ledger"]["same_as"] == first.id
    world.route("another")


def test_of_many_producers_at_once_one_has_the_job(world: World) -> None:
    """Twenty of them, by name and by the client: one message waits for a worker, and all have its answer."""
    start = threading.Barrier(20, timeout=20)

    def submit(number: int) -> str:
        start.wait()
        return world.send().id if number % 2 else world.client.submit({**BODY, "idempotency_key": "key"})

    with ThreadPoolExecutor(20) as pool:
        sent = list(pool.map(submit, range(20)))
    eventually(lambda: len(world.waiting) == 1 and world.waits_for(world.waiting[0]) == 19, what="all but one wait")
    [first] = world.waiting
    world.answer(first)
    for job_id in sent:
        assert world.client.wait(job_id, timeout=10).answer == "Hello"
    assert world.waiting == [first]


def test_a_router_that_dies_loses_no_twin(
    shared_redis: Any, redis_url: str, redis_client: RedisClient, router: ProgramNode
) -> None:
    """Killed while twins come, wait and end; its successor ends every one."""
    world = World(redis_url, redis_client)
    first = world.route()
    sent = [world.send() for _ in range(15)]
    router.kill()
    world.answer(first.id)
    sent += [world.send() for _ in range(5)]
    router.start()
    router.ready()
    for one in sent:
        assert one.get(timeout=20)["ledger"]["same_as"] == first.id
    eventually(lambda: not redis_client.exists(keys.UNACKED, keys.SUBMIT_QUEUE, keys.twins(first.id)))
    world.client.close()


def test_a_job_without_a_key_costs_nothing_more(redis_client: RedisClient) -> None:
    """Its routing and its end touch no key of an idempotency key's, and no deadline."""
    store, job_id = RedisJobStore(redis_client, ttl_s=TTL_S), str(uuid.uuid4())
    redis_client.config_resetstat()
    entry = Entry(tenant="t", bytes=1, webhook=None, max_jobs=9, max_bytes=9)
    store.note_routed(job_id, Route(model="small", complexity=0.1, why=""), entry)
    store.finish(Outcome(job_id=job_id, state=JobState.ANSWERED, response=ANSWER))
    stats = redis_client.info("commandstats")
    assert not {"cmdstat_persist", "cmdstat_lmove", "cmdstat_zrem"} & set(stats)
    assert stats["cmdstat_zadd"]["calls"] == 1  # the outcome's place among those that are kept
