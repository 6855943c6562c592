"""
What a load teaches: measured figures in the place of computed ones, wherever they can be believed.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from itertools import product

import pytest

from worker.memory.estimate import MemoryEstimate
from worker.memory.learn import doubts, find_measured, learned
from worker.memory.measured import LoadKey, Measured, Measurement, engine_name

GIB = 2**30
ESTIMATE = MemoryEstimate(
    weights=8 * GIB, kv_cache=4 * GIB, activation=GIB, cuda_graphs=GIB // 2, non_torch=GIB // 4, cuda_context=GIB // 4
)
KEY = LoadKey(
    model_id="big", quantization=None, engine="vllm 0.32.0", device="Card", max_model_len=32768, max_num_seqs=64,
    max_num_batched_tokens=2048,
)  # fmt: skip


def measurement(key: LoadKey, *, day: int = 1, **figures: int) -> Measurement:
    return Measurement(
        key=key, predicted=ESTIMATE, measured=Measured(**figures), at=datetime(2026, 11, day, tzinfo=UTC)
    )


def known(*found: Measurement) -> dict[LoadKey, Measurement]:
    return {one.key: one for one in found}


# --- Finding ---------------------------------------------------------------------------------------------


def test_the_same_load_counts_with_all_its_figures() -> None:
    """Also if another length was measured later."""
    same = measurement(KEY, weights=7, kv_pool=6, kv_tokens=5, activation=4, cuda_graphs=3, non_torch=2, total=1)
    later = measurement(replace(KEY, max_model_len=2048), day=2, weights=70)

    assert find_measured(known(same, later), KEY) == same.measured


def test_of_another_length_all_counts_that_does_not_depend_on_it() -> None:
    """Neither the pool's tokens nor the total; of several the newest."""
    figures = {
        "weights": 7,
        "kv_pool": 6,
        "kv_tokens": 5,
        "activation": 4,
        "cuda_graphs": 3,
        "non_torch": 2,
        "total": 1,
    }
    old = measurement(replace(KEY, max_model_len=4096), day=1, weights=70)
    new = measurement(replace(KEY, max_model_len=2048), day=2, **figures)

    assert find_measured(known(old, new), KEY) == Measured(weights=7, activation=4, cuda_graphs=3, non_torch=2)


@pytest.mark.parametrize("change", [{"max_num_seqs": 32}, {"kv_cache_dtype": "fp8"}, {"max_num_batched_tokens": 8192}])
def test_of_another_size_of_batch_only_the_weights_count(change: dict[str, object]) -> None:
    """Activation and graphs grow with it: those of a smaller plan would be too low for the full one."""
    other = measurement(replace(KEY, **change), weights=7, activation=4, cuda_graphs=3, non_torch=2, total=1)  # type: ignore[arg-type]

    assert find_measured(known(other), KEY) == Measured(weights=7, non_torch=2)


@pytest.mark.parametrize(
    "change",
    [
        {"model_id": "small"}, {"quantization": "fp8"}, {"engine": "vllm 0.33.0"}, {"device": "cpu"},
        {"tensor_parallel_size": 2}, {"n_gpu_layers": 12},
    ],
)  # fmt: skip
def test_another_model_program_or_card_says_nothing(change: dict[str, object]) -> None:
    """Its weights lie differently."""
    assert find_measured(known(measurement(replace(KEY, **change), weights=7)), KEY) is None  # type: ignore[arg-type]


def test_an_engine_of_unknown_version_has_a_name_of_its_own() -> None:
    """Two that nobody knows are not told apart, but neither is taken for a known one."""
    assert engine_name("llamacpp", None) != engine_name("llamacpp", "1")


# --- Learning --------------------------------------------------------------------------------------------


def test_without_a_measurement_the_estimate_stays() -> None:
    """Whether nobody loaded it yet or the engine said nothing."""
    assert learned(ESTIMATE, None, on_card=True) == ESTIMATE
    assert learned(ESTIMATE, Measured(), on_card=True, kv_tokens=100) == ESTIMATE


@pytest.mark.parametrize("term", ["weights", "activation", "cuda_graphs", "non_torch"])
def test_on_a_card_each_measured_term_takes_the_place_of_its_estimate(term: str) -> None:
    """Up or down."""
    for size in (5 * GIB, 9 * GIB):
        found = learned(ESTIMATE, Measured(**{term: size}), on_card=True)
        assert found == replace(ESTIMATE, **{term: size})


def test_a_request_takes_as_many_bytes_as_its_tokens_took() -> None:
    """4 GiB held 65,536 tokens: a request of 32,768 takes 2; a pool whose size is decided stays."""
    measured = Measured(kv_pool=4 * GIB, kv_tokens=65536)

    assert learned(ESTIMATE, measured, on_card=True, kv_tokens=32768).kv_cache == 2 * GIB
    assert learned(ESTIMATE, measured, on_card=False, kv_tokens=32768).kv_cache == 2 * GIB
    assert learned(ESTIMATE, measured, on_card=True).kv_cache == ESTIMATE.kv_cache


@pytest.mark.parametrize("on_card", [True, False])
@pytest.mark.parametrize("total", [GIB, 13 * GIB, 14 * GIB, 15 * GIB, 20 * GIB])
def test_a_total_raises_an_estimate_and_never_lowers_it(total: int, on_card: bool) -> None:  # noqa: FBT001
    """On a host untouched pages are not counted yet, and on a card the largest batch may not have come yet."""
    found = learned(ESTIMATE, Measured(total=total), on_card=on_card)

    assert found.total == max(total, ESTIMATE.total)
    assert (found.weights, found.kv_cache) == (ESTIMATE.weights, ESTIMATE.kv_cache)


def test_a_total_is_compared_with_the_pool_that_it_was_measured_with() -> None:
    """A load with a pool of 10 GiB took 21: 11 beside it, so an estimate for one request of 1 GiB must come to 12."""
    one_request = replace(ESTIMATE, kv_cache=GIB)
    measured = Measured(kv_pool=10 * GIB, total=21 * GIB)

    assert learned(one_request, measured, on_card=True).total == 12 * GIB


def test_on_a_host_no_term_is_believed() -> None:
    """Mapped weights that nobody has read yet count nowhere."""
    measured = Measured(weights=6 * GIB, activation=0, total=5 * GIB)

    assert learned(ESTIMATE, measured, on_card=False) == ESTIMATE


@pytest.mark.parametrize(
    ("measured", "says"),
    [
        (Measured(weights=3 * GIB), "weights of 3,221,225,472 bytes were read, 0.38 times the 8,589,934,592 computed"),
        (Measured(weights=17 * GIB), "2.12 times"),
        (Measured(weights=0), "0.00 times"),
        (Measured(total=40 * GIB), "42,949,672,960 bytes were counted in all"),
    ],
)
def test_an_absurd_figure_is_not_believed_and_that_is_said(measured: Measured, says: str) -> None:
    """A line that was misread must not make a model load where it cannot, or never load again."""
    assert learned(ESTIMATE, measured, on_card=True) == ESTIMATE
    (doubt,) = doubts(ESTIMATE, measured)
    assert says in doubt


def test_what_is_plausible_is_not_doubted() -> None:
    """Half to twice the weights, up to twice the total; and nothing is absurd beside an estimate of nothing."""
    shares = (Measured(weights=size * GIB, total=total * GIB) for size, total in product((4, 8, 16), (1, 14, 28)))

    assert [doubts(ESTIMATE, measured) for measured in shares] == [()] * 9
    assert doubts(MemoryEstimate(weights=0, kv_cache=0), Measured(weights=1)) == ()


def test_the_error_says_how_far_the_prediction_was_off() -> None:
    """14 GiB were predicted: for 16 measured that is an eighth too little; unknown is no error of nothing."""
    assert measurement(KEY, total=16 * GIB).error == pytest.approx(-0.125)
    assert measurement(KEY).error is None
