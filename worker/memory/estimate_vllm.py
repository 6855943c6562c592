"""
How many bytes does vLLM take on each card, and how many tokens does the rest hold? Each term named.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.catalog.architecture import Architecture
from worker.memory.cache import CacheShape, kv_bytes_per_token, shape_cache
from worker.memory.constants import (
    CUDA_CONTEXT_BYTES,
    ENCODER_TOKEN_BYTES,
    GRAPH_BYTES,
    GRAPH_LAYER_BYTES,
    GRAPH_SIZES,
    NON_TORCH_NCCL,
    VllmConstants,
    constants_for,
)
from worker.memory.weigh import Weights, weigh_model

# Bytes of the types that vLLM takes for weights (config/model.py), bits of those for the cache (config/cache.py).
_TYPE_BYTES = {"half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}
_CACHE_BITS = {
    "float16": 16, "bfloat16": 16, "fp8": 8, "fp8_e4m3": 8, "fp8_e5m2": 8, "fp8_inc": 8, "fp8_ds_mla": 8,
    "int8_per_token_head": 8, "fp8_per_token_head": 8, "nvfp4": 4, "nvfp4_ds_mla": 4, "nvfp4_4over6": 4,
    "int4_per_token_head": 4,
}  # fmt: skip
_LARGEST_CAPTURE = 512  # sequences; vLLM's largest captured batch (config/vllm.py)


@dataclass(frozen=True, kw_only=True)
class VllmLoad:
    """The settings of a load that memory depends on."""

    max_model_len: int  # tokens
    max_num_seqs: int
    max_num_batched_tokens: int
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    dtype: str | None = None  # None = as the config says
    kv_cache_dtype: str = "auto"
    enforce_eager: bool = False
    version: str | None = None  # None = the newest known
    large_card: bool = False  # as `is_large` says


@dataclass(frozen=True, kw_only=True)
class VllmEstimate:
    """
    Bytes on each card.

    `weights`          None if the config does not say enough, or nobody knows the type.
    `cache`            how the KV cache is laid out; None if unknown, or if the model keeps nothing.
    `kv_per_token`     of all layers that keep every token; None if unknown.
    `unknown`          settings of the load that mean nothing.
    `activation`       what profiling finds above the weights: the sampler's warm-up, or the forward pass.
    `cuda_graphs`      captured after the pool was sized; newer versions leave room for it.
    `non_torch`        CUDA and NCCL within the profile.
    `cuda_context`     outside every budget of vLLM: only free memory shows it.
    """

    weights: Weights | None
    kv_per_token: int | None
    cache: CacheShape | None
    activation: int
    cuda_graphs: int
    non_torch: int
    cuda_context: int
    graphs_in_budget: bool
    tokens_from_concurrency: bool
    unknown: tuple[str, ...] = ()

    @property
    def reserved(self) -> int:
        """What the KV pool cannot have of vLLM's share, beside the weights."""
        return self.activation + self.non_torch + (self.cuda_graphs if self.graphs_in_budget else 0)


def estimate_vllm(architecture: Architecture, load: VllmLoad) -> VllmEstimate:
    """Estimate what *architecture* takes under *load*; what its config does not say is None."""
    constants = constants_for(load.version)
    dtype_bytes, element_bits = _dtype_bytes(architecture, load), _element_bits(architecture, load)
    weights = kv_per_token = cache = None
    if not architecture.unknown_weights and dtype_bytes is not None:
        weights = weigh_model(
            architecture,
            tensor_parallel_size=load.tensor_parallel_size,
            pipeline_parallel_size=load.pipeline_parallel_size,
            dtype_bytes=dtype_bytes,
        )
    if not architecture.unknown_cache and element_bits is not None:
        whole = kv_bytes_per_token(
            architecture, element_bits=element_bits, tensor_parallel_size=load.tensor_parallel_size
        )
        kv_per_token = -(-whole // load.pipeline_parallel_size)
        cache = shape_cache(
            architecture,
            max_model_len=load.max_model_len,
            max_num_batched_tokens=load.max_num_batched_tokens,
            element_bits=element_bits,
            tensor_parallel_size=load.tensor_parallel_size,
            pipeline_parallel_size=load.pipeline_parallel_size,
            batches_in_flight=constants.batches_in_flight,
            states_per_request=constants.states_per_request,
        )
    return VllmEstimate(
        weights=weights,
        kv_per_token=kv_per_token,
        cache=cache,
        activation=_activation(architecture, load, constants, dtype_bytes or architecture.dtype_bytes),
        cuda_graphs=0 if load.enforce_eager else _graphs(architecture.layers // load.pipeline_parallel_size, load),
        non_torch=_non_torch(load, constants),
        cuda_context=CUDA_CONTEXT_BYTES,
        graphs_in_budget=constants.graphs_in_budget,
        tokens_from_concurrency=constants.tokens_from_concurrency,
        unknown=(
            *((f"dtype {load.dtype}",) if dtype_bytes is None else ()),
            *((f"kv_cache_dtype {load.kv_cache_dtype}",) if dtype_bytes is not None and element_bits is None else ()),
        ),
    )


def _non_torch(load: VllmLoad, constants: VllmConstants) -> int:
    if load.tensor_parallel_size == 1:
        return constants.non_torch
    return constants.non_torch_parallel if load.large_card else min(NON_TORCH_NCCL, constants.non_torch_parallel)


def _dtype_bytes(architecture: Architecture, load: VllmLoad) -> int | None:
    """Bytes of one number that is not packed; None if nobody knows the type."""
    asked = (load.dtype or "auto").lower().removeprefix("torch.")
    return architecture.dtype_bytes if asked == "auto" else _TYPE_BYTES.get(asked)


def _element_bits(architecture: Architecture, load: VllmLoad) -> int | None:
    """Bits of one number in the cache: as asked, as the checkpoint brings scales for, or as the weights."""
    asked = load.kv_cache_dtype.lower().removeprefix("torch.")
    if asked != "auto":
        return _CACHE_BITS.get(asked)
    packed = architecture.quantization.kv_cache_bits if architecture.quantization else None
    plain = _dtype_bytes(architecture, load)
    return packed or (None if plain is None else 8 * plain)


def _activation(architecture: Architecture, load: VllmLoad, constants: VllmConstants, dtype_bytes: int) -> int:
    """
    The larger of two peaks of the profiling run, which never come together.

    Sampler: max_num_seqs rows of logits in several copies, the hidden states, and the experts' workspace where
    it stays. Forward: the widest MLP, or the experts, for max_num_batched_tokens tokens.
    """
    tokens, hidden, cards = load.max_num_batched_tokens, architecture.hidden_size, load.tensor_parallel_size
    states = tokens * hidden * dtype_bytes
    experts = tokens * architecture.experts_per_token * dtype_bytes
    experts *= max(2 * architecture.expert_width // cards, hidden) + architecture.expert_width // cards
    per_logit = constants.sampler_bytes - 2 + dtype_bytes  # logits come in the model's type first
    rows = load.max_num_seqs if architecture.generates else 0
    sampler = int(rows * architecture.vocab_size * per_logit) + states + constants.sampler_fixed
    if constants.shared_moe_workspace:
        sampler += experts
    forward = 3 * states + max(experts, 3 * tokens * architecture.mlp_width // cards * dtype_bytes)
    encoder = tokens * ENCODER_TOKEN_BYTES if architecture.multimodal else 0
    return max(sampler, forward) + encoder


def _graphs(layers: int, load: VllmLoad) -> int:
    largest = min(2 * load.max_num_seqs, _LARGEST_CAPTURE)
    # 1, 2, 4, then every 8th to 256, then every 16th (config/vllm.py).
    sizes = 3 + min(largest, 256) // 8 + max(0, largest - 256) // 16
    return (GRAPH_BYTES + layers * GRAPH_LAYER_BYTES) * min(sizes, GRAPH_SIZES) // GRAPH_SIZES
