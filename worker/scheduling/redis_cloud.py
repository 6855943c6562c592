"""
Sends waiting jobs of one model on their way to the cloud endpoint, those that may leave, and brings them home.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from common import keys
from common.errors import InvalidRequest
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import JobRequest, Route
from worker.scheduling.redis_reroute import move, read_list

logger = get_logger(__name__)

Grant = Callable[[JobRequest, Route], str | None]  # why a job may leave; None = it stays


class RedisCloud:
    """The model queues, and beside each the queue of its jobs that the cloud endpoint answers."""

    def __init__(self, client: RedisClient, models: tuple[str, ...]) -> None:
        self._redis = client
        self._models = models

    def on_their_way(self) -> Mapping[str, int]:
        """How many jobs of each model wait for the endpoint; one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for model_id in self._models:
                for name in keys.lists_of(keys.cloud_queue(model_id)):
                    pipe.llen(name)
            lengths = iter(pipe.execute())
        return {model_id: sum(islice(lengths, len(keys.PRIORITY_STEPS))) for model_id in self._models}

    def waits(self, model_id: str, grant: Grant) -> bool:
        """Does a job wait for *model_id* that may leave?"""
        return any(self._granted(model_id, grant))

    def send(self, model_id: str, grant: Grant, *, most: int) -> int:
        """Send the first of those jobs, at most *most*, in their order and with their priority; returns how many."""
        found = list(islice(self._granted(model_id, grant), most))
        sent = sum(move(self._redis, raw, new, name=name, to=to) for raw, new, name, to in found)
        if sent:
            logger.info("routing.sent_to_cloud", model_id=model_id, jobs=sent)
        return sent

    def bring_home(self, model_id: str) -> int:
        """Put every job that is on its way back to the head of its model's queue; returns how many."""
        home = 0
        queue, cloud = keys.model_queue(model_id), keys.cloud_queue(model_id)
        for name, to in zip(keys.lists_of(cloud), keys.lists_of(queue), strict=True):
            for raw in reversed(list(read_list(self._redis, name))):  # the head comes last, and is the head again
                new = _rewritten(raw, queue, lambda _request, route: route.model_copy(update={"cloud": None}))
                home += move(self._redis, raw, new or raw, name=name, to=to, served_next=True)
        if home:
            logger.info("routing.back_from_cloud", model_id=model_id, jobs=home)
        return home

    def _granted(self, model_id: str, grant: Grant) -> Iterator[tuple[str, str, str, str]]:
        """Each message that may leave, what it becomes, its list and the one beside it."""

        def leaving(request: JobRequest, route: Route) -> Route | None:
            why = grant(request, route)
            return None if why is None else route.model_copy(update={"cloud": why})

        queue, cloud = keys.model_queue(model_id), keys.cloud_queue(model_id)
        for name, to in zip(keys.lists_of(queue), keys.lists_of(cloud), strict=True):
            for raw in read_list(self._redis, name):
                if (new := _rewritten(raw, cloud, leaving)) is not None:
                    yield raw, new, name, to


def _rewritten(raw: str, queue: str, change: Callable[[JobRequest, Route], Route | None]) -> str | None:
    """
    Write the message of a routed job anew, for *queue* and with the route that *change* gives; None if it gives none.

    Whatever else Celery put into it stays. What is no message of ours is left alone.
    """
    try:
        message: dict[str, Any] = json.loads(raw)
        (request, route), kwargs, embed = json.loads(base64.b64decode(message["body"]))
        if message["headers"]["task"] != keys.GENERATE_TASK:
            return None
        new = change(JobRequest.parse(request), Route.model_validate(route))
        message["properties"]["delivery_info"]["routing_key"] = queue
    except (ValueError, KeyError, TypeError, AttributeError, InvalidRequest):
        return None
    if new is None:
        return None
    body = json.dumps([[request, new.model_dump(mode="json")], kwargs, embed]).encode()
    return json.dumps({**message, "body": base64.b64encode(body).decode()})
