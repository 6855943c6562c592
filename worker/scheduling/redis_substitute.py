"""
Moves waiting jobs from a smaller model's backlog to a larger one's: those that it may take, each in one step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import islice

from common import keys
from common.backlog import RedisBacklog
from common.find_choices import can_take
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import AUTO, JobRequest, OfferedModel, Route
from worker.scheduling.rewrite import rewrite

logger = get_logger(__name__)

_LOOKED_AT = 500  # jobs in one call, lest it takes long; the others are there in the next
_REST_S = 5.0  # after a look that found nothing to take


class RedisSubstitute:
    """The backlogs of the models, for jobs that change their model; from the heart's thread alone."""

    def __init__(self, client: RedisClient, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._backlog = RedisBacklog(client)
        self._clock = clock
        self._in_vain: dict[tuple[str, str], float] = {}  # model, and who may not take its jobs -> until when

    def take_over(self, model_id: str, by: OfferedModel, reason: str) -> int:
        """
        Give *by* the jobs that wait for *model_id*, as far as it may take them; returns how many.

        A job that names a model stays, and one that *by* cannot do or hold, and one that was moved before: so none
        ever goes to and fro. The reason becomes a part of the job's own, for its view and its ledger.
        """
        if self._clock() < self._in_vain.get((model_id, by.id), 0.0):
            return 0
        moved = 0
        for job_id, raw in islice(self._backlog.walk(keys.model_queue(model_id)), _LOOKED_AT):
            why: list[str] = []

            def moving(request: JobRequest, route: Route, why: list[str] = why) -> tuple[Route, str] | None:
                if not may_take(request, route, by):
                    return None
                why.append(f"{route.why}; {by.id} instead of {model_id}: {reason}")
                new = route.model_copy(update={"model": by.id, "instead_of": model_id, "why": why[0]})
                return new, keys.model_queue(by.id)

            if (new := rewrite(raw, moving)) is not None:
                moved += self._backlog.take_over(job_id, raw, new, of=model_id, by=by.id, why=why[0])
        if moved:
            logger.info("routing.substituted", model_id=model_id, by=by.id, jobs=moved, reason=reason)
        else:
            self._in_vain[model_id, by.id] = self._clock() + _REST_S
        return moved


def may_take(request: JobRequest, route: Route, by: OfferedModel) -> bool:
    """May *by* take a job from the model that it was routed to?"""
    free = request.model.casefold() == AUTO and not route.stays and route.cloud is None and route.instead_of is None
    return free and route.complexity <= by.complexity_up_to and can_take(request, by)
