"""
What producers are told of the end of their jobs, on a real Redis: the place in the line, and the published forecast.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from typer.testing import CliRunner

from common import JobClient, JobState, keys
from common.backlog import Place, RedisBacklog
from common.celery_app import create_app
from common.errors import InvalidRequest
from common.redis_client import RedisClient, connect
from common.redis_job_store import RedisJobStore
from common.schemas import Forecast, Foreseen, JobRequest, ModelPace, Offer, OfferedModel, Outcome, Route, utc_now
from common.settings import Settings
from tests.traces import make_costs
from worker.cli import app as command
from worker.simulate.forecast import Snapshot
from worker.state.backlog import Backlog, Lane, Waiting
from worker.tasks import _generate_signature, add_generate_task
from worker.telemetry.forecaster import Forecaster, publish_to
from worker.telemetry.redis_paces import RedisPaces
from worker.telemetry.redis_status import RedisStatus

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def client(redis_url: str) -> Iterator[JobClient]:
    found = JobClient(redis_url)
    yield found
    found.close()


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Celery:
    """An app that sends routed jobs as the router does."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = create_app(Settings.from_env())
    add_generate_task(made, None, None)  # type: ignore[arg-type]  # nothing runs here
    return made


@pytest.fixture
def store(redis_client: RedisClient) -> RedisJobStore:
    """Where the jobs' views are."""
    return RedisJobStore(redis_client, ttl_s=60)


def forecast(model: str, low_s: float, high_s: float) -> Forecast:
    """The first job between these seconds, the 11th ten seconds later."""
    points = [Foreseen(ahead=n, low_s=low_s + n, high_s=high_s + n, switches=1) for n in (0, 10)]
    return Forecast(
        model=model, worker="w", at=utc_now(), valid_s=60, serving=True, points=tuple(points), next_s=1, longest_s=7.0
    )


def send(app: Celery, store: RedisJobStore, job_id: str, model: str = "m", **body: Any) -> None:
    route = Route(model=model, complexity=0.3, why="easy")
    store.note_queued(job_id)
    store.note_routed(job_id, route)
    _generate_signature(app, JobRequest.parse({**BODY, **body}), route).apply_async(task_id=job_id)


def test_a_job_is_told_by_its_place(
    app: Celery, client: JobClient, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """While it waits, while it runs, and no more when it has ended; by `status` as by `estimate`, async too."""
    for number in range(4):
        send(app, store, f"job {number}")
    assert client.status("job 3").finish is None  # no worker has said anything yet
    publish_to(redis_client)([forecast("m", 10, 20)])

    found = client.status("job 3").finish
    assert found is not None
    assert (found.low_s, found.high_s, found.ahead, found.switches) == (13, 23, 3, 1)
    assert (found.model, found.confidence) == ("m", 0.8)
    assert client.estimate("job 3") == found
    assert asyncio.run(client.aestimate("job 3")) == found
    assert asyncio.run(client.astatus("job 3")).finish == found

    store.begin("job 3", delivery="tag")
    running = client.estimate("job 3")
    assert running is not None
    assert (running.low_s, running.high_s) == (0, 7)
    store.finish(Outcome(job_id="job 3", state=JobState.ANSWERED))
    assert client.estimate("job 3") is None
    assert client.estimate("nobody has seen this id") is None


def test_the_command_line_tells_of_a_job(app: Celery, store: RedisJobStore, redis_client: RedisClient) -> None:
    """Its place and its range, or that nobody knows."""
    send(app, store, "one")
    send(app, store, "two")
    unknown = CliRunner().invoke(command, ["status", "two"])
    assert "two is routed on m: easy" in unknown.output
    assert "nobody knows yet when it ends" in unknown.output

    publish_to(redis_client)([forecast("m", 10, 20)])
    known = CliRunner().invoke(command, ["status", "two"])
    assert "1 jobs of its model are served before it" in known.output
    assert "ends in 11 to 21 s, 8 of 10 times, 1 switches before it" in known.output
    as_json = json.loads(CliRunner().invoke(command, ["status", "two", "--json"]).stdout)
    assert (as_json["ahead"], as_json["finish"]["high_s"]) == (1, 21)


def test_a_request_is_told_before_it_is_sent(
    app: Celery, client: JobClient, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """By id or alias; where the router may choose, of the choices it has; those that nobody knows of are named."""
    for number in range(4):
        send(app, store, f"job {number}", tenant="busy")
    with pytest.raises(InvalidRequest):
        client.estimate({"messages": []})
    assert client.estimate({**BODY, "model": "m"}) is None  # no worker is there
    status = RedisStatus(redis_client, ttl_s=60, stream_length=10)
    models = tuple(
        OfferedModel(
            id=model, aliases=(f"{model}-latest",), tier=tier, complexity_up_to=tier / 3, max_model_len=99,
            capabilities=("chat", *more), auto=model != "by name",
        )
        for model, tier, more in (("m", 1, ["vision"]), ("n", 3, []), ("o", 3, ["vision"]), ("by name", 2, []))
    )  # fmt: skip
    status.offer(Offer(worker="w", models=models, at=utc_now()))
    redis_client.set(keys.status("w"), "{}")
    publish_to(redis_client)([forecast("m", 10, 20)])

    mine = client.estimate({**BODY, "model": "M-Latest", "tenant": "busy"})
    assert mine is not None
    assert (mine.low_s, mine.ahead) == (14, 4)
    shared = client.estimate({**BODY, "model": "m", "tenant": "another"})  # it shares with the four of the other tenant
    assert shared is not None
    assert shared.ahead == 1
    known = client.estimate(BODY)  # m or n; o is as able as n, and comes behind it
    assert known is not None
    assert (known.low_s, known.high_s, known.unknown) == (11, 21, ("n",))
    publish_to(redis_client)([forecast("n", 100, 200)])
    either = client.estimate(BODY)
    assert either is not None
    assert (either.low_s, either.high_s, either.model, either.unknown) == (11, 200, None, ())
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    seeing = client.estimate({"messages": [{"role": "user", "content": [picture]}]})
    assert seeing is not None
    assert (seeing.high_s, seeing.model, seeing.unknown) == (21, "m", ("o",))
    assert client.estimate({**BODY, "model": "nobody"}) is None


def test_the_place_of_a_job_that_would_come_is_the_one_it_gets(app: Celery, redis_client: RedisClient) -> None:
    """Two hundred random jobs: each is asked for first, then sent."""
    dice = random.Random(1)
    backlog, queue = RedisBacklog(redis_client), keys.model_queue("m")
    for number in range(200):
        body = {
            **BODY, "priority": dice.randrange(10), "tenant": f"tenant {dice.randrange(4)}",
            "max_tokens": dice.randrange(1, 500),
        }  # fmt: skip
        request = JobRequest.parse(body)
        expected = backlog.rank_of_new(queue, Place.of_job(request, now=0))
        route = Route(model="m", complexity=0.1, why="")
        _generate_signature(app, request, route).apply_async(task_id=str(number))
        assert backlog.rank(queue, str(number)) == expected


def test_the_forecaster_tells_what_it_was_given_last(redis_client: RedisClient) -> None:
    """On a thread of its own; what it is told not to tell, it does not; it ends when it is told to."""
    told = threading.Event()

    def publish(forecasts: Any) -> None:
        publish_to(redis_client)(forecasts)
        told.set()

    forecaster = Forecaster("w", publish)
    forecaster.start()
    lanes = (Lane(count=3, prompt_tokens=300, output_tokens=300),)
    snapshot = Snapshot(
        now=utc_now().timestamp(), max_wait_s=600, min_turn_s=30, costs={"m": make_costs(), "n": make_costs()},
        backlog=Backlog(by_model={"m": Waiting(count=3, oldest_at=None, lanes=lanes)}), usual_s={"m": 1.0, "n": 1.0},
    )  # fmt: skip
    assert forecaster.is_due(news=False)
    forecaster.want(snapshot, ["m"])
    assert told.wait(30)
    found = Forecast.model_validate_json(redis_client.hget(keys.FORECASTS, "m") or "")
    assert [point.ahead for point in found.points] == [0, 1, 2]
    assert (found.worker, found.serving) == ("w", False)
    assert redis_client.hkeys(keys.FORECASTS) == ["m"]
    forecaster.end()
    assert not forecaster.is_alive()
    assert not forecaster.is_due(news=False)  # it rests


def test_a_forecaster_outlives_a_redis_that_is_away() -> None:
    """The next forecast is tried again."""
    tries = threading.Semaphore(0)

    def publish(_forecasts: Any) -> None:
        tries.release()
        raise ConnectionError

    forecaster = Forecaster("w", publish)
    forecaster.start()
    for _ in range(2):
        forecaster.want(Snapshot(now=0, backlog=Backlog(), costs={}, max_wait_s=1, min_turn_s=1), [])
        assert tries.acquire(timeout=30)
    forecaster.end()


def test_paces_outlive_a_restart_and_are_missed_without_harm(redis_client: RedisClient) -> None:
    """One value for each worker and model; what cannot be read is left out; without Redis nothing is known."""
    kept = RedisPaces(redis_client)
    pace = ModelPace(
        worker="w", model="m", count=1, at_once=4, in_flight=1, run_s=2, deviation_s=0, at=utc_now()
    )  # fmt: skip
    kept.save([pace.model_copy(update={"run_s": 9})])
    kept.save([pace, pace.model_copy(update={"worker": "v"})])
    kept.save([])
    redis_client.hset(keys.PACES, "broken", "{")
    assert set(kept.read()) == {pace, pace.model_copy(update={"worker": "v"})}
    assert RedisPaces(connect("redis://127.0.0.1:1/0")).read() == ()
