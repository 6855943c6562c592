"""
What always holds of a choice, on every small world: no place is overfull, no model forgotten.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tests.choices import SHIPPED, choose, ids
from tests.factories import make_machine
from worker.hardware.gpu import Machine
from worker.selection.describe import describe_choice
from worker.selection.overrides import Overrides

CARDS: list[tuple[float, ...]] = [(), (6,), (8,), (12,), (24,), (48,), (80,), (141,), (24, 24), (24, 8), (80, 80)]
RAM = [2, 4, 16, 64]
MACHINES = [make_machine(*cards, ram_gib=ram) for cards in CARDS for ram in RAM]
OVERRIDES = [
    Overrides(),
    Overrides(max_model_len=4096),
    Overrides(max_model_len=131072),
    Overrides(gpu_memory_utilization=0.8),
    Overrides(tensor_parallel_size=2),
    Overrides(quantization="fp8"),
    Overrides(max_num_seqs=256, llamacpp_parallel=1),
    Overrides(n_gpu_layers=10),
    Overrides(n_gpu_layers=-1),
    Overrides(n_gpu_layers=0),
]


@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_placement_is_larger_than_its_place(machine: Machine, overrides: Overrides) -> None:
    """
    On every card it uses, and in RAM where it uses none, there is more free than the placement takes.
    """
    for placement in choose(machine, overrides).placements:
        assert placement.memory.total <= min(
            (machine.gpus[index].free_bytes or 0 for index in placement.gpus), default=machine.ram_available_bytes
        )
        assert placement.memory.host <= machine.ram_available_bytes
        assert placement.kv_cache_bytes == placement.memory.kv_cache
        assert placement.kv_cache_bytes > 0 or placement.n_gpu_layers > 0  # else no layer that keeps any is on the card


@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_model_is_served_or_left_out_with_a_reason(machine: Machine, overrides: Overrides) -> None:
    """
    No model of the catalogue is forgotten, none is told twice, and the lines for people name each.
    """
    choice = choose(machine, overrides)
    left = [left.model_id for left in choice.left_out]

    assert sorted([*ids(choice), *left]) == sorted(SHIPPED.ids)
    assert all(left.reason for left in choice.left_out)
    assert len(describe_choice(choice)) == 1 + len(SHIPPED)


@pytest.mark.parametrize("machine", MACHINES)
def test_one_model_of_each_tier_is_for_the_router(machine: Machine) -> None:
    """
    And it is trusted with at least as much as the others of its tier; what starts is one of these. One more of a
    tier may embed.
    """
    choice = choose(machine)
    chatting = [placement for placement in choice.placements if "chat" in placement.spec.capabilities]
    for tier in {placement.spec.tier for placement in chatting}:
        peers = [placement for placement in chatting if placement.spec.tier == tier]
        (offered,) = (placement for placement in peers if placement.auto)
        assert offered.spec.complexity_up_to == max(peer.spec.complexity_up_to for peer in peers)

    assert choice.starting is None or (choice.starting.auto and choice.starting in choice.placements)


@pytest.mark.parametrize("ram", RAM)
def test_a_larger_card_never_serves_fewer_models(ram: float) -> None:
    """
    From 2 to 200 GiB, whatever one card serves the next larger one serves too, with as long a context.
    """
    for smaller, larger in pairwise(choose(make_machine(gib, ram_gib=ram)) for gib in range(2, 200)):
        for placement in smaller.placements:
            found = larger.placement(placement.model_id)
            assert found is not None
            assert found.max_model_len >= placement.max_model_len or placement.n_gpu_layers >= 0


@pytest.mark.parametrize("machine", MACHINES)
def test_several_cards_only_where_one_is_too_small(machine: Machine) -> None:
    """
    Whatever is spread over cards is refused on the largest of them alone.
    """
    for placement in choose(machine).placements:
        if len(placement.gpus) > 1:
            largest = max(machine.gpus, key=lambda gpu: gpu.total_bytes)
            assert placement.model_id not in ids(choose(replace(machine, gpus=(replace(largest, index=0),))))
