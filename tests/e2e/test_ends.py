"""
Every way in which a job ends without an answer, through the whole system, and how soon; an engine with two places.
"""

from __future__ import annotations

import signal
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery.exceptions import TaskRevokedError

from common import keys
from common.errors import DeadlineExceeded, JobCancelled, TimeLimitExceeded
from common.redis_client import connect
from common.schemas import JobState, Outcome
from tests.e2e.conftest import Box
from tests.waiting import eventually

RUN_S = 12.0  # of each job, and the canary: longer than any test waits for one that it ends
PLACES = 2


@pytest.fixture
def node_env(node_env: dict[str, str]) -> dict[str, str]:
    return {
        **node_env,
        "WORKER_STUB_ENGINE": "true",
        "WORKER_STUB_LOAD_S": "0.05",
        "WORKER_STUB_RUN_S": str(RUN_S),
        "WORKER_CONCURRENCY": str(PLACES),
        "WORKER_SOFT_SHUTDOWN_S": "0.5",
    }


def run(box: Box, count: int = PLACES, **fields: Any) -> list[Any]:
    """Start jobs, and wait until the engine works on them."""
    sent = [box.send(f"Long job {n}", model="small", **fields) for n in range(count)]
    for one in sent:
        running(box, one.id)
    return sent


def running(box: Box, job_id: str, within_s: float = 10) -> float:
    return eventually(lambda: box.client.status(job_id).state is JobState.RUNNING, within_s=within_s, what="it runs")


def ended(box: Box, job_id: str, within_s: float = 10) -> tuple[Outcome, float]:
    """The job's outcome, and how long it took from now on."""
    took_s = eventually(lambda: box.client.result(job_id), within_s=within_s, what="it has ended")
    outcome = box.client.result(job_id)
    assert outcome is not None
    return outcome, took_s


def in_s(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def nothing_is_held(box: Box) -> bool:
    client = connect(box.url)
    try:
        return not client.exists(keys.HELD, keys.TENANTS, keys.DEADLINES, keys.UNACKED)
    finally:
        client.close()


def test_a_cancelled_job_gives_up_its_place_within_a_second(box: Box) -> None:
    """All places of the engine are taken; the one that waits takes that of the cancelled one."""
    first, second = run(box)
    third = box.send("The next", model="small")
    assert box.client.cancel(first.id)
    _, took_s = ended(box, first.id)
    assert took_s < 1
    assert running(box, third.id) < 1.5
    with pytest.raises(TaskRevokedError):
        first.get(timeout=5)

    second.revoke(terminate=True)
    outcome, _ = ended(box, second.id)
    assert outcome.state is JobState.CANCELLED
    third.revoke(terminate=True)
    ended(box, third.id)
    eventually(lambda: nothing_is_held(box))


def test_a_time_limit_stops_the_job_in_the_engine(box: Box) -> None:
    """Our field, or Celery's own, hard or soft; it counts from the start of the run, and the place is free."""
    app, body = box.setup.app, {"messages": [{"role": "user", "content": "Hi"}], "model": "small"}

    def send(**options: Any) -> Any:
        return app.send_task(keys.SUBMIT_TASK, args=[body], queue=keys.SUBMIT_QUEUE, **options)

    sent = [
        box.send("Ours", model="small", time_limit=0.6),
        send(time_limit=0.6),
        send(time_limit=60, soft_time_limit=0.6),
        send(soft_time_limit=0.6),
    ]
    began = time.monotonic()
    for one in sent:
        with pytest.raises(TimeLimitExceeded, match=r"0\.6 s in the engine"):
            one.get(timeout=15)
        outcome, _ = ended(box, one.id)
        assert outcome.state is JobState.FAILED
        assert outcome.ledger.attempt == 1
    assert 2 * 0.6 < time.monotonic() - began < 2 * 0.6 + 2.5  # two at once, two after them
    eventually(lambda: nothing_is_held(box))


def test_a_deadline_ends_a_running_job(box: Box) -> None:
    """Within a second, and its place is free."""
    deadline = datetime.now(UTC) + timedelta(seconds=2.5)
    [first] = run(box, 1, deadline=deadline.isoformat())
    outcome, _ = ended(box, first.id)
    assert outcome.state is JobState.EXPIRED
    assert outcome.ledger.finished_at is not None
    assert timedelta() <= outcome.ledger.finished_at - deadline < timedelta(seconds=1)
    with pytest.raises(DeadlineExceeded, match="while the engine worked on it"):
        first.get(timeout=5)
    eventually(lambda: nothing_is_held(box))


def test_a_deadline_ends_a_waiting_job_when_it_passes(box: Box) -> None:
    """Sent by name or by the client, or with Celery's `expires`, routed or not; the engine is busy with other jobs."""
    run(box)
    soon_s = 2.0
    body = {"messages": [{"role": "user", "content": "Hi"}], "model": "small", "deadline": in_s(soon_s)}
    sent = [
        box.send("By name", model="small", deadline=in_s(soon_s)).id,
        box.send("Another model", model="large", deadline=in_s(soon_s)).id,
        box.client.submit(body),
        box.setup.app.send_task(
            keys.SUBMIT_TASK, args=[{**body, "deadline": None}], queue=keys.SUBMIT_QUEUE, expires=soon_s
        ).id,
    ]
    eventually(lambda: all(box.client.status(job_id).state is JobState.ROUTED for job_id in sent), what="all wait")
    box.router.container.process.send_signal(signal.SIGSTOP)
    unread = box.send("Nobody routes", model="small", deadline=in_s(soon_s)).id
    try:
        for job_id in (*sent, unread):
            outcome, _ = ended(box, job_id, within_s=soon_s + 1.5)
            assert outcome.state is JobState.EXPIRED
            assert outcome.ledger.attempt == 0
            with pytest.raises(DeadlineExceeded):
                box.client.wait(job_id, timeout=1)
    finally:
        box.router.container.process.send_signal(signal.SIGCONT)


def test_a_deadline_passes_also_while_the_worker_is_away(box: Box) -> None:
    """The router looks too."""
    run(box)
    late = box.send("Late", model="small", deadline=in_s(2)).id
    eventually(lambda: box.client.status(late).state is JobState.ROUTED)
    box.worker.container.process.send_signal(signal.SIGSTOP)
    try:
        assert ended(box, late, within_s=3.5)[0].state is JobState.EXPIRED
    finally:
        box.worker.container.process.send_signal(signal.SIGCONT)


def test_what_was_cancelled_while_it_waited_stays_so_over_a_restart(box: Box) -> None:
    """By the client, or by Celery's revoke, which keeps it in the memory of workers that are killed here."""
    blocking = run(box)
    by_client, by_revoke, kept = (box.send(text, model="small") for text in ("client", "revoke", "kept"))
    eventually(lambda: box.client.status(kept.id).state is JobState.ROUTED)
    assert box.client.cancel(by_client.id)
    by_revoke.revoke()
    outcome, took_s = ended(box, by_revoke.id)
    assert took_s < 1
    assert outcome.state is JobState.CANCELLED
    assert box.client.status(kept.id).ahead == 0

    box.worker.kill()
    box.router.kill()
    for node in (box.router, box.worker):
        node.container.start()
        node.ready()
    for one in blocking:
        box.client.cancel(one.id)
    running(box, kept.id)
    for one in (by_client, by_revoke):
        assert box.client.status(one.id).state is JobState.CANCELLED
        assert box.client.status(one.id).attempts == 0
        with pytest.raises(JobCancelled):
            box.client.wait(one.id, timeout=1)
    box.client.cancel(kept.id)
    ended(box, kept.id)
    eventually(lambda: nothing_is_held(box))
