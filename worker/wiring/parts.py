"""
What the router and the worker are both made of: names, connections, and a way to end a job that nobody can read.
"""

from __future__ import annotations

import os
import uuid
from socket import gethostname

from celery import Celery

from common.errors import ShiftworkerError
from common.redis_client import RedisClient, connect, wait_until_there
from common.redis_job_store import RedisJobStore
from common.schemas import Ledger
from common.settings import Settings
from common.waiting_jobs import RedisWaitingJobs
from worker.delivery.deaths import Deaths
from worker.delivery.lease import Lease
from worker.delivery.revoke import remember_revokes
from worker.jobs.deadlines import DeadlineSweep
from worker.jobs.failures import outcome_of


def worker_name(settings: Settings) -> str:
    """What this worker is called in Redis and in `shiftworker status`."""
    return settings.worker.name or gethostname().split(".")[0]


def process_name(role: str, settings: Settings) -> str:
    """What Celery and Flower call a process of ours."""
    return f"{role}@{worker_name(settings)}"


def owner_of(name: str) -> str:
    """A name for this one start of this process: deliveries of an earlier start are another owner's."""
    return f"{name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"


def open_redis(settings: Settings) -> tuple[RedisClient, RedisClient]:
    """A client for what may be missed, and a patient one for what must not; waits until Redis is there."""
    client = connect(settings.redis.url)
    wait_until_there(client, settings.redis.url)
    return client, connect(settings.redis.url, patient=True)


def lease_of(app: Celery, settings: Settings, owner: str) -> Lease:
    """What tells the others that *owner* lives."""
    client = connect(settings.redis.url)
    return Lease(
        app=app,
        client=client,
        deaths=Deaths(client, RedisJobStore(client, ttl_s=settings.job.result_ttl_s)),
        owner=owner,
        lease_s=settings.delivery.lease_s,
        visibility_timeout_s=settings.delivery.visibility_timeout_s,
    )


def watch_the_waiting(settings: Settings, store: RedisJobStore) -> DeadlineSweep:
    """What ends jobs that nobody has begun: when they are revoked, and, while it is entered, at their deadlines."""
    client = connect(settings.redis.url)
    waiting = RedisWaitingJobs(client, ttl_s=settings.job.result_ttl_s, max_bytes=settings.job.result_max_bytes)
    remember_revokes(store, waiting, lambda job_id, error: store.finish(outcome_of(error, job_id, Ledger())))
    return DeadlineSweep(client, store, waiting)


def refuse(app: Celery, store: RedisJobStore, job_id: str, error: ShiftworkerError) -> None:
    """End a job whose message nobody can read: its producer hears of it."""
    kept = store.finish(outcome_of(error, job_id, Ledger()))
    if kept.error is not None:
        app.backend.mark_as_failure(job_id, kept.error.as_exception())
