"""
How much memory did a load take? What vLLM says of it while it loads, and what the machine counts.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from worker.hardware.gpu import Machine
from worker.memory.measured import Measured

_GIB = 2**30
_SIZE = r"(?<![\d.-])(\d+(?:\.\d+)?) GiB"  # no negative one: memory that something else gave back meanwhile

# vLLM 0.19 to 0.32 (v1/worker/gpu_model_runner.py, gpu/model_runner.py, gpu_worker.py, v1/core/kv_cache_utils.py).
_WEIGHTS = re.compile(rf"Model loading took {_SIZE}")
_POOL = re.compile(rf"Available KV cache memory: {_SIZE}|reserved {_SIZE} memory for KV Cache")
_TOKENS = re.compile(r"KV cache size: (\d[\d,]*) tokens")
_CONCURRENCY = re.compile(r"Maximum concurrency for (\d[\d,]*) tokens per request: (\d+\.\d+)x")
_GRAPHS = re.compile(rf"Graph capturing finished in [\d.]+ secs, took {_SIZE}|CUDA graph pool memory: {_SIZE}")
_ACTIVATION = re.compile(rf"{_SIZE} for peak activation")
_NON_TORCH = re.compile(rf"{_SIZE} for non-torch memory")  # to 0.24
_CONSUMED = re.compile(rf"Actual usage is {_SIZE} for consumed memory \(weights \+ non-torch\)")  # 0.32
# Since 0.21 the peak is told with the graphs' estimate in it.
_GRAPHS_IN_PEAK = re.compile(r"CUDA graph memory profiling is enabled")
_GRAPHS_ESTIMATE = re.compile(rf"Estimated CUDA graph memory: {_SIZE}")


def read_vllm(log: str) -> Measured:
    """
    Read the figures of a load in what vLLM printed; a line that is not there leaves its figure unknown.

    Every card prints its own lines; of each figure the largest counts, and of the tokens the smallest.
    """
    weights, activation = _largest(_WEIGHTS, log), _largest(_ACTIVATION, log)
    if activation is not None and _GRAPHS_IN_PEAK.search(log):
        activation = max(0, activation - (_largest(_GRAPHS_ESTIMATE, log) or 0))
    non_torch, consumed = _largest(_NON_TORCH, log), _largest(_CONSUMED, log)
    if consumed is not None and weights is not None:
        non_torch = max(0, consumed - weights)
    return Measured(
        weights=weights,
        kv_pool=_largest(_POOL, log),
        kv_tokens=_tokens(log),
        activation=activation,
        cuda_graphs=_largest(_GRAPHS, log),
        non_torch=non_torch,
    )


def count_bytes(machine: Machine, pids: Collection[int]) -> int | None:
    """
    Count what the processes *pids* hold on the card where they hold most.

    None where the driver does not say which process holds what: in most containers, and under WSL.
    """
    held = (sum(size for pid, size in gpu.processes.items() if pid in pids) for gpu in machine.gpus)
    return max(held, default=0) or None


def _tokens(log: str) -> int | None:
    """
    How many tokens the pool holds, for requests of the full length.

    Up to 0.19 the logged number is something else where layers differ (vllm#51041); the concurrency never is.
    """
    tokens = min((_number(found[1]) for found in _TOKENS.finditer(log)), default=None)
    concurrency = _CONCURRENCY.search(log)
    if concurrency is None:
        return tokens
    length = _number(concurrency[1])
    worth = int(length * float(concurrency[2]))
    # The concurrency has two decimals, so the number is the better one where both say the same.
    return tokens if tokens is not None and abs(tokens - worth) <= length // 100 else worth


def _largest(pattern: re.Pattern[str], log: str) -> int | None:
    """The largest size that *pattern* finds, in bytes."""
    sizes = (size for found in pattern.findall(log) for size in ((found,) if isinstance(found, str) else found))
    return max((int(float(size) * _GIB) for size in sizes if size), default=None)


def _number(digits: str) -> int:
    return int(digits.replace(",", ""))
