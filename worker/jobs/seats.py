"""
Gives each job its place in an engine: alone of its kind, in the company it may have, its model ready for as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from common.errors import EngineDied, EngineNotReady, LoadFailed, Refused
from common.logs import get_logger
from common.schemas import JobRequest, Route
from worker.catalog.spec import EngineKind
from worker.engines.base import Engine, EngineState, StopSignal
from worker.engines.http import CONNECT_S
from worker.jobs.cloud_lane import StandIn
from worker.jobs.failures import NOT_READY_PAUSE_S, DuplicateDelivery, HandBack, StaysHere
from worker.jobs.usher import Usher
from worker.residency.board import ResidencyBoard
from worker.residency.may_leave import may_leave
from worker.selection.placement import Placement

logger = get_logger(__name__)

_ENDPOINT = ""  # its door; no model has this name


@dataclass(frozen=True, kw_only=True, eq=False)
class Wanted:
    """A job that asks for a place."""

    job_id: str
    request: JobRequest
    route: Route
    stop: StopSignal
    delivery: str
    company: int | None  # see isolate.py
    in_worker: bool = False

    @property
    def model_id(self) -> str | None:
        """The model it runs on here; None = it runs elsewhere."""
        return self.route.model if self.route.cloud is None else None


@dataclass(kw_only=True, eq=False)
class Seat:
    """A job's place in an engine."""

    engine: Engine
    company: int | None = None  # how many were there when the engine died; None = it did not


class Seats:
    """The places in all engines of a worker; used from many threads."""

    def __init__(
        self,
        *,
        board: ResidencyBoard,
        placements: Mapping[str, Placement],
        engines: Mapping[EngineKind, Engine],
        stand_in: StandIn | None,
    ) -> None:
        self._board = board
        self._placements = placements
        self._engines = engines
        self._stand_in = stand_in
        self._usher = Usher()
        self.taken: dict[str, Wanted] = {}  # by job id: those that have a place or wait for it

    @contextmanager
    def take(self, wanted: Wanted, *, wait: bool) -> Iterator[Seat]:
        """
        Give the job its place, until it leaves.

        Raises
        ------
        DuplicateDelivery, HandBack
            The job has a place already, by another message or by this one.
        EngineNotReady
            Its engine is not ready, or it may not be there now and does not *wait*: that is no attempt.
        JobStopped
            It was told to stop while it waited.
        StaysHere
            The cloud endpoint will not have it.
        """
        model_id = wanted.model_id
        with self._alone(wanted):
            if model_id is None:
                with self._at_the_door(wanted, _ENDPOINT, wait=wait), self._at_endpoint(wanted) as engine:
                    yield Seat(engine=engine)
                return
            with self._at_the_door(wanted, model_id, wait=wait), self._ready(model_id) as engine:
                seat = Seat(engine=engine)
                try:
                    yield seat
                except EngineDied:
                    if wanted.stop.reason is None:  # else it was ended on purpose, and its jobs were told before
                        seat.company = self._usher.died_with(model_id, wanted.job_id)
                    raise

    @contextmanager
    def _alone(self, wanted: Wanted) -> Iterator[None]:
        """
        Note the job as running here, unless it does already.

        Redis was away, the lease ran out, and the message came again while its first copy still runs: it goes back
        until that one has ended. To drop it would acknowledge it for both.
        """
        if (other := self.taken.setdefault(wanted.job_id, wanted)) is not wanted:
            if other.delivery != wanted.delivery:
                raise DuplicateDelivery
            wanted.stop.wait(NOT_READY_PAUSE_S)
            raise HandBack
        try:
            yield
        finally:
            del self.taken[wanted.job_id]

    def _at_the_door(self, wanted: Wanted, door: str, *, wait: bool) -> AbstractContextManager[None]:
        # Of what an engine here died, the endpoint does not die; the worker may.
        company = wanted.company if door != _ENDPOINT or wanted.in_worker else None
        return self._usher.enter(door, wanted.job_id, company, wanted.stop, wait=wait, in_worker=wanted.in_worker)

    @contextmanager
    def _ready(self, model_id: str) -> Iterator[Engine]:
        with self._board.enter(model_id):
            engine = self._engines[self._placements[model_id].spec.engine]
            if engine.state(model_id) is not EngineState.READY:  # it died, and the board does not know yet
                raise EngineNotReady(f"The engine of {model_id} has just ended; the job waits for the next one.")
            yield engine

    @contextmanager
    def _at_endpoint(self, wanted: Wanted) -> Iterator[Engine]:
        """Give the cloud endpoint; this is the last door, so it is asked again whether the job may leave."""
        stand_in, model_id = self._stand_in, wanted.route.model
        leave = may_leave(wanted.request, wanted.route, stand_in.cloud if stand_in else None, others_ready=False)
        if stand_in is None or not leave.granted:
            raise _stays(wanted, leave.reason)
        if (resting := stand_in.engine.resting) is not None:
            raise EngineNotReady(resting)
        if stand_in.engine.state(model_id) is EngineState.STOPPED:
            try:
                stand_in.engine.ensure_ready(self._placements[model_id], timeout_s=CONNECT_S)
            except LoadFailed as error:
                raise EngineNotReady(error.message) from None
        try:
            yield stand_in.engine
        except Refused as error:  # its own model may well take it
            raise _stays(wanted, error.message) from None


def _stays(wanted: Wanted, reason: str) -> StaysHere:
    logger.info("jobs.stays_here", job_id=wanted.job_id, reason=reason)
    return StaysHere(reason)
