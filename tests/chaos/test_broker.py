"""
Redis in trouble: full, slow, cut off for long, or back without its memory; real processes at work meanwhile.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common import keys
from common.client import JobClient
from common.errors import RedisFull
from common.fleet import read_statuses
from common.redis_client import RedisClient, connect
from common.schemas import JobState
from tests.chaos.report import count_outcomes, judge
from tests.chaos.run import end_world, make_jobs, read_kept
from tests.chaos.world import LEASE_S, MODELS, World
from tests.waiting import eventually

pytestmark = pytest.mark.timeout(250)

CUT_S = 60.0

LONG_JOBS = [  # still running when the trouble begins
    {"model": MODELS[number % len(MODELS)], "messages": [{"role": "user", "content": f"Take 4 seconds, {number}"}]}
    for number in range(6)
]


@pytest.fixture
def running() -> Iterator[World]:
    """A system at work."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        world = World(Path(folder))
        try:
            world.start()
            yield world
        finally:
            world.close()


@pytest.fixture
def client(running: World) -> Iterator[JobClient]:
    with closing(JobClient(running.redis.url)) as found:
        yield found


@pytest.fixture
def redis(running: World) -> Iterator[RedisClient]:
    with closing(connect(running.redis.url)) as found:
        yield found


def running_now(client: JobClient, ids: list[str]) -> list[str]:
    return [i for i in ids if client.status(i).state is JobState.RUNNING]


def check(world: World, ids: list[str]) -> dict[str, int]:
    """End the world, hold every promise against what is kept, and give each job's attempts."""
    left = end_world(world, ids)
    kept = read_kept(world.redis.url, ids)
    report = judge(kept, expected=None, written=count_outcomes(world.folder / "redis"), left=left)
    assert report.whole, report
    return {job_id: job.attempts for job_id, job in kept.items()}


def test_a_full_redis_refuses_the_producer_and_loses_nothing(
    running: World, client: JobClient, redis: RedisClient
) -> None:
    """
    Full (maxmemory, noeviction): a submit says so and sends nothing; what runs is kept until there is room again.

    What an engine answered meanwhile is delivered then, without another run; also by workers that have lost their
    connections meanwhile, and to which the full Redis refuses even the declaration of a queue.
    """
    ids = [client.submit(body) for body in LONG_JOBS]
    eventually(lambda: running_now(client, ids), within_s=30)
    redis.config_set("maxmemory", "1mb")
    with pytest.raises(RedisFull, match="was not sent"):
        client.submit(LONG_JOBS[0])
    assert sum(redis.llen(name) for name in keys.lists_of(keys.SUBMIT_QUEUE)) == 0
    began = running_now(client, ids)
    redis.client_kill_filter(_type="normal", skipme=True)
    full_until = time.monotonic() + 2 * LEASE_S
    eventually(lambda: time.monotonic() > full_until, within_s=3 * LEASE_S)
    assert running.fallen() == []
    redis.config_set("maxmemory", "0")
    ids += [client.submit(body) for body in make_jobs(12)]
    attempts = check(running, ids)
    assert {attempts[i] for i in began} == {1}, "what ran was not run again"


def test_a_slow_redis_delays_and_no_more(running: World, client: JobClient) -> None:
    """Every answer of Redis comes 0.4 s late: nobody is taken for dead, and every job runs once."""
    for program in running.programs.values():
        program.proxy.slow(0.2)
    ids = [client.submit(body) for body in make_jobs(24)]
    eventually(lambda: all(client.result(i) for i in ids), within_s=120)
    for program in running.programs.values():
        program.proxy.slow(0)
    assert set(check(running, ids).values()) == {1}


def test_all_are_cut_off_for_a_minute(running: World, client: JobClient) -> None:
    """Nobody reaches Redis for twenty leases: what runs is kept and delivered afterwards, and nothing runs twice."""
    ids = [client.submit(body) for body in (*LONG_JOBS, *make_jobs(24))]
    eventually(lambda: running_now(client, ids), within_s=30)
    for program in running.programs.values():
        program.proxy.cut()
    whole_at = time.monotonic() + CUT_S
    eventually(lambda: time.monotonic() > whole_at, within_s=CUT_S + 5)
    for program in running.programs.values():
        program.proxy.mend()
    assert set(check(running, ids).values()) == {1}


def test_redis_that_forgot_everything_gets_the_answers_of_what_ran(
    running: World, client: JobClient, redis: RedisClient
) -> None:
    """Restarted without its file, as one without AOF: running jobs are answered; new ones find workers as before."""
    ids = [client.submit(body) for body in LONG_JOBS]
    eventually(lambda: running_now(client, ids), within_s=30)
    began = running_now(client, ids)
    redis.set("remember", "me")
    running.redis.kill()
    shutil.rmtree(running.folder / "redis" / "appendonlydir")
    running.redis.start()
    assert not redis.exists("remember")
    eventually(lambda: all(client.result(i) for i in began), within_s=30, what="what ran has its answer")
    eventually(lambda: len(read_statuses(redis)) == 2, within_s=30, what="the workers are back")
    ids = [client.submit(body) for body in make_jobs(12)]
    eventually(lambda: all(client.result(i) for i in ids), within_s=60, what="new jobs run")
    check(running, ids)
    assert all(client.result(i).state is JobState.ANSWERED for i in began)
