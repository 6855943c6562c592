"""
How much does vLLM's KV cache take, and how much does it hold?
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from worker.catalog.architecture import Architecture, Cache, KeysAndValues, Latent, State

_BLOCK_TOKENS = 16  # vLLM's smallest block
_LARGEST_BLOCK_TOKENS = 128  # on a CPU
_SPARSE_FP8_BYTES = 656  # 512 in FP8 with their scales, 64 rope dimensions in 16 bit (mla_attention.py, fp8_ds_mla)


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """
    The cache as vLLM lays it out: blocks of one size, drawn by groups of equally many layers.

    Source: vLLM 0.32 v1/core/kv_cache_utils.py (`_get_kv_cache_groups_uniform_page_size`,
    `get_max_concurrency_for_kv_cache_config`) and v1/kv_cache_interface.py.
    """

    block_bytes: int  # of one block, over all the layers that share it
    block_tokens: int
    groups: int
    blocks_per_request: int  # that one request of the full length holds

    @property
    def request_bytes(self) -> int:
        """What one request of the full length holds."""
        return self.block_bytes * self.blocks_per_request

    @property
    def smallest_pool(self) -> int:
        """One request of the full length, and the block that vLLM never gives away ("null block")."""
        return self.request_bytes + math.ceil(_LARGEST_BLOCK_TOKENS / self.block_tokens) * self.block_bytes

    def concurrency(self, pool_bytes: int) -> float:
        """How many requests of the full length *pool_bytes* hold: vLLM's "Maximum concurrency"."""
        return (pool_bytes // self.block_bytes) / self.blocks_per_request

    def tokens(self, pool_bytes: int) -> int:
        """How many tokens vLLM up to 0.19 logs for the pool: each group gets its share of the blocks."""
        return pool_bytes // self.block_bytes // self.groups * self.block_tokens


def kv_bytes_per_token(architecture: Architecture, *, element_bits: int = 16, tensor_parallel_size: int = 1) -> int:
    """Bytes on each card for one token that all layers keep; recurrent layers keep none."""
    return sum(
        len(block.layers) * _token_bytes(block.cache, element_bits, tensor_parallel_size)
        for block in architecture.blocks
        if block.cache is not None
    )


def shape_cache(
    architecture: Architecture,
    *,
    max_model_len: int,
    max_num_batched_tokens: int,
    element_bits: int = 16,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    batches_in_flight: int = 1,
    states_per_request: int = 1,
    conv_bytes: int = 2,
) -> CacheShape | None:
    """
    Lay out the cache for requests of *max_model_len* tokens; None if the model keeps nothing.

    1. Pages: what a layer's block takes. Smaller pages get more tokens, until all are as large as the
       largest; recurrent states are padded, and attention's blocks lengthened until they hold one.
    2. Groups: layers that are alike, as many in each as the rarest kind has (a few more rather than padding
       everything). Each group draws its own blocks.
    3. A request holds blocks for its tokens in full attention, for its window and the batch under way where
       there is one, and one for a state (two where prefixes are cached).
    """
    kinds = _layers_by_kind(architecture, pipeline_parallel_size)
    if not kinds:
        return None
    pages = {
        kind: _token_bytes(kind, element_bits, tensor_parallel_size) * _BLOCK_TOKENS
        for kind in kinds
        if not isinstance(kind, State)
    }
    states = [_state_bytes(kind, tensor_parallel_size, conv_bytes) for kind in kinds if isinstance(kind, State)]
    # (1) One page for all.
    page = max([*pages.values(), 1])
    block_tokens = _BLOCK_TOKENS
    if states and pages:
        block_tokens *= max(1, math.ceil(max(states) / page))
        page *= block_tokens // _BLOCK_TOKENS
        pages = {kind: size * block_tokens // _BLOCK_TOKENS for kind, size in pages.items()}
    elif states:
        page = max(states)
    # (2) Groups of equally many layers.
    group_size = _group_size(kinds)
    groups = sum(math.ceil(count / group_size) for count in kinds.values())
    # (3) Blocks of one request.
    per_request = 0
    for kind, count in kinds.items():
        tokens = block_tokens
        if not isinstance(kind, State) and page % pages[kind] == 0:
            tokens = block_tokens * (page // pages[kind])
        held = states_per_request
        if not isinstance(kind, State):
            held = _blocks_held(kind, tokens, max_model_len, max_num_batched_tokens * batches_in_flight)
        per_request += math.ceil(count / group_size) * held
    return CacheShape(
        block_bytes=page * group_size, block_tokens=block_tokens, groups=groups, blocks_per_request=per_request
    )


def _layers_by_kind(architecture: Architecture, stages: int) -> Counter[Cache]:
    kinds: Counter[Cache] = Counter()
    for block in architecture.blocks:
        if block.cache is not None:
            kinds[block.cache] += math.ceil(len(block.layers) / stages)
    return kinds


def _group_size(kinds: Counter[Cache]) -> int:
    """Layers of each group: the fewest of a kind; the most, if that is not much more (vLLM: 1.5 times)."""
    fewest, most = min(kinds.values()), max(kinds.values())
    return most if most < fewest * 1.5 else fewest


def _blocks_held(kind: KeysAndValues | Latent, block_tokens: int, length: int, in_flight: int) -> int:
    if kind.window is None:
        return math.ceil(length / block_tokens)
    if isinstance(kind, KeysAndValues) and kind.chunked:
        return math.ceil(min(kind.window + in_flight, length) / block_tokens)
    # One more, because the window may begin in the middle of a block.
    return math.ceil(min(kind.window - 1 + in_flight, length) / block_tokens) + 1


def _token_bytes(cache: Cache | None, element_bits: int, cards: int) -> int:
    """Bytes on each card for one token in one layer."""
    match cache:
        case KeysAndValues():
            heads = max(1, cache.kv_heads // cards)
            return heads * (cache.head_dim + cache.v_head_dim) * element_bits // 8
        case Latent():
            if cache.indexer_bytes and element_bits == 8:  # noqa: PLR2004 - a byte
                return _SPARSE_FP8_BYTES + cache.indexer_bytes
            return cache.width * element_bits // 8 + cache.indexer_bytes
        case _:
            return 0


def _state_bytes(state: State, cards: int, conv_bytes: int) -> int:
    return (state.conv_elements * conv_bytes + state.ssm_elements * state.ssm_bytes) // cards
