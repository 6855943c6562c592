"""
The estimate against what engines logged, and against itself.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.factories import GIB, make_spec
from worker.catalog.spec import EngineKind, ModelSpec
from worker.memory.estimate import MemoryEstimate, Unknown, estimate_memory, kv_bytes_per_token, longest_that_fits

# layers, KV heads, head size, vocabulary, bytes of the 16-bit files (parameters x 2)
LLAMA_8B = (32, 8, 128, 128256, 2 * 8_030_261_248)
QWEN2_7B = (28, 4, 128, 152064, 2 * 7_615_616_512)
QWEN3_8B = (36, 8, 128, 151936, 2 * 8_190_735_360)
QWEN2_72B = (80, 8, 128, 152064, 2 * 72_706_203_648)
H100_SEQS = 1024  # vLLM's default there


def model(facts: tuple[int, int, int, int, int], engine: EngineKind = EngineKind.VLLM) -> ModelSpec:
    names = ("layers", "kv_heads", "head_dim", "vocab_size", "weights_bytes")
    known: dict[str, Any] = dict(zip(names, facts, strict=True))
    return make_spec(engine=engine, max_model_len=131072, **known)


def estimate(spec: ModelSpec, length: int = 8192, seqs: int = H100_SEQS, cards: int = 1) -> MemoryEstimate:
    found = estimate_memory(spec, max_model_len=length, max_num_seqs=seqs, tensor_parallel_size=cards)
    assert isinstance(found, MemoryEstimate)
    return found


# Logged by vLLM 0.19.0 on H100 80GB, 16 bit, 8192 batched tokens: GiB of weights, of activation + non-torch +
# captured graphs, of the KV pool, and the tokens in that pool.
LOGGED = [
    (LLAMA_8B, 1, 14.99, 1.89 + 0.25 + 0.91, 58.11, 476_000),
    (LLAMA_8B, 2, 7.51, 1.89 + 2.07 + 0.76, 63.76, 1_044_688),
    (LLAMA_8B, 4, 3.77, 1.89 + 2.13 + 0.67, 67.44, 2_209_792),
    (QWEN2_7B, 1, 14.25, 2.21 + 0.24 + 0.86, 58.53, 1_096_000),
    (QWEN2_72B, 2, 67.8, 2.29 + 2.09 + 1.61, 3.04, 19_920),
]


@pytest.mark.parametrize(("facts", "cards", "weights", "overhead", "pool", "tokens"), LOGGED)
def test_the_terms_agree_with_what_vllm_logged(
    *, facts: tuple[int, int, int, int, int], cards: int, weights: float, overhead: float, pool: float, tokens: int
) -> None:
    """
    Weights within 1 %, KV bytes per token within 0.2 % (pools are whole blocks), overhead within 0.35 GiB.
    """
    spec = model(facts)
    found = estimate(spec, cards=cards)

    assert found.weights / GIB == pytest.approx(weights, rel=0.01)
    assert found.overhead / GIB == pytest.approx(overhead, abs=0.35)
    assert (kv_bytes_per_token(spec) or 0) / cards == pytest.approx(pool * GIB / tokens, rel=0.002)


def test_fp8_on_the_fly_is_never_below_what_was_measured() -> None:
    """
    Llama-3.1-8B took 8.49 GiB that way; files that are quantised already are not made smaller again.
    """
    spec = model(LLAMA_8B)
    fp8 = estimate_memory(spec, max_model_len=1, max_num_seqs=1, quantization="fp8")
    files = estimate_memory(replace(spec, quantization="awq"), max_model_len=1, max_num_seqs=1, quantization="fp8")

    assert isinstance(fp8, MemoryEstimate)
    assert isinstance(files, MemoryEstimate)
    assert 8.49 < fp8.weights / GIB < 9.1
    assert files.weights == spec.weights_bytes


# Logged by llama.cpp with one slot: Codestral-22B 896 MiB and Qwen3-8B 576 MiB at 4096 tokens, Llama-3.1-70B
# 8192 + 2048 MiB (card and host together) at 32768.
@pytest.mark.parametrize(
    ("facts", "length", "kv_mib"),
    [((56, 8, 128, 32768, 12_573_000_000), 4096, 896), (QWEN3_8B, 4096, 576), ((80, 8, 128, 128256, 1), 32768, 10240)],
)
def test_llama_cpp_sets_the_context_aside_for_every_slot(
    facts: tuple[int, int, int, int, int], length: int, kv_mib: int
) -> None:
    """
    One slot takes what llama.cpp logged; eight slots take eight times that.
    """
    spec = model(facts, EngineKind.LLAMACPP)

    assert estimate(spec, length, 1).kv_cache == kv_mib * 2**20
    assert estimate(spec, length, 8).kv_cache == 8 * kv_mib * 2**20


@pytest.mark.parametrize("fact", ["weights_bytes", "layers", "kv_heads", "head_dim", "vocab_size"])
def test_an_unknown_fact_is_named_and_nothing_invented(fact: str) -> None:
    """
    One missing fact, no estimate, neither forwards nor backwards.
    """
    unknown: dict[str, Any] = {fact: None}
    spec = replace(model(LLAMA_8B), **unknown)

    assert estimate_memory(spec, max_model_len=1, max_num_seqs=1) == Unknown(missing=(fact,))
    assert longest_that_fits(spec, GIB, max_num_seqs=1) == Unknown(missing=(fact,))


ENGINES = st.sampled_from([EngineKind.VLLM, EngineKind.LLAMACPP])


@given(
    engine=ENGINES,
    budget=st.integers(0, 200 * GIB),
    seqs=st.integers(1, 256),
    cards=st.sampled_from([1, 2, 4]),
    on_card=st.booleans(),
)
def test_the_longest_fits_and_one_token_more_does_not(
    *, engine: EngineKind, budget: int, seqs: int, cards: int, on_card: bool
) -> None:
    """
    The inverse is exact: within the budget at that length, above it at the next, unless the model ends there.
    """
    spec = model(QWEN3_8B, engine)
    shape: dict[str, Any] = {"max_num_seqs": seqs, "tensor_parallel_size": cards, "on_card": on_card}
    longest = longest_that_fits(spec, budget, **shape)
    assert isinstance(longest, int)

    def total(length: int) -> int:
        found = estimate_memory(spec, max_model_len=length, **shape)
        assert isinstance(found, MemoryEstimate)
        return found.total

    assert longest == 0 or total(longest) <= budget
    assert longest == spec.max_model_len or total(longest + 1) > budget


def test_layers_on_the_card_add_up_one_by_one() -> None:
    """
    Each layer more takes more of the card, and all of them what the whole model takes.
    """
    spec = model(QWEN2_7B, EngineKind.LLAMACPP)
    totals = []
    for layers in range(1, 30):
        part = estimate_memory(spec, max_model_len=2048, max_num_seqs=8, gpu_layers=layers)
        assert isinstance(part, MemoryEstimate)
        totals.append(part.total)
        # 28 layers and the output layer, each taken for a 29th of the weights.
        assert layers > 27 or part.weights == pytest.approx((spec.weights_bytes or 0) * layers / 29, abs=1)

    assert totals == sorted(totals)
    assert totals[-1] == estimate(spec, 2048, 8).total
