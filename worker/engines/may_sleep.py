"""
At which levels may vLLM put a model to sleep, so that it answers as before? Pure.
"""

from __future__ import annotations

from worker.selection.placement import Placement
from worker.state.residency import Level


def may_sleep(placement: Placement) -> tuple[Level, ...]:
    """
    Give the levels for the model of *placement*, the lighter sleep first; empty = it cannot sleep.

    The questions, in order:

    1. Is it on the CPU?        None: vLLM refuses (its platforms' is_sleep_mode_available).
    2. Over several cards?      None: what runs those here is vLLM's own server, without its developer endpoints.
    3. Does it see?             Level 1: after level 2 images are misread, and text is not (NVIDIA-NeMo/RL#2631), so
                                that no canary of ours would notice.
    4. Otherwise                Both. Adapters (LoRA) and draft models, which level 2 does not reload (vllm#52479),
                                are not run here at all.
    """
    # (1) The CPU. (2) Several cards.
    if len(placement.gpus) != 1:
        return ()

    # (3) Vision.
    if "vision" in placement.spec.capabilities:
        return (Level.ASLEEP_1,)

    # (4) Both.
    return (Level.ASLEEP_1, Level.ASLEEP_2)
