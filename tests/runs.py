"""
Deliveries as a lane has them, without Celery: what was told of each is written down.
"""

from __future__ import annotations

import json
import uuid
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from common import keys
from common.redis_client import RedisClient
from worker.delivery.lane import Run
from worker.engines.base import StopSignal

OWNER = "here"


@dataclass
class Told:
    """What a lane has said of one run, in order."""

    run: Run
    words: list[str] = field(default_factory=list)


def make_run(client: RedisClient, job_id: str, *args: Any, owner: str = OWNER, **headers: Any) -> Told:
    """Give a run whose message stands in `unacked`, popped by *owner*."""
    tag = str(uuid.uuid4())
    words: list[str] = []
    properties = {
        "delivery_tag": tag,
        "correlation_id": job_id,
        "priority": 3,
        "delivery_info": {"exchange": "", "routing_key": "somewhere"},
        "body_encoding": "base64",
    }
    client.hset(keys.UNACKED, tag, json.dumps([{"headers": {}, "properties": properties}, "", "somewhere"]))
    client.zadd(keys.UNACKED_INDEX, {tag: 1.0})
    client.hset(keys.UNACKED_OWNER, tag, owner)
    run = Run(
        task_id=job_id,
        headers={"id": job_id, "task": "some task", "root_id": job_id, "parent_id": None, **headers},
        properties=properties,
        args=args,
        signal=StopSignal(),
        on_accepted=lambda _pid, _at: words.append("accepted"),
        on_success=lambda _result: words.append("succeeded"),
        on_failure=lambda _why: words.append("moved on"),
        ordinary=lambda: words.append("ordinary"),
        ended=Future(),
    )
    return Told(run=run, words=words)


def in_hand(client: RedisClient) -> set[str]:
    """The tags of all messages that are not acknowledged; every book of them says the same."""
    books = (
        set(client.hkeys(keys.UNACKED)),
        set(client.zrange(keys.UNACKED_INDEX, 0, -1)),
        set(client.hkeys(keys.UNACKED_OWNER)),
    )
    assert books[0] == books[1] == books[2]
    return books[0]
