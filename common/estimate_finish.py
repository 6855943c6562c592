"""
When will a job have ended that has so many before it? Read off the forecast of its model. Pure.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from datetime import datetime

from common.schemas import Estimate, Forecast, Foreseen

_SOME_MORE, _FEW = 1.25, 8  # so many may have come since; of more, the next forecast tells within a second


def estimate_finish(forecast: Forecast | None, *, ahead: int, now: datetime) -> Estimate | None:
    """
    Say in how many seconds from *now* the job will have ended; None = nobody knows.

    1. Is there a forecast, and is it new enough?   Else nobody knows.
    2. Where does the job stand in it?              Between two points: in proportion. Beyond the last: a usual job's
                                                    share of the engine for each. Far beyond: nobody has looked yet.
    3. Are the jobs before it being answered?       Then they leave while time passes, and as many before it take as
                                                    long as they did. Else the moments stay, and come nearer.
    """
    if forecast is None:
        return None
    age_s = (now - forecast.at).total_seconds()
    if age_s > forecast.valid_s:
        return None
    if ahead > _SOME_MORE * forecast.points[-1].ahead + _FEW:
        return None
    low_s, high_s, switches = _read(forecast.points, ahead, forecast.next_s)
    gone_s = 0.0 if forecast.serving else max(0.0, age_s)
    return Estimate(
        low_s=round(max(0.0, low_s - gone_s), 3),
        high_s=round(max(0.0, high_s - gone_s), 3),
        model=forecast.model,
        ahead=ahead,
        switches=switches,
    )


def span(estimates: Sequence[Estimate]) -> Estimate | None:
    """Cover all of *estimates*, of jobs of which one will come true; None if there are none."""
    if len(estimates) < 2:  # noqa: PLR2004 - one is what it is
        return estimates[0] if estimates else None
    return Estimate(low_s=min(found.low_s for found in estimates), high_s=max(found.high_s for found in estimates))


def _read(points: Sequence[Foreseen], ahead: int, next_s: float) -> tuple[float, float, int]:
    after = bisect_left(points, ahead, key=lambda point: point.ahead)
    if after == len(points):
        last = points[-1]
        more_s = (ahead - last.ahead) * next_s
        return last.low_s + more_s, last.high_s + more_s, last.switches
    right = points[after]
    left = points[max(0, after - 1)]
    share = (ahead - left.ahead) / (right.ahead - left.ahead) if right.ahead > left.ahead else 1.0
    low_s = left.low_s + share * (right.low_s - left.low_s)
    return low_s, left.high_s + share * (right.high_s - left.high_s), right.switches
