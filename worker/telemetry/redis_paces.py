"""
Keeps what jobs take over restarts, and for the rest of the fleet: in one Redis hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import redis
from pydantic import ValidationError

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import ModelPace

logger = get_logger(__name__)


class RedisPaces:
    """The hash keys.PACES."""

    def __init__(self, client: RedisClient) -> None:
        self._redis = client

    def save(self, paces: Iterable[ModelPace]) -> None:
        """Keep each in the place of what was known of its worker and model."""
        fields = {json.dumps([found.worker, found.model]): found.model_dump_json() for found in paces}
        if fields:
            self._redis.hset(keys.PACES, mapping=fields)

    def read(self) -> tuple[ModelPace, ...]:
        """Read all of them; without Redis there are none, and one that cannot be read is left out: both are told."""
        try:
            bodies = self._redis.hgetall(keys.PACES)
        except (redis.RedisError, OSError) as error:
            logger.warning("telemetry.paces_away", error=f"{type(error).__name__}: {error}")
            return ()
        found: list[ModelPace] = []
        for field, body in sorted(bodies.items()):
            try:
                found.append(ModelPace.model_validate_json(body))
            except ValidationError as error:
                logger.warning("telemetry.unreadable_pace", field=field, error=str(error))
        return tuple(found)
