"""
Keeps what loads measured, for the whole fleet: in one Redis hash, one value for each way to load a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict

import redis
from pydantic import TypeAdapter, ValidationError

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from worker.memory.learn import doubts
from worker.memory.measured import LoadKey, Measurement

logger = get_logger(__name__)

_AS_JSON = TypeAdapter(Measurement)


class RedisMeasurements:
    """The hash of keys.MEASURED."""

    def __init__(self, client: RedisClient) -> None:
        self._redis = client

    def save(self, measurement: Measurement) -> None:
        """Keep *measurement* in the place of the last one of its key; tell it beside what was predicted."""
        logger.info(
            "memory.measured",
            model_id=measurement.key.model_id,
            predicted=asdict(measurement.predicted),
            measured=asdict(measurement.measured),
            error=None if measurement.error is None else round(measurement.error, 3),
        )
        for doubt in doubts(measurement.predicted, measurement.measured):
            logger.warning("memory.not_believed", model_id=measurement.key.model_id, doubt=doubt)
        body = _AS_JSON.dump_json(measurement).decode()
        self._redis.hset(keys.MEASURED, _field(measurement.key), body)

    def read(self) -> Mapping[LoadKey, Measurement]:
        """Read all of them; without Redis there are none, and one that cannot be read is left out: both are told."""
        try:
            bodies = self._redis.hgetall(keys.MEASURED)
        except (redis.RedisError, OSError) as error:
            logger.warning("memory.measurements_away", error=f"{type(error).__name__}: {error}")
            return {}
        found: dict[LoadKey, Measurement] = {}
        for field, body in sorted(bodies.items()):
            try:
                measurement = _AS_JSON.validate_json(body)
            except ValidationError as error:
                logger.warning("memory.unreadable_measurement", field=field, error=str(error))
            else:
                found[measurement.key] = measurement
        return found


def _field(key: LoadKey) -> str:
    return json.dumps(asdict(key), sort_keys=True)
