"""
The cloud endpoint of the settings, and who else could answer in its place.
"""

from __future__ import annotations

from common.fleet import read_alive, read_offers
from common.redis_client import RedisClient
from common.settings import CloudSettings
from worker.engines.remote import RemoteEngine
from worker.jobs.cloud_lane import StandIn
from worker.residency.may_leave import Cloud


def stand_in_of(settings: CloudSettings) -> StandIn | None:
    """The cloud endpoint of the settings; None = there is none."""
    if settings.url is None or settings.model is None:
        return None
    return StandIn(
        engine=RemoteEngine(url=settings.url, api_key=settings.api_key, model=settings.model),
        cloud=Cloud(
            model=settings.model,
            for_models=frozenset(settings.for_models),
            capabilities=frozenset(settings.capabilities),
        ),
        parallel=settings.parallel,
    )


def served_elsewhere(client: RedisClient, name: str) -> frozenset[str]:
    """The models that a worker other than *name* can serve now."""
    others = [offer for offer in read_offers(client) if offer.worker != name]
    alive = read_alive(client, [offer.worker for offer in others])
    return frozenset(model.id for offer in others if offer.worker in alive for model in offer.models if not model.away)
