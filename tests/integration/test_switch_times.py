"""
What switches take, in a real Redis: read back at the next start of the worker, and missed without harm.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from common import keys
from common.redis_client import connect
from common.schemas import SwitchTime
from worker.telemetry.redis_switch_times import RedisSwitchTimes

TIME = SwitchTime(
    from_model=None, to_model="b", level="cold", mean_s=3.5, last_s=4, load_s=3, load_bytes=7, count=2,
    at=datetime(2026, 11, 21, tzinfo=UTC),
)  # fmt: skip


def test_the_next_start_reads_what_the_last_one_kept(redis_client: Any) -> None:
    """One value for each kind of switch, of this worker alone."""
    kept = RedisSwitchTimes(redis_client, "w")
    kept.save(TIME.model_copy(update={"mean_s": 99}))
    kept.save(TIME)
    other = TIME.model_copy(update={"from_model": "a"})
    kept.save(other)

    assert set(RedisSwitchTimes(redis_client, "w").read()) == {TIME, other}
    assert RedisSwitchTimes(redis_client, "another").read() == ()


def test_what_cannot_be_read_is_left_out(redis_client: Any) -> None:
    """Of another version, say."""
    kept = RedisSwitchTimes(redis_client, "w")
    kept.save(TIME)
    redis_client.hset(keys.switch_times("w"), "broken", "{")

    assert kept.read() == (TIME,)


def test_without_redis_nothing_is_known() -> None:
    """The worker learns anew."""
    assert RedisSwitchTimes(connect("redis://127.0.0.1:1/0"), "w").read() == ()
