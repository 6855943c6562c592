"""
Reads the Backlog: how many jobs wait in each model's queue, and since when.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from common import keys
from common.redis_client import RedisClient
from worker.state.backlog import Backlog, Waiting

QUEUED_AT_HEADER = "shiftworker_queued_at"  # Unix seconds; Celery's messages carry no time of their own


class RedisQueues:
    """The model queues as Redis lists; one round trip a reading, whatever the number of jobs."""

    def __init__(self, client: RedisClient, models: Sequence[str]) -> None:
        self._redis = client
        self._models = tuple(models)

    def backlog(self) -> Backlog:
        """Read every model's queue."""
        with self._redis.pipeline(transaction=False) as pipe:
            for model in self._models:
                for name in keys.lists_of(keys.model_queue(model)):
                    pipe.llen(name)
                    pipe.lindex(name, -1)  # the head: consumers pop from this end
            found = pipe.execute()
        per_model = 2 * len(keys.PRIORITY_STEPS)
        return Backlog(
            by_model={
                model: _waiting(found[start : start + per_model])
                for model, start in zip(self._models, range(0, len(found), per_model), strict=True)
            }
        )


def _waiting(found: Sequence[int | str | None]) -> Waiting:
    counts, heads = found[::2], found[1::2]
    ages = [at for head in heads if isinstance(head, str) and (at := _queued_at(head)) is not None]
    return Waiting(count=sum(count for count in counts if isinstance(count, int)), oldest_at=min(ages, default=None))


def _queued_at(message: str) -> float | None:
    """When the router queued this message; None if it does not say."""
    try:
        at = json.loads(message)["headers"][QUEUED_AT_HEADER]
    except (ValueError, KeyError, TypeError):
        return None
    return float(at) if isinstance(at, int | float) else None
