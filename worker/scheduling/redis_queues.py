"""
Reads the Backlog: how many jobs wait for each model, whose they are, and since when; lets long ones overtake.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from redis.exceptions import OutOfMemoryError

from common import keys
from common.backlog import RedisBacklog
from common.bounds import Bounds
from common.logs import get_logger
from common.redis_client import RedisClient
from worker.scheduling.overtake import MOST, Overtaking
from worker.state.backlog import Backlog, Lane, Waiting

logger = get_logger(__name__)


class RedisQueues:
    """The model queues; one round trip a reading, whatever the number of jobs."""

    def __init__(self, client: RedisClient, models: Sequence[str], *, bounds: Bounds | None = None) -> None:
        self._models = tuple(models)
        self._backlog = RedisBacklog(client, bounds=bounds)

    def backlog(self) -> Backlog:
        """Read every model's queue; what a stock producer has pushed to its lists joins its backlog."""
        by_model: dict[str, Waiting] = {}
        found = self._backlog.read(*map(keys.model_queue, self._models))
        for model, (sums, heads, in_lists) in zip(self._models, found, strict=True):
            lanes = tuple(_lanes(sums, heads))
            by_model[model] = Waiting(
                count=sum(lane.count for lane in lanes) + in_lists,
                oldest_at=min((lane.oldest_at for lane in lanes if lane.oldest_at is not None), default=None),
                lanes=lanes,
            )
            if in_lists:
                self._backlog.adopt(keys.model_queue(model), now=time.time())
        return Backlog(by_model=by_model)

    def overtake(self, some: Overtaking) -> int:
        """Let *some* begin before the other jobs of their class; returns how many have moved, none in a full Redis."""
        pace = some.pace
        if not pace.prefill_tokens_per_s or not pace.decode_tokens_per_s:
            return 0
        try:
            moved = self._backlog.overtake(
                keys.model_queue(some.model_id),
                some.long_s,
                prompt_token_s=1 / pace.prefill_tokens_per_s,
                output_token_s=pace.output_share / pace.decode_tokens_per_s,
                among=MOST,
            )
        except OutOfMemoryError:  # Redis is full: they keep their order, and the heart goes on
            return 0
        if moved:
            logger.info("scheduling.overtaking", model_id=some.model_id, jobs=moved, long_s=round(some.long_s, 3))
        return moved


def _lanes(sums: Sequence[Any], heads: Sequence[Sequence[Any]]) -> Iterator[Lane]:
    """Each lane of one queue's reading (backlog_scripts.READ), by class and tenant."""
    amounts = dict(zip(sums[::2], sums[1::2], strict=True))

    def tokens(what: str, lane: str) -> int | None:
        return None if amounts.get(f"{what}? {lane}", "0") != "0" else int(amounts.get(f"{what} {lane}", 0))

    for lane, oldest, newest, deadline, max_wait in sorted(heads, key=lambda head: str(head[0])):
        job_class, _, tenant = lane.partition(":")
        yield Lane(
            count=int(amounts[f"jobs {lane}"]),
            oldest_at=float(oldest),
            newest_at=float(newest),
            priority=int(job_class.removesuffix("*")),
            tenant=tenant,
            prompt_tokens=tokens("prompt_tokens", lane),
            output_tokens=tokens("output_tokens", lane),
            deadline_at=None if deadline is None else float(deadline),
            max_wait_s=None if max_wait is None else float(max_wait),
            any_model=job_class.endswith("*"),
        )
