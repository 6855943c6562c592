"""
The switches that ended: the last ones in memory, and how much of a job's wait they were.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from common.schemas import SwitchRecord

_KEPT = 50


class SwitchHistory:
    """Remembers switches, newest first, and tells each to *keep* (Redis, say)."""

    def __init__(self, keep: Callable[[SwitchRecord], object]) -> None:
        self._keep = keep
        self._records: deque[SwitchRecord] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()

    def add(self, record: SwitchRecord) -> None:
        """Remember a switch that just ended."""
        with self._lock:
            self._records.appendleft(record)
        self._keep(record)

    def last(self, count: int) -> tuple[SwitchRecord, ...]:
        """The newest *count* switches, newest first."""
        with self._lock:
            return tuple(self._records)[:count]

    def seconds_between(self, start: datetime, end: datetime) -> float:
        """How many seconds between *start* and *end* were spent in switches."""
        return seconds_in_switches(self.last(_KEPT), start, end)


def seconds_in_switches(records: Iterable[SwitchRecord], start: datetime, end: datetime) -> float:
    """The overlap of *records* (one after the other, never two at once) with the time from *start* to *end*."""
    nothing = timedelta()
    overlaps = (min(end, r.at) - max(start, r.at - timedelta(seconds=r.seconds)) for r in records)
    return sum((max(nothing, overlap) for overlap in overlaps), nothing).total_seconds()
