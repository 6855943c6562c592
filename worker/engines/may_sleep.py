"""
At which levels may vLLM put a model to sleep, so that it answers as before? Pure.
"""

from __future__ import annotations

from worker.selection.placement import Placement
from worker.state.residency import Level


def may_sleep(placement: Placement, *, hosted: bool) -> tuple[Level, ...]:
    """
    Give the levels for the model of *placement*, the lighter sleep first; empty = it cannot sleep.

    *hosted* says that the engine host would run it, and not vLLM's own server. The questions, in order:

    1. Is it on the CPU?        None: vLLM refuses (its platforms' is_sleep_mode_available).
    2. Does vLLM's own server   None: it takes such orders at developer endpoints only (VLLM_SERVER_DEV_MODE), whose
       run it?                  collective_rpc lets whoever reaches the socket call anything in its processes.
    3. Over several cards?      None: the server of (2) runs those, whatever the channel. And one canary cannot tell
                                which of many processes came back wrong, or kept its memory.
    4. Does it see?             Level 1: after level 2 images are misread, and text is not (NVIDIA-NeMo/RL#2631), so
                                that no canary of ours would notice.
    5. Otherwise                Both. Adapters (LoRA) and draft models, which level 2 does not reload (vllm#52479),
                                are not run here at all.
    """
    # (1) The CPU. (2) vLLM's own server. (3) Several cards.
    if not placement.gpus or not hosted or len(placement.gpus) > 1:
        return ()

    # (4) Vision.
    if "vision" in placement.spec.capabilities:
        return (Level.ASLEEP_1,)

    # (5) Both.
    return (Level.ASLEEP_1, Level.ASLEEP_2)
