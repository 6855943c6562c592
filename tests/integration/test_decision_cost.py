"""
What a look, a decision and a job cost in Redis at 100,000 waiting jobs: no more than with a few.
"""

from __future__ import annotations

import time

import pytest
from celery import Celery

from bench.decision_time import MODELS, commands, cpu_s, decide, fill
from common import keys
from common.backlog import RedisBacklog
from common.celery_app import create_app
from common.redis_client import RedisClient
from common.schemas import JobRequest, Route
from common.settings import Settings
from worker.tasks import _generate_signature, add_generate_task


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> Celery:
    """An app that sends routed jobs as the router does."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    made = create_app(Settings.from_env())
    add_generate_task(made, None, None)  # type: ignore[arg-type]  # nothing runs here
    return made


def test_a_decision_and_a_job_cost_the_same_at_100_000_jobs(app: Celery, redis_client: RedisClient) -> None:
    """As many commands in Redis as with 1,000 jobs; and look and decision take less than 5 ms of CPU, Redis's too."""
    found: dict[int, tuple[int, int]] = {}
    for jobs in (1_000, 100_000):
        redis_client.flushall()
        fill(redis_client, jobs, now=time.time())
        assert sum(RedisBacklog(redis_client).count(keys.model_queue(model)) for model in MODELS) == jobs
        pass_one_job(app, f"warm {jobs}")
        decide(redis_client, now=time.time())  # Redis knows the scripts now
        before = commands(redis_client)
        decide(redis_client, now=time.time())
        decided = commands(redis_client)
        pass_one_job(app, f"job {jobs}")
        found[jobs] = (decided - before, commands(redis_client) - decided)

    assert found[100_000] == found[1_000]
    assert min(decision_s(redis_client) for _ in range(10)) < 0.005


def decision_s(client: RedisClient) -> float:
    """Seconds of CPU of a look and a decision, the average of ten; other programs make it more, and never less."""
    before = cpu_s(client)
    for _ in range(10):
        decide(client, now=time.time())
    return (cpu_s(client) - before) / 10


def pass_one_job(app: Celery, job_id: str) -> None:
    """Put a job into the first model's backlog, take the first job out of it, and acknowledge that one."""
    request = JobRequest.parse({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "tenant": "tenant 1"})
    route = Route(model=MODELS[0], complexity=0.1, why="a test")
    _generate_signature(app, request, route).apply_async(task_id=job_id)
    with app.connection_for_read() as connection, connection.channel() as channel:
        message = channel.basic_get(keys.model_queue(MODELS[0]))
        channel.basic_ack(message.delivery_tag)
