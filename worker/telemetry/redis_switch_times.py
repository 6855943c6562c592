"""
Keeps what a worker's switches take over its restarts: in one Redis hash, one value for each from, to and level.
"""

from __future__ import annotations

import json

import redis
from pydantic import ValidationError

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import SwitchTime

logger = get_logger(__name__)


class RedisSwitchTimes:
    """The hash of keys.switch_times of one worker."""

    def __init__(self, client: RedisClient, worker: str) -> None:
        self._redis = client
        self._key = keys.switch_times(worker)

    def save(self, time: SwitchTime) -> None:
        """Keep *time* in the place of what was known of this kind of switch."""
        field = json.dumps([time.from_model, time.to_model, time.level])
        self._redis.hset(self._key, field, time.model_dump_json())

    def read(self) -> tuple[SwitchTime, ...]:
        """Read all of them; without Redis there are none, and one that cannot be read is left out: both are told."""
        try:
            bodies = self._redis.hgetall(self._key)
        except (redis.RedisError, OSError) as error:
            logger.warning("residency.switch_times_away", error=f"{type(error).__name__}: {error}")
            return ()
        found: list[SwitchTime] = []
        for field, body in sorted(bodies.items()):
            try:
                found.append(SwitchTime.model_validate_json(body))
            except ValidationError as error:
                logger.warning("residency.unreadable_switch_time", field=field, error=str(error))
        return tuple(found)
