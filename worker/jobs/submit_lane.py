"""
Routes plain jobs many at once: each message moves on to its model's queue under its own headers, in one script.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from common import keys
from common.backlog import PLACE_HEADER, Place
from common.errors import ShiftworkerError
from common.logs import get_logger
from common.schemas import JobRequest, JobState, Route
from worker.delivery.lane import Lane, Run
from worker.delivery.redis_steps import RedisSteps, Routed
from worker.routing.router import Router

logger = get_logger(__name__)

_SHOWN_CHARS = 60  # of a model's name in Flower
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


class SubmitLane:
    """The work of the submit task's lane; what cannot be routed at once goes the ordinary way."""

    def __init__(self, router: Router, steps: RedisSteps) -> None:
        self._router = router
        self._steps = steps
        self.lane = Lane("submit-lane", self._work)

    def _work(self, runs: Sequence[Run]) -> None:
        now = time.time()
        routed: list[tuple[Run, Routed]] = []
        for run in runs:
            try:
                routed.append((run, self._route(run, now=now)))
            except (ShiftworkerError, ValueError):
                run.ordinary()
        if not routed:
            return
        for (run, _), moved in zip(routed, self._steps.route([job for _, job in routed], now=now), strict=True):
            if moved == 0:  # it has ended: its outcome must be told
                run.ordinary()
            else:
                run.moved_on()

    def _route(self, run: Run, *, now: float) -> Routed:
        """Choose the job's model; raises where the ordinary way has to look."""
        (body,) = run.args
        request = JobRequest.parse(body)
        gate = self._router.gate
        if gate is not None:
            if not gate.plain(request):
                raise ValueError("somebody else must be asked first, which takes a while")
            gate.check(request)
        route = self._router.choose(request)
        logger.info("routing.routed", job_id=run.task_id, model_id=route.model, why=route.why)
        queue = keys.model_queue(route.model)
        streams = {"stream": "1"} if request.stream else {}
        return Routed(
            job_id=run.task_id,
            delivery=run.delivery,
            message=generate_message(run, request, route, queue=queue, now=now),
            queue=queue,
            fields={
                "state": JobState.ROUTED,
                "model": route.model,
                "complexity": route.complexity,
                "why": route.why,
                **streams,
            },
            entry=None if gate is None else gate.entry(request),
        )


def generate_message(run: Run, request: JobRequest, route: Route, *, queue: str, now: float) -> dict[str, Any]:
    """Write the message of the generate task as it goes to its queue: the one that came, with another task in it."""
    body = [[request.model_dump(mode="json", exclude_none=True), route.model_dump(mode="json")], {}, _EMBED]
    headers = {
        **run.headers,
        "task": keys.GENERATE_TASK,
        "argsrepr": shown(request, route),
        "kwargsrepr": "{}",
        **Place.of_job(request, now=now, earlier=run.headers.get(PLACE_HEADER)).header(),
    }
    headers.pop("redelivered", None)
    properties = {
        **run.properties,
        "priority": request.priority,
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": queue},
        "delivery_tag": str(uuid.uuid4()),
    }
    return {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": headers,
        "properties": properties,
    }


def shown(request: JobRequest, route: Route) -> str:
    """What Flower shows of a routed job: no prompt."""
    return f"({request.kind.name.lower()}, {len(request.text)} characters, {route.model:.{_SHOWN_CHARS}})"
