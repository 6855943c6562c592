"""
Which models of vLLM may sleep, and how deeply.
"""

from __future__ import annotations

import pytest

from tests.factories import make_placement, make_spec
from worker.engines.may_sleep import may_sleep
from worker.state.residency import Level

BOTH = (Level.ASLEEP_1, Level.ASLEEP_2)


@pytest.mark.parametrize(
    ("gpus", "capabilities", "levels"),
    [
        ((0,), {"chat"}, BOTH),
        ((1,), {"embedding"}, BOTH),
        ((0,), {"chat", "vision"}, (Level.ASLEEP_1,)),  # images are misread after level 2
        ((), {"chat"}, ()),  # the CPU
        ((0, 1), {"chat"}, ()),  # vLLM's own server
    ],
)
def test_a_model_sleeps_only_where_its_answers_stay_right(
    gpus: tuple[int, ...], capabilities: set[str], levels: tuple[Level, ...]
) -> None:
    """Rows of cards and capabilities."""
    spec = make_spec(capabilities=frozenset(capabilities))

    assert may_sleep(make_placement(gpus=gpus, spec=spec)) == levels
