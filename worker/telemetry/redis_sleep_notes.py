"""
Keeps how a worker's models sleep over its restarts: in one Redis hash, one value for each model and level.
"""

from __future__ import annotations

import json

import redis
from pydantic import TypeAdapter, ValidationError

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from worker.residency.sleep_notes import SleepNote

logger = get_logger(__name__)

_AS_JSON = TypeAdapter(SleepNote)


class RedisSleepNotes:
    """The hash of keys.sleep_notes of one worker."""

    def __init__(self, client: RedisClient, worker: str) -> None:
        self._redis = client
        self._key = keys.sleep_notes(worker)

    def save(self, note: SleepNote) -> None:
        """Keep *note* in the place of what was known; told if Redis is away: the switch under way goes on."""
        field = json.dumps([note.model_id, note.level])
        try:
            self._redis.hset(self._key, field, _AS_JSON.dump_json(note).decode())
        except (redis.RedisError, OSError) as error:
            logger.warning("residency.sleep_note_lost", note=field, error=f"{type(error).__name__}: {error}")

    def read(self) -> tuple[SleepNote, ...]:
        """Read all of them; without Redis there are none, and one that cannot be read is left out: both are told."""
        try:
            bodies = self._redis.hgetall(self._key)
        except (redis.RedisError, OSError) as error:
            logger.warning("residency.sleep_notes_away", error=f"{type(error).__name__}: {error}")
            return ()
        found: list[SleepNote] = []
        for field, body in sorted(bodies.items()):
            try:
                found.append(_AS_JSON.validate_json(body))
            except ValidationError as error:
                logger.warning("residency.unreadable_sleep_note", field=field, error=str(error))
        return tuple(found)
