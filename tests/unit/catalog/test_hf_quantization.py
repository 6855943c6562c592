"""
quantization_config blocks of published models, and which modules they pack how.
"""

from __future__ import annotations

from typing import Any

import pytest

from worker.catalog.hf_quantization import named_quantization, read_quantization
from worker.catalog.quantization import Quantization

Q = "model.layers.3.self_attn.q_proj"
UP = "model.layers.3.mlp.up_proj"
EXPERTS = "model.layers.3.mlp.experts.up_proj"
SHARED = "model.layers.3.mlp.shared_expert.up_proj"
DELTA = "model.layers.3.linear_attn.in_proj_qkv"
MIXER = "model.layers.3.mixer.in_proj"


def int4(**weights: Any) -> dict[str, Any]:
    """A block of llm-compressor; the name of the method as in the hub's W4A16 models."""
    usual = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    group = {"targets": ["Linear"], "weights": {**usual, **weights}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def scheme(config: dict[str, Any]) -> Quantization:
    found = read_quantization(config)
    assert isinstance(found, Quantization), found
    return found


def bits(config: dict[str, Any], *names: str) -> list[int | None]:
    """Bits of each module; None = left as it is."""
    read = scheme(config)
    return [found.bits if (found := read.scheme_of(name)) else None for name in names]


class TestSchemes:
    """Bits, groups, scales and zero points."""

    @pytest.mark.parametrize(
        ("config", "one_matrix"),
        [
            # 4096 x 4096 = 16,777,216 weights: their bytes, scales, zero points, row order
            ({"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}, (2**23, 2**18, 2**16, 0)),
            ({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, (2**23, 2**18, 2**16, 2**15)),
            ({"quant_method": "gptq", "bits": 8, "group_size": -1}, (2**24, 8192, 4096, 2**15)),
            ({"quant_method": "auto-round", "bits": 4, "group_size": 32}, (2**23, 2**20, 2**18, 2**15)),
            (int4(), (2**23, 2**18, 0, 0)),
            (int4(symmetric=False, group_size=32), (2**23, 2**20, 2**18, 0)),
            (int4(num_bits=8, strategy="channel", group_size=None), (2**24, 2**14, 0, 0)),
            (int4(num_bits=8, type="float", strategy="channel", group_size=None), (2**24, 2**14, 0, 0)),
            (
                int4(num_bits=8, type="float", strategy="block", group_size=None, block_structure=[128, 128]),
                (2**24, 4096, 0, 0),
            ),
            (int4(type="float", strategy="tensor_group", group_size=16), (2**23, 2**20, 0, 0)),
            ({"quant_method": "fp8", "weight_block_size": [128, 128]}, (2**24, 4096, 0, 0)),
            ({"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16}, (2**23, 2**20, 0, 0)),
            ({"quant_method": "modelopt", "quant_algo": "FP8"}, (2**24, 0, 0, 0)),
            ({"quant_method": "fp8"}, (2**24, 0, 0, 0)),
            ({"quant_method": "ptpc_fp8"}, (2**24, 2**14, 0, 0)),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, (2**23, 2**20, 0, 0)),
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, (2**24, 2**14, 0, 0)),
        ],
    )
    def test_each_format_has_its_tensors(self, config: dict[str, Any], one_matrix: tuple[int, ...]) -> None:
        """
        Counted for one square matrix.
        """
        assert scheme(config).parts_of(4096, 4096) == one_matrix

    def test_blocks_that_do_not_fill_the_matrix_count_whole(self) -> None:
        """
        A matrix of 200 x 300 has 2 x 3 blocks of 128 x 128.
        """
        assert scheme({"quant_method": "fp8", "weight_block_size": [128, 128]}).parts_of(200, 300)[1] == 4 * 6

    @pytest.mark.parametrize(
        ("config", "kv_bits"),
        [
            (int4(), None),
            ({**int4(), "kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 8),
            ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": {"num_bits": 8}}, 8),
            ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8"}}, 8),
            ({"quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None}}, None),
        ],
    )
    def test_a_checkpoint_may_bring_scales_for_the_cache(self, config: dict[str, Any], kv_bits: int | None) -> None:
        """
        The KV cache is then in FP8 without anybody saying so.
        """
        assert scheme(config).kv_cache_bits == kv_bits

    @pytest.mark.parametrize(
        ("name", "method", "size", "group"),
        [
            ("Qwen3-8B-AWQ", "awq", 4, 128), ("x-GPTQ-Int8", "gptq", 8, 128), ("x-GPTQ-Int4", "gptq", 4, 128),
            ("Llama-3.1-8B-Instruct-quantized.w4a16", "w4a16", 4, 128), ("x.w8a8", "w8a8", 8, None),
            ("Qwen3-8B-FP8", "fp8", 8, None), ("gpt-oss-20b-mxfp4", "mxfp4", 4, 32), ("x-NVFP4", "nvfp4", 4, 16),
            ("x-bnb-4bit", "w4a16", 4, 128),
        ],
    )  # fmt: skip
    def test_a_name_means_the_usual_settings(self, name: str, method: str, size: int, group: int | None) -> None:
        """
        Only where the config says nothing.
        """
        found = named_quantization(name)

        assert found is not None
        assert (found.method, found.bits, found.group) == (method, size, group)
        assert named_quantization("Llama-3.1-8B") is None


class TestModules:
    """Which modules stay as they are."""

    def test_an_mxfp4_model_packs_its_experts_alone(self) -> None:
        """
        openai/gpt-oss-20b.
        """
        block = {
            "quant_method": "mxfp4",
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
            ],
        }  # fmt: skip

        assert bits(block, EXPERTS, Q) == [4, None]
        assert not scheme(block).by_layer

    def test_expressions_are_matched_from_the_start_of_a_name(self) -> None:
        """
        moonshotai/Kimi-K2-Thinking: only routed experts are packed.
        """
        block = {
            **int4(group_size=32),
            "ignore": [
                "lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
            ],
        }  # fmt: skip

        assert bits(block, EXPERTS, Q, SHARED, UP) == [4, None, None, None]
        assert bits({**int4(), "ignore": ["re:mlp.*"]}, UP) == [4]

    def test_single_layers_may_be_left_out(self) -> None:
        """
        Lists name modules of one layer, with the words of the files before it, or a whole part of the layer.
        """
        names = ["model.language_model.layers.3.self_attn.q_proj", "model.layers.4.mlp", "lm_head"]
        block = {**int4(), "ignore": names}
        four = UP.replace("3", "4")

        assert bits(block, Q, Q.replace("3", "5"), UP, four) == [None, 4, 4, None]
        assert scheme(block).by_layer

    def test_thousands_of_experts_are_one_module(self) -> None:
        """
        The engine joins the experts of a layer: where single ones are left out, all of them are.
        """
        block = {**int4(), "ignore": [f"model.layers.3.mlp.experts.{i}.up_proj" for i in range(512)]}

        assert bits(block, EXPERTS, EXPERTS.replace("3", "2")) == [None, 4]

    def test_parts_of_a_name_are_whole_words(self) -> None:
        """
        "gate" is the router, not gate_proj; "visual" is no part of the language model.
        """
        block = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["gate", "visual", "self_attn"]}

        assert bits(block, "model.layers.3.mlp.gate_proj", "model.layers.3.mlp.gate", Q) == [4, None, None]

    def test_wildcards_take_what_is_inside(self) -> None:
        """
        nvidia/Qwen3-Next-80B-A3B-Instruct-NVFP4 and Nemotron: lists of modelopt.
        """
        skipped = ["*.linear_attn*", "*mlp.gate", "backbone.layers.3.mixer.in_proj", "lm_head"]
        block = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": skipped}

        assert bits(block, DELTA, UP, "model.layers.3.mlp.gate_proj", MIXER) == [None, 4, 4, None]

    def test_each_group_has_its_targets(self) -> None:
        """
        llm-compressor: attention in FP8 beside MLPs in NVFP4.
        """
        fp8 = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
        groups = {**int4(type="float", group_size=16)["config_groups"], "group_1": fp8}
        block = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": ["re:.*linear_attn.*"]}

        assert bits(block, UP, Q, DELTA) == [4, 8, None]

    def test_mixed_precision_says_it_of_each_module(self) -> None:
        """
        modelopt, MIXED_PRECISION: what is not named stays as it is.
        """
        layers = {
            "model.language_model.layers.3.self_attn.q_proj": {"quant_algo": "FP8"},
            "model.language_model.layers.3.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
        }
        block = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}

        assert bits(block, Q, EXPERTS, UP, EXPERTS.replace("3", "4")) == [8, 4, None, None]

    def test_gptq_rules_change_single_modules(self) -> None:
        """
        GPTQModel: "+:" gives other bits, "-:" none; older files list what is packed.
        """
        rules = {"+:.*self_attn.*": {"bits": 8}, "-:.*layers\\.3\\.mlp.*": {}}
        block = {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": rules}
        older = {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": [["self_attn.q_proj"]]}

        assert bits(block, Q, UP, UP.replace("3", "2")) == [8, None, 4]
        assert bits(older, Q, UP) == [4, None]

    def test_auto_round_keeps_some_in_16_bit(self) -> None:
        """
        extra_config: by name or by expression.
        """
        extra = {"model.layers.3.self_attn.q_proj": {"bits": 16}, ".*layers.3.mlp.*": {"bits": 8, "group_size": 32}}
        block = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": extra}
        found = scheme(block).scheme_of(UP)

        assert bits(block, Q, UP.replace("3", "2")) == [None, 4]
        assert found is not None
        assert (found.bits, found.group) == (8, 32)


class TestBadInput:
    """What cannot be used is said."""

    @pytest.mark.parametrize(
        ("config", "why"),
        [
            ({"quant_method": "zipper"}, "the quantization method zipper is not known"),
            ({"bits": 4}, "the quantization method ? is not known"),
            ({"quant_method": "awq", "bits": 17}, "quantization_config of awq is malformed"),
            ({"quant_method": "awq", "bits": [4]}, "quantization_config of awq is malformed"),
            ({"quant_method": "awq", "group_size": "many"}, "quantization_config of awq is malformed"),
            ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "quantization_config of fp8 is malformed"),
            ({"quant_method": "fp8", "weight_block_size": [128]}, "quantization_config of fp8 is malformed"),
            ({"quant_method": "fp8", "ignored_layers": "all"}, "quantization_config of fp8 is malformed"),
            ({"quant_method": "gptq", "dynamic": ["x"]}, "quantization_config of gptq is malformed"),
            ({"quant_method": "compressed-tensors"}, "the quantization method compressed_tensors is not known"),
            (
                {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"strategy": "group"}}}},
                "quantization_config of compressed_tensors is malformed",
            ),
            (
                {"quant_method": "modelopt", "quantized_layers": {"x": {"quant_algo": "W2A2"}}},
                "the quantization method modelopt is not known",
            ),
        ],
    )
    def test_a_block_that_cannot_be_used_says_why(self, config: dict[str, Any], why: str) -> None:
        """
        Never a scheme that was made up.
        """
        assert read_quantization(config) == why

    def test_an_empty_block_is_none(self) -> None:
        """
        As if it were not there.
        """
        assert read_quantization({}) is None

    def test_an_expression_that_is_none_is_taken_as_text(self) -> None:
        """
        A checkpoint may bring any text.
        """
        assert bits({**int4(), "ignore": ["re:*(["]}, UP) == [4]
