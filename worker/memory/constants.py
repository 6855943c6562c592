"""
What memory costs beyond arithmetic: measured constants, with the versions of vLLM that they hold for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class VllmConstants:
    """
    One row for a range of versions. Figures without a source are from public start-up logs (docs/memory.md).

    Its sampler's warm-up holds `sampler_bytes` for each of max_num_seqs x vocabulary logits; beside them the
    hidden states of a batch and `sampler_fixed` stay allocated.
    """

    since: tuple[int, int]
    sampler_bytes: float
    sampler_fixed: int
    non_torch: int  # CUDA context and libraries within the profile, one card
    non_torch_parallel: int  # with NCCL and the buffers of NVLink's all-reduce, on each of several large cards
    graphs_in_budget: bool  # is the estimate of CUDA graphs taken from the pool? (mem_utils.py)
    utilization: float  # default of gpu_memory_utilization
    batches_in_flight: int  # that may hold blocks behind a sliding window (config/vllm.py, max_in_flight_tokens)
    states_per_request: int  # blocks that a recurrent layer holds; two with prefix caching (MambaSpec, "align")
    tokens_from_concurrency: bool  # does "GPU KV cache size" say concurrency x length? (vllm#51041)
    shared_moe_workspace: bool  # does the workspace of experts stay while the sampler warms up?
    whole_prompts: bool = False  # the old engine (V0) profiled with max_model_len tokens at once


_V0 = VllmConstants(
    since=(0, 0),
    sampler_bytes=8,
    sampler_fixed=0,
    non_torch=int(0.13 * GIB),
    non_torch_parallel=int(0.55 * GIB),
    graphs_in_budget=False,
    utilization=0.9,
    batches_in_flight=1,
    states_per_request=1,
    tokens_from_concurrency=False,
    shared_moe_workspace=False,
    whole_prompts=True,
)
_V0_8 = replace(_V0, since=(0, 8), sampler_bytes=38.3, whole_prompts=False)
_V0_17 = replace(_V0_8, since=(0, 17), sampler_bytes=14.4, sampler_fixed=int(0.07 * GIB), shared_moe_workspace=True)
_V0_18 = replace(_V0_17, since=(0, 18), non_torch=int(0.25 * GIB), non_torch_parallel=int(2.1 * GIB))
_V0_20 = replace(_V0_18, since=(0, 20), graphs_in_budget=True, utilization=0.92, tokens_from_concurrency=True)
# From its source: async scheduling keeps two batches in flight, and hybrid models cache prefixes.
_V0_32 = replace(_V0_20, since=(0, 32), batches_in_flight=2, states_per_request=2)
VLLM = (_V0, _V0_8, _V0_17, _V0_18, _V0_20, _V0_32)

# NCCL alone, on each of several cards that have no NVLink buffers.
NON_TORCH_NCCL = int(0.55 * GIB)

# CUDA graphs grow with depth: 0.6 to 1.0 GiB with 28 to 36 layers, 1.5 to 1.9 GiB with 80.
# That is with 51 batch sizes captured, up to 512; fewer sequences mean fewer sizes.
GRAPH_BYTES = int(0.4 * GIB)
GRAPH_LAYER_BYTES = int(0.0155 * GIB)
GRAPH_SIZES = 51

# Profiling an encoder with as many tokens as a batch: 0.1 to 0.27 GiB with 8,192 of them.
ENCODER_TOKEN_BYTES = int(0.2 * GIB / 8192)

# Outside every budget of vLLM: the context exists before free memory is looked at (gpu_worker.py:505). With fewer
# kernels loaded it is less; 0.5 GiB is what NVML shows for a process that only opened a card. Not measured here.
CUDA_CONTEXT_BYTES = GIB // 2

# RSS of a whole vLLM process tree on a CPU with a tiny model was 2,053 MB.
CPU_PROCESS_BYTES = 2 * GIB


def constants_for(version: str | None) -> VllmConstants:
    """The row for *version* ("0.19.1", "0.22.2.dev45+g1b"); the newest if it is None or says no number."""
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    if found is None:
        return VLLM[-1]
    asked = int(found[1]), int(found[2])
    return next(row for row in reversed(VLLM) if row.since <= asked)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the name of a card tells: the bytes that CUDA offers, which are fewer than on its box."""

    pattern: str
    total_bytes: int


_LARGE_BYTES = 70 * GIB
_LARGEST_BYTES = 160 * GIB  # a B200, a B300
_OFFERED_SHARE = 0.97  # of what is on the box

# CUDA's own totals, from start-up logs (two decimals) and vendor tables less 1.5 to 4 %.
CARDS = (
    Card(pattern=r"h200", total_bytes=int(139.81 * GIB)),
    Card(pattern=r"h100.*(nvl|94)", total_bytes=int(93.1 * GIB)),
    Card(pattern=r"h100|h800", total_bytes=int(79.19 * GIB)),
    Card(pattern=r"b200", total_bytes=int(178.35 * GIB)),
    Card(pattern=r"a100.*40", total_bytes=int(39.38 * GIB)),
    Card(pattern=r"a100|a800", total_bytes=int(79.25 * GIB)),
    Card(pattern=r"gh200", total_bytes=int(94.5 * GIB)),
    Card(pattern=r"rtx pro 6000", total_bytes=int(94.97 * GIB)),
    Card(pattern=r"l40s?\b", total_bytes=int(44.4 * GIB)),
    Card(pattern=r"rtx (6000 ada|a6000)|\ba40\b", total_bytes=int(47.4 * GIB)),
    Card(pattern=r"5070 ti|5080|4080|4060 ti.*16|5060 ti.*16", total_bytes=int(15.5 * GIB)),
    Card(pattern=r"5090", total_bytes=int(31.36 * GIB)),
    Card(pattern=r"\b[34]090", total_bytes=int(23.6 * GIB)),
    Card(pattern=r"\bl4\b", total_bytes=int(22.03 * GIB)),
    Card(pattern=r"\ba10g?\b", total_bytes=int(22.05 * GIB)),
    Card(pattern=r"\bt4\b", total_bytes=int(14.56 * GIB)),
    Card(pattern=r"v100.*32", total_bytes=int(31.73 * GIB)),
    Card(pattern=r"v100", total_bytes=int(15.77 * GIB)),
    Card(pattern=r"gb10|dgx spark", total_bytes=int(119.7 * GIB)),
)


def card_bytes(name: str | None) -> int | None:
    """
    Bytes of the card of this name; from a size in the name ("12 GB card") if the model is not known.

    None also for cards that differ ("RTX 5070 Ti + RTX 5090"): nobody can tell which of them the caller means.
    """
    sizes = {_one_card_bytes(part.lower()) for part in (name or "").split("+") if part.strip()}
    return sizes.pop() if len(sizes) == 1 else None


def _one_card_bytes(name: str) -> int | None:
    known = next((card.total_bytes for card in CARDS if re.search(card.pattern, name)), None)
    if known is not None:
        return known
    exact, size = re.search(r"([1-9]\d{0,8}) ?mib", name), re.search(r"([1-9]\d{0,5}) ?gi?b", name)
    boxed = int(exact[1]) * 2**20 if exact else int(size[1]) * GIB if size else None
    return None if boxed is None else int(boxed * _OFFERED_SHARE)


def is_large(total_bytes: int | None, name: str | None) -> bool:
    """Is it a card like an H100, for which vLLM has defaults of its own? From 70 GiB, but no A100 (arg_utils.py)."""
    return (total_bytes or 0) >= _LARGE_BYTES and "a100" not in (name or "").lower()


@dataclass(frozen=True, kw_only=True)
class ServerDefaults:
    """What vLLM's server takes if it is not told."""

    max_num_seqs: int
    max_num_batched_tokens: int


def server_defaults(total_bytes: int | None = None, name: str | None = None) -> ServerDefaults:
    """Give the server's defaults for this card, or for one of which nothing is known (arg_utils.py)."""
    if (total_bytes or 0) >= _LARGEST_BYTES:
        return ServerDefaults(max_num_seqs=1024, max_num_batched_tokens=16384)
    if is_large(total_bytes, name):
        return ServerDefaults(max_num_seqs=1024, max_num_batched_tokens=8192)
    return ServerDefaults(max_num_seqs=256, max_num_batched_tokens=2048)
