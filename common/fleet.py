"""
Reads what the workers publish: what they offer, and how they are.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import HardwareStatus, Offer

logger = get_logger(__name__)


def read_offers(client: RedisClient) -> tuple[Offer, ...]:
    """The last offer of every worker, also of those now away; one that cannot be read is left out and told."""
    found: list[Offer] = []
    for worker, body in sorted(client.hgetall(keys.FLEET).items()):
        try:
            found.append(Offer.model_validate_json(body))
        except ValidationError as error:
            logger.warning("fleet.unreadable_offer", worker=worker, error=str(error))
    return tuple(found)


def read_statuses(client: RedisClient) -> tuple[HardwareStatus, ...]:
    """How every worker that is alive is, by name."""
    bodies = client.mget(sorted(client.scan_iter(keys.status("*"), count=1000))) or []
    return tuple(HardwareStatus.model_validate(json.loads(body)) for body in bodies if body is not None)
