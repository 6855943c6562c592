"""
Jobs that wait for a model which cannot be loaded, in a real Redis: some go back to the router, the others stay.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from celery import Celery

from common import keys
from common.backlog import RedisBacklog
from common.celery_app import create_app
from common.schemas import JobRequest, Route
from common.settings import Settings
from worker.scheduling.redis_reroute import RedisReroute, for_router
from worker.tasks import _generate_signature, add_generate_task

ROUTE = Route(model="large", complexity=0.9, why="hard")


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Celery:
    """An app that sends routed jobs as the router does."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = create_app(Settings.from_env())
    add_generate_task(made, None, None)  # type: ignore[arg-type]  # nothing runs here
    return made


def send(app: Celery, job_id: str, **fields: Any) -> None:
    request = JobRequest.parse({"messages": [{"role": "user", "content": job_id}], **fields})
    _generate_signature(app, request, ROUTE).apply_async(task_id=job_id)


def waiting(client: Any, queue: str) -> list[str]:
    """The ids of the messages in *queue*, in the order in which they are served."""
    if keys.has_backlog(queue):
        return [job_id for job_id, _ in RedisBacklog(client).walk(queue)]
    found = [raw for name in keys.lists_of(queue) for raw in reversed(client.lrange(name, 0, -1))]
    return [json.loads(raw)["headers"]["id"] for raw in found]


def test_only_jobs_that_any_model_may_answer_are_routed_again(app: Celery, redis_client: Any) -> None:
    """In their order, urgent ones first; those that name a model, by id or by alias, keep their places."""
    reroute = RedisReroute(redis_client)
    assert not reroute.waits("large")
    send(app, "named", model="large")
    assert not reroute.waits("large")
    for number in range(250):  # more than one round trip reads
        send(app, f"auto {number:03}")
    send(app, "by alias", model="Large-Latest")
    send(app, "urgent", priority=0)
    assert reroute.waits("large")

    assert reroute.route_again("large") == 251
    assert waiting(redis_client, keys.SUBMIT_QUEUE) == ["urgent", *(f"auto {number:03}" for number in range(250))]
    assert waiting(redis_client, keys.model_queue("large")) == ["named", "by alias"]
    assert reroute.route_again("large") == 0
    assert redis_client.xlen(keys.WAKE)


def test_the_message_is_the_one_that_the_producer_sent(app: Celery, redis_client: Any) -> None:
    """The router's task with the body alone; who waits for it, and what comes after it, stay."""
    send(app, "job", temperature=0.5)
    before = RedisBacklog(redis_client).find(keys.model_queue("large"), "job")
    assert before is not None
    RedisReroute(redis_client).route_again("large")
    (after,) = redis_client.lrange(keys.lists_of(keys.SUBMIT_QUEUE)[1], 0, -1)

    sent, was = json.loads(after), json.loads(before)
    (request,), kwargs, embed = json.loads(base64.b64decode(sent["body"]))
    assert (request["temperature"], request["model"], kwargs) == (0.5, "auto", {})
    assert embed == json.loads(base64.b64decode(was["body"]))[2]
    assert sent["headers"]["task"] == keys.SUBMIT_TASK
    assert sent["properties"]["delivery_info"]["routing_key"] == keys.SUBMIT_QUEUE
    for name in ("correlation_id", "reply_to", "priority", "delivery_tag"):
        assert sent["properties"][name] == was["properties"][name]
    assert for_router(after) is None


@pytest.mark.parametrize("raw", ["", "{", "[]", "null", '{"body": 7}', '{"body": "e30="}'])
def test_what_is_no_message_of_ours_stays(redis_client: Any, raw: str) -> None:
    """Somebody else may use the same Redis."""
    queue = keys.model_queue("large")
    delivery = {"delivery_tag": "tag", "delivery_info": {"exchange": "", "routing_key": queue}}
    RedisBacklog(redis_client).put(queue, {"properties": delivery}, raw, now=0.0)

    assert not RedisReroute(redis_client).waits("large")
    assert RedisReroute(redis_client).route_again("large") == 0
    assert waiting(redis_client, queue) == ["tag"]


def test_a_message_that_somebody_took_meanwhile_is_not_doubled(
    monkeypatch: pytest.MonkeyPatch, app: Celery, redis_client: Any
) -> None:
    """A consumer may pop it between the look and the move."""
    send(app, "job")
    look = RedisBacklog.walk

    def look_and_lose(backlog: RedisBacklog, queue: str) -> Any:
        found = list(look(backlog, queue))
        assert [backlog.remove(queue, job_id, raw) for job_id, raw in found] == [True]
        return iter(found)

    monkeypatch.setattr(RedisBacklog, "walk", look_and_lose)
    assert RedisReroute(redis_client).route_again("large") == 0
    assert not any(redis_client.llen(name) for name in keys.lists_of(keys.SUBMIT_QUEUE))
