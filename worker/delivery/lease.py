"""
The lease: "I live, and these deliveries are mine", said every few seconds; and what the dead held goes back.

One thread per process, with a Redis connection of its own, so that it goes on while the broker's
connection is being repaired. Three things in a beat:

1. Renew    `shiftworker:lease:<owner>` lives `lease_s`; the deliveries in flight here get a new time.
2. Sweep    A delivery whose owner's lease is gone goes back to the head of its queue, and its job hears of the death;
            so does one of our own that nothing here holds any more (it could not be given back while Redis was
            away, say), and that is nobody's death.
3. Backstop A delivery without an owner, popped by a stock transport, goes back after the visibility timeout.

A delivery goes back only when two sweeps, a beat apart, found the same: after an outage of Redis every lease
has run out, and the living get one beat to renew. Times are Redis's own: the clocks of several machines need
not agree.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import redis
from celery import Celery
from celery.worker import state

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.transport import deliveries_in_flight, give_back
from worker.delivery.deaths import Deaths
from worker.delivery.pool import leaving

logger = get_logger(__name__)

_BEATS_PER_LEASE = 3  # two beats may be lost before the lease runs out


def held_here() -> set[str]:
    """Delivery tags this process answers for: held by an open channel, or still running after its channel."""
    tags = deliveries_in_flight()
    while True:
        try:
            # On a reconnect Celery forgets what it had reserved; what runs by then is only among the active ones.
            requests = {*state.reserved_requests, *state.active_requests}
            return tags | {request.message.delivery_tag for request in requests if not request.acknowledged}
        except RuntimeError:  # changed while we looked
            continue


class Lease(threading.Thread):
    """Keeps one process's lease and sweeps up after the others'."""

    def __init__(
        self,
        *,
        app: Celery,
        client: RedisClient,
        deaths: Deaths,
        owner: str,
        lease_s: float,
        visibility_timeout_s: float,
        held: Callable[[], set[str]] = held_here,
    ) -> None:
        super().__init__(name="lease", daemon=True)
        self._app = app
        self._redis = client
        self._deaths = deaths
        self._owner = owner
        self._lease_s = lease_s
        self._visibility_timeout_s = visibility_timeout_s
        self._held = held
        self._ending = threading.Event()
        self._suspects: set[tuple[str, str]] = set()  # a delivery and its owner, at the last sweep

    def run(self) -> None:
        """Beat until `end` is called; an unreachable Redis costs a beat, never the thread."""
        while True:
            try:
                seconds, microseconds = self._redis.time()
                now = seconds + microseconds / 1e6
                self.renew(now=now)
                self.sweep(now=now)
            except (redis.RedisError, OSError) as error:
                logger.warning("delivery.lease_beat_missed", error=str(error))
            except Exception:  # without this thread a process that lives is taken for dead
                logger.exception("delivery.lease_beat_failed")
            if self._ending.wait(self._lease_s / _BEATS_PER_LEASE):
                return

    def end(self) -> None:
        """Give up the lease: what this process still holds may be taken back at once."""
        self._ending.set()
        try:
            self._redis.delete(keys.lease(self._owner))
        except (redis.RedisError, OSError) as error:
            logger.info("delivery.lease_left_to_expire", error=str(error))

    def renew(self, *, now: float) -> None:
        """Say that this process lives, and which deliveries it works on."""
        held = self._held()
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.set(keys.lease(self._owner), "1", px=int(self._lease_s * 1000))
            if held:
                pipe.zadd(keys.UNACKED_INDEX, dict.fromkeys(held, now), xx=True)
            pipe.execute()
        self._deaths.none_yet(self._owner, leaving=leaving.is_set())

    def sweep(self, *, now: float) -> int:
        """Give back what the dead held and what this process forgot; returns how many deliveries moved."""
        owners: dict[str, str] = self._redis.hgetall(keys.UNACKED_OWNER)
        held, silent = self._held(), self._silent(set(owners.values()))
        suspects = {
            (tag, owner)
            for tag, owner in owners.items()
            if owner in silent or (owner == self._owner and tag not in held)
        }
        lost, self._suspects = suspects & self._suspects, suspects
        overdue = self._redis.zrangebyscore(keys.UNACKED_INDEX, 0, now - self._visibility_timeout_s)
        lost |= {(tag, "") for tag in overdue if tag not in owners}
        for dead in {owner for _, owner in lost} - {self._owner, ""}:
            self._deaths.note(dead, [tag for tag, owner in owners.items() if owner == dead])
        moved = self._give_back(lost) if lost else 0
        if moved:
            logger.warning("delivery.taken_back", deliveries=moved, owners=sorted({owner for _, owner in lost}))
        return moved

    def _silent(self, owners: set[str]) -> set[str]:
        """The other owners without a lease now."""
        names = sorted(owners - {self._owner})
        leases = self._redis.mget([keys.lease(name) for name in names]) if names else []
        return {name for name, lease in zip(names, leases, strict=True) if lease is None}

    def _give_back(self, lost: Iterable[tuple[str, str]]) -> int:
        moved = 0
        with self._app.connection_for_write() as connection:
            channel: Any = connection.default_channel
            for tag, owner in sorted(lost):
                try:
                    moved += give_back(channel, tag, owner=owner)
                except (redis.RedisError, OSError):
                    raise
                except Exception:  # whatever it is, the others go back
                    logger.exception("delivery.not_given_back", delivery=tag)
        return moved
