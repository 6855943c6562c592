"""
A runner with everything that it touches, for tests: its engine counts its calls, and fails as it is told to.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from common.job_store import MemoryJobStore
from common.schemas import ErrorBody, JobRequest, Outcome, Route
from tests.factories import make_placement, make_spec
from tests.waiting import eventually
from worker.catalog.spec import EngineKind
from worker.engines.base import Call, Completion, StopSignal
from worker.engines.stub import StubEngine
from worker.jobs.failures import JobLimits
from worker.jobs.runner import JobRunner
from worker.residency.board import ResidencyBoard
from worker.state.residency import Level, Resident

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "count the birds"}]}
ROUTE = Route(model="small", complexity=0.2, why="simple enough")
LONG_S = 60.0  # a run that only a stop or a death ends


class FaultyEngine(StubEngine):
    """A stub that counts its calls, and raises what it is told to."""

    def __init__(self, **options: float) -> None:
        super().__init__(**options)
        self.errors: list[Exception] = []
        self.calls: list[Call] = []

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        self.calls.append(call)
        if self.errors:
            raise self.errors.pop(0)
        return super().generate(model_id, call, stop)


@dataclass
class World:
    """A runner with everything it touches; one model is ready."""

    run_s: float = 0.0
    in_flight: Callable[[str], bool] = lambda _tag: True
    as_it_starts: Callable[[], object] = lambda: None
    limits: JobLimits = field(default_factory=lambda: JobLimits(timeout_s=LONG_S, max_attempts=3, first_pause_s=0))

    def __post_init__(self) -> None:
        placement = make_placement(spec=make_spec(engine=EngineKind.STUB))
        self.store = MemoryJobStore(self.in_flight)
        self.board = ResidencyBoard(capacity=9, max_residents=1)
        self.board.put(Resident(model_id="small", level=Level.READY, bytes=1, since=0.0))
        self.engine = FaultyEngine(run_s=self.run_s)
        self.engine.ensure_ready(placement, timeout_s=1)
        self.waits: list[tuple[datetime, datetime]] = []
        self.runner = JobRunner(
            worker="here",
            store=self.store,
            board=self.board,
            placements={"small": placement},
            engines={EngineKind.STUB: self.engine},
            limits=self.limits,
            switch_seconds=self._switch_seconds,
        )
        self.store.note_queued("job")
        self.store.note_routed("job", ROUTE)

    def _switch_seconds(self, start: datetime, end: datetime) -> float:
        self.waits.append((start, end))
        self.as_it_starts()
        return 1.5

    def run(self, *, delivery: str = "tag", stop: StopSignal | None = None, **ours: Any) -> Outcome:
        request = JobRequest.parse({**BODY, **ours})
        return self.runner.run("job", request, ROUTE, delivery=delivery, stop=stop or StopSignal())

    @contextmanager
    def running(self, **options: Any) -> Any:
        """Run the job on a thread; inside, the engine works on it."""
        with ThreadPoolExecutor(1) as pool:
            future: Future[Outcome] = pool.submit(self.run, **options)
            eventually(lambda: self.engine.in_flight("small"))
            yield future
            self.engine.close()  # whatever the test did: no thread stays


def told_not_to_wait() -> StopSignal:
    """A signal already set: the pause before a hand-back is over at once."""
    signal = StopSignal()
    signal.stop("handback")
    return signal


def error_of(outcome: Outcome) -> ErrorBody:
    assert outcome.error is not None
    assert outcome.response is None
    return outcome.error
