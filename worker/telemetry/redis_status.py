"""
Publishes what a worker offers and how it is: to Redis, with lifetimes that say "alive".
"""

from __future__ import annotations

from common import keys
from common.redis_client import RedisClient
from common.schemas import HardwareStatus, Offer, SwitchRecord

_SWITCHES_KEPT = 50


class RedisStatus:
    """One worker's side of the keys in common/keys.py."""

    def __init__(self, client: RedisClient, *, ttl_s: float, stream_length: int) -> None:
        self._redis = client
        self._ttl_s = ttl_s
        self._stream_length = stream_length

    def publish(self, status: HardwareStatus) -> None:
        """Set the worker's key, tell the channel, and add to the stream."""
        body = status.model_dump_json()
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(keys.status(status.worker), body, px=int(self._ttl_s * 1000))
            pipe.publish(keys.STATUS_CHANNEL, body)
            pipe.xadd(keys.STATUS_STREAM, {"status": body}, maxlen=self._stream_length, approximate=True)
            pipe.execute()

    def offer(self, offer: Offer) -> None:
        """Tell the routers what this worker can serve; kept when the worker goes away."""
        self._redis.hset(keys.FLEET, offer.worker, offer.model_dump_json())

    def record(self, worker: str, switch: SwitchRecord) -> None:
        """Keep a switch that ended."""
        with self._redis.pipeline() as pipe:
            pipe.lpush(keys.switch_log(worker), switch.model_dump_json())
            pipe.ltrim(keys.switch_log(worker), 0, _SWITCHES_KEPT - 1)
            pipe.execute()

    def next_epoch(self, worker: str) -> int:
        """The number of the next switch asked of *worker*; grows over restarts."""
        return int(self._redis.incr(keys.switch_epoch(worker)))

    def goodbye(self, worker: str) -> None:
        """The worker leaves: its status ends now, its offer stays."""
        self._redis.delete(keys.status(worker))
