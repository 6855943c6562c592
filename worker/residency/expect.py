"""
How long will a switch take, and how long may a load take? Pure: from what earlier ones took.
"""

from __future__ import annotations

from collections.abc import Iterable

from common.schemas import SwitchRecord, SwitchStage, SwitchTime
from worker.state.residency import Level

_NEWEST_COUNTS = 0.3  # of the mean: a disk that is busy once moves it a little, a new driver within a few switches
_SLACK = 3.0  # a load may take this many times what its size says: half of it is not the disk's
_SLOW_DISK = 300e6  # bytes/s: a SATA disk; with the slack, whatever reads a third of that
_WARMEST_FIRST = (Level.ASLEEP_1, Level.ASLEEP_2, Level.SPARE, Level.COLD)
_FROM_FILES = (Level.SPARE, Level.COLD)
PRICED = (SwitchStage.UNLOADING, SwitchStage.LOADING, SwitchStage.VERIFYING)  # what a switch is known to take


def average(before: SwitchTime | None, record: SwitchRecord) -> SwitchTime | None:
    """
    Give what is known of a kind of switch after one more, *record*; *before* if that one teaches nothing.

    It teaches if the model became ready at the first attempt. What jobs in flight and downloads took is no part of
    it: the one is not lost, the other does not come again.
    """
    took_s = round(sum(record.stages.get(stage, 0.0) for stage in PRICED), 4)
    if record.outcome != "ready" or record.attempts != 1 or not took_s:
        return before
    load_s = record.stages.get(SwitchStage.LOADING, 0.0)
    return SwitchTime(
        from_model=record.from_model,
        to_model=record.to_model,
        level=record.level,
        mean_s=_moved(before.mean_s if before else None, took_s),
        last_s=took_s,
        load_s=_moved(before.load_s if before else None, load_s),
        load_bytes=record.load_bytes,
        count=(before.count if before else 0) + 1,
        at=record.at,
    )


def expect_switch_s(
    times: Iterable[SwitchTime], from_model: str | None, to_model: str, *, level: str = Level.COLD
) -> float | None:
    """
    Say how many seconds a switch will take, without draining.

    1. Was this very switch made before?        Its moving mean.
    2. One to the same model from another one?  The mean of those: what goes matters less than what comes.
    3. Otherwise                                Nobody knows: None.
    """
    found = {time.from_model: time.mean_s for time in times if (time.to_model, time.level) == (to_model, level)}
    if from_model in found:
        return found[from_model]
    return sum(found.values()) / len(found) if found else None


def expect_at_most_s(times: Iterable[SwitchTime], from_model: str | None, to_model: str, *, level: str) -> float | None:
    """
    Say how many seconds a switch to a model that is at *level* now will take at most; None if nobody knows.

    What was never measured from there takes no longer than from the next colder level.
    """
    known = list(times)
    colder = _WARMEST_FIRST[_WARMEST_FIRST.index(Level(level)) :]
    expected = (expect_switch_s(known, from_model, to_model, level=each) for each in colder)
    return next((seconds for seconds in expected if seconds is not None), None)


def load_speed(times: Iterable[SwitchTime]) -> float | None:
    """
    Bytes of weights per second that this worker loads from the disk; None if it has loaded nothing yet.

    That of the largest model: starting the engine's program, the same for each, hides the disk of small ones.
    """
    loads = [
        (time.load_bytes, time.load_s)
        for time in times
        if time.load_bytes and time.load_s and time.level in _FROM_FILES
    ]
    if not loads:
        return None
    size, seconds = max(loads)
    return size / seconds


def allow_s(least_s: float, size: int, speed: float | None) -> float:
    """
    Say how many seconds a load of *size* bytes of weights may take.

    At least *least_s*; more where its size and *speed* (bytes/s, see `load_speed`) say so. A slow disk's speed counts
    instead before anything was loaded: a large model that is cut off at its first load never shows how fast it is.
    And where so little was loaded that starting the program took most of the time: else a load that hangs could for
    hours.
    """
    return max(least_s, _SLACK * size / max(speed or 0.0, _SLOW_DISK))


def _moved(mean: float | None, newest: float) -> float:
    return newest if mean is None else round(mean + _NEWEST_COUNTS * (newest - mean), 4)
