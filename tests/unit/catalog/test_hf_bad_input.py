"""
Configs that lie: no value anywhere makes the reader raise, or say a number that nothing supports.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.catalog.architecture import Architecture
from worker.catalog.hf_config import read_config
from worker.catalog.hf_facts import _SPELLINGS, FAMILIES

QWEN: dict[str, Any] = {
    "model_type": "qwen3_5_moe", "hidden_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "intermediate_size": 5632, "vocab_size": 248320, "num_experts": 16,
    "moe_intermediate_size": 512, "max_position_embeddings": 262144, "rope_parameters": {"rope_type": "default"},
    "vision_config": {"depth": 4, "hidden_size": 1152, "spatial_merge_size": 2},
    "quantization_config": {"quant_method": "awq", "bits": 4},
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v32", "hidden_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16,
    "intermediate_size": 2048, "vocab_size": 1000, "kv_lora_rank": 512, "n_routed_experts": 8,
    "moe_intermediate_size": 256, "first_k_dense_replace": 1, "rope_scaling": {"type": "yarn", "factor": 40},
    "text_config": None,
}  # fmt: skip
GEMMA: dict[str, Any] = {
    "model_type": "gemma4_text", "hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 128, "intermediate_size": 2048, "vocab_size": 1000, "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"], "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 64,
}  # fmt: skip
NEMOTRON: dict[str, Any] = {
    "model_type": "nemotron_h", "hidden_size": 1024, "hybrid_override_pattern": "M-E*", "n_routed_experts": 8,
    "intermediate_size": 2048, "mamba_num_heads": 16, "mamba_head_dim": 64, "num_attention_heads": 8,
    "moe_latent_size": 512, "vocab_size": 1000,
}  # fmt: skip

# Fields of configs, and words of our own tables, which a config may happen to use too.
OUR_OWN = (
    {word for family in FAMILIES.values() for word in family}
    | set(_SPELLINGS)
    | {"layer_types", "total_params", "architectures"}
)
KEYS = sorted({key for config in (QWEN, DEEPSEEK, GEMMA, NEMOTRON) for key in config} | OUR_OWN)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, -1, 2**63, 10**400, math.nan, math.inf, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from([*KEYS, "bits", "factor", "rope_type"]), inner, max_size=3)
    ),
    max_leaves=6,
)
CONFIGS = st.builds(
    lambda base, changes: {**base, **changes},
    st.sampled_from([{}, QWEN, DEEPSEEK, GEMMA, NEMOTRON]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
)


def check(read: Architecture) -> None:
    """Either the sizes are sane, or somebody says why there are none."""
    if not read.unknown_weights:
        assert 0 <= read.params <= 2**46
        assert read.layers > 0 or read.params > 0
    if not read.unknown_cache:
        assert read.layers > 0


@settings(max_examples=300, deadline=None)
@given(config=CONFIGS, name=st.none() | st.sampled_from(["Qwen3-8B", "x-8x7B", "nvidia/Nemotron-H"]))
def test_any_value_in_any_field_is_read(config: dict[str, Any], name: str | None) -> None:
    """
    Negative, absurd, of another type, nested: never an exception, never a number without a ground.
    """
    check(read_config(config, name=name))
    check(read_config({"model_type": "llava", "text_config": config}, name=name))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("value", [-1, 2.5, True, "4096", [1, 2], {}, 10**400, math.nan, 10**9])
def test_nonsense_in_a_needed_field_is_named(key: str, value: object) -> None:
    """
    The answer says which field, and what is in it.
    """
    read = read_config({**QWEN, key: value}, name="Qwen3.5-35B-A3B")

    assert any(reason.startswith(f"{key}=") for reason in read.unknown_weights)
    assert all(len(reason) < 120 for reason in read.unknown_weights)


@pytest.mark.parametrize("config", [QWEN, DEEPSEEK, GEMMA])
@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_a_missing_field_is_named(config: dict[str, Any], key: str) -> None:
    """
    Half the facts are no ground for an answer.
    """
    assert key in read_config({k: v for k, v in config.items() if k != key}).unknown_weights


def test_an_empty_config_knows_nothing() -> None:
    """
    Neither weights nor KV cache.
    """
    read = read_config({})

    assert {"num_hidden_layers", "hidden_size", "vocab_size"} <= set(read.unknown_weights)
    assert read.unknown_cache


def test_sizes_that_make_no_model_are_refused() -> None:
    """
    Each is possible; together they are quadrillions of parameters.
    """
    huge = {"num_experts": 2**14, "moe_intermediate_size": 2**19, "hidden_size": 2**19, "num_hidden_layers": 1000}

    assert any("parameters make no sense" in reason for reason in read_config({**QWEN, **huge}).unknown_weights)


def test_a_number_too_long_to_print_is_refused() -> None:
    """
    Python will not write out more than 4,300 digits.
    """
    assert read_config({**QWEN, "hidden_size": 10**5000}).unknown_weights[0] == (
        "hidden_size=a number of thousands of digits makes no sense"
    )
