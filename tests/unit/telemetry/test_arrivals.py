"""
How many jobs come: of usual slices of time, so that a burst is no traffic.
"""

from __future__ import annotations

import pytest

from worker.telemetry.arrivals import Arrivals


def look(arrivals: Arrivals, came: list[int]) -> None:
    """Look five times a second, while so many jobs came in each slice of 10 s."""
    total = 0
    for slice_, jobs in enumerate([*came, 0]):
        arrivals.look({"m": total}, now=10.0 * slice_)
        arrivals.look({"m": total + 1}, now=10.0 * slice_ + 5)  # within a slice nothing is looked at
        total += jobs


@pytest.mark.parametrize(
    ("came", "per_s"),
    [
        ([20] * 12, 2.0),
        ([0] * 11 + [5000], 0.0),  # all at once
        ([0] * 10 + [3000, 3000], 0.0),  # a long burst
        ([20] * 10 + [500, 500], 2.0),  # a burst in traffic
        ([10, 30] * 6, 1.8),  # 6 x 1 and 4 x 3 of 10
    ],
)
def test_what_came_in_most_slices_goes_on(came: list[int], per_s: float) -> None:
    """The two slices with the most are left out."""
    arrivals = Arrivals()
    look(arrivals, came)
    assert arrivals.per_s() == {"m": pytest.approx(per_s)}


def test_nothing_is_said_of_a_short_time() -> None:
    """Two slices are none."""
    arrivals = Arrivals()
    look(arrivals, [100])
    assert arrivals.per_s() == {}


def test_jobs_that_vanish_are_no_traffic() -> None:
    """Cancelled ones, or those that another model took."""
    arrivals = Arrivals()
    for slice_ in range(6):
        arrivals.look({"m": 100 - 10 * slice_}, now=10.0 * slice_)
    assert arrivals.per_s() == {"m": 0.0}
