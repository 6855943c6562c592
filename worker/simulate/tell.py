"""
What are producers told of a forecast?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from common.schemas import Forecast, Foreseen
from worker.simulate.forecast import Finish, Snapshot, one_job_s
from worker.simulate.policies import pace_of

_NINE_OF_TEN = 1.2816  # standard deviations above the mean


def tell_forecast(
    found: Mapping[str, Sequence[Finish]], snapshot: Snapshot, *, worker: str, valid_s: float
) -> Iterator[Forecast]:
    """Give what *worker* publishes of each model, in seconds after the snapshot; *valid_s* says for how long."""
    serving = {start.ready for start in snapshot.workers if start.target is None}
    for model, finishes in found.items():
        waiting = snapshot.backlog.by_model.get(model)
        work_s = sum(pace_of(snapshot.costs[model]).work_s(lane) or 0.0 for lane in waiting.by_class) if waiting else 0
        count = snapshot.backlog.count(model)
        half_s = one_job_s(snapshot, model) / 2
        share_s = work_s / count if count else snapshot.usual_s.get(model, 0.0) / snapshot.costs[model].max_num_seqs
        yield Forecast(
            model=model,
            worker=worker,
            at=datetime.fromtimestamp(snapshot.now, UTC),
            valid_s=valid_s,
            serving=model in serving,
            points=tuple(_point(finish, snapshot.now, half_s) for finish in finishes),
            next_s=share_s,
            longest_s=longest_s(snapshot, model),
        )


def longest_s(snapshot: Snapshot, model: str) -> float | None:
    """Seconds that 9 of 10 jobs of the model do not exceed, by the normal distribution; None = nobody knows."""
    usual_s = snapshot.usual_s.get(model)
    return None if usual_s is None else usual_s * (1 + _NINE_OF_TEN * snapshot.spread.get(model, 0.0))


def _point(finish: Finish, now: float, half_s: float) -> Foreseen:
    """
    Give a point of the forecast, wider by half the time of a job, *half_s*, at both ends.

    Where all places end together, so do the jobs that are between two points, and it is not told how far those in
    flight are when the forecast is read.
    """
    low_s, high_s = (round(max(0.0, at - now), 3) for at in (finish.low_at - half_s, finish.high_at + half_s))
    return Foreseen(ahead=finish.ahead, low_s=low_s, high_s=high_s, switches=finish.switches)
