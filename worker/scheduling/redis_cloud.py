"""
Sends waiting jobs of one model on their way to the cloud endpoint, those that may leave, and brings them home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from common import keys
from common.backlog import RedisBacklog
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import JobRequest, Route
from worker.scheduling.rewrite import rewrite

logger = get_logger(__name__)

Grant = Callable[[JobRequest, Route], str | None]  # why a job may leave; None = it stays


class RedisCloud:
    """The model queues, and beside each the queue of its jobs for the cloud endpoint; a job keeps its place."""

    def __init__(self, client: RedisClient, models: tuple[str, ...]) -> None:
        self._redis = client
        self._backlog = RedisBacklog(client)
        self._models = models

    def on_their_way(self) -> Mapping[str, int]:
        """How many jobs of each model wait for the endpoint; one round trip."""
        with self._redis.pipeline(transaction=False) as pipe:
            for model_id in self._models:
                pipe.zcard(keys.backlog_order(keys.cloud_queue(model_id)))
            return dict(zip(self._models, pipe.execute(), strict=True))

    def waits(self, model_id: str, grant: Grant) -> bool:
        """Does a job wait for *model_id* that may leave?"""
        return any(self._granted(model_id, grant))

    def send(self, model_id: str, grant: Grant, *, most: int) -> int:
        """Send the first of those jobs, at most *most*; returns how many."""
        queue, cloud = keys.model_queue(model_id), keys.cloud_queue(model_id)
        found = islice(self._granted(model_id, grant), most)
        sent = sum(self._backlog.move(job_id, raw, new, queue=queue, to=cloud) for job_id, raw, new in found)
        if sent:
            logger.info("routing.sent_to_cloud", model_id=model_id, jobs=sent)
        return sent

    def bring_home(self, model_id: str) -> int:
        """Put every job that is on its way back into its model's queue; returns how many."""
        home = 0
        queue, cloud = keys.model_queue(model_id), keys.cloud_queue(model_id)
        for job_id, raw in self._backlog.walk(cloud):
            new = rewrite(raw, lambda _request, route: (route.model_copy(update={"cloud": None}), queue))
            home += self._backlog.move(job_id, raw, new or raw, queue=cloud, to=queue)
        if home:
            logger.info("routing.back_from_cloud", model_id=model_id, jobs=home)
        return home

    def _granted(self, model_id: str, grant: Grant) -> Iterator[tuple[str, str, str]]:
        """Each job that may leave: its id, its message, and what that becomes."""
        cloud = keys.cloud_queue(model_id)

        def leaving(request: JobRequest, route: Route) -> tuple[Route, str] | None:
            why = grant(request, route)
            return None if why is None else (route.model_copy(update={"cloud": why}), cloud)

        for job_id, raw in self._backlog.walk(keys.model_queue(model_id)):
            if (new := rewrite(raw, leaving)) is not None:
                yield job_id, raw, new
