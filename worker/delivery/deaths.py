"""
A process has died: which jobs did it run, and how many? Noted under each, so that one that kills its workers is found.

Only a job whose attempt had begun is noted: what had merely been fetched did nothing. A process that had been told to
leave has not died of a job, however it ended then.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from common import keys
from common.backlog import job_id_of
from common.errors import WorkerDied
from common.job_store import JobStore
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import Fault, utc_now

logger = get_logger(__name__)

_KEPT_S = 24 * 3600  # what is known of a death: longer than it takes until somebody is there to ask


class Deaths:
    """Tells jobs of the death of the process that ran them. Every method may raise redis.RedisError."""

    def __init__(self, client: RedisClient, store: JobStore) -> None:
        self._redis = client
        self._store = store

    def note(self, owner: str, tags: Sequence[str]) -> None:
        """Note that *owner* has died with the deliveries *tags* in hand; before any of them goes back."""
        # As bytes: whatever somebody pushed, it must not stop who looks.
        entries = self._redis.execute_command("HMGET", keys.UNACKED, *tags, NEVER_DECODE=True)
        jobs = map(_job_of, entries)
        deliveries = {job_id: tag for tag, job_id in zip(tags, jobs, strict=True) if job_id is not None}
        running = self._store.running(deliveries)
        if not running:
            return
        company = self._company(owner, len(running))
        name = owner.rsplit(".", 2)[0]  # behind it the process and the start
        ran = "this job alone" if company == 1 else f"{company} jobs at once, this one among them"
        for job_id, attempt in running.items():
            if not company:
                self._store.hand_back(job_id, attempt=attempt)
                continue
            fault = Fault(
                at=utc_now(),
                worker=name,
                attempt=attempt,
                kind=WorkerDied.__name__,
                message=f"The worker {name} was gone; it ran {ran}.",
                company=company,
            )
            if self._store.lose(job_id, fault):
                logger.warning("delivery.worker_died", job_id=job_id, worker=name, company=company)

    def none_yet(self, owner: str, *, leaving: bool) -> None:
        """*owner* lives, whoever took it for dead; of one that was told to leave, the end is nobody's fault."""
        if leaving:
            self._redis.set(keys.death(owner), 0, ex=_KEPT_S)
        else:
            self._redis.delete(keys.death(owner))

    def _company(self, owner: str, running: int) -> int:
        """How many it ran when it died. Several look, and jobs go back meanwhile: the first one's number counts."""
        with self._redis.pipeline() as pipe:
            pipe.set(keys.death(owner), running, nx=True, ex=_KEPT_S)
            pipe.get(keys.death(owner))
            return int(pipe.execute()[1])


def _job_of(entry: bytes | None) -> str | None:
    """Whose job a delivery is; None = it has gone, or is no message, so that nothing ran by it."""
    try:
        return None if entry is None else job_id_of(json.loads(entry.decode(errors="replace"))[0])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
