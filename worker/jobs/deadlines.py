"""
Ends jobs whose deadline passes while they wait, when it passes and not when their turn comes.

The router writes each deadline into `keys.DEADLINES` as it routes the job, a producer's client as it submits it; the
end of the job takes it out. Every process of ours looks there: whichever dies, another one goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self

import redis

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.redis_job_store import RedisJobStore
from common.schemas import JobState, JobView, utc_now
from common.waiting_jobs import Ending, RedisWaitingJobs
from worker.jobs.failures import expired, outcome_of
from worker.jobs.unread import UnreadJobs

logger = get_logger(__name__)

_LOOK_EVERY_S = 0.25
_AT_ONCE = 500
# Whoever runs the job stops it at its deadline, and says so; by then he is dead or has lost his way to Redis.
_RUNNING_GRACE_S = 5.0


class DeadlineSweep(threading.Thread):
    """Looks for deadlines that have passed while it is entered; *clock* gives Unix seconds."""

    def __init__(
        self,
        client: RedisClient,
        store: RedisJobStore,
        waiting: RedisWaitingJobs,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        super().__init__(name="deadlines", daemon=True)
        self._redis = client
        self._store = store
        self._waiting = waiting
        self._unread = UnreadJobs(client, store)
        self._clock = clock
        self._ending = threading.Event()

    def run(self) -> None:
        """Sweep again and again; an unreachable Redis costs a sweep, never the thread."""
        while not self._ending.wait(_LOOK_EVERY_S):
            try:
                self._unread.note_deadlines()
                while self.sweep() == _AT_ONCE:
                    pass
            except (redis.RedisError, OSError) as error:
                logger.warning("deadlines.redis_away", problem=str(error))
            except Exception:
                logger.exception("deadlines.internal_error")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop after the sweep under way."""
        self._ending.set()
        self.join()

    def sweep(self) -> int:
        """End what is due; returns how many jobs that were."""
        now = self._clock()
        due = self._redis.zrangebyscore(keys.DEADLINES, "-inf", now, withscores=True, start=0, num=_AT_ONCE)
        if not due:
            return 0
        endings = [
            self._ending_of(view, deadline, now=now)
            for (_, deadline), view in zip(due, self._store.views([job_id for job_id, _ in due]), strict=True)
        ]
        ended = [ending for ending, now_ended in zip(endings, self._waiting.end(endings), strict=True) if now_ended]
        for ending in ended:
            logger.info("jobs.ended", job_id=ending.view.job_id, state=ending.outcome.state, model_id=ending.view.model)
        return len(ended)

    @staticmethod
    def _ending_of(view: JobView, deadline: float, *, now: float) -> Ending:
        silent = now > deadline + _RUNNING_GRACE_S
        when = "and whoever ran it is silent" if silent and view.state is JobState.RUNNING else "while the job waited"
        error = expired(datetime.fromtimestamp(deadline, UTC), when)
        ledger = view.ledger.model_copy(update={"finished_at": utc_now()})
        return Ending(view=view, outcome=outcome_of(error, view.job_id, ledger), running_too=silent)
