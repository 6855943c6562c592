"""
The producer's side on a real Redis, without a router: what a waiter hears, and when.
"""

from __future__ import annotations

import base64
import gc
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, states
from celery.exceptions import TaskRevokedError

from common import InvalidRequest, JobClient, JobState, Ledger, NotEndedYet, Outcome, PromptTooLong, keys
from common.backlog import RedisBacklog
from common.errors import JobCancelled, OverLimit, RedisUnavailable
from common.redis_job_store import RedisJobStore
from common.schemas import ErrorBody, Route
from tests.waiting import eventually
from worker.embedded_redis import EmbeddedRedis

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


def route(client: JobClient, redis_client: Any, job_id: str, **options: Any) -> None:
    """Bring a job to its model's queue, as the router does."""
    chosen = Route(model="large", complexity=0.5, why="hard")
    RedisJobStore(redis_client, ttl_s=60).note_routed(job_id, chosen)
    arguments = [BODY, chosen.model_dump(mode="json")]
    client._app.send_task(
        keys.GENERATE_TASK, args=arguments, task_id=job_id, queue=keys.model_queue("large"), **options
    )


def test_a_waiting_job_that_is_cancelled_leaves_the_line_at_once(client: JobClient, redis_client: Any) -> None:
    """Status says how many are ahead; those behind a cancelled job move up, and its message is gone."""
    for job_id in ("first", "second", "third"):
        route(client, redis_client, job_id)
    assert [client.status(job_id).ahead for job_id in ("first", "second", "third")] == [0, 1, 2]

    assert client.cancel("second")
    assert [client.status(job_id).ahead for job_id in ("first", "second", "third")] == [0, None, 1]
    outcome = client.result("second")
    assert outcome is not None
    assert outcome.state is JobState.CANCELLED
    assert [job_id for job_id, _ in RedisBacklog(redis_client).walk(keys.model_queue("large"))] == ["first", "third"]


def test_a_cancelled_part_of_a_group_waits_for_its_turn(client: JobClient, redis_client: Any) -> None:
    """It has ended for whoever waits, but only the worker that takes its message can tell its chord."""
    route(client, redis_client, "part", group_id="group")
    assert client.cancel("part")
    assert client.status("part").state is JobState.CANCELLED
    assert RedisBacklog(redis_client).count(keys.model_queue("large")) == 1


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


def test_many_jobs_are_as_many_submits_in_a_few_round_trips(client: JobClient, redis_client: Any) -> None:
    """The same messages, in the order of the requests; only how they travel differs."""
    client.submit(BODY, job_id="alone")
    redis_client.config_resetstat()
    ids = client.submit_many([{**BODY, "max_tokens": number} for number in range(1, 451)])
    assert redis_client.info("commandstats")["cmdstat_xadd"]["calls"] == 3  # who waits is woken once in each

    alone, *many = (json.loads(raw) for raw in reversed(redis_client.lrange(keys.SUBMIT_QUEUE, 0, -1)))
    assert [message["headers"]["id"] for message in many] == ids
    sent = [json.loads(base64.b64decode(message["body"]))[0][0]["max_tokens"] for message in many]
    assert sent == list(range(1, 451))

    def shape(message: dict[str, Any]) -> dict[str, Any]:
        own = {"id", "root_id", "correlation_id", "delivery_tag"}
        return {
            name: {key: value for key, value in message[name].items() if key not in own}
            for name in ("headers", "properties")
        }

    assert all(shape(message) == shape(alone) for message in many)


def test_of_many_jobs_none_is_sent_if_one_is_refused(client: JobClient, redis_client: Any) -> None:
    """Whoever hands over a file of jobs need not find out which of them went."""
    with pytest.raises(InvalidRequest):
        client.submit_many([BODY, {}])
    with pytest.raises(OverLimit):
        client.submit_many([BODY, {**BODY, "n": 10**6}])
    assert not redis_client.exists(keys.SUBMIT_QUEUE)
    assert client.submit_many([]) == []


def test_many_jobs_get_through_when_the_connection_breaks(client: JobClient, redis_client: Any) -> None:
    """They are sent again on a new one, each under its own id."""
    ids = client.submit_many([BODY] * 3)
    redis_client.client_kill_filter(_type="normal", skipme=True)
    ids += client.submit_many([BODY] * 3, job_ids=["a", "b", "c"])
    raws = reversed(redis_client.lrange(keys.SUBMIT_QUEUE, 0, -1))
    assert [json.loads(raw)["headers"]["id"] for raw in raws] == ids


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


def test_a_redis_that_goes_between_two_submits_is_told_as_such(own_redis: EmbeddedRedis) -> None:
    """Whoever catches Unavailable and tries again must not meet another library's error."""
    with closing(JobClient(own_redis.url)) as client:
        client.submit(BODY)
        own_redis.kill()
        with pytest.raises(RedisUnavailable, match="Nothing was sent"):
            client.submit({**BODY, "tenant": "another"})
