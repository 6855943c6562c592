"""
Sends waiting jobs of one model back to the router: those that any model may answer. The others keep their place.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from common import keys
from common.backlog import RedisBacklog
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import AUTO

logger = get_logger(__name__)


class RedisReroute:
    """The backlogs of models that cannot be loaded."""

    def __init__(self, client: RedisClient) -> None:
        self._backlog = RedisBacklog(client)

    def waits(self, model_id: str) -> bool:
        """Does a job wait for *model_id* that any model may answer?"""
        return any(for_router(raw) for _, raw in self._backlog.walk(keys.model_queue(model_id)))

    def route_again(self, model_id: str) -> int:
        """Send those jobs back to the router, in their order and with their priority; returns how many."""
        moved = 0
        queue = keys.model_queue(model_id)
        for job_id, raw in self._backlog.walk(queue):
            if (again := for_router(raw)) is not None:
                target = keys.list_of(keys.SUBMIT_QUEUE, again["properties"]["priority"])
                moved += self._backlog.send(job_id, raw, json.dumps(again), queue=queue, to_list=target)
        if moved:
            logger.info("routing.routed_again", model_id=model_id, jobs=moved)
        return moved


def for_router(raw: str) -> dict[str, Any] | None:
    """
    Write the message of a routed job as the router takes it; None if its job names a model, or it is none of ours.

    Whatever else Celery put into it stays: who waits for the result, what comes after it, its priority.
    """
    try:
        message: dict[str, Any] = json.loads(raw)
        (request, _route), kwargs, embed = json.loads(base64.b64decode(message["body"]))
        if message["headers"]["task"] != keys.GENERATE_TASK or request["model"].casefold() != AUTO:
            return None
        message["headers"] |= {"task": keys.SUBMIT_TASK, "argsrepr": "(again)"}
        message["properties"]["delivery_info"]["routing_key"] = keys.SUBMIT_QUEUE
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    body = json.dumps([[request], kwargs, embed]).encode()
    return {**message, "body": base64.b64encode(body).decode()}
