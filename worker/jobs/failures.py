"""
What becomes of a job whose attempt gave no answer? It ends with an error, or there is another attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from math import inf

from common.errors import (
    AttemptsExhausted,
    DeadlineExceeded,
    EngineNotReady,
    EngineTimeout,
    JobCancelled,
    PromptTooLong,
    ShiftworkerError,
    TimeLimitExceeded,
    Unavailable,
)
from common.job_store import JobStore
from common.logs import get_logger
from common.schemas import ErrorBody, Fault, JobRequest, JobState, Ledger, Outcome, utc_now
from worker.engines.base import JobStopped, StopSignal
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
    max_attempts: int  # engine deaths and hangs under one job


class Failures:
    """Judges attempts that gave no answer."""

    def __init__(self, *, store: JobStore, board: ResidencyBoard, limits: JobLimits) -> None:
        self._store = store
        self._board = board
        self._limits = limits

    def end_of(
        self,
        job_id: str,
        request: JobRequest,
        ledger: Ledger,
        stop: StopSignal,
        error: ShiftworkerError | JobStopped,
        *,
        attempt: int | None,
    ) -> ShiftworkerError:
        """
        Give the error that the job ends with. *attempt* is None if it had not begun.

        Raises
        ------
        HandBack, RouteAgain
            It does not end: there will be another attempt.
        """
        if isinstance(error, EngineNotReady):
            stop.wait(NOT_READY_PAUSE_S)
            raise self._handed_back(job_id, attempt) from None
        if isinstance(error, JobStopped):
            return self._stopped(job_id, error.reason, attempt)
        if isinstance(error, Unavailable):
            return self._fault(job_id, request, ledger, error)
        if isinstance(error, PromptTooLong):
            return self._too_long(job_id, ledger, error)
        return error

    def _fault(self, job_id: str, request: JobRequest, ledger: Ledger, error: Unavailable) -> ShiftworkerError:
        """What an engine's death or silence means for the job: another attempt, or the end."""
        if request.deadline is not None and utc_now() >= request.deadline:
            return expired(request.deadline, "while the engine worked on it")
        if isinstance(error, EngineTimeout) and (request.time_limit or inf) <= self._limits.timeout_s:
            return TimeLimitExceeded(
                f"The job's time limit, {request.time_limit:g} s in the engine, is over; it was stopped there."
            )
        attempt = ledger.attempt
        fault = Fault(at=utc_now(), worker=ledger.worker or "", attempt=attempt, kind=error.kind, message=error.message)
        faults = self._store.add_fault(job_id, fault)
        if faults is None:
            raise HandBack
        logger.warning("jobs.fault", job_id=job_id, faults=len(faults), error=error.message)
        if len(faults) < self._limits.max_attempts:
            raise self._handed_back(job_id, attempt)
        return AttemptsExhausted(
            f"The engine failed under this job {len(faults)} times, the last time with: {error.message} It is not "
            "tried again; shorten the prompt or max_tokens, or see the worker's log for what the engine said."
        )

    def _stopped(self, job_id: str, reason: str, attempt: int | None) -> ShiftworkerError:
        """What a stop means for the job."""
        if reason == "cancelled":
            return cancelled(job_id)
        if reason == "time limit":
            return TimeLimitExceeded("The time limit of the job's task is over; it was stopped in the engine.")
        raise self._handed_back(job_id, attempt)

    def _too_long(self, job_id: str, ledger: Ledger, error: PromptTooLong) -> PromptTooLong:
        """
        What a prompt that is too long means for the job: the end, unless its model is shorter than it was offered.

        Then the router knows by now, and is asked once more; the second time nobody has a longer one.
        """
        resident = self._board.read().resident(ledger.model or "")
        if resident is None or resident.max_model_len is None:
            return error
        if ledger.attempt == 1:
            raise RouteAgain if self._store.hand_back(job_id, attempt=1) else HandBack
        return PromptTooLong(
            f"{error.message} For want of memory {resident.model_id} is loaded with {resident.max_model_len:,} tokens "
            "for now, fewer than it was offered with: send the job again later, or name another model."
        )

    def _handed_back(self, job_id: str, attempt: int | None) -> HandBack:
        """Let the job be begun again; if that has happened already, this process has nothing to give back."""
        if attempt is not None:
            self._store.hand_back(job_id, attempt=attempt)
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
