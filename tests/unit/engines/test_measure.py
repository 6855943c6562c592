"""
What vLLM's start-up log says of memory, in the words of each version; and what a driver counts.
"""

from __future__ import annotations

import pytest

from tests.factories import GIB, make_gpu, make_machine
from worker.engines.measure import count_bytes, read_vllm
from worker.memory.measured import Measured


def gib(size: float) -> int:
    return int(size * GIB)


# Composed from the format strings of each version; the figures are examples.
# 0.32 with its own division of the card (v1/worker/gpu_worker.py): the peak has the graphs' estimate in it.
V0_32 = """\
(EngineCore pid=7) INFO 11-21 10:00:00 [gpu_model_runner.py:5150] Model loading took 7.61 GiB memory and 12.345 seconds
(EngineCore pid=7) INFO 11-21 10:00:09 [gpu_model_runner.py:6475] Estimated CUDA graph memory: 0.44 GiB total
(EngineCore pid=7) INFO 11-21 10:00:10 [gpu_worker.py:760] Available KV cache memory: 11.06 GiB
(EngineCore pid=7) INFO 11-21 10:00:10 [gpu_worker.py:772] CUDA graph memory profiling is enabled (default since \
v0.21.0). The current --gpu-memory-utilization=0.9000 is equivalent to --gpu-memory-utilization=0.8818 without it.
(EngineCore pid=7) INFO 11-21 10:00:10 [kv_cache_utils.py:2327] GPU KV cache size: 80,544 tokens, \
Maximum concurrency for 32,768 tokens per request: 2.46x
(EngineCore pid=7) INFO 11-21 10:00:20 [gpu_model_runner.py:6582] Graph capturing finished in 9 secs, took 0.51 GiB
(EngineCore pid=7) INFO 11-21 10:00:20 [gpu_worker.py:971] CUDA graph pool memory: 0.51 GiB (actual), 0.44 GiB \
(estimated), difference: 0.07 GiB (13.7%).
(EngineCore pid=7) INFO 11-21 10:00:20 [gpu_worker.py:1044] Free memory on device (23.5/23.99 GiB) on startup. \
Desired GPU memory utilization is (0.9, 21.59 GiB). Actual usage is 7.86 GiB for consumed memory (weights + \
non-torch), 1.73 GiB for peak activation, and 0.51 GiB for CUDAGraph memory. Replace gpu_memory_utilization config \
with `--kv-cache-memory=11718361088` (10.91 GiB) to fit into requested memory, or `--kv-cache-memory=13768861696` \
(12.82 GiB) to fully utilize gpu memory. Current kv cache memory in use is 11.06 GiB.
"""
# The same with --kv-cache-memory-bytes, as we start it: nothing is profiled.
V0_32_TOLD = """\
INFO 11-21 10:00:00 [gpu_model_runner.py:5150] Model loading took 7.61 GiB memory and 12.345 seconds
INFO 11-21 10:00:09 [gpu_worker.py:670] Initial free memory 23.5 GiB, reserved 11.06 GiB memory for KV Cache as \
specified by kv_cache_memory_bytes config and skipped memory profiling. This does not respect the \
gpu_memory_utilization config.
INFO 11-21 10:00:10 [kv_cache_utils.py:2327] GPU KV cache size: 80,544 tokens, Maximum concurrency for 32,768 tokens \
per request: 2.46x
INFO 11-21 10:00:20 [gpu_model_runner.py:6582] Graph capturing finished in 9 secs, took 0.51 GiB
"""
# 0.19 on two cards, a hybrid model: the tokens are not capacity (vllm#51041), the concurrency is.
V0_19_HYBRID = """\
(Worker_TP0 pid=8) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] Model loading took 12.66 GiB memory and 31.6 seconds
(Worker_TP1 pid=9) INFO 05-06 20:59:59 [gpu_model_runner.py:4879] Model loading took 12.68 GiB memory and 31.7 seconds
(Worker_TP0 pid=8) INFO 05-06 21:00:22 [gpu_worker.py:436] Available KV cache memory: 6.87 GiB
(EngineCore pid=7) INFO 05-06 21:00:22 [kv_cache_utils.py:1319] GPU KV cache size: 973,760 tokens
(EngineCore pid=7) INFO 05-06 21:00:22 [kv_cache_utils.py:1324] Maximum concurrency for 262,144 tokens per \
request: 14.77x
(Worker_TP0 pid=8) INFO 05-06 21:00:40 [gpu_worker.py:391] Free memory on device (43.93/44.42 GiB) on startup. \
Desired GPU memory utilization is (0.9, 39.98 GiB). Actual usage is 12.66 GiB for weight, 1.4 GiB for peak \
activation, 0.21 GiB for non-torch memory, and 3.45 GiB for CUDAGraph memory.
(Worker_TP1 pid=9) INFO 05-06 21:00:40 [gpu_worker.py:391] Actual usage is 12.68 GiB for weight, 1.5 GiB for peak \
activation, 0.19 GiB for non-torch memory, and 3.45 GiB for CUDAGraph memory.
"""
CPU = "INFO CPU KV cache size: 2,048 tokens, Maximum concurrency for 512 tokens per request: 4.00x"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        pytest.param(
            V0_32,
            Measured(
                weights=gib(7.61), kv_pool=gib(11.06), kv_tokens=80_544, activation=gib(1.73) - gib(0.44),
                cuda_graphs=gib(0.51), non_torch=gib(7.86) - gib(7.61),
            ),
            id="0.32",
        ),
        pytest.param(
            V0_32_TOLD,
            Measured(weights=gib(7.61), kv_pool=gib(11.06), kv_tokens=80_544, cuda_graphs=gib(0.51)),
            id="0.32, pool given",
        ),
        pytest.param(
            V0_19_HYBRID,
            Measured(
                weights=gib(12.68), kv_pool=gib(6.87), kv_tokens=int(262_144 * 14.77), activation=gib(1.5),
                non_torch=gib(0.21),
            ),
            id="0.19, hybrid, two cards",
        ),
        pytest.param(CPU, Measured(kv_tokens=2048), id="CPU"),
        pytest.param("", Measured(), id="nothing"),
        pytest.param("INFO Graph capturing finished in 2 secs, took -0.35 GiB", Measured(), id="less than nothing"),
        pytest.param("Actual usage is 8.28 GiB for weight, -3.58 GiB for non-torch memory", Measured(), id="negative"),
        pytest.param("Model loading took 1.2.3 GiB\nKV cache size: , tokens", Measured(), id="no numbers"),
    ],
)  # fmt: skip
def test_every_figure_that_a_version_prints_is_read(log: str, expected: Measured) -> None:
    """And no other: what is not said stays unknown, and nothing raises."""
    assert read_vllm(log) == expected


def test_bytes_of_a_token_come_from_the_pool_and_what_it_holds() -> None:
    """Only if both are known."""
    assert Measured(kv_pool=2048, kv_tokens=16).kv_bytes_per_token == 128
    assert Measured(kv_pool=2048).kv_bytes_per_token is None
    assert Measured(kv_pool=2048, kv_tokens=0).kv_bytes_per_token is None


def test_the_card_where_the_processes_hold_most_counts() -> None:
    """Other programs on the same card do not."""
    cards = (make_gpu(24, processes={1: 5, 2: 7, 3: 100}), make_gpu(24, index=1, processes={2: 13}))
    machine = make_machine(24)

    assert count_bytes(type(machine)(**{**vars(machine), "gpus": cards}), (1, 2)) == 13
    assert count_bytes(type(machine)(**{**vars(machine), "gpus": cards}), (4,)) is None
    assert count_bytes(machine, (1,)) is None
