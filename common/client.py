"""
The producer's side: submit a job, ask how it is, follow its tokens, wait for its outcome, cancel it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from celery import states
from celery.exceptions import TimeoutError as CeleryTimeout
from celery.result import AsyncResult

from common import keys
from common.backlog import RedisBacklog
from common.celery_app import create_producer_app
from common.door import Door
from common.errors import JobCancelled, NotEndedYet, RedisUnavailable, ShiftworkerError
from common.estimates import Estimates
from common.fleet import read_offers, read_statuses
from common.job_stream import START, aread_stream, read_stream
from common.redis_client import connect, connect_async, ping, without_password
from common.redis_job_store import RedisJobStore
from common.schemas import (
    Estimate,
    HardwareStatus,
    JobRequest,
    JobState,
    JobView,
    Ledger,
    Offer,
    Outcome,
    StreamEvent,
)
from common.sender import Sender
from common.settings import Settings
from common.waiting_jobs import RedisWaitingJobs, cancelled_waiting

_REACHED_S = 1.0  # after a job was taken: to send fails fast enough, without asking first
_AT_ONCE = 200  # messages in a round trip: the first jobs are routed while the next are on their way


class JobClient:
    """
    Sends jobs to Shiftworker and gives back their outcomes; safe to share between threads.

    Parameters
    ----------
    redis_url
        Where Redis is; None = REDIS_URL, or the local one.

    Raises
    ------
    BadSetting
        A setting in the environment is not valid.
    """

    def __init__(self, redis_url: str | None = None) -> None:
        settings = Settings.from_env()
        if redis_url is not None:
            settings = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": redis_url})})
        self._url = settings.redis.url
        self._app = create_producer_app(settings)
        # A quarter of a submit's time; Flower hears of the job a moment later, from the router.
        self._app.conf.task_send_sent_event = False
        self._redis = connect(self._url)
        self._store = RedisJobStore(self._redis, ttl_s=settings.job.result_ttl_s)
        self._waiting = RedisWaitingJobs(self._redis, ttl_s=settings.job.result_ttl_s)
        self._backlog = RedisBacklog(self._redis)
        self._estimates = Estimates(self._redis)
        self._reached_at = -_REACHED_S  # when Redis last took a job; monotonic
        self._door = Door(self._redis, settings.limit)
        self._sender = Sender(self._app, self._store, broker=settings.broker.url or self._url)

    def submit(self, request: Mapping[str, Any] | JobRequest, *, job_id: str | None = None) -> str:
        """
        Put a job on the queue; returns its id, which is also the id of Celery's `AsyncResult`.

        *request* is an OpenAI body with our few fields (see JobRequest). A *job_id* of your own makes a
        repeated submit harmless: a job that has ended is not run again.

        Raises
        ------
        InvalidRequest
            The body is not valid; nothing was sent.
        OverLimit, QueueFull
            It is too large, or too much waits already (`retry_after_s`); nothing was sent.
        RedisUnavailable
            Nobody answers at the Redis address; nothing was sent.
        RedisFull
            Redis has no memory for it; nothing was sent.
        """
        (sent,) = self.submit_many([request], job_ids=[job_id] if job_id else None)
        return sent

    def submit_many(
        self, requests: Iterable[Mapping[str, Any] | JobRequest], *, job_ids: Sequence[str] | None = None
    ) -> list[str]:
        """
        Put jobs on the queue, some hundred in a round trip; returns their ids in the order of *requests*.

        *job_ids*, one for each request, are as `job_id` of `submit`.

        Raises
        ------
        InvalidRequest, OverLimit, QueueFull
            As `submit`, for the first job that is refused; none was sent.
        RedisUnavailable
            Nobody answers at the Redis address. If Redis went away in the middle, some of the jobs may have been sent.
        RedisFull
            Redis has no memory for all of them; some may have been sent.
        """
        parsed = [given if isinstance(given, JobRequest) else JobRequest.parse(dict(given)) for given in requests]
        ids = [str(uuid.uuid4()) for _ in parsed] if job_ids is None else list(job_ids)
        jobs = list(zip(ids, parsed, strict=True))
        if time.monotonic() - self._reached_at > _REACHED_S:
            ping(self._redis, self._url)
        try:
            for request in parsed:
                self._door.check(request)
        except redis.RedisError as error:
            raise RedisUnavailable(
                f"Nothing was sent: Redis at {without_password(self._url)} went away ({error}). Submit again."
            ) from error
        for start in range(0, len(jobs), _AT_ONCE):
            self._sender.send(jobs[start : start + _AT_ONCE])
            self._reached_at = time.monotonic()
        return ids

    def wait(self, job_id: str, timeout: float | None = None) -> Outcome:
        """
        Wait for the job's outcome, *timeout* seconds at most (None = as long as it takes).

        Raises
        ------
        Refused, Stopped, SetAside, InternalError
            The job ended without an answer; the error is the one that its outcome names.
        NotEndedYet
            It has not ended yet. It goes on; wait again, or cancel it.
        """
        outcome = self.result(job_id) or self._wait(job_id, timeout)
        if outcome.error is not None:
            raise outcome.error.as_exception()
        return outcome

    def _wait(self, job_id: str, timeout: float | None) -> Outcome:
        began = time.monotonic()
        pending: AsyncResult[Any] = self._app.AsyncResult(job_id)
        try:
            pending.get(timeout=timeout, propagate=False)
        except CeleryTimeout:
            if (outcome := self.result(job_id)) is not None:  # of record before Celery has its copy
                return outcome
            raise NotEndedYet(
                f"Job {job_id} has not ended after {time.monotonic() - began:.0f} s; it is "
                f"{self.status(job_id).state}. It goes on: wait again, or cancel it."
            ) from None
        return self.result(job_id) or _read_copy(job_id, pending.state, pending.result)

    def stream(self, job_id: str, after: str = START, timeout: float | None = None) -> Iterator[StreamEvent]:
        """
        Follow a job that was sent with `stream: true`: its tokens as they are made, and at last its end.

        Each event has a position; a reader that was cut off goes on with *after* = the last one it had. A `reset`
        says that an attempt begins and the tokens before it are void. The outcome is whole in any case.

        Raises
        ------
        InvalidRequest
            *after* is no position.
        NotEndedYet
            No event for *timeout* seconds (None = as long as it takes), and the job has not ended.
        RedisUnavailable
            Redis went away.
        """
        with self._redis_errors(job_id):
            yield from read_stream(self._redis, job_id, after=after, timeout_s=timeout)

    async def astream(
        self,
        job_id: str,
        after: str = START,
        timeout: float | None = None,  # noqa: ASYNC109 - of each silence
    ) -> AsyncIterator[StreamEvent]:
        """Follow a job as `stream` does, without blocking the event loop."""
        client = connect_async(self._url)
        try:
            with self._redis_errors(job_id):
                async for event in aread_stream(client, job_id, after=after, timeout_s=timeout):
                    yield event
        finally:
            await client.aclose()

    @contextmanager
    def _redis_errors(self, job_id: str) -> Iterator[None]:
        try:
            yield
        except redis.RedisError as error:
            raise RedisUnavailable(
                f"The stream of job {job_id} broke off: Redis at {without_password(self._url)} went away ({error}). "
                "Read it again with after=the position of the last event."
            ) from error

    def result(self, job_id: str) -> Outcome | None:
        """The outcome of record, answered or not; None while the job has not ended, or is forgotten."""
        return self._store.outcome(job_id)

    def status(self, job_id: str) -> JobView:
        """What is known of the job now; UNKNOWN until the router has seen it."""
        view = self._store.view(job_id)
        if view.state is JobState.ROUTED and view.model is not None:
            view = view.model_copy(update={"ahead": self._backlog.rank(keys.model_queue(view.model), job_id)})
        return view.model_copy(update={"finish": self._estimates.of_job(view)})

    def estimate(self, job: str | Mapping[str, Any] | JobRequest) -> Estimate | None:
        """
        Say when *job* will have ended, switches ahead of it included: by its id, or a request that would be sent now.

        The range holds for 8 of 10 jobs. None = nobody knows: the job has ended or is not routed yet, no worker is
        there, or a model whose turn comes before was never measured. For a request that leaves the choice to the
        router, the range covers the models that it may choose, but for those of which nobody knows: `unknown` names
        them. Once sent and routed, it is that of the chosen one.

        Raises
        ------
        InvalidRequest
            The body is not valid.
        """
        if isinstance(job, str):
            return self.status(job).finish
        return self._estimates.of_request(job if isinstance(job, JobRequest) else JobRequest.parse(dict(job)))

    async def aestimate(self, job: str | Mapping[str, Any] | JobRequest) -> Estimate | None:
        """Say what `estimate` says, without blocking the event loop."""
        return await asyncio.to_thread(self.estimate, job)

    async def astatus(self, job_id: str) -> JobView:
        """Say what `status` says, without blocking the event loop."""
        return await asyncio.to_thread(self.status, job_id)

    def cancel(self, job_id: str) -> bool:
        """
        Ask for the job to stop; False if it has ended already.

        A waiting job never runs; a running one is aborted in the engine within a second.
        """
        if self._store.outcome(job_id) is not None:
            return False
        self._store.ask_cancel(job_id)
        if self._waiting.end([cancelled_waiting(self._store.view(job_id))]) == [True]:
            return True
        ended = self._store.outcome(job_id)
        return ended is None or ended.state is JobState.CANCELLED

    def hardware(self) -> tuple[HardwareStatus, ...]:
        """How every worker that is alive is."""
        return read_statuses(self._redis)

    def offers(self) -> tuple[Offer, ...]:
        """What every worker offers, also those now away."""
        return read_offers(self._redis)

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()
        try:
            self._redis.close()
        except redis.RedisError:  # it is gone already
            return


def _read_copy(job_id: str, state: str, result: Any) -> Outcome:
    """
    Read Celery's copy of an end that we have no record of: it expired a moment before the copy.

    A task that somebody revoked never had a record.
    """
    if state == states.SUCCESS:
        response = dict(result)
        ledger = Ledger.model_validate(response.pop("ledger"))
        return Outcome(job_id=job_id, state=JobState.ANSWERED, response=response, ledger=ledger)
    if state == states.REVOKED:
        raise JobCancelled(f"Job {job_id} was revoked.")
    raise result if isinstance(result, ShiftworkerError) else ShiftworkerError(str(result))
