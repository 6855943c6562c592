"""
The KV cache as vLLM lays it out, against the figures that vLLM logged.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.catalog.architecture import Architecture, Block, Cache, KeysAndValues, Latent, State
from worker.catalog.hf_config import read_config
from worker.memory.cache import CacheShape, kv_bytes_per_token, shape_cache
from worker.memory.constants import GIB

# Sizes that a cache does not depend on.
ANY = {"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 1024, "vocab_size": 1000}
LLAMA_8B = {**ANY, "model_type": "llama", "num_hidden_layers": 32, "num_key_value_heads": 8}
QWEN_7B = {**ANY, "model_type": "qwen2", "num_hidden_layers": 28, "num_key_value_heads": 4, "head_dim": 128}
GEMMA_3_27B = {
    **ANY, "model_type": "gemma3_text", "num_hidden_layers": 62, "num_key_value_heads": 16, "head_dim": 128,
    "sliding_window": 1024,
}  # fmt: skip
GEMMA_4_26B = {
    **ANY, "model_type": "gemma4_text", "num_hidden_layers": 30, "num_key_value_heads": 8, "head_dim": 256,
    "global_head_dim": 512, "num_global_key_value_heads": 2, "attention_k_eq_v": True, "sliding_window": 1024,
}  # fmt: skip
SCOUT = {
    **ANY, "model_type": "llama4_text", "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8,
    "head_dim": 128, "attention_chunk_size": 8192, "num_local_experts": 16, "hidden_size": 5120,
}  # fmt: skip
GPT_OSS = {
    **ANY, "model_type": "gpt_oss", "num_hidden_layers": 24, "num_key_value_heads": 8, "head_dim": 64,
    "sliding_window": 128,
}  # fmt: skip
QWEN_3_5_27B = {
    **ANY, "model_type": "qwen3_5_text", "num_hidden_layers": 64, "num_attention_heads": 24, "num_key_value_heads": 4,
    "head_dim": 256, "hidden_size": 5120,
}  # fmt: skip
QWEN_3_NEXT = {
    **ANY, "model_type": "qwen3_next", "num_hidden_layers": 48, "num_attention_heads": 16, "num_key_value_heads": 2,
    "head_dim": 256,
}  # fmt: skip
KIMI_VL = {**ANY, "model_type": "deepseek_v2", "num_hidden_layers": 27, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
PLANNER = "https://github.com/llm-d-incubation/llm-d-planner/tree/main/accuracy/results/v0.19.0/logs"


class Row:
    """A start-up log: a pool in GiB, and what vLLM said of it."""

    def __init__(self, config: dict[str, Any], source: str, **facts: Any) -> None:
        self.architecture, self.source = read_config(config), source
        self.pool, self.tokens, self.concurrency = facts["pool"], facts.get("tokens"), facts["concurrency"]
        self.shape = shape_cache(
            self.architecture,
            max_model_len=facts["length"],
            max_num_batched_tokens=facts.get("batch", 8192),
            element_bits=facts.get("bits", 16),
            tensor_parallel_size=facts.get("cards", 1),
        )


LOGGED = {
    "Llama-3.1-8B": Row(LLAMA_8B, PLANNER, pool=58.11, length=8192, tokens=476016, concurrency=58.11),
    "FP8": Row(LLAMA_8B, PLANNER, pool=58.11, length=8192, bits=8, tokens=952032, concurrency=116.21),
    "32 bit": Row(LLAMA_8B, PLANNER, pool=42.8, length=8192, bits=32, tokens=175296, concurrency=21.4),
    "as many cards as KV heads": Row(
        QWEN_7B, PLANNER, pool=67.34, length=8192, cards=4, tokens=5043280, concurrency=615.63
    ),
    "MLA on one card": Row(KIMI_VL, PLANNER, pool=41.32, length=8192, tokens=1426368, concurrency=174.12),
    "MLA is not divided": Row(KIMI_VL, PLANNER, pool=54.78, length=8192, cards=2, tokens=1890896, concurrency=230.82),
    "windows: Gemma 3": Row(GEMMA_3_27B, PLANNER, pool=19.53, length=8192, tokens=36560, concurrency=4.46),
    "chunks: Llama 4": Row(SCOUT, PLANNER, pool=16.75, length=8192, cards=4, tokens=365968, concurrency=44.68),
    "windows: gpt-oss": Row(
        GPT_OSS, "a log of 0.13.0", pool=12.94, length=8192, batch=2048, tokens=282624, concurrency=54.44
    ),
    "heads of two sizes: Gemma 4": Row(
        GEMMA_4_26B, "https://github.com/sostrowsk/dgx-spark-local-llm", pool=83.89, length=262144, batch=2496,
        concurrency=14.78,
    ),
    "states: Qwen3.5": Row(
        QWEN_3_5_27B, "a log of 0.19.0", pool=7.0, length=32768, cards=4, tokens=114464, concurrency=12.98
    ),
    "states: Qwen3-Next": Row(
        QWEN_3_NEXT, "a log of 0.10.2", pool=44.59, length=262144, cards=2, tokens=973760, concurrency=14.77
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", LOGGED.values(), ids=LOGGED)
def test_a_pool_holds_what_vllm_logged(row: Row) -> None:
    """
    To 0.2 %: the pool is logged to 0.01 GiB. Tokens as vLLM up to 0.19 counts them, blocks shared out to the groups.
    """
    assert row.shape is not None
    pool = int(row.pool * GIB)

    assert row.shape.concurrency(pool) == pytest.approx(row.concurrency, rel=2e-3)
    if row.tokens is not None:
        assert row.shape.tokens(pool) == pytest.approx(row.tokens, rel=2e-3)


class TestBytesPerToken:
    """Of all layers that keep every token."""

    @pytest.mark.parametrize(("cards", "expected"), [(1, 131072), (2, 65536), (8, 16384), (16, 16384), (64, 16384)])
    def test_a_card_has_at_least_one_head(self, cards: int, expected: int) -> None:
        """
        32 layers x 8 heads x 2 x 128 numbers x 2 bytes; beyond 8 cards heads are copied.
        """
        assert kv_bytes_per_token(read_config(LLAMA_8B), tensor_parallel_size=cards) == expected

    def test_sparse_mla_has_an_indexer_and_a_format_of_its_own(self) -> None:
        """
        576 numbers in 16 bit and 132 bytes of the indexer; in FP8 656 bytes and the same 132 (mla_attention.py).
        """
        sparse = read_config({**KIMI_VL, "model_type": "deepseek_v32", "num_hidden_layers": 1})

        assert kv_bytes_per_token(sparse) == 576 * 2 + 132
        assert kv_bytes_per_token(sparse, element_bits=8) == 656 + 132

    def test_states_keep_no_tokens(self) -> None:
        """
        Qwen3.5 27B: 16 of 64 layers are full; 4 heads x 2 x 256 numbers x 2 bytes.
        """
        assert kv_bytes_per_token(read_config(QWEN_3_5_27B)) == 16 * 4 * 2 * 256 * 2


def model(*kinds: tuple[int, Cache | None]) -> Architecture:
    """A model with so many layers of each kind."""
    blocks, index = [], 0
    for count, cache in kinds:
        blocks.append(Block(layers=tuple(range(index, index + count)), matrices=(), cache=cache))
        index += count
    return Architecture(
        kind="", hidden_size=1, vocab_size=1, heads=1, max_position_embeddings=None, blocks=tuple(blocks), outside=()
    )


def shape(*kinds: tuple[int, Cache | None], length: int = 1024, batch: int = 64) -> CacheShape | None:
    return shape_cache(model(*kinds), max_model_len=length, max_num_batched_tokens=batch)


FULL = KeysAndValues(kv_heads=1, head_dim=8, v_head_dim=8)  # 32 bytes for each token, 512 for a block
WINDOW = KeysAndValues(kv_heads=1, head_dim=8, v_head_dim=8, window=128)
CHUNK = KeysAndValues(kv_heads=1, head_dim=8, v_head_dim=8, window=128, chunked=True)


class TestShapes:
    """Small worlds, counted by hand from v1/core/kv_cache_utils.py."""

    @pytest.mark.parametrize(
        ("kinds", "expected"),
        [
            # 10 layers share each block; 1024 tokens are 64 blocks of 16.
            (((10, FULL),), CacheShape(block_bytes=5120, block_tokens=16, groups=1, blocks_per_request=64)),
            # The documentation's example: 10 full and 20 sliding make groups of 10; a window holds
            # ceil((127 + 64) / 16) + 1 = 13 blocks.
            (
                ((10, FULL), (20, WINDOW)),
                CacheShape(block_bytes=5120, block_tokens=16, groups=3, blocks_per_request=64 + 2 * 13),
            ),
            # A chunk needs no block more: ceil((128 + 64) / 16) = 12.
            (
                ((10, FULL), (10, CHUNK)),
                CacheShape(block_bytes=5120, block_tokens=16, groups=2, blocks_per_request=64 + 12),
            ),
            # 13 and 12 are near enough: both get groups of 13.
            (
                ((13, FULL), (12, WINDOW)),
                CacheShape(block_bytes=13 * 512, block_tokens=16, groups=2, blocks_per_request=64 + 13),
            ),
            # A state of 1,300 bytes needs pages of three blocks: 48 tokens of attention, 22 of them for 1,024.
            (
                ((2, FULL), (6, State(conv_elements=0, ssm_elements=650))),
                CacheShape(block_bytes=2 * 1536, block_tokens=48, groups=4, blocks_per_request=22 + 3),
            ),
            # States alone.
            (
                ((6, State(conv_elements=0, ssm_elements=650)),),
                CacheShape(block_bytes=6 * 1300, block_tokens=16, groups=1, blocks_per_request=1),
            ),
            # Heads twice as wide: the narrow layers get 32 tokens into a page.
            (
                ((2, KeysAndValues(kv_heads=1, head_dim=16, v_head_dim=16)), (2, WINDOW)),
                CacheShape(block_bytes=2048, block_tokens=16, groups=2, blocks_per_request=64 + 7),
            ),
            (((2, Latent(width=16)), (3, None)), CacheShape(
                block_bytes=1024, block_tokens=16, groups=1, blocks_per_request=64
            )),
            (((3, None),), None),
        ],
    )  # fmt: skip
    def test_layers_are_grouped_as_vllm_groups_them(
        self, kinds: tuple[tuple[int, Cache | None], ...], expected: CacheShape | None
    ) -> None:
        """
        Pages of one size, groups of equally many layers, blocks of one request.
        """
        assert shape(*kinds) == expected

    def test_stages_share_the_layers(self) -> None:
        """
        Of ten layers in three stages one has four.
        """
        laid_out = shape_cache(
            model((10, FULL)), max_model_len=1024, max_num_batched_tokens=64, pipeline_parallel_size=3
        )

        assert laid_out == CacheShape(block_bytes=4 * 512, block_tokens=16, groups=1, blocks_per_request=64)

    def test_a_window_is_never_more_than_the_length(self) -> None:
        """
        A request of 32 tokens holds 2 blocks and one more, whatever the window.
        """
        short = shape((1, WINDOW), length=32)

        assert short is not None
        assert short.blocks_per_request == 3


CACHES = st.sampled_from([FULL, WINDOW, CHUNK, Latent(width=16), State(conv_elements=8, ssm_elements=64)])
WORLDS = st.lists(st.tuples(st.integers(1, 12), CACHES), min_size=1, max_size=3, unique_by=lambda kind: kind[1])


@given(WORLDS, st.integers(16, 4096), st.integers(0, 2**30), st.integers(0, 2**30))
def test_a_larger_pool_never_holds_less(
    kinds: list[tuple[int, Cache | None]], length: int, smaller: int, more: int
) -> None:
    """
    Neither requests nor tokens.
    """
    laid_out = shape(*kinds, length=length)

    assert laid_out is not None
    assert laid_out.concurrency(smaller) <= laid_out.concurrency(smaller + more)
    assert laid_out.tokens(smaller) <= laid_out.tokens(smaller + more)


@given(WORLDS, st.integers(16, 4096))
def test_a_longer_request_never_takes_less(kinds: list[tuple[int, Cache | None]], length: int) -> None:
    """
    And what it takes is a pool for exactly one of it.
    """
    short, long = shape(*kinds, length=length), shape(*kinds, length=2 * length)

    assert short is not None
    assert long is not None
    assert short.request_bytes <= long.request_bytes
    assert short.concurrency(short.request_bytes) == 1
