"""
Refuses a job on the producer's side, before anything is queued, by what was lately seen of Redis.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from common import keys
from common.errors import QueueFull
from common.may_enter import Held, check_body, check_intake, check_share
from common.redis_client import RedisClient
from common.schemas import JobRequest
from common.settings import LimitSettings

_SEEN_S = 0.25  # what was seen is good for so long: a look now and then, and no round trip for each job
_MOST_TENANTS = 1000  # remembered


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What waited at a moment, and what was let in since."""

    at: float
    unrouted: int
    held: Held


class Door:
    """
    Lets jobs in as the limits say; safe to share between threads.

    It is a courtesy to the producer: the router counts exactly, and refuses what comes too close on another's heels.
    """

    def __init__(
        self, client: RedisClient, limits: LimitSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._redis = client
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}

    def check(self, request: JobRequest) -> None:
        """
        See that the job may enter.

        Raises
        ------
        OverLimit, QueueFull
            See may_enter.py.
        redis.RedisError
            Redis does not say what waits.
        """
        check_body(request, self._limits)
        with self._lock:
            seen = self._seen.get(request.tenant)
            if seen is None or self._clock() - seen.at > _SEEN_S:
                seen = self._look(request.tenant)
            try:
                self._check(request, seen)
            except QueueFull:  # by what has come since that look; and what has gone?
                seen = self._look(request.tenant)
                self._check(request, seen)
            if len(self._seen) >= _MOST_TENANTS:
                self._seen.clear()
            held = replace(seen.held, jobs=seen.held.jobs + 1, bytes=seen.held.bytes + request.size_bytes)
            self._seen[request.tenant] = replace(seen, unrouted=seen.unrouted + 1, held=held)

    def _check(self, request: JobRequest, seen: _Seen) -> None:
        check_intake(seen.unrouted, self._limits)
        check_share(request, seen.held, self._limits)

    def _look(self, tenant: str) -> _Seen:
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hmget(keys.TENANTS, f"jobs {tenant}", f"bytes {tenant}", f"gap {tenant}")
            for name in keys.lists_of(keys.SUBMIT_QUEUE):
                pipe.llen(name)
            (jobs, size, gap), *lengths = pipe.execute()
        held = Held(jobs=int(jobs or 0), bytes=int(size or 0), gap_s=float(gap) if gap else None)
        return _Seen(at=self._clock(), unrouted=sum(lengths), held=held)
