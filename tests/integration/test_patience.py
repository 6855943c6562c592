"""
A patient client: it waits for Redis, also for a full one, until its process leaves.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from redis.exceptions import ConnectionError as RedisAway
from redis.exceptions import OutOfMemoryError

from common import redis_client
from common.redis_client import connect, end_patience
from tests.waiting import eventually
from worker.embedded_redis import EmbeddedRedis, free_port


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its end is for this test alone."""
    monkeypatch.setattr(redis_client, "_patience_is_over", threading.Event())


def test_it_waits_for_room_in_a_full_redis(own_redis: EmbeddedRedis) -> None:
    """Another client hears at once that Redis is full; this one writes when there is room, and once."""
    plain, patient = connect(own_redis.url), connect(own_redis.url, patient=True)
    plain.config_set("maxmemory", "1")
    with pytest.raises(OutOfMemoryError):
        plain.incr("a")
    with ThreadPoolExecutor(1) as pool:
        written = pool.submit(patient.incr, "a")
        eventually(lambda: plain.info("errorstats")["errorstat_OOM"]["count"] >= 3, what="it tries again")
        plain.config_set("maxmemory", "0")
        assert written.result(10) == 1
    plain.close()
    patient.close()


def test_it_gives_up_when_its_process_leaves() -> None:
    """Nobody is there, for ever; the end of patience is its end, within a pause."""
    patient = connect(f"redis://127.0.0.1:{free_port()}/0", patient=True)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(patient.ping)
        with pytest.raises(TimeoutError):
            asked.result(0.5)
        end_patience()
        with pytest.raises(RedisAway):
            asked.result(10)
    patient.close()
