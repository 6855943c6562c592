"""
A worker that is told to go: by SIGTERM or `shiftworker drain`, with Redis there or away; real processes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import pytest

from common import keys
from common.client import JobClient
from common.fleet import read_statuses
from common.redis_client import connect
from common.schemas import JobState, WorkerState
from tests.chaos.faults import Fault, Kind, Target
from tests.chaos.run import end_world, make_jobs, read_kept
from tests.chaos.world import MODELS, World
from tests.waiting import eventually

GRACE_S = 6.0
SHORT_JOBS = [  # long enough to be seen at work
    {"model": MODELS[number % len(MODELS)], "messages": [{"role": "user", "content": f"Take 3 seconds, {number}"}]}
    for number in range(30)
]
LONG_JOBS = [  # they outlast any grace here
    {"model": MODELS[number % len(MODELS)], "messages": [{"role": "user", "content": "Take 60 seconds"}]}
    for number in range(24)
]
ENDS_S = 30.0  # beyond the grace: for jobs to go back, engines to end and Redis to hear goodbye
REDIS_PAUSED = Fault(target=Target.REDIS, kind=Kind.PAUSE, after_s=0, lasts_s=0)
ONE_CUT = Fault(target=Target.WORKER, kind=Kind.CUT, after_s=0, lasts_s=0)


@pytest.fixture
def env() -> dict[str, str]:
    """What the programs are set to; a test may override this fixture."""
    return {}


@pytest.fixture
def running(env: Mapping[str, str]) -> Iterator[World]:
    """A system at work, with a grace longer than most jobs."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder), env={"WORKER_SOFT_SHUTDOWN_S": str(GRACE_S), **env})
        try:
            world.start()
            yield world
        finally:
            world.close()


@pytest.fixture
def client(running: World) -> Iterator[JobClient]:
    with closing(JobClient(running.redis.url)) as found:
        yield found


def start_drain(world: World, *arguments: str) -> subprocess.Popen[str]:
    """Start `shiftworker drain`."""
    return subprocess.Popen(
        [sys.executable, "-m", "worker", "drain", *arguments],
        env={**os.environ, "REDIS_URL": world.redis.url}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_by(world: World, client: JobClient, ids: list[str], name: str) -> set[str]:
    """The jobs that the worker *name* runs now."""
    with closing(connect(world.redis.url)) as redis:
        owners = redis.hgetall(keys.UNACKED_OWNER)
        mine = {tag for tag, owner in owners.items() if owner.startswith(f"{name}.")}
        return {i for i in ids if redis.hget(keys.job(i), "claim") in mine and client.result(i) is None}


def state_of(world: World, name: str) -> WorkerState | None:
    with closing(connect(world.redis.url)) as redis:
        return next((found.state for found in read_statuses(redis) if found.worker == name), None)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("env", [{"WORKER_SOFT_SHUTDOWN_S": "30"}])
def test_a_drained_worker_ends_what_it_runs_and_leaves_the_rest(running: World, client: JobClient) -> None:
    """
    Drained by its name under a load: it shows "draining", takes nothing more, ends its jobs, stops its engine, is gone.

    The jobs that ran there ran once; all others run on the other worker.
    """
    one = running.programs[Target.WORKER]
    ids = [client.submit(body) for body in SHORT_JOBS]
    eventually(lambda: run_by(running, client, ids, "one"), within_s=30, what="it runs some")
    engines = one.below()
    leaving = start_drain(running, "one", "--wait")
    eventually(lambda: state_of(running, "one") is WorkerState.DRAINING, within_s=30, what="it says so")
    taken = {i: client.status(i).attempts for i in run_by(running, client, ids, "one")}
    said, _ = leaving.communicate(timeout=90)
    assert (leaving.returncode, said.split()[-1]) == (0, "Gone")
    assert one.process.wait(10) == 0
    assert state_of(running, "one") is None
    assert not [process for process in engines if process.is_running()]
    eventually(lambda: all(client.result(i) for i in ids), within_s=60, what="every job ends")
    assert {i: client.status(i).attempts for i in taken} == taken, "they were given their grace"
    one.start()
    assert end_world(running, ids) == []
    kept = read_kept(running.redis.url, ids)
    assert {job.outcome.state for job in kept.values() if job.outcome} == {JobState.ANSWERED}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("env", [{"WORKER_SOFT_SHUTDOWN_S": "60"}])
def test_told_twice_it_waits_for_nothing(running: World, client: JobClient) -> None:
    """The second SIGTERM ends the grace at once: what runs goes back, and ends elsewhere or later."""
    one = running.programs[Target.WORKER]
    ids = [client.submit(body) for body in LONG_JOBS]
    eventually(lambda: run_by(running, client, ids, "one"), within_s=30, what="it runs some")
    one.process.send_signal(signal.SIGTERM)
    eventually(lambda: state_of(running, "one") is WorkerState.DRAINING, within_s=5, what="it leaves")
    taken = run_by(running, client, ids, "one")
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(ENDS_S) == 0
    with closing(connect(running.redis.url)) as redis:
        assert not [owner for owner in redis.hvals(keys.UNACKED_OWNER) if owner.startswith("one.")]
    assert state_of(running, "one") is None
    assert [i for i in taken if client.result(i) is not None] == [], "they went back"


@pytest.mark.timeout(200)
@pytest.mark.parametrize("how", ["killed", "paused", "cut off"])
def test_told_to_go_while_redis_is_away(running: World, client: JobClient, how: str) -> None:
    """It ends within its grace all the same, with its engine; its jobs are taken back when Redis is there again."""
    one = running.programs[Target.WORKER]
    ids = [client.submit(body) for body in make_jobs(40)]
    eventually(lambda: run_by(running, client, ids, "one"), within_s=30, what="it runs some")
    engines = one.below()
    if how == "killed":
        running.redis.kill()
    else:
        running.strike(REDIS_PAUSED if how == "paused" else ONE_CUT)
    one.process.send_signal(signal.SIGTERM)
    one.process.wait(GRACE_S + ENDS_S)
    eventually(lambda: not any(process.is_running() for process in engines), within_s=5, what="its engine is gone")
    if how == "killed":
        running.redis.start()
    else:
        running.mend(REDIS_PAUSED if how == "paused" else ONE_CUT)
    one.start()
    assert end_world(running, ids) == []
    kept = read_kept(running.redis.url, ids)
    assert {job.outcome.state for job in kept.values() if job.outcome} == {JobState.ANSWERED}
    assert len([job for job in kept.values() if job.outcome]) == len(ids)


def test_nobody_to_drain(redis_url: str) -> None:
    """A worker that is not there is an error with its own exit code, and the names of those that are."""
    found = subprocess.run(
        [sys.executable, "-m", "worker", "drain", "nobody"],
        env={**os.environ, "REDIS_URL": redis_url}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert found.returncode == 69
    assert "nobody" in found.stderr
