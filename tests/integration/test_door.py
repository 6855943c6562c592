"""
The producer's door on a real Redis: refused before anything is queued, at the price of a look now and then.
"""

from __future__ import annotations

from typing import Any

import pytest

from common import JobClient, keys
from common.door import Door
from common.errors import OverLimit, QueueFull
from common.may_enter import Entry
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import JobRequest, JobState, Outcome, Route
from common.settings import LimitSettings

BODY = {"messages": [{"role": "user", "content": "Hi"}]}
ROUTE = Route(model="small", complexity=0.5, why="simple enough")


class Clock:
    """Time as the test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def route(store: RedisJobStore, job_id: str) -> None:
    """As the router does."""
    entry = Entry.of(JobRequest.parse(BODY), LimitSettings())
    assert store.note_routed(job_id, ROUTE, entry) is None


def test_a_job_over_a_limit_is_not_queued(monkeypatch: pytest.MonkeyPatch, redis_url: str, redis_client: Any) -> None:
    """Neither one that is too large, nor one for which its tenant or the router has no room."""
    monkeypatch.setenv("LIMIT_MAX_TOKENS", "10")
    monkeypatch.setenv("LIMIT_TENANT_JOBS", "2")
    monkeypatch.setenv("LIMIT_UNROUTED_JOBS", "1")
    client = JobClient(redis_url)
    with pytest.raises(OverLimit, match="LIMIT_MAX_TOKENS"):
        client.submit({**BODY, "max_tokens": 11})
    assert redis_client.llen(keys.SUBMIT_QUEUE) == 0
    client.submit(BODY)
    with pytest.raises(QueueFull, match="LIMIT_UNROUTED_JOBS"):
        client.submit(BODY)
    redis_client.delete(keys.SUBMIT_QUEUE)
    for job_id in "12":
        route(RedisJobStore(redis_client, ttl_s=100), job_id)
    with pytest.raises(QueueFull, match="LIMIT_TENANT_JOBS") as refused:
        client.submit(BODY)
    assert refused.value.retry_after_s
    client.submit({**BODY, "tenant": "other"})
    assert redis_client.llen(keys.SUBMIT_QUEUE) == 1
    client.close()


def test_redis_is_asked_now_and_then(redis_client: RedisClient) -> None:
    """Four times a second, however many jobs come."""
    clock = Clock()
    door = Door(redis_client, LimitSettings(), clock=clock)
    redis_client.config_resetstat()
    for _ in range(100):
        door.check(JobRequest.parse(BODY))
    clock.now += 0.3
    door.check(JobRequest.parse(BODY))
    assert redis_client.info("commandstats")["cmdstat_hmget"]["calls"] == 2


def test_a_door_that_is_shut_is_looked_at_again(redis_client: RedisClient) -> None:
    """What has ended since the last look makes room at once."""
    store, door = (
        RedisJobStore(redis_client, ttl_s=100),
        Door(redis_client, LimitSettings(tenant_jobs=1), clock=Clock()),
    )
    route(store, "1")
    with pytest.raises(QueueFull):
        door.check(JobRequest.parse(BODY))
    store.finish(Outcome(job_id="1", state=JobState.ANSWERED, response={}))
    door.check(JobRequest.parse(BODY))
