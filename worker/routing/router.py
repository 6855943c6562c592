"""
Carries out the routing of one job: read it, score it, choose its model, write that down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import EngineNotReady
from common.job_store import JobStore
from common.schemas import JobRequest, OfferedModel, Route
from worker.routing.gate import Gate
from worker.routing.route import route_job
from worker.routing.rules import Rules
from worker.routing.score import score_prompt

_OFFERS_KEPT_S = 1.0  # between two readings of what the workers offer


class Router:
    """Routes jobs to the models that the workers offer; without a *gate*, all of them."""

    def __init__(
        self,
        *,
        store: JobStore,
        offers: Callable[[], Sequence[OfferedModel]],
        rules: Rules,
        gate: Gate | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._offers = offers
        self._rules = rules
        self.gate = gate
        self._clock = clock
        self._known: tuple[Sequence[OfferedModel], float] | None = None

    def route(self, job_id: str, body: object, **limits: Any) -> tuple[JobRequest, Route]:
        """
        Choose the model for the job in *body*; *limits* are what Celery knows of its task: see JobRequest.within.

        Raises
        ------
        InvalidRequest, UnknownModel, PromptTooLong, OverLimit, AddressRefused
            The job can never be answered as it is.
        QueueFull
            Too many jobs of its tenant have not ended.
        KeyReused, SameKey
            Its idempotency key is another job's, with another body or with the same.
        EngineNotReady
            No worker has ever said what it offers; the job must wait.
        """
        self._store.note_queued(job_id)
        request = JobRequest.parse(body).within(**limits)
        if self.gate is not None:
            self.gate.check(request)
        if request.stream:
            self._store.note_streams(job_id)
        try:
            route = self.choose(request)
        except EngineNotReady:
            if request.deadline is not None:  # it waits here, and nobody else knows of it
                self._store.note_deadline(job_id, request.deadline)
            raise
        if self.gate is not None:
            self.gate.enter(self._store, job_id, request, route)
        else:
            self._store.note_routed(job_id, route)
        return request, route

    def choose(self, request: JobRequest) -> Route:
        """Choose the model for *request*, and write nothing down; raises as `route`."""
        models = self.models()
        if not models:
            raise EngineNotReady("No worker has said yet which models it can serve; the job waits.")
        complexity = score_prompt(request.text, task_type=request.task_type, rules=self._rules)
        return route_job(request, complexity, models)

    def models(self) -> Sequence[OfferedModel]:
        """What the workers offer, at most a second old; asked again at once while nothing is offered."""
        now = self._clock()
        if self._known is None or not self._known[0] or now - self._known[1] > _OFFERS_KEPT_S:
            self._known = (self._offers(), now)
        return self._known[0]
