"""
What was chosen, in words: one line for each model, for the log and the terminal.
"""

from __future__ import annotations

from worker.catalog.spec import EngineKind
from worker.selection.choose import Choice
from worker.selection.placement import Placement

_GIB = 2**30


def describe_choice(choice: Choice) -> tuple[str, ...]:
    """Say what starts and why, then each model that is served, then each that is left out and why."""
    starting = choice.starting.model_id if choice.starting else "nothing"
    return (
        f"starts with {starting}: {choice.reason}",
        *(f"serves {placement.model_id}: {describe_placement(placement)}" for placement in choice.placements),
        *(f"leaves out {left.model_id}: {left.reason}" for left in choice.left_out),
    )


def describe_placement(placement: Placement) -> str:
    """Where it runs, with how much memory, for how many tokens; sizes in GiB, because people read them."""
    parts = [
        placement.spec.engine.value,
        _where(placement),
        f"{placement.memory.total / _GIB:.1f} GiB{' each' if len(placement.gpus) > 1 else ''}",
        f"{placement.max_model_len} tokens",
        f"{placement.max_num_seqs} at once",
    ]
    if not placement.auto:
        parts.append("only when named")
    return ", ".join(parts)


def _where(placement: Placement) -> str:
    if not placement.gpus:
        return "on the CPU"
    cards = f"card{'s' if len(placement.gpus) > 1 else ''} {', '.join(map(str, placement.gpus))}"
    if placement.spec.engine is EngineKind.LLAMACPP and placement.n_gpu_layers != -1:
        return f"{placement.n_gpu_layers} layers on {cards}, the others on the CPU"
    return f"on {cards}"
