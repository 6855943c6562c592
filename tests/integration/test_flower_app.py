"""
What Flower counts through our app, on a real Redis.
"""

from __future__ import annotations

import asyncio
import importlib
from typing import Any

import pytest
from flower.utils.broker import Broker, RedisBase

from common import keys
from common.backlog import RedisBacklog


def test_flower_counts_what_waits_in_backlogs(
    redis_url: str, redis_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside what waits in lists, which is all that Flower knows by itself."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setattr(RedisBase, "queues", RedisBase.queues)  # the app replaces it; afterwards it is as it was
    importlib.import_module("worker.flower_app")
    redis_client.lpush(keys.SUBMIT_QUEUE, "a", "b", "c")
    large = keys.model_queue("large")
    redis_client.lpush(keys.lists_of(large)[2], "d")
    for number in range(2):
        delivery = {"delivery_tag": str(number), "delivery_info": {"exchange": "", "routing_key": large}}
        RedisBacklog(redis_client).put(large, {"properties": delivery}, "message", now=0.0)

    found = asyncio.run(Broker(redis_url).queues([keys.SUBMIT_QUEUE, large, keys.model_queue("small")]))
    assert {queue["name"]: queue["messages"] for queue in found} == {
        keys.SUBMIT_QUEUE: 3, large: 3, keys.model_queue("small"): 0,
    }  # fmt: skip
