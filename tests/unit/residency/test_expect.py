"""
What earlier switches teach of the next one: how long it will take, and how long a load may take.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import product
from typing import Any

import pytest

from common.schemas import SwitchRecord, SwitchTime
from tests.factories import GIB
from worker.residency.expect import allow_s, average, expect_at_most_s, expect_switch_s, load_speed

GB = 10**9
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def record(loading_s: float = 8.0, **changes: Any) -> SwitchRecord:
    """A switch that drained for 100 s, then took 2 s besides its loading."""
    stages = {"draining": 100, "unloading": 1, "loading": loading_s, "verifying": 1}
    facts: dict[str, Any] = {
        "from_model": "a", "to_model": "b", "outcome": "ready", "seconds": 102 + loading_s, "stages": stages,
        "attempts": 1, "reason": "", "at": NOW, "load_bytes": GIB,
    }  # fmt: skip
    return SwitchRecord(**{**facts, **changes})


def known(from_model: str | None, to_model: str, mean_s: float = 1.0, **changes: Any) -> SwitchTime:
    facts: dict[str, Any] = {
        "from_model": from_model, "to_model": to_model, "level": "cold", "mean_s": mean_s, "last_s": mean_s,
        "load_s": mean_s, "load_bytes": GIB, "count": 1, "at": NOW,
    }  # fmt: skip
    return SwitchTime(**{**facts, **changes})


def test_the_first_switch_of_a_kind_is_its_mean() -> None:
    """Without draining: the jobs in flight are answered meanwhile."""
    first = average(None, record(8))

    assert first == known("a", "b", 10, load_s=8)


def test_later_ones_move_the_mean_by_three_tenths() -> None:
    """10 s, then 20 s: 10 + 0.3 x 10; the last one is told beside it."""
    after = average(average(None, record(8)), record(18))

    assert after is not None
    assert (after.mean_s, after.last_s, after.load_s, after.count) == (13, 20, 11, 2)


def test_the_mean_stays_between_the_shortest_and_the_longest() -> None:
    """Whatever order they come in; one value is kept, however many there were."""
    for seconds in product((1.0, 5.0, 60.0), repeat=4):
        time: SwitchTime | None = None
        for loading_s in seconds:
            time = average(time, record(loading_s))
        assert time is not None
        assert min(seconds) + 2 <= time.mean_s <= max(seconds) + 2


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": "failed"},
        {"outcome": "stale", "stages": {}},
        {"attempts": 2},  # half of it was a failure
        {"attempts": 0, "stages": {}},  # it was ready already
    ],
)
@pytest.mark.parametrize("before", [None, known("a", "b")])
def test_what_was_no_whole_switch_teaches_nothing(changes: dict[str, Any], before: SwitchTime | None) -> None:
    """What is known stays as it is."""
    assert average(before, record(**changes)) is before


@pytest.mark.parametrize(
    ("times", "from_model", "expected"),
    [
        ([], "a", None),
        ([("a", "c", 5)], "a", None),  # to another model
        ([("a", "b", 5)], "a", 5),
        ([(None, "b", 3), ("a", "b", 5)], None, 3),  # nothing was loaded
        ([("x", "b", 4), ("y", "b", 8)], "a", 6),  # never from a: what comes counts more than what goes
    ],
)
def test_what_is_expected(times: list[tuple[str | None, str, float]], from_model: str, expected: float | None) -> None:
    """Rows of (from, to, seconds), asked for a switch to b."""
    assert expect_switch_s([known(*row) for row in times], from_model, "b") == expected


def test_another_level_is_another_kind_of_switch() -> None:
    """A wake says nothing of a cold start, nor the other way round."""
    times = [known("a", "b", 1, level="asleep_1"), known("a", "b", 20)]

    assert expect_switch_s(times, "a", "b") == 20
    assert expect_switch_s(times, "a", "b", level="asleep_1") == 1
    assert expect_switch_s(times, "a", "b", level="asleep_2") is None


@pytest.mark.parametrize(
    ("measured", "level", "expected"),
    [
        ({}, "cold", None),
        ({"cold": 60}, "cold", 60),
        ({"cold": 60}, "spare", 60),
        ({"cold": 60, "spare": 20}, "asleep_1", 20),
        ({"cold": 60, "asleep_2": 9, "asleep_1": 2}, "asleep_2", 9),
        ({"cold": 60, "asleep_2": 9, "asleep_1": 2}, "asleep_1", 2),
        ({"asleep_1": 2}, "asleep_2", None),  # a lighter sleep says nothing of a deeper one
        ({"spare": 20}, "cold", None),
    ],
)
def test_what_was_never_measured_takes_at_most_what_a_colder_start_took(
    measured: dict[str, float], level: str, expected: float | None
) -> None:
    """Rows of seconds by level, asked for a switch from a to b."""
    times = [known("a", "b", seconds, level=kind) for kind, seconds in measured.items()]

    assert expect_at_most_s(times, "a", "b", level=level) == expected


@pytest.mark.parametrize(
    ("times", "speed"),
    [
        ([], None),
        ([known(None, "a", load_bytes=None)], None),
        ([known(None, "a", load_s=0)], None),
        ([known(None, "a", load_s=2, level="asleep_1")], None),  # nothing came from the disk
        ([known(None, "a", load_bytes=100, load_s=10), known("a", "b", load_bytes=9000, load_s=30)], 300),
        ([known(None, "a", load_bytes=100, load_s=10, level="spare")], 10),  # from the files too
    ],
)
def test_the_load_speed_is_that_of_the_largest_load(times: list[SwitchTime], speed: float | None) -> None:
    """A small model's load is mostly the start of a program."""
    assert load_speed(times) == speed


@pytest.mark.parametrize(
    ("size", "speed", "allowed"),
    [
        (3 * GB, None, 90),  # nothing was ever loaded here: 10 s on a slow disk, thrice that
        (60 * GB, None, 600),  # 200 s
        (60 * GB, GB / 100, 600),  # a tiny model took seconds to start, which says nothing of the disk
        (4 * GIB, GIB, 90),  # 4 s, thrice that: far below
        (40 * GIB, GIB / 2, 240),  # 80 s
        (0, GIB, 90),  # nobody knows its size
    ],
)
def test_a_load_may_take_longer_where_its_size_says_so(size: int, speed: float | None, allowed: float) -> None:
    """Never less than the setting, here 90 s; never more than a slow disk asks for."""
    assert allow_s(90, size, speed) == allowed
