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
    ("gpus", "capabilities", "hosted", "levels"),
    [
        ((0,), {"chat"}, True, BOTH),
        ((1,), {"embedding"}, True, BOTH),
        ((0,), {"chat", "vision"}, True, (Level.ASLEEP_1,)),  # images are misread after level 2
        ((), {"chat"}, True, ()),  # the CPU
        ((), {"chat"}, False, ()),
        ((0,), {"chat"}, False, ()),  # vLLM's own server: VLLM_CHANNEL=server
        ((0,), {"chat", "vision"}, False, ()),
        ((0, 1), {"chat"}, True, ()),  # several cards: vLLM's own server too
        ((0, 1, 2, 3), {"chat", "vision"}, True, ()),
        ((0, 1), {"chat"}, False, ()),
    ],
)
def test_a_model_sleeps_only_where_its_answers_stay_right(
    gpus: tuple[int, ...],
    capabilities: set[str],
    hosted: bool,  # noqa: FBT001 - a row
    levels: tuple[Level, ...],
) -> None:
    """Rows of cards, capabilities and who runs it."""
    spec = make_spec(capabilities=frozenset(capabilities))

    assert may_sleep(make_placement(gpus=gpus, spec=spec), hosted=hosted) == levels
