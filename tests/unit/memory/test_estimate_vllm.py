"""
Everything that vLLM takes on a card beside the weights, against start-up logs and against itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.catalog.hf_config import read_config
from worker.memory.constants import GIB
from worker.memory.estimate_vllm import VllmEstimate, VllmLoad, estimate_vllm

LLAMA_8B = read_config(
    {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }
)  # fmt: skip
QWEN_32B = read_config(
    {
        "model_type": "qwen3", "hidden_size": 5120, "num_hidden_layers": 64, "num_attention_heads": 64, "head_dim": 128,
        "num_key_value_heads": 8, "intermediate_size": 25600, "vocab_size": 151936, "max_position_embeddings": 40960,
    }
)  # fmt: skip
GEMMA_2_27B = read_config(
    {
        "model_type": "gemma2", "hidden_size": 4608, "num_hidden_layers": 46, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 128, "intermediate_size": 36864, "vocab_size": 256000,
        "max_position_embeddings": 8192, "sliding_window": 4096,
    }
)  # fmt: skip
LOAD = VllmLoad(max_model_len=8192, max_num_seqs=1024, max_num_batched_tokens=8192, large_card=True, version="0.19.0")
CARD = int(79.19 * GIB)


def load(**changes: Any) -> VllmLoad:
    return replace(LOAD, **changes)


def pool(estimate: VllmEstimate, share: float, card: int = CARD) -> int:
    assert estimate.weights is not None
    return int(card * share) - estimate.weights.total - estimate.reserved


# https://github.com/llm-d-incubation/llm-d-planner (0.19.0), https://github.com/llm-d/llm-d-benchmark (0.11.0):
# model, settings, share of an H100, and the logged peak of activation, non-torch memory and pool, in GiB.
LOGGED = {
    "Llama-3.1-8B": (LLAMA_8B, LOAD, 0.95, 1.89, 0.25, 58.11),
    "Llama-3.1-8B tp2": (LLAMA_8B, load(tensor_parallel_size=2), 0.95, 1.89, 2.07, 63.76),
    "Llama-3.1-8B tp4": (LLAMA_8B, load(tensor_parallel_size=4), 0.95, 1.89, 2.13, 67.44),
    "Gemma-2-27b": (GEMMA_2_27B, LOAD, 0.95, 3.66, 0.26, 20.59),
    "Llama-3.1-8B, before 0.17": (LLAMA_8B, load(version="0.11.0"), 0.9, 4.76, 0.13, 51.38),
    "Qwen3-32B, before 0.17": (QWEN_32B, load(version="0.11.0"), 0.9, 5.64, 0.14, 4.45),
    "Qwen3-32B tp2, before 0.17": (QWEN_32B, load(version="0.11.0", tensor_parallel_size=2), 0.9, 5.64, 0.54, 34.49),
}


@pytest.mark.parametrize("row", LOGGED)
def test_each_term_is_what_vllm_logged(row: str) -> None:
    """
    Activation within 0.15 GiB, non-torch memory within 0.1, the pool within 0.3.
    """
    architecture, settings, share, activation, non_torch, logged = LOGGED[row]
    estimate = estimate_vllm(architecture, settings)

    assert estimate.activation / GIB == pytest.approx(activation, abs=0.15)
    assert estimate.non_torch / GIB == pytest.approx(non_torch, abs=0.1)
    assert pool(estimate, share) / GIB == pytest.approx(logged, abs=0.3)


class TestActivation:
    """The larger of two peaks."""

    def test_the_sampler_costs_a_row_of_logits_for_each_sequence(self) -> None:
        """
        256 sequences more are 256 rows x 128,256 logits x 14.4 bytes.
        """
        few, many = (estimate_vllm(LLAMA_8B, load(max_num_seqs=rows)).activation for rows in (768, 1024))

        assert many - few == pytest.approx(256 * 128256 * 14.4, rel=0.001)

    def test_few_sequences_leave_the_forward_pass(self) -> None:
        """
        Then the batch decides: 8 times the tokens are 8 times the bytes.
        """
        short, long = (
            estimate_vllm(LLAMA_8B, load(max_num_seqs=1, max_num_batched_tokens=tokens)).activation
            for tokens in (8192, 65536)
        )

        assert long == 8 * short

    def test_an_embedder_has_no_logits(self) -> None:
        """
        A model that generates nothing samples nothing.
        """
        embedder = replace(LLAMA_8B, generates=False)

        assert estimate_vllm(embedder, LOAD).activation < estimate_vllm(LLAMA_8B, LOAD).activation

    def test_a_model_that_sees_is_profiled_with_images(self) -> None:
        """
        0.2 GiB for 8,192 tokens of them.
        """
        more = (
            estimate_vllm(replace(LLAMA_8B, multimodal=True), LOAD).activation
            - estimate_vllm(LLAMA_8B, LOAD).activation
        )

        assert more / GIB == pytest.approx(0.2, abs=0.01)


class TestVersions:
    """What changed from one version of vLLM to the next."""

    @pytest.mark.parametrize(
        ("version", "in_budget"), [("0.11.0", False), ("0.19.0", False), ("0.22.0", True), (None, True)]
    )
    def test_newer_versions_leave_room_for_graphs(self, version: str | None, *, in_budget: bool) -> None:
        """
        Older ones capture them outside their budget.
        """
        estimate = estimate_vllm(LLAMA_8B, load(version=version))
        bare = estimate.activation + estimate.non_torch

        assert estimate.reserved == bare + (estimate.cuda_graphs if in_budget else 0)

    def test_eager_models_have_no_graphs(self) -> None:
        """
        And fewer sequences capture fewer sizes.
        """
        graphs = [estimate_vllm(LLAMA_8B, load(max_num_seqs=rows)).cuda_graphs for rows in (1, 32, 256)]

        assert estimate_vllm(LLAMA_8B, load(enforce_eager=True)).cuda_graphs == 0
        assert 0 < graphs[0] < graphs[1] < graphs[2]


class TestTypes:
    """The types of weights and cache."""

    @pytest.mark.parametrize(
        ("dtype", "kv_cache_dtype", "per_token"),
        [
            (None, "auto", 131072), ("bfloat16", "auto", 131072), ("torch.float16", "auto", 131072),
            ("float32", "auto", 262144), ("float32", "bfloat16", 131072), (None, "fp8", 65536),
            (None, "fp8_e5m2", 65536), (None, "nvfp4", 32768),
        ],
    )  # fmt: skip
    def test_the_cache_is_in_its_type_or_the_weights(
        self, dtype: str | None, kv_cache_dtype: str, per_token: int
    ) -> None:
        """
        65,536 numbers for each token.
        """
        assert estimate_vllm(LLAMA_8B, load(dtype=dtype, kv_cache_dtype=kv_cache_dtype)).kv_per_token == per_token

    def test_a_checkpoint_may_bring_an_fp8_cache(self) -> None:
        """
        "auto" then means 8 bit; any other word is obeyed.
        """
        assert LLAMA_8B.quantization is None
        nvfp4 = read_config({}, quantization="nvfp4").quantization
        packed = replace(LLAMA_8B, quantization=nvfp4)

        assert estimate_vllm(packed, LOAD).kv_per_token == 65536
        assert estimate_vllm(packed, load(kv_cache_dtype="bfloat16")).kv_per_token == 131072

    def test_a_type_that_nobody_knows_is_unknown(self) -> None:
        """
        Neither 16 bit nor an error: the term is None, and named.
        """
        weights = estimate_vllm(LLAMA_8B, load(dtype="float12"))
        cache = estimate_vllm(LLAMA_8B, load(kv_cache_dtype="q8_0"))

        assert (weights.weights, weights.cache, weights.unknown) == (None, None, ("dtype float12",))
        assert (cache.cache, cache.kv_per_token, cache.unknown) == (None, None, ("kv_cache_dtype q8_0",))
        assert cache.weights is not None


LOADS = st.builds(
    VllmLoad,
    max_model_len=st.integers(16, 2**20),
    max_num_seqs=st.integers(1, 1024),
    max_num_batched_tokens=st.integers(1, 65536),
    tensor_parallel_size=st.sampled_from([1, 2, 4, 8]),
    pipeline_parallel_size=st.sampled_from([1, 2, 4]),
    kv_cache_dtype=st.sampled_from(["auto", "fp8"]),
    enforce_eager=st.booleans(),
    version=st.sampled_from([None, "0.7.2", "0.11.0", "0.17.0", "0.19.0", "0.22.0"]),
    large_card=st.booleans(),
)
MODELS = st.sampled_from([LLAMA_8B, QWEN_32B, GEMMA_2_27B])


@given(MODELS, LOADS)
def test_no_term_is_negative(architecture: Any, settings: VllmLoad) -> None:
    """
    Whatever the settings.
    """
    estimate = estimate_vllm(architecture, settings)

    assert min(estimate.activation, estimate.cuda_graphs, estimate.non_torch, estimate.cuda_context) >= 0
    assert estimate.weights is not None
    assert estimate.weights.total > 0
    assert estimate.reserved <= estimate.activation + estimate.cuda_graphs + estimate.non_torch


@given(MODELS, LOADS)
def test_asking_for_more_never_takes_less(architecture: Any, settings: VllmLoad) -> None:
    """
    More sequences, larger batches.
    """
    twice = replace(
        settings,
        max_num_seqs=2 * settings.max_num_seqs,
        max_num_batched_tokens=2 * settings.max_num_batched_tokens,
    )

    assert estimate_vllm(architecture, twice).reserved >= estimate_vllm(architecture, settings).reserved


@given(MODELS, LOADS, st.integers(0, 2**38))
def test_an_fp8_cache_holds_at_least_as_much(architecture: Any, settings: VllmLoad, size: int) -> None:
    """
    Of the same pool.
    """
    plain = estimate_vllm(architecture, replace(settings, kv_cache_dtype="auto")).cache
    packed = estimate_vllm(architecture, replace(settings, kv_cache_dtype="fp8")).cache

    assert plain is not None
    assert packed is not None
    assert packed.concurrency(size) >= plain.concurrency(size)
