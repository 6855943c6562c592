"""
Long jobs of a batch overtake in a real Redis: from the reading, through the decision, to what is taken next.
"""

from __future__ import annotations

import time

import pytest

from common import keys
from common.redis_client import RedisClient
from tests.integration.test_backlog import NOW, Line
from worker.scheduling.overtake import MOST, choose_overtaking
from worker.scheduling.pick import Knowledge
from worker.scheduling.redis_queues import RedisQueues
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

PACE = Pace(prefill_tokens_per_s=1000, decode_tokens_per_s=10, at_once=4, output_share=0.5)
RESIDENCY = Residency(
    capacity=1, max_residents=1, residents=(Resident(model_id="large", level=Level.READY, bytes=1, since=NOW),)
)


class Worker:
    """Looks, decides, and lets jobs overtake, as the heart does."""

    def __init__(self, client: RedisClient) -> None:
        self.queues = RedisQueues(client, ["large", "small"])

    def beat(self, *, now: float) -> int:
        """Returns how many jobs have moved."""
        known = Knowledge(paces={"large": PACE})
        found = choose_overtaking(self.queues.backlog(), RESIDENCY, known=known, look_s=0.0, now=now)
        return sum(self.queues.overtake(some) for some in found)


@pytest.fixture
def line(redis_client: RedisClient) -> Line:
    """The backlog of the ready model, while many wait for another."""
    other = Line(redis_client, keys.model_queue("small"))
    for number in range(40):
        other.put(f"other {number}")
    return Line(redis_client)


def put_batch(line: Line) -> None:
    """Twelve jobs that take 1 s with half of their answer, and one of 10 s, which came last; the first has begun."""
    for number in range(12):
        line.put(f"short {number:02}", queued_at=NOW + number / 100, prompt_tokens=0, output_tokens=20)
    line.put("long", queued_at=NOW + 1, prompt_tokens=0, output_tokens=200)
    assert line.take() == ["short 00"]


def test_a_long_job_at_the_end_of_a_batch_begins_first(line: Line, redis_client: RedisClient) -> None:
    """21 s of work are 5.25 s on four places: 10 s would stick out. A second look changes nothing."""
    put_batch(line)
    worker = Worker(redis_client)

    assert worker.beat(now=NOW + 11) == 1
    assert worker.beat(now=NOW + 11) == 0
    assert line.rank("long") == 0
    assert line.take(3) == ["long", "short 01", "short 02"]


def test_a_long_job_keeps_its_place_while_more_come(line: Line, redis_client: RedisClient) -> None:
    """The batch took a second to come: before ten have passed, the order is that of arrival."""
    put_batch(line)

    assert Worker(redis_client).beat(now=NOW + 10.9) == 0
    assert line.take(12)[-1] == "long"


def test_nobody_overtakes_who_is_more_urgent(line: Line, redis_client: RedisClient) -> None:
    """A more urgent class goes first, then who has a deadline that binds, as ever."""
    put_batch(line)
    line.put("urgent", queued_at=NOW, priority=0, prompt_tokens=0, output_tokens=2)
    worker = Worker(redis_client)

    assert worker.beat(now=NOW + 11) == 0
    assert line.take() == ["urgent"]
    line.put("soon", queued_at=NOW, deadline_at=NOW + 2, prompt_tokens=0, output_tokens=2)
    assert worker.beat(now=NOW + 11) == 0
    assert line.take(now=NOW + 11) == ["soon"]
    assert worker.beat(now=NOW + 11) == 1
    assert line.take(now=NOW + 11) == ["long"]


def test_a_job_that_has_overtaken_can_be_cancelled(line: Line, redis_client: RedisClient) -> None:
    """Nothing of it is left; the others are in the order of their arrival."""
    put_batch(line)
    Worker(redis_client).beat(now=NOW + 11)

    assert line.remove("long")
    assert line.take(20) == [f"short {number:02}" for number in range(1, 12)]
    assert redis_client.keys(f"{keys.backlog(line.queue)}*") == []


def test_as_many_as_are_ever_looked_at_take_a_few_milliseconds(line: Line, redis_client: RedisClient) -> None:
    """Of Redis's own time; all of them move."""
    for number in range(MOST):
        line.put(f"job {number}", prompt_tokens=10, output_tokens=10)
    redis_client.config_resetstat()
    began = time.process_time()
    moved = line.backlog.overtake(line.queue, 1.0, prompt_token_s=1.0, output_token_s=1.0, among=MOST, now=NOW)
    in_redis = redis_client.info("commandstats")
    took_us = sum(stats["usec"] for name, stats in in_redis.items() if name in ("cmdstat_evalsha", "cmdstat_eval"))

    assert moved == MOST - 1  # the first one is the first already
    assert took_us / 1e6 + time.process_time() - began < 0.02


def test_in_a_full_redis_jobs_keep_their_order(line: Line, redis_client: RedisClient) -> None:
    """The heart that asks for it goes on."""
    put_batch(line)
    worker = Worker(redis_client)
    redis_client.config_set("maxmemory", 1)
    try:
        assert worker.beat(now=NOW + 11) == 0
    finally:
        redis_client.config_set("maxmemory", 0)
    assert line.rank("long") == 11
