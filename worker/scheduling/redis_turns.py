"""
Tells the other workers which models this one serves or loads, and hears the same of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from common import keys
from common.fleet import read_alive, read_offers
from common.redis_client import RedisClient

_CHANGES = "#"  # field of the hash that is no worker's

# KEYS: the turns. ARGV: worker, its models, how often the turns had changed when it looked; without that it is not
# asked. Returns 1, or 0 if somebody else's turn has changed since.
_SET = """
if ARGV[3] and (redis.call('HGET', KEYS[1], '#') or '0') ~= ARGV[3] then return 0 end
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
  redis.call('HINCRBY', KEYS[1], '#', 1)
end
return 1
"""


class RedisTurns:
    """
    The hash keys.TURNS, as one worker uses it: it looks, decides, and claims.

    A claim is refused if another worker has changed its turn after the look, so that two that decide at the same
    moment do not load the same model: the later one looks again.
    """

    def __init__(self, client: RedisClient, worker: str) -> None:
        self._redis = client
        self._worker = worker
        self._set = client.register_script(_SET)
        self._changes = "0"

    def look(self, models: Iterable[str]) -> Mapping[str, Sequence[str]]:
        """Say that this worker serves or loads *models*; give those of each other worker that is alive."""
        mine = _text(models)
        told: dict[str, str] = self._redis.hgetall(keys.TURNS)
        if told.get(self._worker) != mine:
            self._set(keys=[keys.TURNS], args=[self._worker, mine])
            told = self._redis.hgetall(keys.TURNS)
        self._changes = told.pop(_CHANGES, "0")
        told.pop(self._worker, None)
        alive = read_alive(self._redis, told) if told else frozenset()
        return {worker: json.loads(told[worker]) for worker in sorted(alive)}

    def claim(self, models: Iterable[str]) -> bool:
        """Say that this worker is about to serve *models*; False if another turn has changed since the last look."""
        return bool(self._set(keys=[keys.TURNS], args=[self._worker, _text(models), self._changes]))

    def offered(self) -> Mapping[str, frozenset[str]]:
        """The models that each worker can serve, by its last offer; those now away too."""
        return {offer.worker: frozenset(model.id for model in offer.models) for offer in read_offers(self._redis)}

    def goodbye(self) -> None:
        """The worker leaves."""
        with self._redis.pipeline() as pipe:
            pipe.hdel(keys.TURNS, self._worker)
            pipe.hincrby(keys.TURNS, _CHANGES, 1)
            pipe.execute()


def _text(models: Iterable[str]) -> str:
    return json.dumps(sorted(models))
