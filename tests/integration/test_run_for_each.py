"""
One script for many calls, in one round trip: what Redis refuses of it, and what it has forgotten.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

from common.redis_client import RedisClient, connect, run_for_each
from tests.waiting import eventually

COUNT = """
if redis.call('TYPE', KEYS[1])['ok'] == 'hash' then return redis.error_reply('WRONGTYPE no number') end
return redis.call('INCRBY', KEYS[1], ARGV[1])
"""


def test_each_call_has_its_own_answer_and_the_command_follows_them(redis_client: RedisClient) -> None:
    """In the order of the calls."""
    calls = [((name,), (by,)) for name, by in (("a", 1), ("b", 2), ("a", 3))]
    assert run_for_each(redis_client, COUNT, calls, "SET", "done", "yes") == [1, 2, 4]
    assert redis_client.get("done") == "yes"


def test_a_redis_that_has_forgotten_the_script_is_told_it_again(redis_client: RedisClient) -> None:
    """And no call is done twice."""
    for expected in ([1, 2], [3, 4]):
        redis_client.script_flush()
        assert run_for_each(redis_client, COUNT, [(("a",), (1,)), (("a",), (1,))]) == expected


def test_a_call_that_fails_is_told_and_the_others_are_done_once(redis_client: RedisClient) -> None:
    """It is nothing that time mends."""
    redis_client.hset("b", "no", "number")
    with pytest.raises(redis.ResponseError, match="no number"):
        run_for_each(redis_client, COUNT, [((name,), (1,)) for name in ("a", "b", "c")])
    assert redis_client.mget("a", "c") == ["1", "1"]


def test_the_command_that_follows_may_fail_too(redis_client: RedisClient) -> None:
    """That is told, and the calls before it are done once."""
    redis_client.set("text", "no number")
    with pytest.raises(redis.ResponseError, match="not an integer"):
        run_for_each(redis_client, COUNT, [(("a",), (1,))], "INCR", "text")
    assert redis_client.get("a") == "1"


def test_a_full_redis_is_asked_until_there_is_room(redis_client: RedisClient, redis_url: str) -> None:
    """By a patient client."""
    patient = connect(redis_url, patient=True)
    redis_client.config_resetstat()
    redis_client.config_set("maxmemory", "1mb")
    try:
        with ThreadPoolExecutor(1) as pool:
            counted = pool.submit(run_for_each, patient, COUNT, [(("a",), (1,)), (("b",), (1,))])
            eventually(lambda: "errorstat_OOM" in redis_client.info("errorstats"), what="it was refused")
            redis_client.config_set("maxmemory", "0")
            assert counted.result(timeout=10) == [1, 1]
    finally:
        redis_client.config_set("maxmemory", "0")
        patient.close()
