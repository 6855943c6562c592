"""
Questions as they are asked, and answers that say what they rest on.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.memory.case import Answer, Case, Files, judge_vllm, read_case
from worker.memory.constants import GIB

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
}  # fmt: skip


def judge(files: Files | None = None, **facts: Any) -> Answer:
    return judge_vllm(Case(**{"config": LLAMA_8B, **facts}), files=files)


class TestReading:
    """A line of a batch."""

    @pytest.mark.parametrize(
        ("data", "why"),
        [
            ({"max_model_len": -1}, "max_model_len: Input should be greater than 0 (it is '-1')"),
            ({"tensor_parallel_size": 10**400}, "tensor_parallel_size:"),
            ({"gpu_memory_gib": math.nan}, "gpu_memory_gib:"),
            ({"gpu_memory_gib": math.inf}, "gpu_memory_gib:"),
            ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization:"),
            ({"kv_pool_gib": 0}, "kv_pool_gib:"),
            ({"config": [1, 2]}, "config:"),
            ({"config": "{}"}, "config:"),
            ({"engine": "triton"}, "engine:"),
        ],
    )
    def test_a_case_that_means_nothing_says_which_key(self, data: dict[str, Any], why: str) -> None:
        """
        A reason, not an exception.
        """
        case, found, _ = read_case(data)

        assert case is None
        assert found.startswith(why)
        assert len(found) < 200

    def test_keys_that_mean_nothing_are_named(self) -> None:
        """
        And ignored; null is as if the key were not there.
        """
        case, why, unknown = read_case({"colour": 1, "max_model_len": None, "model": "x"})

        assert case == Case(model="x")
        assert (why, unknown) == ("", ("colour",))


class TestArithmetic:
    """From a card to requests."""

    def test_the_pool_is_what_everything_else_leaves(self) -> None:
        """
        The reason shows the sum.
        """
        answer = judge(gpu_memory_gib=24, gpu_memory_utilization=0.9, max_model_len=8192)
        terms = answer.weights_bytes, answer.activation_bytes, answer.cuda_graph_bytes, answer.non_torch_bytes

        assert all(term is not None for term in terms)
        assert answer.kv_pool_bytes == int(24 * GIB * 0.9) - sum(term or 0 for term in terms)
        assert answer.reason.startswith("24.00 GiB x 0.9 - 14.99 GiB weights - ")

    def test_a_measured_pool_is_taken_as_it_is(self) -> None:
        """
        1 GiB holds 8,192 tokens of 131,072 bytes; the card's size does not matter.
        """
        answer = judge(kv_pool_gib=1, max_model_len=4096, gpu_memory_gib=24, vllm_version="0.19.0")

        assert (answer.kv_pool_bytes, answer.kv_tokens, answer.max_concurrency) == (GIB, 8192, 2.0)
        assert answer.sources["kv_pool"] == "as measured"

    @pytest.mark.parametrize(("gib", "fits"), [(16, False), (18, False), (24, True)])
    def test_a_model_fits_where_one_request_does(self, gib: float, *, fits: bool) -> None:
        """
        15 GiB of weights, 1 GiB for 8,192 tokens, and what vLLM computes in.
        """
        answer = judge(gpu_memory_gib=gib, max_model_len=8192, max_num_seqs=16)

        assert answer.fits is fits
        assert (answer.max_concurrency or 0) >= 1 if fits else (answer.max_concurrency or 0) < 1

    def test_a_card_too_small_for_the_weights_has_no_pool(self) -> None:
        """
        Nothing is negative but the sum in the reason.
        """
        answer = judge(gpu_memory_gib=8)

        assert (answer.kv_pool_bytes, answer.kv_tokens, answer.max_concurrency, answer.fits) == (0, 0, 0.0, False)
        assert "leaves -" in answer.reason

    def test_the_name_of_the_card_is_enough(self) -> None:
        """
        Where its memory is not given.
        """
        named, given_too = judge(gpu="NVIDIA H100"), judge(gpu="NVIDIA H100", gpu_memory_gib=79.19)

        assert named.kv_pool_bytes == given_too.kv_pool_bytes
        assert (named.sources["card"], given_too.sources["card"]) == ("its name", "as given")

    def test_the_files_correct_the_weights(self) -> None:
        """
        The config says how they are divided, the headers how many bytes there are.
        """
        halves = judge(tensor_parallel_size=2)
        measured = judge(files=Files(weights_bytes=int(16.06e9)), tensor_parallel_size=2)

        assert measured.weights_bytes == pytest.approx(halves.weights_bytes, rel=1e-3)
        assert measured.sources["weights"] == "the files' headers"

    def test_tokens_of_windows_are_counted_as_the_version_counts_them(self) -> None:
        """
        Up to 0.19 blocks are shared out to the groups, from 0.20 on tokens are requests x length (vllm#51041).
        """
        gemma = {**LLAMA_8B, "model_type": "gemma2", "sliding_window": 1024}
        old, new = (
            judge(config=gemma, kv_pool_gib=8, max_model_len=65536, vllm_version=version)
            for version in ("0.19.0", "0.22.0")
        )

        assert old.max_concurrency == new.max_concurrency
        assert new.kv_tokens == int((new.max_concurrency or 0) * 65536)
        assert (old.kv_tokens or 0) < (new.kv_tokens or 0)


class TestUnknown:
    """What nobody can tell is null, and the reason says why."""

    @pytest.mark.parametrize(
        ("facts", "nulls", "why"),
        [
            ({"config": {}}, ("weights_bytes", "kv_tokens", "fits", "activation_bytes"), "unknown: num_hidden_layers"),
            ({"config": None}, ("weights_bytes", "kv_bytes_per_token"), "unknown: num_hidden_layers"),
            (
                {"config": {**LLAMA_8B, "model_type": "frobnicator"}},
                ("weights_bytes", "kv_bytes_per_token", "kv_pool_bytes"),
                "unknown: the architecture frobnicator is not known here",
            ),
            (
                {"config": {**LLAMA_8B, "hidden_size": -1}},
                ("weights_bytes", "kv_tokens"),
                "unknown: hidden_size=-1 makes no sense",
            ),
            (
                {"config": {}, "model": "Mystery-7B", "gpu_memory_gib": 24},
                ("kv_bytes_per_token", "kv_pool_bytes", "kv_tokens", "activation_bytes", "cuda_graph_bytes", "fits"),
                "what its layers keep is unknown: num_hidden_layers",
            ),
            ({"dtype": "float12"}, ("weights_bytes", "kv_tokens"), "unknown: dtype float12"),
            (
                {"kv_cache_dtype": "q8_0", "gpu_memory_gib": 24},
                ("kv_bytes_per_token", "kv_tokens", "fits"),
                "what its layers keep is unknown: kv_cache_dtype q8_0",
            ),
            ({}, ("kv_pool_bytes", "kv_tokens", "fits"), "the card's memory is not known: give gpu_memory_gib"),
            ({"gpu": "some card"}, ("kv_pool_bytes",), "the card's memory is not known"),
        ],
    )
    def test_half_the_facts_are_no_answer(self, facts: dict[str, Any], nulls: tuple[str, ...], why: str) -> None:
        """
        Not even where the rest could be computed.
        """
        answer = judge(**facts)

        assert {name: getattr(answer, name) for name in nulls} == dict.fromkeys(nulls)
        assert answer.reason.startswith(why)

    def test_a_guess_is_marked_as_one(self) -> None:
        """
        In the reason and in the source of the weights.
        """
        answer = judge(config={}, model="Mystery-7B")

        assert answer.weights_bytes == pytest.approx(14e9, rel=1e-3)
        assert answer.sources["weights"] == "a guess: 7 billion parameters, from the name"
        assert "assumed: a guess: 7 billion parameters, from the name, a length of 8192 tokens" in answer.reason


NUMBERS = st.none() | st.integers(1, 2**20)
CASES = st.builds(
    Case,
    model=st.none() | st.sampled_from(["Qwen3-8B-AWQ", "Mixtral-8x7B", "x"]),
    config=st.none()
    | st.dictionaries(
        st.sampled_from(sorted(LLAMA_8B)), st.none() | st.integers(-1, 200_000) | st.text(max_size=3), max_size=8
    ).map(lambda changes: {**LLAMA_8B, **changes}),
    vllm_version=st.none() | st.sampled_from(["0.7.2", "0.19.0", "nightly"]),
    quantization=st.none() | st.sampled_from(["awq", "fp8", "zipper", "compressed-tensors"]),
    dtype=st.none() | st.sampled_from(["auto", "bfloat16", "float32", "float12"]),
    kv_cache_dtype=st.none() | st.sampled_from(["auto", "fp8", "q8_0"]),
    tensor_parallel_size=st.none() | st.integers(1, 64),
    pipeline_parallel_size=st.none() | st.integers(1, 64),
    max_model_len=NUMBERS,
    max_num_seqs=NUMBERS,
    max_num_batched_tokens=NUMBERS,
    gpu=st.none() | st.text(max_size=8) | st.sampled_from(["H100", "24 GB"]),
    gpu_memory_gib=st.none() | st.floats(0.01, 2**20),
    gpu_memory_utilization=st.none() | st.floats(0.01, 1),
    kv_pool_gib=st.none() | st.floats(0.0001, 2**20),
)


@settings(deadline=None)
@given(CASES)
def test_every_case_has_an_answer(case: Case) -> None:
    """
    Numbers are not negative, nulls have a reason, and JSON can hold it.
    """
    answer = judge_vllm(case)
    numbers = [value for value in answer.model_dump().values() if isinstance(value, int | float)]

    assert all(number >= 0 and math.isfinite(number) for number in numbers)
    assert answer.reason
    assert Answer.model_validate_json(answer.model_dump_json()) == answer
    if answer.weights_bytes is None and case.kv_pool_gib is None:
        assert answer.kv_pool_bytes is None


@settings(deadline=None)
@given(st.integers(8, 200), st.integers(8, 200))
def test_a_larger_card_never_holds_less(one: int, other: int) -> None:
    """
    Tokens and requests grow with the card; both cards have the defaults of small ones.
    """
    small, large = (
        judge(gpu="A100", gpu_memory_gib=gib, max_model_len=4096).kv_tokens or 0 for gib in sorted((one, other))
    )

    assert small <= large
