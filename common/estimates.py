"""
Asks when a job will have ended: its place in the line, and the forecast that the workers tell of its model.
"""

from __future__ import annotations

from datetime import UTC, datetime

from common import keys
from common.backlog import Place, RedisBacklog
from common.errors import PromptTooLong, UnknownModel
from common.estimate_finish import estimate_finish, span
from common.find_choices import find_choices
from common.fleet import read_alive, read_offers
from common.redis_client import RedisClient
from common.schemas import Estimate, Forecast, JobRequest, JobState, JobView


class Estimates:
    """What producers are told of the end of their jobs; None where nobody knows."""

    def __init__(self, client: RedisClient) -> None:
        self._redis = client
        self._backlog = RedisBacklog(client)

    def of_job(self, view: JobView) -> Estimate | None:
        """When a job that waits for its model, with `view.ahead` before it, or that runs, will have ended."""
        if view.model is None or view.state not in (JobState.ROUTED, JobState.RUNNING):
            return None
        forecast, now = self._ask(view.model)
        if view.state is JobState.ROUTED:
            return None if view.ahead is None else estimate_finish(forecast, ahead=view.ahead, now=now)
        if forecast is None or forecast.longest_s is None or (now - forecast.at).total_seconds() > forecast.valid_s:
            return None
        return Estimate(low_s=0.0, high_s=forecast.longest_s, model=view.model, switches=0)

    def of_request(self, request: JobRequest) -> Estimate | None:
        """
        When a job would have ended that is sent now.

        If the router may choose, the range covers those of its choices that somebody knows of; the others are named.
        """
        offers = read_offers(self._redis)
        alive = read_alive(self._redis, [offer.worker for offer in offers])
        offered = {m.id: m for offer in offers if offer.worker in alive for m in offer.models if not m.away}
        try:
            choices = find_choices(request, list(offered.values()))
        except (UnknownModel, PromptTooLong):
            return None
        found = {model.id: self._if_it_came(model.id, request) for model in choices}
        unknown = tuple(model for model, estimate in found.items() if estimate is None)
        told = span([estimate for estimate in found.values() if estimate is not None])
        return told and told.model_copy(update={"unknown": unknown})

    def _if_it_came(self, model: str, request: JobRequest) -> Estimate | None:
        forecast, now = self._ask(model)
        place = Place.of_job(request, now=now.timestamp())
        ahead = self._backlog.rank_of_new(keys.model_queue(model), place)
        return estimate_finish(forecast, ahead=ahead, now=now)

    def _ask(self, model: str) -> tuple[Forecast | None, datetime]:
        """Read the forecast for *model*, and Redis's clock: a producer's may be wrong."""
        with self._redis.pipeline(transaction=False) as pipe:
            pipe.hget(keys.FORECASTS, model)
            pipe.time()
            body, (seconds, microseconds) = pipe.execute()
        now = datetime.fromtimestamp(seconds + microseconds / 1e6, UTC)
        return None if body is None else Forecast.model_validate_json(body), now
