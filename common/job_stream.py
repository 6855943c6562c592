"""
Reads a job's stream: what its attempts say, event by event, from any position, until the job ends.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from common import keys
from common.errors import InvalidRequest, NotEndedYet
from common.outcome_text import read_outcome
from common.redis_client import RedisClient
from common.schemas import Outcome, StreamEvent

START = "0"  # the position before the first event
_LOOK_EVERY_S = 1.0  # for an outcome that has no event: of a job that does not stream, or whose stream has expired
_READ_AT_ONCE = 500


def read_stream(client: RedisClient, job_id: str, *, after: str, timeout_s: float | None) -> Iterator[StreamEvent]:
    """
    Give the events behind the position *after* as they come; the last one is of kind `end`.

    A job that does not stream has only its end.

    Raises
    ------
    InvalidRequest
        *after* is no position.
    NotEndedYet
        Nothing happened for *timeout_s* seconds (None = wait as long as it takes), and the job has not ended.
    redis.RedisError
        Redis went away; the position of the last event is where to go on.
    """
    reading = _Reading(job_id, after, timeout_s)
    while not reading.ended:
        found = client.xread({reading.key: reading.position}, count=_READ_AT_ONCE, block=reading.block_ms)
        outcome = None if found else client.get(keys.outcome(job_id))
        yield from reading.take(found, outcome)


async def aread_stream(
    client: RedisClient, job_id: str, *, after: str, timeout_s: float | None
) -> AsyncIterator[StreamEvent]:
    """Give the events as `read_stream` does, with an asyncio client."""
    reading = _Reading(job_id, after, timeout_s)
    while not reading.ended:
        found = await client.xread({reading.key: reading.position}, count=_READ_AT_ONCE, block=reading.block_ms)
        outcome = None if found else await client.get(keys.outcome(job_id))
        for event in reading.take(found, outcome):
            yield event


class _Reading:
    """How far one reader is, and what it must ask for next."""

    def __init__(self, job_id: str, after: str, timeout_s: float | None) -> None:
        if not re.fullmatch(r"\d{1,19}(-\d{1,19})?", after):
            raise InvalidRequest(
                f"after={after!r} is no position of a stream. Give the position of the last event you had, or "
                f"{START!r} for all that is there."
            )
        self.key = keys.stream(job_id)
        self.position = after
        self.ended = False
        self._job_id = job_id
        self._timeout_s = timeout_s
        self._outcome: Outcome | None = None
        self._waiting_since: float | None = None  # None = do not wait: something may be there already

    @property
    def block_ms(self) -> int | None:
        """How long to wait for an event, in milliseconds; None = not at all."""
        if self._waiting_since is None:
            return None
        left_s = _LOOK_EVERY_S if self._timeout_s is None else self._waiting_since + self._timeout_s - time.monotonic()
        return max(1, int(1000 * min(left_s, _LOOK_EVERY_S)))  # 0 would be for ever

    def take(self, found: Any, outcome: str | None) -> Iterator[StreamEvent]:
        """Give the events in Redis's answer; without any, see what *outcome* says."""
        if found:
            [entries] = found.values() if isinstance(found, dict) else [entries for _, entries in found]
            for position, fields in entries:
                self.position = position
                self.ended = fields["kind"] == "end"
                yield _event(position, fields)
                if self.ended:
                    return
            self._waiting_since = None
        elif self._outcome is not None:  # and nothing had been added to the stream before it
            self.ended = True
            yield StreamEvent(position=self.position, kind="end", state=self._outcome.state)
        elif outcome is not None:
            self._outcome = read_outcome(outcome)
            self._waiting_since = None
        else:
            self._go_on_waiting()

    def _go_on_waiting(self) -> None:
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now
        if self._timeout_s is not None and now >= self._waiting_since + self._timeout_s:
            raise NotEndedYet(
                f"Nothing was heard of job {self._job_id} for {self._timeout_s:g} s. It goes on: read its stream again "
                f"with after={self.position!r}, or cancel it."
            )


def _event(position: str, fields: dict[str, str]) -> StreamEvent:
    chunk = fields.get("chunk")
    return StreamEvent.model_validate({**fields, "position": position, "chunk": json.loads(chunk) if chunk else None})
