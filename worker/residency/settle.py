"""
A model must leave its card: does it sleep, how deeply, or does it end? Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from worker.memory.estimate import MemoryEstimate
from worker.state.backlog import Backlog
from worker.state.residency import Level, Resident, by_place

# PyTorch rounds each block of pinned memory up to a power of two (CachingHostAllocator): 7B weights may take twice
# their bytes of the host.
_PINNED_AT_MOST = 2
_UNKNOWN = 1e-9  # seconds: less than anything that was measured, and more than nothing


@dataclass(frozen=True, kw_only=True)
class Rest:
    """One way to leave without ending."""

    level: Level
    held: Mapping[int, int]  # bytes that it takes then, by card and HOST


@dataclass(frozen=True, kw_only=True)
class Leaver:
    """A model that must leave, or that has left and sleeps."""

    model_id: str
    rests: tuple[Rest, ...] = ()  # the best first; none = it can only end


def rest_at(level: Level, resident: Resident, memory: MemoryEstimate, *, host_bytes: int | None) -> Rest:
    """
    Say what *resident* will take asleep at *level*; *host_bytes* is what was measured of the host, None = nothing was.

    On its cards stays what no sleep gives back: CUDA's context, the libraries, the graphs.
    """
    pinned = _PINNED_AT_MOST * memory.weights * len(resident.gpus) if level is Level.ASLEEP_1 else 0
    if host_bytes is None:
        host_bytes = resident.host_bytes + pinned
    size = memory.cuda_context + memory.non_torch + memory.cuda_graphs
    return Rest(level=level, held=by_place(size=size, gpus=resident.gpus, host_bytes=host_bytes))


def settle(leavers: Sequence[Leaver], free: Mapping[int, int], *, most: int) -> Mapping[str, Level]:
    """
    Choose a level for each of *leavers*, of which the first is needed first; who gets none ends.

    One after the other takes the best of its rests that what is left of *free* (bytes, by card and HOST) can hold,
    until *most* of them sleep. So none that is needed sooner gives way to one that is needed later.
    """
    left, chosen = dict(free), dict[str, Level]()
    for leaver in leavers:
        fitting = (rest for rest in leaver.rests if all(size <= left.get(at, 0) for at, size in rest.held.items()))
        if len(chosen) < most and (rest := next(fitting, None)):
            chosen[leaver.model_id] = rest.level
            for at, size in rest.held.items():
                left[at] = left.get(at, 0) - size
    return chosen


def by_next_use(residents: Iterable[Resident], backlog: Backlog) -> tuple[str, ...]:
    """
    Put first the model that will be needed first.

    1. Do jobs wait for it?     The one whose job waits longest; an age that nobody knows comes last of these.
    2. Otherwise                The one that was used last; ties go by name.
    """

    def key(resident: Resident) -> tuple[bool, float, float, str]:
        waits, oldest_at = bool(backlog.count(resident.model_id)), backlog.oldest_at(resident.model_id)
        since = float("inf") if oldest_at is None else oldest_at
        return not waits, since if waits else 0.0, -resident.since, resident.model_id

    return tuple(resident.model_id for resident in sorted(residents, key=key))


def rank_levels(
    levels: Iterable[Level],
    *,
    wake_s: Mapping[Level, float],
    sleep_s: Mapping[Level, float],
    start_s: float | None,
) -> tuple[Level, ...]:
    """
    Put first the level that saves most; leave out what saves nothing.

    A level saves *start_s*, what the model's start takes if it has ended, less its wake and the falling asleep, as
    far as they were measured. What was never measured comes after what is known to pay, the lighter sleep first.
    """

    def saved(level: Level) -> float:
        if start_s is None or level not in wake_s:
            return _UNKNOWN
        return start_s - wake_s[level] - sleep_s.get(level, 0.0)

    return tuple(sorted((level for level in levels if saved(level) > 0), key=lambda level: (-saved(level), level)))
