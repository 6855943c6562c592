"""
What dies and comes back: no job is lost, each has one outcome, and nothing of an engine is left behind.
"""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import psutil
import pytest

from common import keys
from common.backlog import RedisBacklog
from common.redis_client import connect
from common.schemas import JobState
from tests.e2e.conftest import LEASE_S, Box
from tests.waiting import eventually

SOFT_SHUTDOWN_S = 2  # what running jobs are given when the worker is told to stop
ENGINE_PROGRAM = "llamacpp_main.py"


def engines_of(box: Box) -> list[psutil.Process]:
    """The engine programs below the worker; their guards not counted."""
    try:
        below = psutil.Process(box.worker.container.process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    return [p for p in below if _is_engine(p)]


def _is_engine(process: psutil.Process) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return any(part.endswith(ENGINE_PROGRAM) for part in command) and not any("guard" in part for part in command)


def start_long_jobs(box: Box, count: int, **fields: Any) -> list[Any]:
    """Send *count* jobs that take a while, and wait until at least one runs."""
    fields = {"max_tokens": 400, **fields}
    sent = [box.send(f"Long job {n}", model="large", **fields) for n in range(count)]
    eventually(lambda: any(box.client.status(job.id).state is JobState.RUNNING for job in sent), within_s=30)
    return sent


def test_a_killed_engine_costs_an_attempt_and_no_job(box: Box) -> None:
    """Kill -9 of the engine in mid-job: it is started again and the jobs are answered, at the second attempt."""
    sent = start_long_jobs(box, 6)
    [engine] = engines_of(box)
    engine.kill()

    results = [job.get(timeout=90) for job in sent]
    assert all(r["choices"][0]["message"]["content"] for r in results)
    assert max(r["ledger"]["attempt"] for r in results) == 2
    assert [e["model_id"] for e in box.events("residency.engine_died")] == ["large"]


def test_a_killed_worker_leaves_no_engine_and_its_jobs_run_elsewhere(box: Box) -> None:
    """Kill -9 of the worker: its engines end with it; the next worker takes its jobs back within two leases."""
    sent = start_long_jobs(box, 6)
    engines = engines_of(box)
    assert engines
    box.worker.kill()
    eventually(lambda: not any(p.is_running() for p in engines), within_s=5, what="the engine is gone")

    box.worker.container.start()
    redis = connect(box.url)
    held = set(redis.hvals(keys.UNACKED_OWNER))
    eventually(
        lambda: not held & set(redis.hvals(keys.UNACKED_OWNER)),
        within_s=2 * LEASE_S + 1,  # a lease to run out, two beats of a third each to be sure, and the start of one
        what="the dead worker's deliveries are taken back",
    )
    results = [job.get(timeout=90) for job in sent]
    assert all(r["choices"] for r in results)
    assert max(r["ledger"]["attempt"] for r in results) == 2


def test_a_killed_redis_comes_back_with_its_jobs(box: Box) -> None:
    """Kill -9 of Redis with an append-only file, in mid-job: running and waiting jobs are answered."""
    sent = start_long_jobs(box, 10)
    box.setup.broker.kill()
    box.setup.broker.restart()
    assert all(job.get(timeout=120)["choices"] for job in sent)
    assert box.worker.container.status == "running"


def test_redis_killed_under_a_burst_of_new_jobs_loses_none(box: Box) -> None:
    """Kill -9 of Redis while the router is between taking jobs and sending them on: every one is answered."""
    sent = [box.send(f"Job {n}", task_type="simple_extraction") for n in range(80)]
    box.setup.broker.kill()
    assert len(finished_before_the_kill(box)) < len(sent)
    box.setup.broker.restart()
    assert all(job.get(timeout=120)["choices"] for job in sent)
    assert box.router.container.status == "running"


def finished_before_the_kill(box: Box) -> list[dict[str, Any]]:
    """The ends that the worker had logged by now."""
    return box.events("jobs.ended")


def test_a_killed_router_costs_nothing(box: Box) -> None:
    """Kill -9 of the router under a burst: what it held comes back, and every job is answered."""
    sent = [box.send(f"Job {n}", task_type="simple_extraction") for n in range(60)]
    box.router.kill()
    box.router.container.start()
    results = [job.get(timeout=90) for job in sent]
    assert all(r["choices"] for r in results)


def test_sigterm_hands_back_what_does_not_end_in_time(box: Box) -> None:
    """A worker that is told to stop gives its jobs back after their grace, stops its engine, and says goodbye."""
    sent = start_long_jobs(box, 4, max_tokens=3900, ignore_eos=True)
    sent += [box.send("Waiting", model="large") for _ in range(8)]
    engines = engines_of(box)
    redis = connect(box.url)
    told_at = time.monotonic()
    box.worker.kill("SIGTERM")
    leaving_s = time.monotonic() - told_at

    assert box.worker.container.process.returncode == 0, box.worker.logs()[-2000:]
    assert SOFT_SHUTDOWN_S <= leaving_s < SOFT_SHUTDOWN_S + 10, "their grace, and the time to end an engine"
    assert not any(p.is_running() for p in engines)
    assert redis.get(keys.status("box")) is None
    assert redis.hlen(keys.UNACKED) == 0
    assert all(box.client.result(job.id) is None for job in sent[:4])
    assert RedisBacklog(redis).count(keys.model_queue("large")) == len(sent)

    box.worker.container.start()
    for job in sent[:4]:
        eventually(lambda job=job: box.client.status(job.id).attempts == 2, within_s=30)
        box.client.cancel(job.id)
    assert all(job.get(timeout=90)["choices"] for job in sent[4:])


@pytest.fixture
def node_env(node_env: dict[str, str]) -> dict[str, str]:
    """Short waits: what is tested here is that they end."""
    return {
        **node_env,
        "WORKER_SOFT_SHUTDOWN_S": str(SOFT_SHUTDOWN_S),
        "SWITCH_MIN_TURN_S": "1",
        "JOB_MAX_ATTEMPTS": "20",
    }


@pytest.mark.timeout(600)
def test_twenty_kills_under_a_backlog_lose_nothing(box: Box, tmp_path_factory: pytest.TempPathFactory) -> None:
    """
    Twenty kills of the engine, the worker and Redis, at random moments under a backlog for two models.

    Every accepted job has exactly one outcome and it is an answer; no engine process is left.
    """
    dice = random.Random(20261121)
    sent: list[Any] = []

    def feed(count: int) -> None:
        for _ in range(count):
            difficulty = dice.choice(["simple_extraction", "edge_case_handling"])
            sent.append(box.send(f"Job {len(sent)}", task_type=difficulty, max_tokens=dice.randint(10, 80)))

    kills = ["engine"] * 8 + ["worker"] * 7 + ["redis"] * 5
    dice.shuffle(kills)
    for kill in kills:
        feed(12)
        done_before = len(finished(box, sent))
        # Some jobs must end between two kills, so that each kill meets the system at work.
        eventually(lambda seen=done_before: len(finished(box, sent)) > seen, within_s=120, what="a job ends")
        if kill == "engine":
            for engine in engines_of(box):
                _end(engine)
        elif kill == "worker":
            box.worker.kill()
            box.worker.container.start()
        else:
            box.setup.broker.kill()
            box.setup.broker.restart()

    eventually(lambda: len(finished(box, sent)) == len(sent), within_s=180, what="every job has its outcome")
    outcomes = [box.client.result(job.id) for job in sent]
    assert [outcome for outcome in outcomes if outcome is None or outcome.state is not JobState.ANSWERED] == []
    assert all(job.get(timeout=30)["choices"] for job in sent)
    redis = connect(box.url)
    eventually(lambda: redis.hlen(keys.UNACKED) == 0, within_s=4 * LEASE_S, what="nothing is left in flight")
    assert [RedisBacklog(redis).count(keys.model_queue(model)) for model in ("small", "large")] == [0, 0]

    box.worker.kill("SIGTERM")
    # Engines of this run have one of its models; others on the machine are not ours to judge.
    models = str(tmp_path_factory.getbasetemp())
    assert not [p for p in psutil.process_iter() if _is_engine(p) and models in " ".join(p.cmdline())]


def finished(box: Box, sent: list[Any]) -> list[str]:
    """The ids that have an outcome."""
    redis = connect(box.url)
    found = redis.mget([keys.outcome(job.id) for job in sent])
    redis.close()
    return [job.id for job, outcome in zip(sent, found, strict=True) if outcome]


def _end(process: psutil.Process) -> None:
    try:
        os.kill(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
