"""
How many bytes does a model need? A first honest estimate: each term named, `total` derived.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from worker.catalog.spec import EngineKind, ModelSpec

_GIB = 2**30
_FLOAT_BYTES = 4  # logits and llama.cpp's compute buffers are 32-bit floats

# vLLM. Its sampler warm-up holds this many copies of max_num_seqs rows of logits (from 0.17; 9.7 before).
_SAMPLER_COPIES = 3.9
# Below that, the forward pass of max_num_batched_tokens rules; largest measured with 8192 tokens: 1.21 GiB.
_FORWARD_BYTES = int(1.25 * _GIB)
# Captured graphs grow with depth: 0.6 to 1.0 GiB with 28 to 36 layers, 1.5 to 1.9 GiB with 80 (H100 logs).
_CUDA_GRAPH_BYTES = int(0.2 * _GIB)
_CUDA_GRAPH_LAYER_BYTES = int(0.02 * _GIB)
_NON_TORCH_BYTES = int(0.25 * _GIB)  # CUDA context and libraries on one card
_NON_TORCH_PARALLEL_BYTES = int(2.1 * _GIB)  # with NCCL, on each of several cards
# RSS of a whole vLLM process tree on a CPU with a tiny model was 2,053 MB.
_CPU_PROCESS_BYTES = 2 * _GIB
# On-the-fly quantisation leaves embeddings in 16 bit; largest measured share: 8.49 of 14.99 GiB.
_LOADED_SHARE = {"fp8": 0.6}

# llama.cpp: tokens of one physical batch, its default.
_UBATCH_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes per card (or of the host, where there is no card)."""

    weights: int
    kv_cache: int
    overhead: int  # activation, CUDA graphs, CUDA context and what is outside the allocator

    @property
    def total(self) -> int:
        """Everything the model takes while it is ready."""
        return self.weights + self.kv_cache + self.overhead


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """There is no estimate, because these facts of the model are not known."""

    missing: tuple[str, ...]


def estimate_memory(
    spec: ModelSpec,
    *,
    max_model_len: int,
    max_num_seqs: int,
    tensor_parallel_size: int = 1,
    gpu_layers: int | None = None,
    on_card: bool = True,
    kv_bytes_per_element: int = 2,
    quantization: str | None = None,
) -> MemoryEstimate | Unknown:
    """
    Estimate the bytes on each card, or of the host when not *on_card*.

    weights    the files' bytes, divided over the cards; with *quantization* = fp8 of a 16-bit model 0.6 of them.
    KV cache   2 (K and V) x layers x KV heads x head size x bytes per element, for each token held. vLLM shares
               a pool and must hold one request of *max_model_len*; llama.cpp sets that aside for every slot.
    overhead   vLLM: sampler or forward pass, CUDA graphs, CUDA context. llama.cpp: its compute buffer, which is
               vocabulary x 512 x 4 bytes with flash attention, and the CUDA context.

    The constants are medians of public start-up logs of vLLM 0.17 to 0.22 and llama.cpp. With *gpu_layers* the
    estimate is of that many layers' share on the card (llama.cpp; the output layer counts as one more).
    """
    facts = {
        "weights_bytes": spec.weights_bytes, "layers": spec.layers, "kv_heads": spec.kv_heads,
        "head_dim": spec.head_dim, "vocab_size": spec.vocab_size,
    }  # fmt: skip
    per_token = kv_bytes_per_token(spec, kv_bytes_per_element=kv_bytes_per_element)
    if spec.weights_bytes is None or spec.vocab_size is None or per_token is None or spec.layers is None:
        return Unknown(missing=tuple(name for name, value in facts.items() if value is None))

    loaded_share = _LOADED_SHARE.get(quantization or "", 1.0) if spec.quantization is None else 1.0
    weights = math.ceil(spec.weights_bytes * loaded_share / tensor_parallel_size)
    kv_cache = per_token * max_model_len * _requests_held(spec, max_num_seqs) // tensor_parallel_size
    if gpu_layers is not None and gpu_layers < spec.layers:
        weights = math.ceil(weights * gpu_layers / (spec.layers + 1))
        kv_cache = math.ceil(kv_cache * gpu_layers / spec.layers)

    overhead = _activation(spec.engine, spec.vocab_size, max_num_seqs)
    if on_card:
        overhead += _NON_TORCH_BYTES if tensor_parallel_size == 1 else _NON_TORCH_PARALLEL_BYTES
    if spec.engine is EngineKind.VLLM:
        overhead += _CUDA_GRAPH_BYTES + spec.layers * _CUDA_GRAPH_LAYER_BYTES if on_card else _CPU_PROCESS_BYTES
    return MemoryEstimate(weights=weights, kv_cache=kv_cache, overhead=overhead)


def kv_bytes_per_token(spec: ModelSpec, *, kv_bytes_per_element: int = 2) -> int | None:
    """Bytes of KV cache for one token over all cards; None if a fact is missing."""
    if spec.layers is None or spec.kv_heads is None or spec.head_dim is None:
        return None
    return 2 * spec.layers * spec.kv_heads * spec.head_dim * kv_bytes_per_element


def longest_that_fits(
    spec: ModelSpec,
    budget_bytes: int,
    *,
    max_num_seqs: int,
    tensor_parallel_size: int = 1,
    on_card: bool = True,
    kv_bytes_per_element: int = 2,
    quantization: str | None = None,
) -> int | Unknown:
    """
    The inverse of `estimate_memory`: the longest *max_model_len* in tokens within *budget_bytes* per card.

    0 if not even the weights fit; never more than `spec.max_model_len`.
    """
    without_kv = estimate_memory(
        spec,
        max_model_len=0,
        max_num_seqs=max_num_seqs,
        tensor_parallel_size=tensor_parallel_size,
        on_card=on_card,
        quantization=quantization,
    )
    per_token = kv_bytes_per_token(spec, kv_bytes_per_element=kv_bytes_per_element)
    if isinstance(without_kv, Unknown) or per_token is None:
        return without_kv if isinstance(without_kv, Unknown) else Unknown(missing=("layers",))
    left = (budget_bytes - without_kv.total) * tensor_parallel_size
    return max(0, min(spec.max_model_len, left // (per_token * _requests_held(spec, max_num_seqs))))


def _requests_held(spec: ModelSpec, max_num_seqs: int) -> int:
    return max_num_seqs if spec.engine is EngineKind.LLAMACPP else 1


def _activation(engine: EngineKind, vocab_size: int, max_num_seqs: int) -> int:
    if engine is EngineKind.LLAMACPP:
        return vocab_size * _UBATCH_TOKENS * _FLOAT_BYTES
    return max(_FORWARD_BYTES, int(_SAMPLER_COPIES * max_num_seqs * vocab_size * _FLOAT_BYTES))
