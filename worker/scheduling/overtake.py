"""
Which jobs of a turn must begin before those that came earlier, lest its end leaves places empty? Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.scheduling.pick import Knowledge
from worker.state.backlog import Backlog, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

_NEAR = 8  # the end of a turn is near when at most so many times as many jobs wait as there are places ...
MOST = 512  # ... and at most so many: each of them is looked at
_QUIET = 10  # nothing more comes when nothing came for so many times as long as what waits took to come


@dataclass(frozen=True, kw_only=True)
class Overtaking:
    """The long jobs of a model that begin before its other jobs of their class."""

    model_id: str
    long_s: float  # seconds that a job takes at least to be one of them ...
    pace: Pace  # ... at this pace


def find_long_s(
    *,
    waiting: int,
    elsewhere: int,
    places: int,
    reading_s: float,
    whole_s: float,
    came_s: float,
    quiet_s: float,
    look_s: float = 0.0,
) -> float | None:
    """
    Decide from which length on a job overtakes those that came before it, in seconds; None = all keep their order.

    The questions, in order:

    1. Is the end of the turn near?            If not, no job is long beside what is left.
    2. Do as many jobs wait for other models   If not, fewer may gain than are overtaken.
       as can be overtaken here?
    3. Is it a batch, and all of it here?      If not, who comes before the end may rather need a turn that lasts.
    4. How long does the turn take, with all   A job that takes as long must begin now: later, it would still run when
       places taken to its end?                the others have ended.

    Parameters
    ----------
    waiting
        Jobs that wait for the ready model.
    elsewhere
        Jobs that wait for models that nobody serves.
    places
        Jobs that run side by side.
    reading_s, whole_s
        Seconds to read all prompts that wait; of all jobs one after the other, what is left of those in flight too.
    came_s, quiet_s
        Seconds in which all that waits has come, for whatever model; and since the last of it came.
    look_s
        Seconds until this is asked again: what must begin by then begins now.
    """
    most = min(_NEAR * places, MOST)
    # (1) Far from the end.
    if places == 1 or not 1 < waiting <= most:
        return None
    # (2) Few gain.
    if elsewhere < most:
        return None
    # (3) More may come.
    if quiet_s < _QUIET * came_s:
        return None
    # (4) What sticks out.
    left_s = max(reading_s, whole_s / places)
    return left_s - look_s if left_s > look_s else None


def choose_overtaking(
    backlog: Backlog, residency: Residency, *, known: Knowledge, look_s: float, now: float
) -> tuple[Overtaking, ...]:
    """
    Decide at *now* (Unix seconds) which jobs of the ready models overtake others; see find_long_s.

    None do where nobody knows how long they take, or since when something waits.
    """
    lanes = [lane for waiting in backlog.by_model.values() for lane in waiting.by_class]
    came_at = [at for lane in lanes for at in (lane.oldest_at, lane.newest_at)]
    known_at = [at for at in came_at if at is not None]
    if not known_at or len(known_at) < len(came_at):
        return ()
    served = {*residency.ready_models, *(model for model, workers in known.elsewhere.items() if workers)}
    elsewhere = sum(backlog.count(model) for model in backlog.by_model if model not in served)

    def decide(resident: Resident, waiting: Waiting, pace: Pace) -> Overtaking | None:
        alone = [pace.alone_s(lane) for lane in waiting.by_class if lane.output_tokens is not None]
        told_apart = [found for found in alone if found is not None]
        if not told_apart or len(told_apart) < len(waiting.by_class):
            return None
        reading_s, whole_s = (sum(column) for column in zip(*told_apart, strict=True))
        workers = 1 + known.elsewhere.get(resident.model_id, 0)  # each is taken to have as much in flight
        one_s, places = whole_s / waiting.count, workers * pace.at_once
        running = min(resident.in_flight, pace.at_once)  # halfway on average; some may stand behind them
        behind = workers * (resident.in_flight - running)
        long_s = find_long_s(
            waiting=waiting.count,
            elsewhere=elsewhere,
            places=places,
            reading_s=reading_s / workers,
            whole_s=whole_s + (workers * running / 2 + behind) * one_s,
            came_s=max(known_at) - min(known_at),
            quiet_s=now - max(known_at),
            look_s=look_s + behind * one_s / places,
        )
        return None if long_s is None else Overtaking(model_id=resident.model_id, long_s=long_s, pace=pace)

    found = (
        decide(resident, backlog.by_model[resident.model_id], known.paces[resident.model_id])
        for resident in residency.residents
        if resident.level is Level.READY and backlog.count(resident.model_id) and resident.model_id in known.paces
    )
    return tuple(some for some in found if some is not None)
