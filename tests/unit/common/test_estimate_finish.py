"""
When a job will have ended, read off a forecast: rows with the arithmetic.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from common.estimate_finish import estimate_finish, span
from common.schemas import Estimate, Forecast, Foreseen, utc_now

AT = utc_now()
FORECAST = Forecast(
    model="m", worker="w", at=AT, valid_s=30, serving=False, next_s=2.0,
    points=(
        Foreseen(ahead=0, low_s=10, high_s=20, switches=1),
        Foreseen(ahead=10, low_s=30, high_s=60, switches=1),
        Foreseen(ahead=20, low_s=100, high_s=130, switches=3),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("ahead", "low_s", "high_s", "switches"),
    [
        (0, 10, 20, 1),
        (5, 20, 40, 1),  # halfway
        (10, 30, 60, 1),
        (11, 37, 67, 3),  # a tenth of the way
        (20, 100, 130, 3),
        (24, 108, 138, 3),  # four more, 2 s each
    ],
)
def test_a_place_between_two_points_is_told_in_proportion(
    ahead: int, low_s: float, high_s: float, switches: int
) -> None:
    """And beyond the last, a usual job's share of the engine for each."""
    found = estimate_finish(FORECAST, ahead=ahead, now=AT)
    assert found == Estimate(low_s=low_s, high_s=high_s, model="m", ahead=ahead, switches=switches)


def test_the_moments_come_nearer_unless_the_jobs_before_it_leave() -> None:
    """After 15 s: of a model that waits for its turn, 15 s less; of one that is served, as many take as long."""
    later = AT + timedelta(seconds=15)
    waits = estimate_finish(FORECAST, ahead=0, now=later)
    served = estimate_finish(FORECAST.model_copy(update={"serving": True}), ahead=0, now=later)
    assert waits is not None
    assert served is not None
    assert (waits.low_s, waits.high_s) == (0, 5)
    assert (served.low_s, served.high_s) == (10, 20)


def test_nobody_knows() -> None:
    """No forecast, one that is too old, or a place that it says nothing of."""
    assert estimate_finish(None, ahead=0, now=AT) is None
    assert estimate_finish(FORECAST, ahead=0, now=AT + timedelta(seconds=31)) is None
    assert estimate_finish(FORECAST, ahead=33, now=AT) is not None  # 1.25 x 20 + 8
    assert estimate_finish(FORECAST, ahead=34, now=AT) is None


def test_a_range_covers_each_choice() -> None:
    """Of one it is its own; of several, from the soonest to the latest, of no model; of none, nothing."""
    one = Estimate(low_s=1, high_s=2, model="a", ahead=3, switches=0)
    other = Estimate(low_s=0.5, high_s=1.5, model="b", ahead=1, switches=2)
    assert span([]) is None
    assert span([one]) == one
    assert span([one, other]) == Estimate(low_s=0.5, high_s=2)
