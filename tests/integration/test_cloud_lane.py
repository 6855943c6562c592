"""
Jobs on their way to the cloud endpoint, in a real Redis: who goes, how many at once, and who comes home.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Collection, Iterator
from typing import Any

import pytest
from celery import Celery

from common import keys
from common.backlog import RedisBacklog
from common.celery_app import create_app
from common.schemas import JobRequest, Route
from common.settings import Settings
from worker.engines.remote import RemoteEngine
from worker.jobs.cloud_lane import CloudLane, StandIn
from worker.residency.may_leave import Cloud
from worker.scheduling.redis_cloud import RedisCloud
from worker.scheduling.redis_queues import RedisQueues
from worker.state.residency import Level, Quarantine, Residency, Resident
from worker.tasks import _generate_signature, add_generate_task

ROUTE = Route(model="large", complexity=0.9, why="hard")
MODELS = ("small", "large")
BROKEN = Quarantine(since=0.0, until=60.0, failures=1, reason="no file")
WINDOW = 3


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Celery:
    """An app that sends routed jobs as the router does."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = create_app(Settings.from_env())
    add_generate_task(made, None, None)  # type: ignore[arg-type]  # nothing runs here
    return made


class World:
    """One worker's lane; a look is a second after the last."""

    def __init__(self, client: Any, stand_in: StandIn | None) -> None:
        self.client = client
        self.elsewhere: Collection[str] = ()
        self.broken = {"large": BROKEN}
        self.ready: tuple[str, ...] = ()
        self.now = 100.0
        self.lane = CloudLane(
            queues=RedisCloud(client, MODELS), stand_in=stand_in, served_elsewhere=lambda: self.elsewhere
        )

    def look(self, *, after_s: float = 1.0) -> tuple[str, ...]:
        self.now += after_s
        residency = Residency(
            capacity=9,
            max_residents=1,
            residents=tuple(Resident(model_id=m, level=Level.READY, bytes=1, since=0.0) for m in self.ready),
            quarantined=self.broken,
        )
        self.lane.look(residency, RedisQueues(self.client, MODELS).backlog(), now=self.now)
        return self.lane.open

    def waiting(self, queue: str) -> list[str]:
        """The ids of the messages in *queue*, in the order in which they are served."""
        return [job_id for job_id, _ in RedisBacklog(self.client).walk(queue)]

    @property
    def here(self) -> list[str]:
        return self.waiting(keys.model_queue("large"))

    @property
    def away(self) -> list[str]:
        return self.waiting(keys.cloud_queue("large"))

    def answered(self) -> None:
        """The endpoint has taken those that were on their way."""
        backlog, queue = RedisBacklog(self.client), keys.cloud_queue("large")
        for job_id, raw in backlog.walk(queue):
            backlog.remove(queue, job_id, raw)


@pytest.fixture
def engine() -> Iterator[RemoteEngine]:
    """An endpoint that is never asked here; it rests when the test says so."""
    made = RemoteEngine(url="http://127.0.0.1:9/v1", api_key=None, model="theirs")
    yield made
    made.close()


@pytest.fixture
def world(redis_client: Any, engine: RemoteEngine) -> World:
    return World(redis_client, StandIn(engine=engine, cloud=Cloud(model="theirs"), parallel=WINDOW))


def send(app: Celery, *job_ids: str, **fields: Any) -> None:
    """Put jobs into the queue of the model large, as the router does."""
    for job_id in job_ids:
        body = {"messages": [{"role": "user", "content": job_id}], "privacy_required": False, **fields}
        _generate_signature(app, JobRequest.parse(body), ROUTE).apply_async(task_id=job_id)


def test_a_few_jobs_at_a_time_leave_in_their_order(app: Celery, world: World) -> None:
    """The others wait where their model would answer them as soon as it is back; urgent ones go first."""
    send(app, *(f"job {number}" for number in range(5)))
    send(app, "urgent", priority=0)

    assert world.look() == ("large",)
    assert world.away == ["urgent", "job 0", "job 1"]
    assert world.look() == ("large",)
    assert len(world.away) == WINDOW
    world.answered()
    world.look()
    assert world.away == ["job 2", "job 3", "job 4"]
    assert world.here == []


def test_a_job_that_requires_privacy_never_leaves(app: Celery, world: World) -> None:
    """Nor one that says nothing of it, however many others leave around it."""
    send(app, "first")
    send(app, "private", privacy_required=True)
    silent = JobRequest.parse({"messages": [{"role": "user", "content": "Hi"}]})
    _generate_signature(app, silent, ROUTE).apply_async(task_id="silent")
    send(app, "last")

    world.look()
    assert world.away == ["first", "last"]
    world.answered()
    for _ in range(3):
        world.look()
    assert world.away == []
    assert world.here == ["private", "silent"]


def test_everybody_comes_home_to_the_head_of_the_queue_when_the_model_is_ready(app: Celery, world: World) -> None:
    """In the order in which they left; the model itself answers them."""
    send(app, "a", "b", "c", "d")
    send(app, "urgent", priority=0)
    world.look()
    assert world.here == ["c", "d"]

    world.broken, world.ready = {}, ("large",)
    assert world.look() == ()
    assert world.here == ["urgent", "a", "b", "c", "d"]
    assert world.away == []


def test_everybody_comes_home_while_the_endpoint_rests(app: Celery, world: World, engine: RemoteEngine) -> None:
    """And leaves again when it has rested."""
    send(app, "a", "b")
    world.look()
    engine._rest("HTTP 503", rest_s=3600)

    assert world.lane.alerts[0] == "jobs of large that may leave the machine are answered by the cloud"
    assert world.look() == ()
    assert world.lane.alerts == ("no job leaves for the cloud for now: HTTP 503",)
    assert (world.here, world.away) == (["a", "b"], [])
    assert not world.lane.waits("large")
    engine._rests_until = 0.0
    assert world.lane.waits("large")
    assert world.look() == ("large",)
    assert world.away == ["a", "b"]


def test_the_message_is_the_one_that_the_router_sent(app: Celery, world: World) -> None:
    """There with the reason in its route; home again, it is what it was."""
    send(app, "job", temperature=0.5)
    backlog = RedisBacklog(world.client)
    before = backlog.find(keys.model_queue("large"), "job")
    world.look()
    away = backlog.find(keys.cloud_queue("large"), "job")
    world.broken = {}
    world.look()
    after = backlog.find(keys.model_queue("large"), "job")
    assert before is not None
    assert away is not None
    assert after is not None

    assert json.loads(away)["properties"]["delivery_info"]["routing_key"] == "cloud.large"
    (_, route), _, _ = _body(away)
    assert route["cloud"] == "theirs stands in for large, which cannot be made ready"
    assert {**json.loads(after), "body": None} == {**json.loads(before), "body": None}
    assert _body(after) == _body(before)


def _body(raw: str) -> Any:
    return json.loads(base64.b64decode(json.loads(raw)["body"]))


@pytest.mark.parametrize("why", ["not broken", "just broken", "served elsewhere", "already ready again"])
def test_nobody_leaves_as_long_as_the_model_may_answer(app: Celery, world: World, why: str) -> None:
    """Here or at another worker; and the router is given time to find another model first."""
    send(app, "job")
    if why == "not broken":
        world.broken = {}
    elif why == "just broken":
        world.broken = {"large": Quarantine(since=world.now - 2, until=world.now + 60, failures=1, reason="")}
    elif why == "served elsewhere":
        world.elsewhere = {"large"}
    else:
        world.ready = ("large",)

    assert world.look() == ()
    assert (world.here, world.away) == (["job"], [])


def test_while_another_model_is_ready_only_jobs_that_name_this_one_leave(
    app: Celery, redis_client: Any, engine: RemoteEngine
) -> None:
    """And only if the operator lets the endpoint stand in for it by name."""
    cloud = Cloud(model="theirs", for_models=frozenset({"large"}))
    world = World(redis_client, StandIn(engine=engine, cloud=cloud, parallel=WINDOW))
    world.ready = ("small",)
    send(app, "any model will do")
    send(app, "named", model="large")

    world.look()
    assert (world.here, world.away) == (["any model will do"], ["named"])


def test_without_an_endpoint_what_an_earlier_start_sent_away_comes_home(
    app: Celery, redis_client: Any, world: World
) -> None:
    """Once the model is not broken any more; until then a worker with an endpoint may still take it."""
    send(app, "job")
    world.look()
    without = World(redis_client, None)

    assert without.look() == ()
    assert without.away == ["job"]
    without.broken = {}
    without.look()
    assert (without.here, without.away) == (["job"], [])


def test_a_queue_of_which_nobody_may_leave_is_read_once(
    app: Celery, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be long; it is read again when a job comes, or when the model has failed once more."""
    reads: list[str] = []
    send_away = RedisCloud.send

    def counted(self: RedisCloud, model_id: str, *args: Any, **options: Any) -> int:
        reads.append(model_id)
        return send_away(self, model_id, *args, **options)

    monkeypatch.setattr(RedisCloud, "send", counted)
    send(app, "private", privacy_required=True)
    for _ in range(5):
        world.look()
    assert len(reads) == 1
    send(app, "next", privacy_required=True)
    for _ in range(5):
        world.look()
    assert len(reads) == 2
    world.broken = {"large": Quarantine(since=50.0, until=200.0, failures=2, reason="")}
    for _ in range(5):
        world.look()
    assert len(reads) == 3


def test_two_looks_within_a_second_are_one(app: Celery, world: World) -> None:
    """The heart beats five times a second."""
    world.look()
    send(app, "job")
    world.look(after_s=0.5)
    assert world.away == []
    world.look(after_s=0.5)
    assert world.away == ["job"]
