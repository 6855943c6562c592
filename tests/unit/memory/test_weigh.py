"""
Bytes of weights on each card: packed, divided, copied, rounded as the allocator does.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.catalog.architecture import Architecture
from worker.catalog.hf_config import packed_as, read_config
from worker.memory.constants import GIB
from worker.memory.weigh import allocated, checkpoint_bytes, correct_weights, weigh_model

MIB = 2**20
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
             "intermediate_size": 28672}  # fmt: skip
QWEN_14B: dict[str, Any] = {
    "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "head_dim": 128,
    "num_key_value_heads": 8, "intermediate_size": 17408, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
QWEN_8B = {**QWEN_14B, "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32,
           "intermediate_size": 12288}  # fmt: skip
QWEN_30B: dict[str, Any] = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
    "num_key_value_heads": 4, "num_experts": 128, "moe_intermediate_size": 768, "vocab_size": 151936,
    "max_position_embeddings": 262144,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64, "head_dim": 64,
    "num_key_value_heads": 8, "intermediate_size": 2880, "num_local_experts": 32, "vocab_size": 201088,
    "max_position_embeddings": 131072, "sliding_window": 128, "quantization_config": {"quant_method": "mxfp4"},
}  # fmt: skip
AWQ = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}}
W8A8 = {
    "quantization_config": {
        "quant_method": "compressed-tensors", "ignore": ["lm_head"],
        "config_groups": {"a": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}},
    },
}  # fmt: skip
GPTQ = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}}
PLANNER = "https://github.com/llm-d-incubation/llm-d-planner/tree/main/accuracy/results/v0.19.0/logs"

# What vLLM logged: "Model loading took N GiB" on each card.
LOGGED: dict[str, tuple[dict[str, Any], int, int, float, str]] = {
    "Llama-3.1-8B": (LLAMA_8B, 1, 1, 14.9889, "https://github.com/llm-d/llm-d-benchmark"),
    "Llama-3.1-8B tp2": (LLAMA_8B, 2, 1, 7.51, PLANNER),
    "Llama-3.1-8B tp4": (LLAMA_8B, 4, 1, 3.77, PLANNER),
    "Llama-3.1-8B pp2": (LLAMA_8B, 1, 2, 7.51, PLANNER),
    "Llama-3.1-8B pp4": (LLAMA_8B, 1, 4, 4.26, PLANNER),
    "Llama-3.1-8B in 32 bit": ({**LLAMA_8B, "dtype": "float32"}, 1, 1, 29.98, PLANNER),
    "Llama-3.1-8B GPTQ": ({**LLAMA_8B, **GPTQ}, 1, 1, 5.38, PLANNER),
    "Llama-3.1-8B W8A8": ({**LLAMA_8B, **W8A8}, 1, 1, 8.49, PLANNER),
    "Llama-3.3-70B W8A8 tp2": ({**LLAMA_70B, **W8A8}, 2, 1, 33.88, PLANNER),
    "Qwen3-14B AWQ": ({**QWEN_14B, **AWQ}, 1, 1, 9.3619, "a public start-up log"),
    "Qwen3-8B AWQ tp2": ({**QWEN_8B, **AWQ}, 2, 1, 2.85, "a public start-up log"),
    "Qwen3-30B-A3B": (QWEN_30B, 1, 1, 56.9342, "a public start-up log of vLLM 0.12.0"),
    "gpt-oss-20b": (GPT_OSS, 1, 1, 13.7193, "a public start-up log of vLLM 0.13.0"),
}  # fmt: skip


@pytest.mark.parametrize("row", LOGGED)
def test_weights_are_what_vllm_logged(row: str) -> None:
    """
    Within 0.3 %, whatever the packing and the number of cards.
    """
    config, tensor_parallel, pipeline_parallel, logged, _ = LOGGED[row]
    weights = weigh_model(
        read_config(config), tensor_parallel_size=tensor_parallel, pipeline_parallel_size=pipeline_parallel
    )

    assert weights.total / GIB == pytest.approx(logged, rel=3e-3)


def small(**changes: Any) -> Architecture:
    """A model of which every tensor is below 10 MiB, where the allocator does not round."""
    return read_config(
        {
            "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000, **changes,
        }
    )  # fmt: skip


class TestDividing:
    """Tensor and pipeline parallelism."""

    def test_keys_and_values_are_copied_beyond_their_heads(self) -> None:
        """
        On 8 cards each has one of the 2 KV heads: a whole head, where an eighth would be a quarter of one.
        """
        two, eight = (weigh_model(small(), tensor_parallel_size=cards).layers for cards in (2, 8))
        head = 2 * 256 * 32 * 2  # a key and a value: 256 inputs, 32 outputs, 2 bytes
        norms = 2 * 256 * 2

        # Without KV heads, eight cards have a quarter of what two have.
        assert (eight - 4 * (head + norms)) * 4 == two - 4 * (head + norms)

    def test_a_stage_has_the_embedding_or_the_output(self) -> None:
        """
        The fullest stage of a model whose output head is its own: half of both. Tied, the first has the only one.
        """
        table = 1000 * 256 * 2
        plain, tied = small(), small(tie_word_embeddings=True)

        assert weigh_model(plain).embeddings == 2 * table + 512
        assert weigh_model(plain, pipeline_parallel_size=2).embeddings == table + 512
        assert weigh_model(tied).embeddings == table + 512
        assert weigh_model(tied, pipeline_parallel_size=2).embeddings == table

    def test_layers_that_do_not_divide_evenly_weigh_as_the_fullest_stage(self) -> None:
        """
        Four layers in three stages: one has two of them.
        """
        one = weigh_model(small()).layers // 4

        assert weigh_model(small(), pipeline_parallel_size=3).layers == pytest.approx(2 * one, rel=0.34)
        assert weigh_model(small(), pipeline_parallel_size=2).layers == 2 * one

    def test_tables_are_on_every_card(self) -> None:
        """
        Of 512 positions x 32 numbers x 2 bytes.
        """
        architecture = small(max_position_embeddings=512)

        assert {weigh_model(architecture, tensor_parallel_size=cards).rope for cards in (1, 2, 8)} == {512 * 32 * 2}

    def test_mxfp4_experts_are_padded_after_dividing(self) -> None:
        """
        gpt-oss on 8 cards: 2880 / 8 = 360 outputs become 384, 2880 inputs become 3072.
        """
        one, eight = (weigh_model(read_config(GPT_OSS), tensor_parallel_size=cards).layers for cards in (1, 8))

        assert eight > one / 8 * 1.04


class TestAllocator:
    """What PyTorch takes for a tensor."""

    @pytest.mark.parametrize(
        ("size", "taken"),
        [
            (1, 1), (10 * MIB - 1, 10 * MIB - 1), (10 * MIB, 10 * MIB), (11 * MIB, 12 * MIB), (12 * MIB, 12 * MIB),
            (12 * MIB + 1, 12 * MIB + 1), (13 * MIB - 1, 13 * MIB - 1), (13 * MIB, 14 * MIB), (14 * MIB - 1, 14 * MIB),
        ],
    )  # fmt: skip
    def test_large_tensors_take_whole_steps(self, size: int, taken: int) -> None:
        """
        Of 2 MiB, unless more than 1 MiB would be left over: that is split off.
        """
        assert allocated(size) == taken

    @given(st.integers(0, 2**40))
    def test_rounding_never_takes_less_nor_much_more(self, size: int) -> None:
        """
        At most 1 MiB.
        """
        assert size <= allocated(size) <= size + MIB


class TestFiles:
    """What the headers of the files correct."""

    def test_files_that_hold_what_was_counted_change_nothing(self) -> None:
        """
        Checkpoint bytes are those of the tensors alone: no tables, no padding.
        """
        architecture = small(max_position_embeddings=512)
        weights = weigh_model(architecture).total

        assert checkpoint_bytes(architecture) == weights - 512 * 32 * 2
        assert correct_weights(weights, architecture, in_files=checkpoint_bytes(architecture), cards=1) == weights

    def test_files_that_hold_more_weigh_more(self) -> None:
        """
        In proportion: a tenth more in the files is a tenth more on each card.
        """
        architecture = small()
        half = weigh_model(architecture, tensor_parallel_size=2).total
        larger = correct_weights(half, architecture, in_files=checkpoint_bytes(architecture) * 11 // 10, cards=2)

        assert larger == pytest.approx(1.1 * half, rel=1e-3)

    def test_without_an_estimate_the_files_are_divided(self) -> None:
        """
        Evenly over the cards, rounded up.
        """
        assert correct_weights(None, small(), in_files=1001, cards=4) == 251

    def test_a_copy_for_decoding_is_not_in_the_files(self) -> None:
        """
        One matrix of MLA is unfolded at load, in 16 bit: 512 inputs x (128 + 128) outputs for each head.
        """
        mla = small(model_type="deepseek_v3", kv_lora_rank=512, qk_rope_head_dim=64)

        assert weigh_model(mla).total - checkpoint_bytes(mla) == 4 * 512 * 8 * 256 * 2


ARCHITECTURES = st.builds(
    small,
    model_type=st.sampled_from(["llama", "qwen2", "qwen3", "gemma3_text", "phi", "mixtral"]),
    num_hidden_layers=st.integers(1, 8),
    hidden_size=st.sampled_from([256, 512, 4096]),
    num_key_value_heads=st.sampled_from([1, 2, 4, 8]),
    num_local_experts=st.sampled_from([None, 4]),
)


@given(ARCHITECTURES)
def test_more_cards_never_weigh_more_each(architecture: Architecture) -> None:
    """
    And together never less than one; but for what rounding adds: 1 MiB for each tensor.
    """
    one, *others = (weigh_model(architecture, tensor_parallel_size=cards).total for cards in (1, 2, 4, 8))
    slack = MIB * 8 * (architecture.layers + 3)

    for cards, each in zip((2, 4, 8), others, strict=True):
        assert each <= one + slack
        assert each * cards >= one - slack


@given(ARCHITECTURES)
def test_fewer_bits_never_weigh_more(architecture: Architecture) -> None:
    """
    4 bits, 8 bits, 16 bits, 32 bits.
    """
    sizes = [
        weigh_model(packed_as(architecture, "awq")).total,
        weigh_model(packed_as(architecture, "fp8")).total,
        weigh_model(architecture).total,
        weigh_model(replace(architecture, dtype_bytes=4)).total,
    ]

    assert sizes == sorted(sizes)


@given(ARCHITECTURES, st.sampled_from([1, 2, 4]))
def test_stages_together_hold_the_model(architecture: Architecture, stages: int) -> None:
    """
    The fullest stage is at least its share.
    """
    stage = weigh_model(architecture, pipeline_parallel_size=stages).layers

    assert stage * stages >= weigh_model(architecture).layers
