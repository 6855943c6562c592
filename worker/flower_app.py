"""
The app that Flower looks through: `celery -A worker.flower_app flower`.
"""

from collections.abc import Iterable
from typing import Any

from flower.utils.broker import RedisBase

from common import keys
from common.celery_app import create_app
from common.settings import Settings

app = create_app(Settings.from_env())
# Flower counts queues only over a transport that it knows by name; it takes no jobs, so the stock one loses none.
app.conf.broker_transport = None

_count_lists = RedisBase.queues


async def _count(broker: Any, names: Iterable[str]) -> list[dict[str, Any]]:
    """Count what waits in lists, as Flower does, and what waits in backlogs, of which it knows nothing."""
    queues = list(names)
    async with broker.redis.pipeline(transaction=False) as pipe:
        for queue in queues:
            pipe.zcard(keys.backlog_order(queue))
        waiting = dict(zip(queues, await pipe.execute(), strict=True))
    found: list[dict[str, Any]] = await _count_lists(broker, queues)  # closes the broker's connections
    return [{**queue, "messages": queue["messages"] + waiting[queue["name"]]} for queue in found]


RedisBase.queues = _count
