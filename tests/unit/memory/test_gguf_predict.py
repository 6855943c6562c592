"""
GGUF weights from a config and the name of a mix: as llama.cpp's quantizer made them, and what it logged.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.catalog.architecture import Architecture
from worker.catalog.hf_config import read_config
from worker.memory.gguf import GgufWeights
from worker.memory.gguf_predict import predict_gguf
from worker.memory.gguf_recipe import MIXES, find_mix

MIB = 2**20
GIB = 2**30


def config(kind: str, sizes: tuple[int, int, int, int, int, int], **more: Any) -> Architecture:
    """A config.json with what every decoder has: layers, hidden size, heads, KV heads, inner size, vocabulary."""
    layers, hidden, heads, kv_heads, inner, vocab = sizes
    return read_config({
        "model_type": kind, "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner, "vocab_size": vocab, **more,
    })  # fmt: skip


LLAMA_8B = config("llama", (32, 4096, 32, 8, 14336, 128256))
LLAMA_1B = config("llama", (16, 2048, 32, 8, 8192, 128256), head_dim=64, tie_word_embeddings=True)
CODESTRAL = config("mistral", (56, 6144, 48, 8, 16384, 32768))
R1_14B = config("qwen2", (48, 5120, 40, 8, 13824, 152064))
QWEN3_4B = config("qwen3", (36, 2560, 32, 8, 9728, 151936), head_dim=128, tie_word_embeddings=True)
QWEN35_9B = config("qwen3_5", (32, 4096, 16, 4, 12288, 248320), head_dim=256)
QWEN36_27B = config("qwen3_5", (64, 5120, 24, 4, 17408, 248320), head_dim=256, linear_num_value_heads=48)
QWEN35_35B = config(
    "qwen3_5_moe", (40, 2048, 16, 2, 512, 248320), head_dim=256, moe_intermediate_size=512, num_experts=256,
    shared_expert_intermediate_size=512, num_experts_per_tok=8,
)  # fmt: skip
GPT_OSS = config("gpt_oss", (24, 2880, 64, 8, 2880, 201088), num_local_experts=32, num_experts_per_tok=4)

# tools/quantize/README.md of llama.cpp, the table of Llama-3.1-8B: bits per weight of all 8,030,261,312.
BITS_PER_WEIGHT = {
    "IQ1_S": 2.0042, "IQ1_M": 2.1460, "IQ2_XXS": 2.3824, "IQ2_XS": 2.5882, "IQ2_S": 2.7403, "IQ2_M": 2.9294,
    "IQ3_XXS": 3.2548, "IQ3_XS": 3.4977, "IQ3_S": 3.6606, "IQ3_M": 3.7628, "Q2_K_S": 2.9697, "Q2_K": 3.1593,
    "Q3_K_S": 3.6429, "Q3_K_L": 4.2979, "Q4_K_S": 4.6672, "Q4_K_M": 4.8944, "Q5_K_S": 5.5704, "Q5_K_M": 5.7036,
    "Q6_K": 6.5633, "Q8_0": 8.5008, "F16": 16.0005,
}  # fmt: skip


def weights(architecture: Architecture, mix: str, size: int | None = None) -> GgufWeights:
    """The prediction, which must know everything."""
    model = predict_gguf(architecture, mix, weights_bytes=size)
    assert model.weights is not None, model.unknown
    return model.weights


class TestTheRecipe:
    """What llama.cpp's own quantizer makes."""

    @pytest.mark.parametrize("mix", BITS_PER_WEIGHT)
    def test_llama_8b_has_the_published_bits_per_weight(self, mix: str) -> None:
        """
        All mixes of the table to its last digit (Q3_K_M is missing there).
        """
        bits = weights(LLAMA_8B, mix).total * 8 / 8_030_261_312

        assert bits == pytest.approx(BITS_PER_WEIGHT[mix], abs=0.0001)

    def test_the_first_and_last_eighth_and_every_third_layer_between_have_more_bits(self) -> None:
        """
        Llama-3.1-8B in Q4_K_M: the others have Q4_K for values and the way down, these Q6_K.
        """
        layers = weights(LLAMA_8B, "Q4_K_M").layers

        more = {number for number, size in enumerate(layers) if size > min(layers)}
        assert more == {0, 1, 2, 3, *range(6, 28, 3), 28, 29, 30, 31}

    def test_iq4_is_taken_to_be_made_with_an_importance_matrix(self) -> None:
        """
        The table's was made without one (4.4597 bits): its first four layers have Q5_K on the way down.
        """
        more = 4 * 4096 * 14336 * (5.5 - 4.25)

        bits = weights(LLAMA_8B, "IQ4_XS").total * 8 + more

        assert bits / 8_030_261_312 == pytest.approx(4.4597, abs=0.0001)

    @pytest.mark.parametrize(
        ("architecture", "mix", "embedding", "card"),
        [
            # https://github.com/Jantoniio3/TFG/blob/a9b0dc3/ollama_logs.txt, 57 of 57 layers on the card
            (CODESTRAL, "Q4_0", 108.00, 11878.15),
            # https://github.com/Yudeg1128/Alpy/blob/80055d6/llama_server.log, none on the card; tied
            (QWEN3_4B, "Q6_K", None, 3147.42),
            # https://github.com/bgpr/armage/blob/bc073d1/llama_server.log, none on the card; tied
            (LLAMA_1B, "Q4_K - Medium", None, 762.81),
            # https://github.com/ghghang2/v1.6/blob/3f8418f/llama_server.log, 33 of 33
            (QWEN35_9B, "Q8_0", 1030.62, 8045.05),
        ],
    )
    def test_whole_models_have_the_bytes_that_were_logged(
        self, architecture: Architecture, mix: str, embedding: float | None, card: float
    ) -> None:
        """
        Within 0.1 MiB; on the card is all but the embedding, or all where that is the head too.
        """
        found = weights(architecture, mix)

        assert (sum(found.layers) + found.output) / MIB == pytest.approx(card, abs=0.1)
        if embedding is not None:
            assert found.embedding / MIB == pytest.approx(embedding, abs=0.01)

    def test_the_first_layer_has_the_bytes_that_were_logged(self) -> None:
        """
        R1-Distill-Qwen-14B, 48 of 49: 584.07 MiB are left on the host, the embedding and layer 0
        (https://github.com/apollo-mg/Project-Apollo/blob/1dab3b3/llama_server.log).
        """
        found = weights(R1_14B, "Q4_K - Medium")

        assert (found.embedding + found.layers[0]) / MIB == pytest.approx(584.07, abs=0.02)
        assert (sum(found.layers[1:]) + found.output) / MIB == pytest.approx(7981.97, abs=0.1)

    def test_rows_that_are_no_whole_number_of_blocks_get_another_type(self) -> None:
        """
        gpt-oss has rows of 2,880 elements, 256 times 11 and a quarter: Q4_K becomes Q5_0, and Q6_K Q8_0.
        """
        found = weights(GPT_OSS, "Q4_K_M")

        assert found.embedding == 201088 * 2880 // 32 * 22
        assert found.output == 201088 * 2880 // 32 * 34 + 4 * 2880

    def test_mxfp4_packs_the_experts_alone(self) -> None:
        """
        gpt-oss-20b: its experts in 4.25 bits, all else in 8.5; the file has 12.1 GB (ggml-org/gpt-oss-20b-GGUF).
        """
        assert weights(GPT_OSS, "MXFP4 MoE").total == pytest.approx(12.1e9, rel=0.005)


class TestWithTheFilesSize:
    """Embedding and head by the recipe, the layers what is left."""

    @pytest.mark.parametrize(
        ("architecture", "mix", "size", "card"),
        [
            # https://github.com/ghghang2/v1.6, logs of Q5_K_M and Q4_K_M, made by a recipe of their own
            (QWEN35_9B, "Q5_K - Medium", 6.27 * GIB, 5753.94),
            (QWEN35_9B, "Q4_K - Medium", 5.28 * GIB, 4861.28),
            # https://github.com/lota09/local_LLM_llama/blob/94b3c82/llama_server.log
            (QWEN35_35B, "IQ2_M - 2.7 bpw", 10.73 * GIB, 10783.98),
            # Unsloth's: the embedding in 8 bits where the recipe says 4, in 16 where it says 8
            (QWEN35_35B, "Q4_K - Medium", 20.7 * GIB, 20685.78),
            (QWEN36_27B, "Q8_0", 32.89 * GIB, 31253.22),
        ],
    )
    def test_what_is_left_for_the_card_was_logged(
        self, architecture: Architecture, mix: str, size: float, card: float
    ) -> None:
        """
        Within 0.1 %, which is what the logs' two decimals of a GiB are worth.
        """
        found = weights(architecture, mix, int(size))

        assert (sum(found.layers) + found.output) / MIB == pytest.approx(card, rel=0.001)

    def test_another_recipe_is_called_a_guess(self) -> None:
        """
        The file's size says so, and nobody else.
        """
        assert any(
            "a guess" in text for text in predict_gguf(QWEN36_27B, "Q8_0", weights_bytes=int(32.89 * GIB)).assumed
        )
        assert not predict_gguf(QWEN36_27B, "Q8_0").assumed

    def test_a_size_near_the_recipe_s_changes_nothing_but_the_layers(self) -> None:
        """
        Two hundredths more, and the embedding is in 4 bits as before.
        """
        plain = weights(CODESTRAL, "Q4_0")
        found = weights(CODESTRAL, "Q4_0", int(plain.total * 1.02))

        assert (found.embedding, found.output) == (plain.embedding, plain.output)
        assert sum(found.layers) == pytest.approx(sum(plain.layers) + 0.02 * plain.total, rel=1e-6)

    def test_a_config_without_the_mlp_is_enough_when_the_size_is_known(self) -> None:
        """
        The layers share what embedding and head leave.
        """
        poor = config("llama", (32, 4096, 32, 8, 0, 128256))

        assert predict_gguf(poor, "Q4_K_M").unknown == ("intermediate_size",)
        assert weights(poor, "Q4_K_M", int(4.58 * GIB)).total == pytest.approx(4.58 * GIB, abs=32)


@pytest.mark.parametrize(
    ("name", "mix"),
    [
        ("Q4_K - Medium", "Q4_K_M"), ("Q4_K - Small", "Q4_K_S"), ("Q3_K - Large", "Q3_K_L"), ("Q2_K - Medium", "Q2_K"),
        ("IQ4_XS - 4.25 bpw", "IQ4_XS"), ("IQ3_S mix - 3.66 bpw", "IQ3_M"), ("all F32", "F32"),
        ("MXFP4 MoE", "MXFP4_MOE"),
        ("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("UD-Q4_K_XL", "Q4_K_M"), ("Q6_K_L", "Q6_K"), ("UD-Q8_K_XL", "Q8_0"),
        ("bf16", "BF16"), ("model.Q5_K_S.gguf", "Q5_K_S"), ("TQ1_0 - 1.69 bpw ternary", "TQ1_0"),
        ("awq", None), ("", None), ("Q9_K", None), ("fp8", None),
    ],
)  # fmt: skip
def test_a_mix_is_found_by_any_of_its_names(name: str, mix: str | None) -> None:
    """
    As llama.cpp prints it, as files are named; what is no mix is none.
    """
    assert find_mix(name) == mix


def test_what_is_unknown_is_named() -> None:
    """
    No such mix, nothing known of the model: no weights, and the reason.
    """
    assert predict_gguf(LLAMA_8B, "awq").unknown == ("the GGUF quantization awq",)
    nothing = predict_gguf(read_config({}), "Q4_K_M")
    assert nothing.weights is None
    assert {"hidden_size", "vocab_size"} <= set(nothing.unknown)


@settings(deadline=1000)
@example(mix="TQ1_0", layers=1, hidden=64, inner=1, vocab=1966, tied=False, size=267_499)
@given(
    mix=st.sampled_from(sorted(MIXES)), layers=st.integers(1, 90), hidden=st.integers(1, 64).map(lambda n: n * 32),
    inner=st.integers(1, 9000), vocab=st.integers(1, 5000), tied=st.booleans(), size=st.none() | st.integers(0, 10**12),
)  # fmt: skip
def test_every_piece_of_every_model_has_bytes(
    *, mix: str, layers: int, hidden: int, inner: int, vocab: int, tied: bool, size: int | None
) -> None:
    """
    Any shape and any mix; the pieces together are what was said to be there.
    """
    model = config("llama", (layers, hidden, 1, 1, inner, vocab), tie_word_embeddings=tied)
    found = weights(model, mix, size)

    assert len(found.layers) == layers
    assert min(found.embedding, found.output, *found.layers, found.largest_tensor) >= 0
    assert found.head_shared == (found.embedding if tied else 0)
    if size is not None and size > weights(model, mix).total:
        assert size - layers <= found.total <= size
