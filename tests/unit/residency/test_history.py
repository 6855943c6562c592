"""
How much of a wait was a switch, and which switches are remembered.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.schemas import SwitchRecord, SwitchTime
from worker.residency.history import SwitchHistory, seconds_in_switches

ZERO = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return ZERO + timedelta(seconds=seconds)


def record(start: float, end: float) -> SwitchRecord:
    return SwitchRecord(
        from_model="a", to_model="b", outcome="ready", seconds=end - start, attempts=1, reason="", at=at(end)
    )


@pytest.mark.parametrize(
    ("switches", "start", "end", "seconds"),
    [
        ([], 0, 10, 0),
        ([(2, 5)], 0, 10, 3),  # all of it
        ([(2, 5)], 3, 4, 1),  # the wait lies within the switch
        ([(2, 5)], 0, 3, 1),  # its beginning
        ([(2, 5)], 4, 10, 1),  # its end
        ([(2, 5)], 5, 10, 0),  # it ended as the wait began
        ([(2, 5)], 0, 2, 0),
        ([(2, 5), (7, 8)], 4, 10, 2),
        ([(2, 5)], 10, 0, 0),  # two clocks may disagree about what came first
    ],
)
def test_only_what_overlaps_counts(switches: list[tuple[int, int]], start: int, end: int, seconds: int) -> None:
    """Switches from-to, and a wait from-to."""
    assert seconds_in_switches([record(*switch) for switch in switches], at(start), at(end)) == seconds


@given(
    st.lists(st.integers(0, 1000), unique=True).map(sorted), st.integers(0, 1000), st.integers(0, 1000)
)  # fmt: skip
def test_never_negative_and_never_more_than_the_wait(moments: list[int], start: int, length: int) -> None:
    """However many switches there were, one after the other."""
    switches = [record(*pair) for pair in zip(moments[::2], moments[1::2], strict=False)]

    assert 0 <= seconds_in_switches(switches, at(start), at(start + length)) <= length


def test_the_newest_are_remembered_and_every_one_is_told() -> None:
    """Newest first; fifty at most stay in memory."""
    told: list[SwitchRecord] = []
    history = SwitchHistory(told.append)
    records = [record(second, second + 0.5) for second in range(60)]
    for one in records:
        history.add(one)

    assert told == records
    assert history.last(2) == (records[59], records[58])
    assert history.last(99) == tuple(records[:9:-1])
    assert history.seconds_between(at(58.25), at(99)) == 0.75


def loaded(seconds: float, **changes: object) -> SwitchRecord:
    stages = {"loading": seconds}
    return record(0, seconds).model_copy(update={"stages": stages, "load_bytes": 1000, **changes})


def test_what_switches_take_is_learned_kept_and_expected() -> None:
    """Each time that changes goes to whoever keeps it, and comes back at the next start."""
    kept: list[SwitchTime] = []
    history = SwitchHistory(lambda _: None, keep_time=kept.append)
    assert history.expected_switch_s("a", "b") is None
    history.add(loaded(10))
    history.add(loaded(20))
    history.add(loaded(99, outcome="failed"))

    assert [time.last_s for time in kept] == [10, 20]
    assert history.expected_switch_s("a", "b") == 13
    assert history.load_speed() == pytest.approx(1000 / 13)

    again = SwitchHistory(lambda _: None, times=kept[-1:])
    assert again.times() == history.times() == (kept[-1],)
    assert again.expected_switch_s("x", "b") == 13
