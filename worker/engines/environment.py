"""
What may an engine know of our environment? Everything but our own settings and secrets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from common.settings import Settings, VllmSettings

_OUR_GROUPS: tuple[Any, ...] = tuple(info.annotation for info in Settings.model_fields.values())
# Secrets (the Redis URL, keys, passwords), and settings that mean nothing to an engine: whatever we read ourselves.
_OUR_PREFIXES = (
    "CELERY_",
    *(group.model_config["env_prefix"] for group in _OUR_GROUPS if group is not VllmSettings),
)
# vLLM reads every VLLM_* variable, warns of those it does not know, and one day may know ours. The last one is
# vLLM's: it overrules --kv-cache-memory-bytes without a word.
_OUR_VLLM = (*(f"VLLM_{field}".upper() for field in VllmSettings.model_fields), "VLLM_CPU_KVCACHE_SPACE")


def engine_environment(environ: Mapping[str, str], *, gpus: Sequence[int]) -> dict[str, str]:
    """
    Build an engine's environment from ours: without our settings, on these cards and no others.

    Cards are counted in PCI order, as NVML does; CUDA's own order would be by speed.
    """
    kept = {
        name: value for name, value in environ.items() if not name.startswith(_OUR_PREFIXES) and name not in _OUR_VLLM
    }
    return {
        **kept,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": ",".join(str(index) for index in gpus),
        "DO_NOT_TRACK": "1",
    }
