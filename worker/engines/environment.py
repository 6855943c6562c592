"""
What may an engine know of our environment? Everything but our own settings and secrets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Ours, by prefix: secrets (the Redis URL, Flower's password), and settings that mean nothing to an engine.
_OUR_PREFIXES = (
    "REDIS_", "FLOWER_", "CELERY_", "LLAMACPP_", "MODELS_", "WORKER_", "SWITCH_", "JOB_", "DELIVERY_", "ROUTING_",
    "STATUS_", "LOG_",
)  # fmt: skip
# vLLM reads every VLLM_* variable, warns of those it does not know, and one day may know ours. The last one is
# vLLM's: it overrules --kv-cache-memory-bytes without a word.
_OUR_VLLM = (
    "VLLM_MODEL", "VLLM_QUANTIZATION", "VLLM_MAX_MODEL_LEN", "VLLM_GPU_MEMORY_UTILIZATION",
    "VLLM_TENSOR_PARALLEL_SIZE", "VLLM_MAX_NUM_SEQS", "VLLM_FORCE", "VLLM_PYTHON", "VLLM_CHANNEL",
    "VLLM_CPU_KVCACHE_SPACE",
)  # fmt: skip


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
