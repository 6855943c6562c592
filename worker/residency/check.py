"""
May a model be loaded on these cards right now? A pure answer: the list of what speaks against it.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.hardware.gpu import Gpu, Machine
from worker.selection.placement import Placement

_GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class LoadLimits:
    """What a card may show before a load."""

    max_temperature_c: float
    max_power_share: float  # of the card's own power limit


def check_load(machine: Machine, placement: Placement, limits: LoadLimits, *, held: int = 0) -> tuple[str, ...]:
    """
    Say what speaks against loading *placement* now: what the cards show, then the memory; empty = go ahead.

    *held* is what it has of each of its cards already, asleep.
    """
    return (*check_cards(machine, placement, limits), *check_memory(machine, placement, held=held))


def check_cards(machine: Machine, placement: Placement, limits: LoadLimits) -> tuple[str, ...]:
    """
    Say what the cards of *placement* show against a load, whatever memory is free; empty = nothing.

    Is each there, cool enough, and below its power limit? What the driver does not say speaks against nothing.
    """
    cards = {gpu.index: gpu for gpu in machine.gpus}
    return tuple(
        problem
        for index in placement.gpus
        for problem in (
            _card_problems(cards[index], limits) if index in cards else [f"card {index} does not answer any more"]
        )
    )


def check_memory(machine: Machine, placement: Placement, *, held: int = 0) -> tuple[str, ...]:
    """Say where *placement* finds too little free memory: on its cards, or on the host if it has none."""
    if not placement.gpus:
        return _short_of(placement, machine.ram_available_bytes, "the host")
    return tuple(
        problem
        for gpu in machine.gpus
        if gpu.index in placement.gpus and gpu.free_bytes is not None
        for problem in _short_of(placement, gpu.free_bytes + held, f"card {gpu.index}")
    )


def free_bytes(machine: Machine, placement: Placement) -> int | None:
    """What is free on the fullest of the cards of *placement*, or on the host if it has none; None = unknown."""
    if not placement.gpus:
        return machine.ram_available_bytes
    free = [gpu.free_bytes for gpu in machine.gpus if gpu.index in placement.gpus and gpu.free_bytes is not None]
    return min(free, default=None)


def _card_problems(gpu: Gpu, limits: LoadLimits) -> list[str]:
    name = f"card {gpu.index}"
    problems: list[str] = []
    if gpu.temperature_c is not None and gpu.temperature_c > limits.max_temperature_c:
        problems.append(f"{name} is at {gpu.temperature_c:.0f} C, above {limits.max_temperature_c:.0f} C")
    if gpu.power_w is not None and gpu.power_limit_w and gpu.power_w / gpu.power_limit_w > limits.max_power_share:
        problems.append(
            f"{name} draws {gpu.power_w:.0f} W, above {limits.max_power_share:.0%} of its {gpu.power_limit_w:.0f} W"
        )
    return problems


def _short_of(placement: Placement, free_bytes: int, where: str) -> tuple[str, ...]:
    needed = placement.memory.total
    if needed <= free_bytes:
        return ()
    has, needs = f"{free_bytes / _GIB:.1f} GiB free", f"{needed / _GIB:.1f} GiB"
    return (f"{where} has {has}, {placement.model_id} needs {needs} (did another program take the memory?)",)
