"""
Puts vLLM's engine to sleep and wakes it, in the order that keeps its answers right.

Runs in the engine's process. *engine* is vLLM's `AsyncLLM`; nothing of vLLM is imported here.

| level | asleep: its weights               | awake again                                                     |
| ----- | --------------------------------- | --------------------------------------------------------------- |
| 1     | in the host's memory              | weights come back over the bus                                  |
| 2     | nowhere, they stay in their files | memory for weights, weights from their files, memory for the KV |

At both levels the KV cache is lost, and with it what the prefix cache points to. Without the reload level 2
answers with garbage and says nothing (vllm#54235).
"""

from __future__ import annotations

from typing import Any

WITHOUT_WEIGHTS = 2


async def fall_asleep(engine: Any, level: int) -> None:
    """Give the card's memory back; requests that still run are aborted."""
    await engine.sleep(level, mode="abort")


async def wake(engine: Any, level: int) -> None:
    """Make it answer again; raises whatever vLLM does, or RuntimeError if vLLM says that it is not awake."""
    if level == WITHOUT_WEIGHTS:
        await engine.wake_up(["weights"])
        await engine.collective_rpc("reload_weights")
        awake = await engine.wake_up(["kv_cache"])
    else:
        awake = await engine.wake_up()
    if not (awake and await engine.reset_prefix_cache()):
        raise RuntimeError(f"vLLM did not wake up from level {level}")
