"""
Waiting jobs that change their model, in a real Redis: which may, what becomes of them, and that each moves once.
"""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery

from common import keys
from common.backlog import RedisBacklog
from common.celery_app import create_app
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import JobRequest, OfferedModel, Route
from common.settings import Settings
from worker.scheduling.redis_substitute import RedisSubstitute
from worker.tasks import _generate_signature, add_generate_task

SMALL, LARGE = keys.model_queue("small"), keys.model_queue("large")
BY = OfferedModel(id="large", tier=2, complexity_up_to=0.8, max_model_len=100, capabilities=("chat", "json"))
REASON = "large is ready"


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


def send(app: Celery, store: RedisJobStore, job_id: str, *, route: dict[str, Any] | None = None, **body: Any) -> None:
    request = JobRequest.parse({"messages": [{"role": "user", "content": "Hi"}], **body})
    chosen = Route(**{"model": "small", "complexity": 0.3, "why": "easy", **(route or {})})
    store.note_queued(job_id)
    store.note_routed(job_id, chosen)
    _generate_signature(app, request, chosen).apply_async(task_id=job_id)


def waiting(client: RedisClient, queue: str) -> dict[str, Route]:
    """The jobs that wait in *queue*, in their order, each with its route."""
    found = {}
    for job_id, raw in RedisBacklog(client).walk(queue):
        (_request, route), _kwargs, _embed = json.loads(base64.b64decode(json.loads(raw)["body"]))
        found[job_id] = Route.model_validate(route)
    return found


def test_a_job_that_names_no_model_moves_with_its_reason(
    app: Celery, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """Its message, its route, its view, in one step; the ledger's reason is that of the route."""
    send(app, store, "job")
    assert RedisSubstitute(redis_client).take_over("small", BY, REASON) == 1

    why = "easy; large instead of small: large is ready"
    assert waiting(redis_client, SMALL) == {}
    assert waiting(redis_client, LARGE) == {"job": Route(model="large", complexity=0.3, why=why, instead_of="small")}
    view = store.view("job")
    assert (view.model, view.why) == ("large", why)
    message = json.loads(RedisBacklog(redis_client).find(LARGE, "job") or "")
    assert message["properties"]["delivery_info"]["routing_key"] == LARGE
    assert not list(redis_client.scan_iter(f"{keys.backlog(SMALL)}*"))


@pytest.mark.parametrize(
    ("body", "route"),
    [
        ({"model": "small"}, {}),  # it names its model
        ({"model": "Small-Latest"}, {}),  # by an alias
        ({"tools": [{"type": "function"}]}, {}),  # BY has no tools
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, {}),  # it cannot see
        ({"max_tokens": 101}, {}),  # prompt and answer do not fit
        ({"messages": [{"role": "user", "content": "word " * 99}]}, {}),  # nor does a long prompt
        ({}, {"complexity": 0.9}),  # it is trusted with less
        ({}, {"instead_of": "tiny"}),  # it was moved before
        ({}, {"stays": True}),  # the cloud has refused it: it waits for its own model
    ],
)
def test_a_job_that_the_larger_model_may_not_take_stays(
    app: Celery, store: RedisJobStore, redis_client: RedisClient, body: dict[str, Any], route: dict[str, Any]
) -> None:
    """Those beside it move."""
    send(app, store, "stays", route=route, **body)
    send(app, store, "moves", response_format={"type": "json_object"})
    assert RedisSubstitute(redis_client).take_over("small", BY, REASON) == 1
    assert list(waiting(redis_client, SMALL)) == ["stays"]
    assert list(waiting(redis_client, LARGE)) == ["moves"]
    assert store.view("stays").model == "small"


def test_no_job_goes_to_and_fro(app: Celery, store: RedisJobStore, redis_client: RedisClient) -> None:
    """What was moved up is moved no further, neither back nor to a still larger one."""
    send(app, store, "job")
    substitutes = RedisSubstitute(redis_client)
    assert substitutes.take_over("small", BY, REASON) == 1
    for other in ("small", "largest"):
        assert substitutes.take_over("large", BY.model_copy(update={"id": other}), REASON) == 0
    assert list(waiting(redis_client, LARGE)) == ["job"]


def test_a_look_in_vain_is_not_repeated_at_once(app: Celery, store: RedisJobStore, redis_client: RedisClient) -> None:
    """The heart asks a few times a second; a backlog that nobody may take from is read every few seconds only."""
    now = 100.0
    substitutes = RedisSubstitute(redis_client, clock=lambda: now)
    send(app, store, "named", model="small")
    assert substitutes.take_over("small", BY, REASON) == 0
    send(app, store, "job")
    assert substitutes.take_over("small", BY, REASON) == 0
    now += 5.1
    assert substitutes.take_over("small", BY, REASON) == 1


def test_a_moved_job_keeps_its_time_and_takes_its_tenants_place(
    app: Celery, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """Behind the jobs of its tenant that wait there, before those of a tenant that has sent more."""
    for number in range(4):
        send(app, store, f"there {number}", route={"model": "large"}, tenant="busy", max_tokens=50)
    send(app, store, "moved", tenant="quiet", max_tokens=50)
    before = redis_client.zscore(f"{keys.backlog(SMALL)}:arrivals:3*:quiet", "moved")
    RedisSubstitute(redis_client).take_over("small", BY, REASON)

    assert list(waiting(redis_client, LARGE)).index("moved") == 1
    assert redis_client.zscore(f"{keys.backlog(LARGE)}:arrivals:3*:quiet", "moved") == before


def test_of_workers_that_take_over_at_once_each_job_is_moved_by_one(
    app: Celery, store: RedisJobStore, redis_client: RedisClient
) -> None:
    """Four of them, and a consumer that pops meanwhile: every job is in one place, with one route."""
    for number in range(100):
        send(app, store, f"job {number:03}")
    with ThreadPoolExecutor(5) as pool:
        moves = [pool.submit(RedisSubstitute(redis_client).take_over, "small", BY, REASON) for _ in range(4)]
        popped = pool.submit(_pop, app, 30)
        moved = sum(move.result() for move in moves)
    assert moved + len(popped.result()) == 100
    assert len(waiting(redis_client, LARGE)) == moved
    assert waiting(redis_client, SMALL) == {}
    assert set(popped.result()).isdisjoint(waiting(redis_client, LARGE))


def _pop(app: Celery, most: int) -> list[str]:
    """Take jobs of the small model as a consumer does; gives their ids."""
    found = []
    with app.connection_for_read() as connection, connection.channel() as channel:
        for _ in range(most):
            message = channel.basic_get(SMALL, no_ack=True)
            if message is None:
                break
            found.append(message.headers["id"])
    return found
