"""
Configs of released models, counted: the numbers must be those of the models themselves.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from worker.catalog.architecture import RopeTable
from worker.catalog.hf_config import packed_as, read_config

ROOT = Path(__file__).parents[3]
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
GEMMA_4_31B: dict[str, Any] = {
    "model_type": "gemma4_text", "hidden_size": 5376, "num_hidden_layers": 60, "num_attention_heads": 32,
    "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 4,
    "attention_k_eq_v": True, "intermediate_size": 21504, "vocab_size": 262144, "sliding_window": 1024,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 10,
}  # fmt: skip

# The last number is that of the parameters of the model that transformers 5.19 builds from the same config.
RELEASED: dict[str, tuple[dict[str, Any], int]] = {
    "Llama 3.1 8B": (LLAMA_8B, 8_030_261_248),
    "Falcon 40B, the new way": (
        {
            "model_type": "falcon", "new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 8,
            "num_attention_heads": 128, "hidden_size": 8192, "num_hidden_layers": 60, "vocab_size": 65024,
        },
        41_303_293_952,
    ),
    "Falcon 7B, one KV head": (
        {
            "model_type": "falcon", "multi_query": True, "num_attention_heads": 71, "hidden_size": 4544,
            "num_hidden_layers": 32, "vocab_size": 65024,
        },
        6_921_720_704,
    ),
    "LFM2 1.2B: short convolutions, an MLP cut to two thirds": (
        {
            "model_type": "lfm2", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "block_ff_dim": 12288, "block_auto_adjust_ff_dim": True, "vocab_size": 65536,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
        },
        1_170_340_608,
    ),
    "Bamba 9B: three layers of attention": (
        {
            "model_type": "bamba", "attn_layer_indices": [9, 18, 27], "hidden_size": 4096, "intermediate_size": 14336,
            "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_heads": 128, "num_attention_heads": 32,
            "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        },
        9_780_235_392,
    ),
    "Granite 4 Tiny: experts after Mamba": (
        {
            "model_type": "granitemoehybrid", "hidden_size": 1536, "intermediate_size": 512,
            "shared_intermediate_size": 1024, "num_hidden_layers": 40, "num_attention_heads": 12,
            "num_key_value_heads": 4, "num_local_experts": 64, "num_experts_per_tok": 6, "mamba_d_head": 64,
            "mamba_d_state": 128, "mamba_n_heads": 48, "vocab_size": 100352,
            "layer_types": ["attention" if i in {5, 15, 25, 35} else "mamba" for i in range(40)],
        },
        6_939_037_248,
    ),
    "Granite 4 Micro: no experts, only what they would share": (
        {
            "model_type": "granitemoehybrid", "hidden_size": 2560, "intermediate_size": 8192, "num_local_experts": 0,
            "shared_intermediate_size": 8192, "num_hidden_layers": 40, "num_attention_heads": 40,
            "num_key_value_heads": 8, "layer_types": ["attention"] * 40, "vocab_size": 100352,
        },
        3_402_836_480,
    ),
    "Nemotron Nano 9B v2: each layer a mixer or an MLP": (
        {
            "model_type": "nemotron_h", "hidden_size": 4480, "intermediate_size": 15680, "num_hidden_layers": 56,
            "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
            "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128,
            "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128, "vocab_size": 131072,
        },
        8_888_227_328,
    ),
    "Nemotron 3 Nano 30B: or experts": (
        {
            "model_type": "nemotron_h", "hidden_size": 2688, "intermediate_size": 1856, "num_hidden_layers": 52,
            "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "n_routed_experts": 128,
            "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1,
            "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128, "mamba_num_heads": 64,
            "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "vocab_size": 131072,
        },
        31_577_937_344,
    ),
    "Gemma 4 31B: values are keys, and a tower": (
        {
            "model_type": "gemma4", "text_config": GEMMA_4_31B,
            "vision_config": {
                "model_type": "gemma4_vision", "hidden_size": 1152, "num_hidden_layers": 27, "patch_size": 16,
                "intermediate_size": 4304, "position_embedding_size": 10240,
            },
        },
        31_273_086_512,
    ),
    "Gemma 4 E2B: embeddings for each layer, borrowed keys": (
        {
            "model_type": "gemma4_text", "hidden_size": 1536, "num_hidden_layers": 35, "num_attention_heads": 8,
            "num_key_value_heads": 1, "head_dim": 256, "global_head_dim": 512, "intermediate_size": 6144,
            "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7, "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True, "hidden_size_per_layer_input": 256, "vocab_size": 262144,
            "sliding_window": 512, "attention_k_eq_v": False,
        },
        4_628_569_344,
    ),
    "GLM-5: sparse MLA": (
        {
            "model_type": "glm_moe_dsa", "hidden_size": 6144, "num_hidden_layers": 78, "num_attention_heads": 64,
            "num_key_value_heads": 64, "intermediate_size": 12288, "moe_intermediate_size": 2048, "head_dim": 64,
            "n_routed_experts": 256, "n_shared_experts": 1, "first_k_dense_replace": 3, "kv_lora_rank": 512,
            "q_lora_rank": 2048, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256,
            "index_n_heads": 32, "index_head_dim": 128, "vocab_size": 154880,
        },
        743_911_199_232,
    ),
    "GPT-2: sizes that only the class knows": (
        {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
    "Mamba2: no attention, no MLP": (
        {
            "model_type": "mamba2", "hidden_size": 4096, "num_hidden_layers": 64, "num_heads": 128, "head_dim": 64,
            "n_groups": 8, "state_size": 128, "conv_kernel": 4, "vocab_size": 32768,
        },
        7_285_403_648,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", RELEASED)
def test_a_released_model_counts_as_it_is_built(model: str) -> None:
    """
    To 0.1 %: what differs is biases of norms.
    """
    config, params = RELEASED[model]
    read = read_config(config)

    assert (read.unknown_weights, read.unknown_cache) == ((), ())
    assert read.params == pytest.approx(params, rel=1e-3)


def test_every_shipped_model_counts_as_published() -> None:
    """
    The catalogue's configs give the numbers of parameters that docs/catalogue-sources.md has from the models.
    """
    entries = {e["id"]: e for e in tomllib.loads((ROOT / "worker/catalog/models.toml").read_text())["models"]}
    table = re.findall(r"^\| ([^|]+) \| ([\d,]+) \|", (ROOT / "docs/catalogue-sources.md").read_text(), re.MULTILINE)
    published = {name.strip(): int(count.replace(",", "")) for names, count in table for name in names.split(",")}

    counted = {name: read_config(entries[name]["config"]).params for name in published}

    assert len(counted) > 40
    assert counted == {name: pytest.approx(count, rel=2e-4) for name, count in published.items()}


class TestFamilies:
    """Whose config is it?"""

    @pytest.mark.parametrize(
        "config",
        [
            {"model_type": "frobnicator"},
            {"architectures": ["FrobnicatorForCausalLM"]},
            {"model_type": "gemma3n"},
            {"model_type": "zamba2", "total_params": 7_000_000_000},
        ],
    )
    def test_an_unknown_family_is_refused_by_name(self, config: dict[str, Any]) -> None:
        """
        Layers may be put together in any way: neither weights nor KV cache are guessed, not even from a total.
        """
        read = read_config({**LLAMA_8B, "model_type": None, **config}, name="Frobnicator-8B")

        assert any("the architecture" in reason for reason in read.unknown_weights)
        assert read.unknown_cache == read.unknown_weights

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("LlamaForCausalLM", "llama"), ("Qwen3MoeForCausalLM", "qwen3_moe"), ("GPT2LMHeadModel", "gpt2"),
            ("GraniteMoeHybridForCausalLM", "granitemoehybrid"), ("MiniMaxM2ForCausalLM", "minimax_m2"),
            ("Qwen3VLMoeForConditionalGeneration", "qwen3_vl_moe"), ("BertModel", "bert"),
            ("Qwen2_5_VLForX", "qwen2_5_vl"),
        ],
    )  # fmt: skip
    def test_a_class_names_the_family_too(self, name: str, kind: str) -> None:
        """
        Where there is no model_type.
        """
        assert read_config({**LLAMA_8B, "model_type": None, "architectures": [name]}).kind == kind

    def test_what_is_around_a_known_language_model_must_be_known_too(self) -> None:
        """
        A Llama inside a model with towers of its own is more than a Llama.
        """
        assert read_config({"model_type": "llava", "text_config": LLAMA_8B}).unknown_weights == ()
        assert read_config({"model_type": "janus", "text_config": LLAMA_8B}).unknown_weights

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("google/gemma-3-12b-it", "gemma3"), ("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next"),
            ("Qwen/Qwen3.5-122B-A10B", "qwen3_5_moe"), ("Qwen/Qwen3-30B-A3B", "qwen3_moe"),
            ("Qwen/Qwen3-VL-8B", "qwen3_vl"), ("Qwen/Qwen2.5-VL-7B", "qwen2_5_vl"),
            ("nvidia/Llama-3.1-Nemotron-70B", "llama"), ("nvidia/NVIDIA-Nemotron-Nano-9B-v2", "nemotron_h"),
            ("openai/gpt-oss-120b", "gpt_oss"), ("a model of mine", ""),
        ],
    )  # fmt: skip
    def test_a_poor_config_takes_the_family_of_its_name(self, name: str, kind: str) -> None:
        """
        And says so.
        """
        read = read_config({**LLAMA_8B, "model_type": None}, name=name)

        assert read.kind == kind
        assert any("from the model's name" in note for note in read.assumed) == bool(kind)


class TestTotals:
    """What a poor config declares in one number."""

    def test_a_tower_is_what_the_layers_do_not_explain(self) -> None:
        """
        In a model that sees; any other has more weights in its layers.
        """
        declared = {**LLAMA_8B, "model_type": None, "total_params": 8_330_261_248}

        assert read_config(declared, name="llava-8b").vision == 300_000_000
        assert read_config(declared, name="other").vision == 0
        assert read_config(declared, name="other").params == pytest.approx(8_330_261_248, rel=1e-4)

    def test_a_total_stands_in_for_missing_layers(self) -> None:
        """
        Weights are known to the number, the KV cache is not.
        """
        read = read_config({"total_params": 7_000_000_000, "vocab_size": 32000, "hidden_size": 4096})

        assert read.unknown_weights == ()
        assert read.params == pytest.approx(7_000_000_000, rel=1e-4)
        assert "num_hidden_layers" in read.unknown_cache

    def test_a_total_does_not_stand_in_for_nonsense(self) -> None:
        """
        A config with a negative size is wrong, whatever else it says.
        """
        read = read_config({**LLAMA_8B, "hidden_size": -4096, "total_params": 8_000_000_000}, name="Llama-8B")

        assert read.unknown_weights[0] == "hidden_size=-4096 makes no sense"

    @pytest.mark.parametrize(
        ("name", "billions"),
        [
            ("Qwen3-14B", 14), ("qwen2.5-1.5b-instruct", 1.5), ("Qwen3-30B-A3B", 30), ("Qwen3-0.6B", 0.6),
            ("7B-of-nothing", 7), ("Mixtral-8x7B", None), ("Llama-4-Scout-17B-16E", None), ("Qwen1.5-MoE-A2.7B", None),
            ("phi-4", None), ("gpt-style", None), ("draft-1B-for-70B", None), ("Model-4bit", None), ("0B", None),
        ],
    )  # fmt: skip
    def test_the_name_is_the_last_resort_and_a_guess(self, name: str, billions: float | None) -> None:
        """
        Names that say a size which is not the model's say nothing.
        """
        read = read_config({}, name=name)

        if billions is None:
            assert "num_hidden_layers" in read.unknown_weights
        else:
            assert read.params == pytest.approx(billions * 1e9, rel=1e-4)
            assert any(note.startswith("a guess:") for note in read.assumed)
        assert read.unknown_cache

    def test_a_name_changes_nothing_where_the_config_speaks(self) -> None:
        """
        A name that lies is not asked.
        """
        assert read_config(LLAMA_8B, name="Tiny-1B").params == read_config(LLAMA_8B).params


class TestRope:
    """Tables that vLLM computes at load."""

    @pytest.mark.parametrize(
        ("changes", "tables"),
        [
            ({}, (RopeTable(rows=131072, width=128),)),
            ({"partial_rotary_factor": 0.5}, (RopeTable(rows=131072, width=64),)),
            ({"rope_parameters": {"partial_rotary_factor": 0.25}}, (RopeTable(rows=131072, width=32),)),
            ({"rope_scaling": {"type": "linear", "factor": 8}}, (RopeTable(rows=1048576, width=128),)),
            (
                {"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
                (RopeTable(rows=131072, width=128),),
            ),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, (RopeTable(rows=131072, width=128),)),
            ({"model_type": "gpt2"}, ()),
            ({"max_position_embeddings": None}, ()),
        ],
    )
    def test_a_row_for_each_position(self, changes: dict[str, Any], tables: tuple[RopeTable, ...]) -> None:
        """
        Some kinds of scaling lengthen the table, others only change what is in it; learned positions have none.
        """
        assert read_config({**LLAMA_8B, **changes}).rope == tables


class TestToldQuantization:
    """What the engine is told, and what the files say."""

    def test_the_files_say_it_better(self) -> None:
        """
        A method on the command line does not change files that are packed already.
        """
        packed = {**LLAMA_8B, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}}
        read = read_config(packed, quantization="fp8")

        assert read.quantization is not None
        assert (read.quantization.bits, read.quantization.group) == (4, 64)

    def test_a_method_that_nobody_knows_is_unknown(self) -> None:
        """
        In the config, on the command line, and added later.
        """
        unknown = ("the quantization method zipper is not known", "the quantization method zipper")
        in_config = read_config({**LLAMA_8B, "quantization_config": {"quant_method": "zipper"}})

        assert in_config.unknown_weights == (unknown[0],)
        assert read_config(LLAMA_8B, quantization="zipper").unknown_weights == (unknown[1],)
        assert packed_as(read_config(LLAMA_8B), "zipper").unknown_weights == (unknown[1],)

    def test_an_embedder_has_no_sampler(self) -> None:
        """
        Its name tells, or its kind.
        """
        assert not read_config(LLAMA_8B, name="Qwen3-Embedding-8B").generates
        assert not read_config({**LLAMA_8B, "model_type": "bert"}).generates
        assert read_config(LLAMA_8B, name="Llama-8B").generates
