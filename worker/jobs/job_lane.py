"""
Answers the plain jobs of a model many at once: no thread for a job, and one round trip for a step of many.

A job that is not plain, and one whose run does not end with an answer, goes to JobRunner on a thread of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis

from common.errors import ShiftworkerError
from common.logs import get_logger
from common.schemas import JobRequest, Ledger, Outcome, Route, utc_now
from worker.delivery.lane import Lane, Run
from worker.delivery.redis_steps import Begun, Ended, RedisSteps
from worker.engines.base import Channel, JobStopped, Read
from worker.jobs.runner import JobRunner, Ran
from worker.jobs.seats import Seat

logger = get_logger(__name__)

_TICK_S = 0.25  # how much longer than its time limit a job may run
_SHOWN_CHARS = 200  # of an answer, in Flower


@dataclass(kw_only=True, eq=False)
class _Job:
    """One job on its way through the lane."""

    run: Run
    request: JobRequest
    route: Route
    channel: Channel
    place: ExitStack  # holds its model ready
    seat: Seat
    started: datetime = field(default_factory=utc_now)
    ledger: Ledger = field(default_factory=Ledger)
    expires_at: float = 0.0  # monotonic
    expire: Callable[[], object] = lambda: None

    @property
    def id(self) -> str:
        return self.run.task_id

    def leave(self) -> None:
        """Go the ordinary way."""
        self.place.close()
        self.run.ordinary()


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """What an engine gave back."""

    job: _Job
    read: Read

    def fall_back(self) -> None:
        """Go the ordinary way."""
        self.job.place.close()
        self.job.run.fall_back()


class JobLane:
    """The work of the generate task's lane."""

    def __init__(self, runner: JobRunner, steps: RedisSteps, *, hostname: str) -> None:
        self._runner = runner
        self._steps = steps
        self._hostname = hostname
        self._asked: dict[str, _Job] = {}  # in an engine, by job id
        self._looked_at = 0.0
        self.lane = Lane("job-lane", self._work, tick_s=_TICK_S)

    def _work(self, items: Sequence[Run | _Answer]) -> None:
        self._end([item for item in items if isinstance(item, _Answer)])
        entered = [job for item in items if isinstance(item, Run) and (job := self._enter(item)) is not None]
        if entered:
            try:
                self._begin(entered)
            except Exception:
                for job in entered:
                    if job.id not in self._asked:
                        job.place.close()  # else a switch would wait for it for ever
                raise
        self._expire(now=time.monotonic())

    def _enter(self, run: Run) -> _Job | None:
        """Hold the job's model ready; None if the job goes the ordinary way."""
        place = ExitStack()
        try:
            body, chosen = run.args
            request, route = JobRequest.parse(body), Route.model_validate(chosen)
            channel = self._runner.channel(route)
            late = request.deadline is not None and utc_now() >= request.deadline
            if channel is None or late or self._runner.runs(run.task_id) or run.signal.reason is not None:
                run.ordinary()
                return None
            seat = place.enter_context(self._runner.enter(run.task_id, request, route, run.signal, run.delivery))
        except (ShiftworkerError, ValueError, TypeError):
            place.close()
            run.ordinary()
            return None
        return _Job(run=run, request=request, route=route, channel=channel, place=place, seat=seat)

    def _begin(self, jobs: Sequence[_Job]) -> None:
        """Start an attempt of each and ask its engine."""
        try:
            begun = self._steps.begin({job.id: job.run.delivery for job in jobs}, hostname=self._hostname)
        except redis.RedisError:
            for job in jobs:
                job.leave()
            return
        with ExitStack() as sent:
            for channel in {id(job.channel): job.channel for job in jobs}.values():
                sent.enter_context(channel.together())
            for job in jobs:
                if (found := begun[job.id]) is None:
                    job.leave()
                    continue
                job.run.accepted()
                self._ask(job, found)

    def _ask(self, job: _Job, begun: Begun) -> None:
        queued_at = None if begun.queued_at is None else datetime.fromtimestamp(begun.queued_at, UTC)
        job.ledger = self._runner.ledger(job.route, attempt=begun.attempt, queued_at=queued_at, started=job.started)
        call = self._runner.call(job.id, job.request, job.route, attempt=begun.attempt, started=job.started)
        job.expires_at = time.monotonic() + call.timeout_s
        self._asked[job.id] = job
        try:
            job.expire = job.channel.ask(call, job.run.signal, lambda read: self.lane.put(_Answer(job=job, read=read)))
        except (ShiftworkerError, JobStopped) as error:
            self.lane.put(_Answer(job=job, read=_raising(error)))

    def _end(self, answers: Sequence[_Answer]) -> None:
        """Store what came of each."""
        if not answers:
            return
        ended: list[tuple[_Answer, Outcome]] = []
        for answer in answers:
            job = answer.job
            self._asked.pop(job.id, None)
            try:
                with job.place:
                    completion = answer.read()
                ended.append((answer, self._runner.answered(job.id, job.request, job.ledger, completion)))
            except (ShiftworkerError, JobStopped):
                self._leave_the_end(answer)
        try:
            if any(answer.job.request.stream for answer, _ in ended):
                self._runner.tokens.flush()  # before the end is stored: nothing is added to a stream behind it
            stored = self._steps.end(
                [
                    Ended(
                        delivery=answer.job.run.delivery,
                        outcome=outcome,
                        parent_id=answer.job.run.headers.get("parent_id"),
                    )
                    for answer, outcome in ended
                ]
            )
        except redis.RedisError:
            for answer, _ in ended:
                self._leave_the_end(answer)
            return
        for (answer, outcome), first in zip(ended, stored, strict=True):
            if first:
                logger.info("jobs.ended", job_id=outcome.job_id, state=outcome.state, model_id=outcome.ledger.model)
                answer.job.run.succeeded(repr(outcome.answer)[:_SHOWN_CHARS])
            else:
                self._leave_the_end(answer)

    def _leave_the_end(self, answer: _Answer) -> None:
        """Have JobRunner end the job, with what its engine gave back."""
        job = answer.job
        ran = Ran(
            job_id=job.id,
            request=job.request,
            ledger=job.ledger,
            stop=job.run.signal,
            read=answer.read,
            company=job.seat.company,
        )
        self._runner.leave_the_end(job.run.delivery, ran)
        job.run.ordinary()

    def _expire(self, *, now: float) -> None:
        """Give up what has taken longer than it may."""
        if now - self._looked_at < _TICK_S:
            return
        self._looked_at = now
        for job in list(self._asked.values()):
            if now >= job.expires_at:
                job.expire()


def _raising(error: ShiftworkerError | JobStopped) -> Read:
    def read() -> Any:
        raise error

    return read
