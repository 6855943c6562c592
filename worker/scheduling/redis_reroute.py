"""
Sends waiting jobs of one model back to the router: those that any model may answer. The others keep their place.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

from common import keys
from common.logs import get_logger
from common.redis_client import RedisClient
from common.schemas import AUTO

logger = get_logger(__name__)

_AT_ONCE = 100  # messages a round trip

# KEYS: the list it waits in, the other one, wake. ARGV: the message, what it becomes there, LPUSH (served last) or
# RPUSH (served next). Nothing happens if somebody else took it in between. Returns 1 if it was moved.
_MOVE = """
if redis.call('LREM', KEYS[1], -1, ARGV[1]) == 0 then return 0 end
redis.call(ARGV[3], KEYS[2], ARGV[2])
redis.call('XADD', KEYS[3], 'MAXLEN', '8', '*', 'q', '')
return 1
"""


class RedisReroute:
    """The model queues, for the case that a model cannot be loaded."""

    def __init__(self, client: RedisClient) -> None:
        self._redis = client

    def waits(self, model_id: str) -> bool:
        """Does a job wait for *model_id* that any model may answer?"""
        queue = keys.model_queue(model_id)
        return any(for_router(raw) for name in keys.lists_of(queue) for raw in read_list(self._redis, name))

    def route_again(self, model_id: str) -> int:
        """Send those jobs back to the router, in their order and with their priority; returns how many."""
        moved = 0
        queue = keys.model_queue(model_id)
        for name, target in zip(keys.lists_of(queue), keys.lists_of(keys.SUBMIT_QUEUE), strict=True):
            for raw in list(read_list(self._redis, name)):
                if (again := for_router(raw)) is not None:
                    moved += move(self._redis, raw, again, name=name, to=target)
        if moved:
            logger.info("routing.routed_again", model_id=model_id, jobs=moved)
        return moved


def read_list(client: RedisClient, name: str) -> Iterator[str]:
    """Read a list from its head, where consumers take: its right end."""
    stop = -1
    while batch := client.lrange(name, stop - _AT_ONCE + 1, stop):
        yield from reversed(batch)
        stop -= _AT_ONCE


def move(client: RedisClient, raw: str, new: str, *, name: str, to: str, served_next: bool = False) -> int:
    """Take *raw* out of the list *name* and put it, as *new*, into the list *to*; returns 1 if it was there."""
    return int(client.eval(_MOVE, 3, name, to, keys.WAKE, raw, new, "RPUSH" if served_next else "LPUSH"))


def for_router(raw: str) -> str | None:
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
    return json.dumps({**message, "body": base64.b64encode(body).decode()})
