"""
The switches that ended: the last ones in memory, how much of a job's wait they were, and what the next will take.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import datetime, timedelta

from common.schemas import SwitchRecord, SwitchTime
from worker.residency.expect import average, expect_at_most_s, load_speed
from worker.state.residency import Level

_KEPT = 50


class SwitchHistory:
    """
    Remembers switches, newest first, and tells each to *keep* (Redis, say).

    *times* is what earlier starts of this worker measured; what becomes of it goes to *keep_time*.
    """

    def __init__(
        self,
        keep: Callable[[SwitchRecord], object],
        *,
        times: Iterable[SwitchTime] = (),
        keep_time: Callable[[SwitchTime], object] = lambda _time: None,
    ) -> None:
        self._keep = keep
        self._keep_time = keep_time
        self._records: deque[SwitchRecord] = deque(maxlen=_KEPT)
        self._times = {(time.from_model, time.to_model, time.level): time for time in times}
        self._lock = threading.Lock()

    def add(self, record: SwitchRecord) -> None:
        """Remember a switch that just ended."""
        kind = (record.from_model, record.to_model, record.level)
        with self._lock:
            self._records.appendleft(record)
            before = self._times.get(kind)
            after = average(before, record)
            if after is not None:
                self._times[kind] = after
        self._keep(record)
        if after is not None and after != before:
            self._keep_time(after)

    def last(self, count: int) -> tuple[SwitchRecord, ...]:
        """The newest *count* switches, newest first."""
        with self._lock:
            return tuple(self._records)[:count]

    def seconds_between(self, start: datetime, end: datetime) -> float:
        """How many seconds between *start* and *end* were spent in switches."""
        return seconds_in_switches(self.last(_KEPT), start, end)

    def times(self) -> tuple[SwitchTime, ...]:
        """What each kind of switch takes, in order of the names."""
        with self._lock:
            return tuple(time for _, time in sorted(self._times.items(), key=lambda item: tuple(map(str, item[0]))))

    def expected_switch_s(self, from_model: str | None, to_model: str, *, level: Level = Level.COLD) -> float | None:
        """How many seconds a switch to a model at *level* will take at most, without draining; None: nobody knows."""
        return expect_at_most_s(self.times(), from_model, to_model, level=level)

    def load_speed(self) -> float | None:
        """Bytes of weights per second that this worker loads; None if it has loaded nothing yet."""
        return load_speed(self.times())


def seconds_in_switches(records: Iterable[SwitchRecord], start: datetime, end: datetime) -> float:
    """The overlap of *records* (one after the other, never two at once) with the time from *start* to *end*."""
    nothing = timedelta()
    overlaps = (min(end, r.at) - max(start, r.at - timedelta(seconds=r.seconds)) for r in records)
    return sum((max(nothing, overlap) for overlap in overlaps), nothing).total_seconds()
