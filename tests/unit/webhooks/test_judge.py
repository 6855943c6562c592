"""
When a webhook is delivered, called again, or given up.
"""

from __future__ import annotations

from itertools import pairwise

import pytest

from worker.webhooks.judge import Ended, Owed, Verdict, judge

DAY = 86400.0
OWED = Owed(job_id="1", url="https://a.example", calls=0, since=1000.0)


def verdict(ended: Ended, *, calls: int = 0, now: float = 1000.0, give_up_s: float = DAY) -> Verdict:
    return judge(Owed(job_id="1", url="x", calls=calls, since=1000.0), ended, now=now, give_up_s=give_up_s)


@pytest.mark.parametrize("status", range(100, 600))
def test_every_status_means_something(status: int) -> None:
    """2xx is delivered, 410 is the end, and everything else is called again: redirects too, they are not followed."""
    found = verdict(Ended(status=status))
    assert found.delivered is (200 <= status < 300)
    assert (found.again_in_s is None) is (found.delivered or status == 410)
    assert str(status) in found.reason


def test_calls_become_more_seldom() -> None:
    """Three times later each time, an hour at most."""
    pauses = [verdict(Ended(status=500), calls=calls).again_in_s or 0 for calls in range(50)]
    assert pauses[:4] == [5, 15, 45, 135]
    assert all(earlier <= later for earlier, later in pairwise(pauses))
    assert max(pauses) == 3600


def test_who_asks_for_patience_gets_it() -> None:
    """Not sooner than anybody else, and not beyond an hour; only where the answer is one that means it."""
    assert verdict(Ended(status=429, retry_after_s=60)).again_in_s == 60
    assert verdict(Ended(status=503, retry_after_s=1)).again_in_s == 5
    assert verdict(Ended(status=429, retry_after_s=1e9)).again_in_s == 3600
    assert verdict(Ended(status=404, retry_after_s=60)).again_in_s == 5


@pytest.mark.parametrize(("now", "ends"), [(1000.0, False), (1000.0 + DAY - 5, False), (1000.0 + DAY - 4, True)])
def test_it_is_given_up_when_the_next_call_would_be_too_late(now: float, *, ends: bool) -> None:
    """Measured from the job's end, with the reason of the last call and their number."""
    found = verdict(Ended(problem="ConnectError: nobody"), now=now)
    assert (found.again_in_s is None) is ends
    assert not found.delivered
    if ends:
        assert found.reason == "given up after 1 calls: ConnectError: nobody"


def test_an_address_that_is_refused_is_not_called_again() -> None:
    """It would be refused again."""
    found = verdict(Ended(problem="x leads inside", refused=True))
    assert found == Verdict(delivered=False, reason="given up: x leads inside")
