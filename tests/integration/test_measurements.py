"""
What loads measured, in a real Redis: kept for the fleet, read back as it was, and missed without harm.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from common import keys
from common.redis_client import connect
from tests.factories import make_machine, make_placement
from worker.memory.estimate import MemoryEstimate
from worker.memory.measured import Measured, Measurement, device_name, engine_name
from worker.telemetry.redis_measured import RedisMeasurements

GIB = 2**30
PLACEMENT = make_placement(gpus=(0,), n_gpu_layers=-1)
KEY = PLACEMENT.load_key(engine=engine_name("llamacpp", "1"), device=device_name(make_machine(24), (0,)))
MEASUREMENT = Measurement(
    key=KEY,
    predicted=MemoryEstimate(weights=2 * GIB, kv_cache=GIB),
    measured=Measured(weights=2 * GIB + 1, total=3 * GIB),
    at=datetime(2026, 11, 21, tzinfo=UTC),
)


def test_what_was_saved_is_read_back(redis_client: Any) -> None:
    """Every field, the unknown ones too; another worker reads the same."""
    RedisMeasurements(redis_client).save(MEASUREMENT)

    assert RedisMeasurements(redis_client).read() == {KEY: MEASUREMENT}


def test_the_last_load_of_a_kind_is_the_one_that_stays(redis_client: Any) -> None:
    """One value for each way to load a model, however often it is loaded; another length is another way."""
    kept = RedisMeasurements(redis_client)
    for total in range(50):
        last = replace(MEASUREMENT, measured=Measured(total=total))
        kept.save(last)
    other = replace(MEASUREMENT, key=replace(KEY, max_model_len=1024))
    kept.save(other)

    assert kept.read() == {KEY: last, other.key: other}
    assert redis_client.hlen(keys.MEASURED) == 2


def test_what_cannot_be_read_is_left_out(redis_client: Any) -> None:
    """Of another version, say; what it has beyond ours is passed over."""
    kept = RedisMeasurements(redis_client)
    kept.save(MEASUREMENT)
    (body,) = redis_client.hgetall(keys.MEASURED).values()
    newer = {**json.loads(body), "by": "a newer worker"}
    redis_client.hset(keys.MEASURED, "newer", json.dumps(newer))
    redis_client.hset(keys.MEASURED, "broken", "{")

    assert kept.read() == {KEY: MEASUREMENT}


def test_without_redis_nothing_is_known() -> None:
    """The worker goes by its estimates then."""
    assert RedisMeasurements(connect("redis://127.0.0.1:1/0")).read() == {}
