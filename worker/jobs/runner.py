"""
Runs one job: ended before? may it run? then generate, and store the one outcome.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf

from common.errors import SetAside, ShiftworkerError
from common.job_store import JobStore
from common.logs import get_logger
from common.schemas import DeadLetter, ErrorBody, Fault, JobRequest, JobState, Ledger, Outcome, Route, utc_now
from worker.catalog.spec import EngineKind
from worker.engines.base import (
    Call,
    Channel,
    Completion,
    Engine,
    HasChannels,
    JobStopped,
    Read,
    StopSignal,
)
from worker.jobs.cloud_lane import StandIn
from worker.jobs.failures import (
    Attempt,
    DuplicateDelivery,
    Failures,
    HandBack,
    JobLimits,
    StaysHere,
    cancelled,
    expired,
    outcome_of,
)
from worker.jobs.seats import Seat, Seats, Wanted
from worker.jobs.token_writer import TokenWriter
from worker.residency.board import ResidencyBoard
from worker.selection.placement import Placement

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ran:
    """A run that has come back from its engine, and is not stored yet."""

    job_id: str
    request: JobRequest
    ledger: Ledger
    stop: StopSignal
    read: Read  # gives what the engine answered, or raises
    company: int | None  # see Seat


class JobRunner:
    """Runs jobs on the models that are ready; called from many threads at once."""

    def __init__(
        self,
        *,
        worker: str,
        store: JobStore,
        board: ResidencyBoard,
        placements: Mapping[str, Placement],
        engines: Mapping[EngineKind, Engine],
        limits: JobLimits,
        switch_seconds: Callable[[datetime, datetime], float],
        stand_in: StandIn | None = None,
        on_answer: Callable[[str, JobRequest, Completion], object] = lambda _model, _request, _completion: None,
    ) -> None:
        self._worker = worker
        self._store = store
        self._placements = placements
        self._engines = engines
        # Found out once: it takes longer than the rest of a job's way in.
        self._with_channels = {kind: engine for kind, engine in engines.items() if isinstance(engine, HasChannels)}
        self._limits = limits
        self._failures = Failures(store=store, board=board, limits=limits)
        self._switch_seconds = switch_seconds
        self._stand_in = stand_in
        self._on_answer = on_answer
        self._seats = Seats(board=board, placements=placements, engines=engines, stand_in=stand_in)
        self.tokens = TokenWriter(store)
        self._ran: dict[str, Ran] = {}  # by delivery

    def hand_back(self, model_id: str) -> None:
        """Tell every job that runs on *model_id* to stop and go back to its queue."""
        for wanted in list(self._seats.taken.values()):
            if wanted.model_id == model_id:
                wanted.stop.stop("handback")

    def stop_cancelled(self) -> None:
        """Tell every running job that somebody cancelled; one round trip for all of them."""
        running = dict(self._seats.taken)
        for job_id in self._store.asked_to_cancel(running):
            running[job_id].stop.stop("cancelled")

    def run(self, job_id: str, request: JobRequest, route: Route, *, delivery: str, stop: StopSignal) -> Outcome:
        """
        Bring the job to its outcome. *delivery* is the tag of the message that brought it.

        The questions, in order:

        0. Has a lane run it already?               Then only its end is left.
        1. Has it ended already?                    Give the stored outcome: this is a second delivery.
        2. Did somebody cancel it?                  Cancelled.
        3. Has its deadline passed?                 Expired.
        4. Did its workers die under it too often?  Set aside; of other faults that was decided when they happened.
        5. Did its engine die under it?             It waits until it may be there in the company that it may have.
           Is its model ready here? On its way to   If not, the message goes back.
           the cloud: may it leave, and does the
           endpoint take it?
        6. Is another copy of it in flight? Of      If so, this one is dropped; a copy of the same message goes back,
           the same message, even?                  for the two are one to whoever acknowledges it.
           Or has it ended while it waited?         Give the stored outcome.
        7. Otherwise                                Generate, and store what came of it.

        Raises
        ------
        HandBack, RouteAgain, StaysHere, DuplicateDelivery
            There is no outcome; what must happen to the message.
        """
        if (ran := self._ran.pop(delivery, None)) is not None:
            return self._conclude(ran)

        # (1) Ended already.
        ended = self._store.outcome(job_id)
        if ended is not None:  # while it was routed, perhaps: then nobody knew of its webhook
            return self._store.finish(ended, webhook=request.webhook) if request.webhook else ended

        view = self._store.view(job_id)
        attempt: int | None = None
        seat: Seat | None = None
        started = utc_now()
        ledger = self.ledger(route, attempt=view.attempts, queued_at=view.queued_at)

        # (2) Cancelled. (3) Expired. (4) Its workers.
        if (over := self._over(job_id, request, view.faults, now=started)) is not None:
            return self._end(job_id, ledger, over, request)

        try:
            # (5) Its company, and its engine, ready for as long as it runs.
            with self.enter(job_id, request, route, stop, delivery, faults=view.faults) as seat:
                # (6) One copy at a time.
                attempt = self._store.begin(job_id, delivery=delivery)
                if attempt is None:
                    return self._ended_meanwhile(job_id)
                # (7) Generate.
                started = utc_now()
                ledger = self.ledger(route, attempt=attempt, queued_at=view.queued_at, started=started)
                call = self.call(job_id, request, route, attempt=attempt, started=started)
                try:
                    completion = seat.engine.generate(route.model, call, stop)
                finally:
                    if request.stream:
                        self.tokens.flush()  # before the end is stored: nothing is added to a stream behind it
        except StaysHere:
            if attempt is not None and not self._store.hand_back(job_id, attempt=attempt):
                raise HandBack from None
            raise
        except (ShiftworkerError, JobStopped) as error:
            failed = Attempt(
                job_id=job_id,
                request=request,
                ledger=ledger,
                stop=stop,
                number=attempt,
                company=seat.company if seat else None,
            )
            return self._end(job_id, ledger, self._failures.end_of(failed, error), request)
        return self._finish(self.answered(job_id, request, ledger, completion))

    # --- What a lane does step by step: see job_lane.py --------------------------------------------------

    def channel(self, route: Route) -> Channel | None:
        """Give the way to ask the job's engine without a thread; None if it has none, or the job runs elsewhere."""
        placement = self._placements.get(route.model)
        if placement is None or route.cloud is not None:
            return None
        engine = self._with_channels.get(placement.spec.engine)
        return None if engine is None else engine.channel(route.model)

    def runs(self, job_id: str) -> bool:
        """Does the job run here now?"""
        return job_id in self._seats.taken

    def enter(
        self,
        job_id: str,
        request: JobRequest,
        route: Route,
        stop: StopSignal,
        delivery: str,
        *,
        faults: Sequence[Fault] | None = None,
    ) -> AbstractContextManager[Seat]:
        """
        Give the job its place in an engine, ready for as long as it runs; `run` says what it raises.

        *faults* are those of the job; None = it has none, and does not wait for its place.
        """
        again = self._failures.again(faults) if faults else None
        wanted = Wanted(
            job_id=job_id,
            request=request,
            route=route,
            stop=stop,
            delivery=delivery,
            company=again.company if again else None,
            in_worker=again is not None and again.in_worker,
        )
        return self._seats.take(wanted, wait=faults is not None)

    def call(self, job_id: str, request: JobRequest, route: Route, *, attempt: int, started: datetime) -> Call:
        """Say what to ask of the engine."""
        timeout_s = min(self._limits.timeout_s, request.time_limit or inf)
        if request.deadline is not None:
            timeout_s = min(timeout_s, (request.deadline - started).total_seconds())
        return Call(
            path=request.kind,
            body=request.engine_body(route.model),
            timeout_s=timeout_s,
            on_chunk=self.tokens.listener(job_id, attempt) if request.stream else None,
        )

    def ledger(
        self, route: Route, *, attempt: int, queued_at: datetime | None, started: datetime | None = None
    ) -> Ledger:
        """Say what is known of the job before its engine has answered; it may not have *started*."""
        cloud, why = None, route.why
        if self._stand_in is not None and route.cloud is not None:
            cloud, why = self._stand_in.cloud.model, f"{route.why}; {route.cloud}"
        waited: dict[str, float] = {}
        if queued_at is not None and started is not None:
            waited["waited_s"] = round(max(timedelta(), started - queued_at).total_seconds(), 4)
            waited["switch_s"] = round(self._switch_seconds(queued_at, started), 4)
        return Ledger(
            model=route.model, complexity=route.complexity, why=why, cloud=cloud, worker=self._worker,
            attempt=attempt, queued_at=queued_at, **waited,
        )  # fmt: skip

    def answered(self, job_id: str, request: JobRequest, ledger: Ledger, completion: Completion) -> Outcome:
        """Give the outcome of a job that its engine has just answered; it is not stored yet."""
        if ledger.model is not None and ledger.cloud is None:
            self._on_answer(ledger.model, request, completion)
        measured = ledger.model_copy(
            update={
                "prefill_s": completion.prefill_s,
                "decode_s": completion.decode_s,
                "run_s": round(completion.run_s, 4),
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": completion.completion_tokens,
                "finished_at": utc_now(),
            }
        )
        return Outcome(job_id=job_id, state=JobState.ANSWERED, response=dict(completion.response), ledger=measured)

    def leave_the_end(self, delivery: str, ran: Ran) -> None:
        """Keep what a lane could not end by itself, for the `run` of the same delivery that follows."""
        self._ran[delivery] = ran

    def _conclude(self, ran: Ran) -> Outcome:
        if ran.request.stream:
            self.tokens.flush()
        try:
            completion = ran.read()
        except (ShiftworkerError, JobStopped) as error:
            failed = Attempt(
                job_id=ran.job_id,
                request=ran.request,
                ledger=ran.ledger,
                stop=ran.stop,
                number=ran.ledger.attempt,
                company=ran.company,
            )
            return self._end(ran.job_id, ran.ledger, self._failures.end_of(failed, error), ran.request)
        return self._finish(self.answered(ran.job_id, ran.request, ran.ledger, completion))

    def _over(
        self, job_id: str, request: JobRequest, faults: Sequence[Fault], *, now: datetime
    ) -> ShiftworkerError | None:
        """Give the error of a job that is not to run any more."""
        if job_id in self._store.asked_to_cancel([job_id]):
            return cancelled(job_id)
        if request.deadline is not None and now >= request.deadline:
            return expired(request.deadline, "while the job waited")
        return self._failures.set_aside(job_id, faults) if faults else None

    def _ended_meanwhile(self, job_id: str) -> Outcome:
        ended = self._store.outcome(job_id)
        if ended is None:
            raise DuplicateDelivery
        return ended

    def _end(self, job_id: str, ledger: Ledger, error: ShiftworkerError, request: JobRequest) -> Outcome:
        outcome = outcome_of(error, job_id, ledger.model_copy(update={"finished_at": utc_now()}))
        if not isinstance(error, SetAside):
            return self._finish(outcome)
        letter = DeadLetter(
            job_id=job_id,
            at=utc_now(),
            model=ledger.model,
            error=ErrorBody.of(error),
            faults=self._store.view(job_id).faults,
            body=request.model_dump(mode="json", exclude_none=True),
        )
        return self._finish(outcome, letter)

    def _finish(self, outcome: Outcome, letter: DeadLetter | None = None) -> Outcome:
        kept = self._store.set_aside(outcome, letter) if letter else self._store.finish(outcome)
        logger.info("jobs.ended", job_id=kept.job_id, state=kept.state, model_id=kept.ledger.model)
        return kept
