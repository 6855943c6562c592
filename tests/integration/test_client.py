"""
The producer's side on a real Redis, without a router: what a waiter hears, and when.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states
from celery.exceptions import TaskRevokedError

from common import JobClient, JobState, Ledger, NotEndedYet, Outcome, PromptTooLong, keys
from common.errors import JobCancelled
from common.redis_job_store import RedisJobStore
from common.schemas import ErrorBody
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
BODY = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(autouse=True)
def _collected(redis_url: str) -> Iterator[None]:
    """Celery's AsyncResult unsubscribes when it is collected; with Redis gone that takes 20 s."""
    yield
    gc.collect()


@pytest.fixture
def client(redis_url: str) -> Iterator[JobClient]:
    found = JobClient(redis_url)
    yield found
    found.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as threads:
        yield threads


def waits(redis_client: Any, job_id: str) -> bool:
    """Does somebody wait for this job's result?"""
    return bool(dict(redis_client.pubsub_numsub(f"celery-task-meta-{job_id}")).get(f"celery-task-meta-{job_id}"))


def test_whoever_waits_hears_of_a_cancel_at_once(redis_url: str, redis_client: Any, pool: ThreadPoolExecutor) -> None:
    """A job that nobody has begun ends when it is cancelled, and not when its message's turn comes."""
    producer, canceller = JobClient(redis_url), JobClient(redis_url)
    job_id = producer.submit(BODY)
    waiter: Future[Outcome] = pool.submit(producer.wait, job_id, timeout=60)
    eventually(lambda: waits(redis_client, job_id))

    assert canceller.cancel(job_id)
    with pytest.raises(JobCancelled):
        waiter.result(timeout=5)
    with pytest.raises(TaskRevokedError):
        Celery(broker=redis_url, backend=redis_url).AsyncResult(job_id).get(timeout=5)
    assert not canceller.cancel(job_id)
    producer.close()
    canceller.close()


def test_a_wait_that_is_over_looks_at_the_record_first(
    client: JobClient, redis_client: Any, pool: ThreadPoolExecutor
) -> None:
    """The outcome is of record before Celery has its copy; only a job without one has not ended yet."""
    job_id = client.submit(BODY)
    with pytest.raises(NotEndedYet, match="It goes on: wait again, or cancel it"):
        client.wait(job_id, timeout=0.01)

    waiter: Future[Outcome] = pool.submit(client.wait, job_id, timeout=2)
    eventually(lambda: waits(redis_client, job_id))
    error = ErrorBody.of(PromptTooLong("Too long."))
    RedisJobStore(redis_client, ttl_s=60).finish(Outcome(job_id=job_id, state=JobState.FAILED, error=error))
    with pytest.raises(PromptTooLong):
        waiter.result(timeout=10)


@pytest.mark.parametrize("example", ["producer.py", "producer_client.py"])
def test_the_shipped_examples_keep_prompts_out_of_celerys_events(
    redis_url: str, redis_client: Any, example: str
) -> None:
    """What Flower shows of a task's arguments is what the producer says of them: no word of the prompt."""
    command = [sys.executable, str(ROOT / "examples" / example)]
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "REDIS_URL": redis_url}) as producer:
        eventually(lambda: redis_client.llen(keys.SUBMIT_QUEUE), what="the job is sent")
        producer.kill()
    headers = json.loads(redis_client.lindex(keys.SUBMIT_QUEUE, -1))["headers"]
    assert re.fullmatch(r"\((job|chat, \d+ characters)\)", headers["argsrepr"])
    assert headers["kwargsrepr"] == "{}"


def test_a_record_that_has_expired_is_read_from_celerys_copy(client: JobClient, redis_url: str) -> None:
    """An answer is an answer, with its ledger; an error is raised by its own class."""
    backend = Celery(backend=redis_url).backend
    answered = Outcome(
        job_id="answered", state=JobState.ANSWERED, response={"choices": []}, ledger=Ledger(model="small", attempt=1)
    )
    backend.store_result("answered", answered.result(), states.SUCCESS)
    backend.store_result("refused", PromptTooLong("Too long."), states.FAILURE)
    backend.mark_as_revoked("revoked")

    assert client.wait("answered", timeout=5) == answered
    with pytest.raises(PromptTooLong, match=r"Too long\."):
        client.wait("refused", timeout=5)
    with pytest.raises(JobCancelled, match="revoked was revoked"):
        client.wait("revoked", timeout=5)
