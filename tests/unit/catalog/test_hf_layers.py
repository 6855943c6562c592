"""
Which layers a config describes, and what each of them keeps.
"""

from __future__ import annotations

from typing import Any

import pytest

from worker.catalog.architecture import KeysAndValues, Latent, State
from worker.catalog.hf_config import read_config
from worker.catalog.hf_facts import FAMILIES, Facts
from worker.catalog.hf_layers import Mixer, kinds_of

FULL, SLIDING, DELTA = Mixer.FULL, Mixer.SLIDING, Mixer.DELTA
SIZES: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2,
    "intermediate_size": 128, "vocab_size": 1000,
}  # fmt: skip


def mixers(family: str, **facts: Any) -> list[Mixer]:
    return [kind.mixer for kind in kinds_of(Facts({**SIZES, **facts}, FAMILIES[family]))]


def experts(family: str, **facts: Any) -> list[bool]:
    return [kind.sparse for kind in kinds_of(Facts({**SIZES, "num_experts": 8, **facts}, FAMILIES[family]))]


@pytest.mark.parametrize(
    ("family", "facts", "expected"),
    [
        # (1) all of one kind
        ("mamba2", {}, [Mixer.MAMBA2] * 4),
        # (2) every layer has a name
        ("gemma3", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, [FULL, *[SLIDING] * 3]),
        ("qwen3_5", {"layer_types": [*["linear_attention"] * 3, "full_attention"]}, [*[DELTA] * 3, FULL]),
        ("bamba", {"layer_types": [*["linear_attention"] * 3, "full_attention"]}, [*[Mixer.MAMBA2] * 3, FULL]),
        ("nemotron_h", {"hybrid_override_pattern": "M-E*"}, [Mixer.MAMBA2, Mixer.NONE, Mixer.NONE, FULL]),
        ("deepseek_v3", {"layer_types": ["full_attention"] * 4, "kv_lora_rank": 16}, [Mixer.LATENT] * 4),
        # (3) the full ones are listed, or every so many
        ("lfm2", {"full_attn_idxs": [1, 3]}, [Mixer.CONV, FULL, Mixer.CONV, FULL]),
        ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1}, [Mixer.MAMBA, FULL] * 2),
        # (4) MLA
        ("deepseek_v3", {"kv_lora_rank": 16}, [Mixer.LATENT] * 4),
        # (5) every n-th
        ("qwen3_next", {}, [*[DELTA] * 3, FULL]),
        ("qwen3_next", {"full_attention_interval": 2}, [DELTA, FULL] * 2),
        ("qwen3_next", {"full_attention_interval": None, "kv_layers": 1}, [*[DELTA] * 3, FULL]),
        ("gemma2", {"sliding_window": 32}, [SLIDING, FULL] * 2),
        ("llama4", {"attention_chunk_size": 8192}, [*[Mixer.CHUNKED] * 3, FULL]),
        # (6) a window
        ("mistral", {"sliding_window": 32}, [SLIDING] * 4),
        ("qwen2", {"sliding_window": 32}, [FULL] * 4),
        ("qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 3}, [*[FULL] * 3, SLIDING]),
        # (7) none
        ("llama", {}, [FULL] * 4),
        ("gemma2", {}, [FULL] * 4),
    ],
)
def test_every_family_says_it_its_own_way(family: str, facts: dict[str, Any], expected: list[Mixer]) -> None:
    """
    In the order of the questions in `_mixers`.
    """
    assert mixers(family, **facts) == expected


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"model_type": "bamba"}, "which of its layers are recurrent"),
        ({"model_type": "qwen3", "layer_types": ["full_attention"] * 3}, "the kinds of its layers"),
        ({"model_type": "qwen3", "layer_types": ["magic_attention"] * 4}, "the kinds of its layers"),
        ({"model_type": "laguna", "num_attention_heads_per_layer": [8, 8]}, "num_attention_heads_per_layer"),
        ({"model_type": "llama", "num_key_value_heads": 3}, "num_key_value_heads=3 does not divide 8 heads"),
        ({"model_type": "llama", "num_attention_heads": 7, "num_key_value_heads": 7}, "head_dim"),
    ],
)
def test_layers_that_cannot_be_told_apart_are_unknown(config: dict[str, Any], why: str) -> None:
    """
    Taking all of them for full attention would be a number, and wrong.
    """
    read = read_config({**SIZES, **config})

    assert any(why in reason for reason in read.unknown_weights)
    assert any(why in reason for reason in read.unknown_cache)


@pytest.mark.parametrize(
    ("family", "facts", "expected"),
    [
        ("qwen3_moe", {}, [True] * 4),
        ("qwen3_moe", {"mlp_only_layers": [1]}, [True, False, True, True]),
        ("qwen3_moe", {"decoder_sparse_step": 2}, [False, True] * 2),
        ("deepseek_v3", {"first_k_dense_replace": 3}, [False, False, False, True]),
        ("laguna", {"mlp_layer_types": ["dense", *["sparse"] * 3]}, [False, True, True, True]),
        ("glm4_moe", {}, [False, True, True, True]),
        ("llama4", {"interleave_moe_layer_step": 2}, [False, True] * 2),
        ("llama4", {"moe_layers": [0]}, [True, False, False, False]),
        ("jamba", {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4}, [False, True] * 2),
        ("nemotron_h", {"hybrid_override_pattern": "M-E*"}, [False, False, True, False]),
        ("llama", {"num_experts": 0}, [False] * 4),
    ],
)
def test_experts_are_in_the_layers_that_have_them(family: str, facts: dict[str, Any], expected: list[bool]) -> None:
    """
    By a list, by every n-th, or from some layer on.
    """
    assert experts(family, **facts) == expected


class TestCaches:
    """What a layer keeps."""

    def test_a_window_is_kept_where_there_is_one(self) -> None:
        """
        Gemma 2: every second layer.
        """
        read = read_config({**SIZES, "model_type": "gemma2", "sliding_window": 32, "head_dim": 16})

        assert {block.layers: block.cache for block in read.blocks} == {
            (0, 2): KeysAndValues(kv_heads=2, head_dim=16, v_head_dim=16, window=32),
            (1, 3): KeysAndValues(kv_heads=2, head_dim=16, v_head_dim=16),
        }

    def test_global_layers_have_heads_of_their_own(self) -> None:
        """
        Gemma 4: wider heads, fewer of them where values are keys; vLLM holds the values' copy all the same.
        """
        facts = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 32, "head_dim": 8}
        more = {"global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
        read = read_config({**SIZES, "model_type": "gemma4_text", **facts, **more})
        caches = [block.cache for block in read.blocks]
        copies = [m.counted for block in read.blocks for m in block.matrices if m.name == "self_attn.v_proj"]

        assert caches == [
            KeysAndValues(kv_heads=2, head_dim=8, v_head_dim=8, window=32),
            KeysAndValues(kv_heads=1, head_dim=16, v_head_dim=16),
        ]
        assert copies == [True, False]

    def test_a_layer_that_borrows_keeps_nothing(self) -> None:
        """
        The last layers of Gemma 4 E2B look at the keys of earlier ones, and have no matrices for them.
        """
        read = read_config({**SIZES, "model_type": "gemma4_text", "num_kv_shared_layers": 2, "head_dim": 8})
        last = next(block for block in read.blocks if 3 in block.layers)

        assert (last.layers, last.cache) == ((2, 3), None)
        assert not any(matrix.name == "self_attn.k_proj" for matrix in last.matrices)

    def test_mla_keeps_one_vector(self) -> None:
        """
        And with sparse attention the indexer's keys: 128 in FP8 and a scale of 4 bytes.
        """
        mla = {"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64, "q_lora_rank": 1536}
        plain = read_config({**SIZES, **mla})
        sparse = read_config({**SIZES, **mla, "model_type": "deepseek_v32"})

        assert {block.cache for block in plain.blocks} == {Latent(width=576)}
        assert {block.cache for block in sparse.blocks} == {Latent(width=576, indexer_bytes=132)}

    def test_a_state_is_as_large_as_its_heads(self) -> None:
        """
        Qwen3.5: twice as many value heads as query heads, in 32 bit; the convolution keeps three tokens.
        """
        read = read_config({**SIZES, "model_type": "qwen3_5_text"})
        state = next(block.cache for block in read.blocks if isinstance(block.cache, State))

        # 16 key heads and 16 value heads of 128: the convolution mixes 2 x 2048 + 2048 numbers.
        assert state == State(conv_elements=3 * 6144, ssm_elements=16 * 128 * 128, ssm_bytes=4)

    def test_heads_may_differ_by_layer(self) -> None:
        """
        Laguna: each layer has its number of query heads, all have the same keys.
        """
        read = read_config({**SIZES, "model_type": "laguna", "num_attention_heads_per_layer": [8, 8, 4, 4]})

        assert [block.layers for block in read.blocks] == [(0, 1), (2, 3)]
        assert len({block.cache for block in read.blocks}) == 1
