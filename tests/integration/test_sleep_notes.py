"""
How models sleep, in a real Redis: read back at the next start of the worker, and missed without harm.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from common import keys
from common.redis_client import connect
from worker.residency.sleep_notes import SleepNote
from worker.state.residency import Level
from worker.telemetry.redis_sleep_notes import RedisSleepNotes

NOTE = SleepNote(
    model_id="a", level=Level.ASLEEP_1, weights=7, sleep_s=1.5, host_bytes=10, banned="other tokens",
    at=datetime(2026, 11, 21, tzinfo=UTC),
)  # fmt: skip
OTHER = SleepNote(model_id="a", level=Level.ASLEEP_2, at=NOTE.at)


def test_the_next_start_reads_what_the_last_one_kept(redis_client: Any) -> None:
    """One value for each model and level, of this worker alone."""
    kept = RedisSleepNotes(redis_client, "w")
    kept.save(SleepNote(model_id="a", level=Level.ASLEEP_1, at=NOTE.at))
    kept.save(NOTE)
    kept.save(OTHER)

    assert set(RedisSleepNotes(redis_client, "w").read()) == {NOTE, OTHER}
    assert RedisSleepNotes(redis_client, "another").read() == ()


def test_what_cannot_be_read_is_left_out(redis_client: Any) -> None:
    """Of another version, say."""
    kept = RedisSleepNotes(redis_client, "w")
    kept.save(NOTE)
    redis_client.hset(keys.sleep_notes("w"), "broken", "{")

    assert kept.read() == (NOTE,)


def test_without_redis_nothing_is_known_and_nothing_stops() -> None:
    """The worker learns anew, and a switch that has something to note goes on."""
    away = RedisSleepNotes(connect("redis://127.0.0.1:1/0"), "w")
    away.save(NOTE)

    assert away.read() == ()
