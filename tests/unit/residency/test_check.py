"""
What speaks against a load, and that the unknown speaks against nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.factories import GIB, make_gpu, make_machine, make_placement
from worker.residency.check import LoadLimits, check_cards, check_load, check_memory

LIMITS = LoadLimits(max_temperature_c=85, max_power_share=0.95)


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ({}, ()),
        ({"temperature_c": 85, "power_w": 285, "power_limit_w": 300}, ()),  # at the limits is not above them
        ({"temperature_c": 86}, ("card 0 is at 86 C, above 85 C",)),
        ({"power_w": 290, "power_limit_w": 300}, ("card 0 draws 290 W, above 95% of its 300 W",)),
        ({"temperature_c": None, "power_w": 290, "power_limit_w": None, "free_bytes": None}, ()),
        ({"free_bytes": 3 * GIB // 2}, ()),  # make_placement takes 1.5 GiB, to the byte
        (
            {"free_bytes": 3 * GIB // 2 - 1},
            ("card 0 has 1.5 GiB free, small needs 1.5 GiB (did another program take the memory?)",),
        ),
        (
            {"temperature_c": 90, "power_w": 300, "power_limit_w": 300, "free_bytes": GIB},
            (
                "card 0 is at 90 C, above 85 C",
                "card 0 draws 300 W, above 95% of its 300 W",
                "card 0 has 1.0 GiB free, small needs 1.5 GiB (did another program take the memory?)",
            ),
        ),
    ],
)
def test_a_card_says_everything_that_is_against_it(card: dict[str, Any], says: tuple[str, ...]) -> None:
    """Temperature, power, memory, in this order; None is unknown."""
    machine = replace(make_machine(24), gpus=(make_gpu(24, **card),))

    assert check_load(machine, make_placement(gpus=(0,)), LIMITS) == says


def test_heat_and_memory_are_two_questions() -> None:
    """The first is asked while the old model still holds the memory."""
    hot_and_full = replace(make_machine(24), gpus=(make_gpu(24, temperature_c=90, free_bytes=0),))
    placement = make_placement(gpus=(0,))

    assert check_cards(hot_and_full, placement, LIMITS) == ("card 0 is at 90 C, above 85 C",)
    assert check_memory(hot_and_full, placement) == (
        "card 0 has 0.0 GiB free, small needs 1.5 GiB (did another program take the memory?)",
    )
    assert check_cards(make_machine(ram_available_gib=0), make_placement(), LIMITS) == ()


def test_only_the_cards_of_the_placement_are_asked() -> None:
    """The neighbour may be as hot and as full as it likes."""
    hot = make_gpu(24, index=0, free_gib=0, temperature_c=99.0)
    machine = replace(make_machine(24), gpus=(hot, make_gpu(24, index=1)))

    assert check_load(machine, make_placement(gpus=(1,)), LIMITS) == ()
    assert len(check_load(machine, make_placement(gpus=(0, 1)), LIMITS)) == 2


def test_a_card_that_is_gone_is_named() -> None:
    """A reader leaves out a card that stopped answering."""
    assert check_load(make_machine(24), make_placement(gpus=(0, 1)), LIMITS) == ("card 1 does not answer any more",)


@pytest.mark.parametrize(("available_gib", "refused"), [(1.5, False), (1.4, True)])
def test_without_a_card_the_host_s_memory_counts(available_gib: float, refused: bool) -> None:  # noqa: FBT001 - a parameter
    """What is available, not what there is in all."""
    problems = check_load(make_machine(ram_gib=64, ram_available_gib=available_gib), make_placement(), LIMITS)

    assert bool(problems) is refused
    assert all("the host has 1.4 GiB free" in problem for problem in problems)
