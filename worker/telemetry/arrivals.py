"""
How many jobs come for each model? By what waits, runs and was answered, over the last minutes; no job is looked at.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from itertools import pairwise

_SLICE_S = 10.0
_SLICES = 12
_BURSTS = 2  # slices that are left out, those with the most: what came all at once does not go on


class Arrivals:
    """Counts per slice of time; told at every beat, from one thread."""

    def __init__(self) -> None:
        self._slices: deque[tuple[float, Mapping[str, int]]] = deque(maxlen=_SLICES + 1)  # begin -> jobs ever, by model

    def look(self, jobs: Mapping[str, int], *, now: float) -> None:
        """See how many *jobs* of each model there have ever been, a number that grows, at *now* (Unix seconds)."""
        if not self._slices or now - self._slices[-1][0] >= _SLICE_S:
            self._slices.append((now, dict(jobs)))

    def per_s(self) -> Mapping[str, float]:
        """Jobs a second, by model: of usual slices, so that a burst is no traffic; nothing before there are some."""
        slices = list(self._slices)
        if len(slices) <= _BURSTS + 1:
            return {}
        rates: dict[str, list[float]] = {}
        for (begin, before), (end, after) in pairwise(slices):
            for model, count in after.items():
                came = max(0, count - before.get(model, count))
                rates.setdefault(model, []).append(came / (end - begin))
        return {
            model: sum(sorted(found)[:-_BURSTS]) / (len(found) - _BURSTS)
            for model, found in rates.items()
            if len(found) > _BURSTS
        }
