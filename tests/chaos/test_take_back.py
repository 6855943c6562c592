"""
How soon a dead worker's jobs are somebody else's, and what a worker's commands of before its pause still do: nothing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from common import keys
from common.celery_app import create_app
from common.client import JobClient
from common.fleet import read_statuses
from common.redis_client import RedisClient, connect
from common.settings import Settings
from tests.chaos.faults import Fault, Kind, Target
from tests.chaos.world import LEASE_S, World
from tests.waiting import eventually

HAND = 32  # a worker takes up so many at once, and more


@pytest.fixture
def world() -> Iterator[World]:
    """A router and two workers, with as many jobs in hand as by default."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        made = World(Path(folder), env={"WORKER_CONCURRENCY": ""})
        try:
            made.start()
            yield made
        finally:
            made.close()


def held_by(redis: RedisClient, name: str) -> set[str]:
    return {tag for tag, owner in redis.hgetall(keys.UNACKED_OWNER).items() if owner.startswith(f"{name}.")}


@pytest.mark.timeout(180)
def test_a_full_hand_is_taken_back_within_two_leases_kill_after_kill(world: World) -> None:
    """One worker is killed with all its jobs in hand, then the other one, who got them: each time the same bound."""
    with closing(JobClient(world.redis.url)) as client, closing(connect(world.redis.url)) as redis:
        for number in range(5 * HAND):
            client.submit(
                {"model": "small", "messages": [{"role": "user", "content": f"Job {number}: Take 600 seconds"}]}
            )
        names = {program.name: target for target, program in world.programs.items() if target is not Target.ROUTER}
        for _ in range(2):
            eventually(lambda: any(len(held_by(redis, name)) >= HAND for name in names), within_s=60)
            name = max(names, key=lambda name: len(held_by(redis, name)))
            kill = Fault(target=names[name], kind=Kind.KILL, after_s=0, lasts_s=0)
            world.strike(kill)
            began = time.monotonic()
            dead = held_by(redis, name)
            assert len(dead) >= HAND
            eventually(lambda name=name: not held_by(redis, name), within_s=2 * LEASE_S, what="it is taken back")
            world.note(f"{len(dead)} deliveries were taken back after {time.monotonic() - began:.1f} s")
            world.mend(kill)


@pytest.mark.timeout(120)
def test_a_switch_asked_for_before_the_pause_is_not_carried_out_after_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker wakes from a pause and finds a command with an epoch that is over: its model stays as it is."""
    monkeypatch.setenv("REDIS_URL", world.redis.url)
    with closing(connect(world.redis.url)) as redis, closing(create_app(Settings.from_env())) as celery:

        def residents() -> set[str]:
            [status] = [found for found in read_statuses(redis) if found.worker == "one"]
            return set() if status.switching_to else {resident.model for resident in status.residents}

        eventually(residents, what="its first switch is over")
        before, epoch = residents(), int(redis.get(keys.switch_epoch("one")))
        other = min({"small", "large"} - before)
        pause = Fault(target=Target.WORKER, kind=Kind.PAUSE, after_s=0, lasts_s=0)
        world.strike(pause)
        asked = [
            celery.send_task(
                keys.SWITCH_TASK, kwargs={"model": other, "epoch": old}, queue=keys.control_queue("one"),
                ignore_result=False,
            )
            for old in (0, epoch - 1, epoch + 1)
        ]  # fmt: skip
        eventually(lambda: redis.get(keys.status("one")) is None, within_s=30, what="its silence is noted")
        world.mend(pause)

        assert [found.get(timeout=30)["outcome"] for found in asked] == ["stale"] * 3
        eventually(lambda: redis.get(keys.status("one")))
        eventually(residents, what="no switch is under way")
        assert residents() == before
