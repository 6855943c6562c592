"""
A lane: one thread that takes up many runs of one task together, beside Celery's thread for each run.

Celery receives each message as ever, so that Flower, `inspect`, `revoke` and the lease see a run like any other; what a
lane saves is the thread, and the round trips to Redis that many runs can share. Only plain runs are offered to it, and
whatever it does not bring to a good end it gives back to Celery's own way (`Run.ordinary`): see docs/decisions/0009.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore

from common.logs import get_logger
from common.transport import acknowledged_already
from worker.engines.base import StopSignal

logger = get_logger(__name__)

_MOST = 256  # runs in one batch
_END_S = 10.0  # for the batch under way, when the lane is told to end


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """One delivery of a task, as a lane has it."""

    task_id: str
    headers: Mapping[str, Any]  # as they came; Celery's request has some more
    properties: Mapping[str, Any]  # kombu's
    args: Sequence[Any]
    signal: StopSignal
    on_accepted: Callable[[int, float], object]
    on_success: Callable[[tuple[int, str, float]], object]
    on_failure: Callable[[ExceptionInfo], object]
    ordinary: Callable[[], object]  # hands it to a thread of the pool, as Celery would have done
    ended: Future[None]
    began: float = field(default_factory=time.monotonic)

    @property
    def delivery(self) -> str:
        """The tag of the message."""
        return str(self.properties["delivery_tag"])

    def accepted(self) -> None:
        """Say that the run begins."""
        self.on_accepted(0, time.monotonic())

    def succeeded(self, shown: str) -> None:
        """Say that it has ended well; Redis has its result and its acknowledgement. *shown* is what Flower shows."""
        acknowledged_already(self.delivery)
        self.on_success((0, shown, time.monotonic() - self.began))
        self.ended.set_result(None)

    def fall_back(self) -> None:
        """Go the ordinary way, unless it has ended."""
        if not self.ended.done():
            self.ordinary()

    def moved_on(self) -> None:
        """Say that its message has become another one; Redis has the acknowledgement."""
        acknowledged_already(self.delivery)
        self.on_failure(_IGNORED)
        self.ended.set_result(None)


def plain_args(args: tuple[Any, ...]) -> Sequence[Any] | None:
    """
    Give the arguments of the run that Celery hands to its pool as *args*; None if more belongs to it than its result.

    Callbacks, chains, groups, time limits, retries and results that nobody wants are Celery's own business.
    """
    _name, _task_id, request, body, content_type, _encoding = args
    unplain = ("group", "timelimit", "retries", "eta", "expires", "ignore_result", "stamped_headers", "shadow")
    if content_type != "application/json" or any(_truthy(request.get(name)) for name in unplain):
        return None
    positional, named, embed = json.loads(body)
    return None if named or any((embed or {}).values()) else positional


def _truthy(value: Any) -> bool:
    return any(value) if isinstance(value, list | tuple) else bool(value)


def headers_of(request: Mapping[str, Any]) -> dict[str, Any]:
    """Give a message's headers back from what Celery's request has made of them."""
    added = {"properties", "reply_to", "correlation_id", "hostname", "delivery_info", "args", "kwargs"}
    return {name: value for name, value in request.items() if name not in added}


def _ignored() -> ExceptionInfo:
    """What Celery takes for "acknowledge it, and say nothing"."""
    try:
        raise Ignore  # noqa: TRY301 - it must have a traceback
    except Ignore:
        return ExceptionInfo()


_IGNORED = _ignored()


class Item(Protocol):
    """What a lane works on: a run, or news of one."""

    def fall_back(self) -> None:
        """The work has failed in the middle: go the ordinary way."""
        ...


class Lane(threading.Thread):
    """
    Hands to *work* all that was `put` since it was called last, and at least every *tick_s* seconds, then nothing.

    What *work* raises is logged, and each item of that batch falls back.
    """

    def __init__(self, name: str, work: Callable[[Sequence[Any]], object], *, tick_s: float = 1.0) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._tick_s = tick_s
        self._ending = False
        self._inbox: SimpleQueue[Item | None] = SimpleQueue()  # None only wakes it

    def put(self, item: Item) -> None:
        """Have *item* worked on with the next batch; from any thread."""
        self._inbox.put(item)

    def end(self) -> None:
        """Stop after the batch under way; the messages of what was put behind it are given back by the lease."""
        self._ending = True
        self._inbox.put(None)
        self.join(timeout=_END_S)  # Redis may be away

    def run(self) -> None:
        """Work until `end` is called."""
        while not self._ending:
            items = self._next()
            try:
                self._work(items)
            except Exception:
                logger.exception("delivery.lane_broke", lane=self.name)
                for item in items:
                    item.fall_back()

    def _next(self) -> list[Item]:
        items: list[Item | None] = []
        try:
            items.append(self._inbox.get(timeout=self._tick_s))
            while len(items) < _MOST:
                items.append(self._inbox.get_nowait())
        except Empty:
            pass
        return [item for item in items if item is not None]
