"""
What becomes of a job whose attempt gave no answer? It ends with an error, or there is another attempt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf

from common.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    EngineDied,
    EngineNotReady,
    EngineTimeout,
    JobCancelled,
    PoisonJob,
    PromptTooLong,
    SetAside,
    ShiftworkerError,
    TimeLimitExceeded,
    Unavailable,
)
from common.job_store import JobStore
from common.logs import get_logger
from common.schemas import ErrorBody, Fault, JobRequest, JobState, Ledger, Outcome, utc_now
from worker.engines.base import JobStopped, StopSignal
from worker.jobs.isolate import Again, isolate
from worker.residency.board import ResidencyBoard

logger = get_logger(__name__)

NOT_READY_PAUSE_S = 0.2  # before a job goes back to a queue that is about to be closed: no busy loop


class HandBack(Exception):
    """The job has no outcome yet; its message must go back to the head of its queue."""


class RouteAgain(Exception):
    """The job has no outcome yet; its model was loaded too short for it, and another one may not be."""


class StaysHere(Exception):
    """The job has no outcome yet; the cloud endpoint will not have it, so it waits for its own model."""


class DuplicateDelivery(Exception):
    """Another message with the same job is in flight; this copy must be dropped."""


@dataclass(frozen=True, kw_only=True)
class JobLimits:
    """What one job may take."""

    timeout_s: float  # in the engine, per attempt
    max_attempts: int  # that failed in an engine which lived on
    max_deaths: int = 2  # of an engine with this job alone in it
    max_worker_deaths: int = 3  # of a worker, likewise
    first_pause_s: float = 1.0  # before the attempt after one that failed; doubles


@dataclass(frozen=True, kw_only=True, eq=False)
class Attempt:
    """An attempt that gave no answer."""

    job_id: str
    request: JobRequest
    ledger: Ledger
    stop: StopSignal
    number: int | None  # None = it had not begun
    company: int | None  # how many were in the engine when it died; None = it did not


class Failures:
    """Judges attempts that gave no answer."""

    def __init__(self, *, store: JobStore, board: ResidencyBoard, limits: JobLimits) -> None:
        self._store = store
        self._board = board
        self._limits = limits

    def again(self, faults: Sequence[Fault]) -> Again:
        """What becomes of a job that has these faults."""
        limits = self._limits
        return isolate(
            faults,
            max_attempts=limits.max_attempts,
            max_deaths=limits.max_deaths,
            max_worker_deaths=limits.max_worker_deaths,
            first_pause_s=limits.first_pause_s,
        )

    def set_aside(self, job_id: str, faults: Sequence[Fault]) -> SetAside | None:
        """Give the error that a job with these faults ends with; None = there is another attempt."""
        again = self.again(faults)
        if not again.set_aside:
            return None
        last = faults[-1]
        error = AttemptsExhausted if last.company is None else PoisonJob
        return error(
            f"The job was set aside: {again.reason}, the last time with: {last.message} `shiftworker dead show "
            f"{job_id}` has its history, `shiftworker dead retry {job_id}` runs it again."
        )

    def end_of(self, attempt: Attempt, error: ShiftworkerError | JobStopped) -> ShiftworkerError:
        """
        Give the error that the job ends with.

        Raises
        ------
        HandBack, RouteAgain
            It does not end: there will be another attempt.
        """
        if isinstance(error, EngineNotReady):
            attempt.stop.wait(NOT_READY_PAUSE_S)
            raise self._handed_back(attempt) from None
        if isinstance(error, JobStopped):
            return self._stopped(attempt, error.reason)
        if isinstance(error, EngineDied) and attempt.stop.reason is not None:  # ended on purpose, its jobs told before
            return self._stopped(attempt, attempt.stop.reason)
        if isinstance(error, Unavailable):
            return self._fault(attempt, error)
        if isinstance(error, PromptTooLong):
            return self._too_long(attempt, error)
        return error

    def _fault(self, attempt: Attempt, error: Unavailable) -> ShiftworkerError:
        """What an engine's death or silence means for the job: another attempt, or the end."""
        job_id, request, ledger = attempt.job_id, attempt.request, attempt.ledger
        if request.deadline is not None and utc_now() >= request.deadline:
            return expired(request.deadline, "while the engine worked on it")
        if isinstance(error, EngineTimeout) and (request.time_limit or inf) <= self._limits.timeout_s:
            return self._time_limit(attempt, f"The job's time limit, {request.time_limit:g} s in the engine, is over")
        faults = self._store.add_fault(
            job_id,
            Fault(
                at=utc_now(),
                worker=ledger.worker or "",
                attempt=ledger.attempt,
                kind=error.kind,
                message=error.message,
                company=attempt.company,
            ),
        )
        if faults is None:  # another attempt has begun since
            raise HandBack
        again = self.again(faults)
        logger.warning(
            "jobs.fault", job_id=job_id, faults=len(faults), company=attempt.company, error=error.message,
            then=again.reason,
        )  # fmt: skip
        if (set_aside := self.set_aside(job_id, faults)) is not None:
            return set_aside
        handed_back = self._handed_back(attempt)
        attempt.stop.wait(again.pause_s)
        raise handed_back

    def _stopped(self, attempt: Attempt, reason: str) -> ShiftworkerError:
        """What a stop means for the job."""
        if reason == "cancelled":
            return cancelled(attempt.job_id)
        if reason == "time limit":
            return self._time_limit(attempt, "The time limit of the job's task is over")
        raise self._handed_back(attempt)

    def _time_limit(self, attempt: Attempt, what: str) -> TimeLimitExceeded:
        """The end, unless another attempt has begun since: this process was paused then, and the job took no time."""
        if attempt.number is not None and self._store.view(attempt.job_id).attempts != attempt.number:
            raise HandBack
        return TimeLimitExceeded(f"{what}; it was stopped there.")

    def _too_long(self, attempt: Attempt, error: PromptTooLong) -> PromptTooLong:
        """
        What a prompt that is too long means for the job: the end, unless its model is shorter than it was offered.

        Then the router knows by now, and is asked once more; the second time nobody has a longer one.
        """
        resident = self._board.read().resident(attempt.ledger.model or "")
        if resident is None or resident.max_model_len is None:
            return error
        if attempt.number == 1:
            raise RouteAgain if self._store.hand_back(attempt.job_id, attempt=1) else HandBack
        return PromptTooLong(
            f"{error.message} For want of memory {resident.model_id} is loaded with {resident.max_model_len:,} tokens "
            "for now, fewer than it was offered with: send the job again later, or name another model."
        )

    def _handed_back(self, attempt: Attempt) -> HandBack:
        """Let the job be begun again; if that has happened already, there is nothing to give back."""
        if attempt.number is not None:
            self._store.hand_back(attempt.job_id, attempt=attempt.number)
        return HandBack()


def outcome_of(error: ShiftworkerError, job_id: str, ledger: Ledger) -> Outcome:
    """The outcome of a job that ends with *error*."""
    if isinstance(error, JobCancelled):
        return Outcome(job_id=job_id, state=JobState.CANCELLED, error=ErrorBody.of(error), ledger=ledger)
    state = JobState.EXPIRED if isinstance(error, DeadlineExceeded) else JobState.FAILED
    return Outcome(job_id=job_id, state=state, error=ErrorBody.of(error), ledger=ledger)


def cancelled(job_id: str) -> JobCancelled:
    """Somebody asked for it."""
    return JobCancelled(f"Job {job_id} was cancelled.")


def expired(deadline: datetime, when: str) -> DeadlineExceeded:
    """It is too late; *when* is a clause."""
    return DeadlineExceeded(f"The job's deadline, {deadline.isoformat()}, passed {when}.")
