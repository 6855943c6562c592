"""
Puts jobs on the producers' queue: a message for each, and many messages in one round trip.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import redis
from celery import Celery
from kombu.exceptions import OperationalError

from common import keys
from common.errors import RedisFull, RedisUnavailable, ShiftworkerError
from common.job_store import JobStore
from common.redis_client import without_password
from common.schemas import JobRequest
from common.transport import Channel

_RETRY = {"max_retries": 3, "interval_start": 0.1, "interval_step": 0.3, "interval_max": 1.0}


class Sender:
    """Sends jobs with *app*; *broker* is its URL, for people. Safe to share between threads."""

    def __init__(self, app: Celery, store: JobStore, *, broker: str) -> None:
        self._app = app
        self._store = store
        self._broker = without_password(broker)

    def send(self, jobs: Sequence[tuple[str, JobRequest]]) -> None:
        """
        Send a message for each of *jobs* (id, request), all together.

        Raises
        ------
        RedisUnavailable, RedisFull
            Some of them may have been sent.
        """

        def publish() -> None:
            channel = producer.channel  # RabbitMQ's has no way to send many in one piece
            with channel.together() if isinstance(channel, Channel) else nullcontext():
                for number, (job_id, request) in enumerate(jobs):
                    self._app.send_task(
                        keys.SUBMIT_TASK,
                        args=[request.model_dump(mode="json", exclude_none=True)],
                        task_id=job_id,
                        queue=keys.SUBMIT_QUEUE,
                        producer=producer,
                        declare=[] if number else None,  # the queue, with the first of them
                        retry=False,  # of a message; all of them together are tried again
                        argsrepr=f"({request.kind.name.lower()}, {len(request.text)} characters)",
                        kwargsrepr="{}",
                    )

        try:
            for job_id, request in jobs:
                if request.deadline is not None:  # it may pass before the router has read the job
                    self._store.note_deadline(job_id, request.deadline)
            with self._app.producer_or_acquire() as producer:
                producer.connection.ensure(producer, publish, **_RETRY)()
        except (OperationalError, redis.RedisError) as error:
            raise self._not_sent([job_id for job_id, _ in jobs], error) from error

    def _not_sent(self, job_ids: Sequence[str], error: Exception) -> ShiftworkerError:
        what, again = "The job was", f"it again with job_id={job_ids[0]!r}"
        if len(job_ids) > 1:
            what, again = f"{len(job_ids)} jobs were", "them again with the same job_ids"
        if isinstance(error.__cause__ or error, redis.exceptions.OutOfMemoryError):
            return RedisFull(
                f"{what} not sent: {self._broker} is full ({error}). Try again when jobs have ended and answers "
                "have expired, or give Redis more memory (maxmemory)."
            )
        return RedisUnavailable(
            f"{what} not sent: {self._broker} went away ({error}). Submit {again}: "
            "should the first message have arrived after all, the job runs only once."
        )
