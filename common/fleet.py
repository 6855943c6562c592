"""
Reads what the workers publish: what they offer, and how they are.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

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


def read_alive(client: RedisClient, workers: Iterable[str]) -> frozenset[str]:
    """Which of *workers* are alive: their status has not run out."""
    names = list(workers)
    with client.pipeline(transaction=False) as pipe:
        for name in names:
            pipe.exists(keys.status(name))
        return frozenset(name for name, there in zip(names, pipe.execute(), strict=True) if there)


def read_unserved(client: RedisClient, served: Collection[str]) -> Mapping[str, int]:
    """How many routed jobs wait for each model that is not among *served*, by the model's id."""
    orders = keys.backlog_order(keys.model_queue("*"))
    start, _, end = orders.partition("*")
    found = {
        name.removeprefix(start).removesuffix(end): name
        for name in sorted(client.scan_iter(orders, count=1000, _type="zset"))
    }
    unserved = {model_id: name for model_id, name in found.items() if model_id not in served}
    with client.pipeline(transaction=False) as pipe:
        for name in unserved.values():
            pipe.zcard(name)
        return dict(zip(unserved, pipe.execute(), strict=True))
