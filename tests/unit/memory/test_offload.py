"""
Layers on the card by a budget: never over it, never fewer than fit, and more for more memory.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.catalog.architecture import KeysAndValues
from worker.memory.estimate import Unknown
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf import GgufModel, GgufWeights
from worker.memory.offload import TooLarge, offload_layers

MIB = 2**20
OPTIONS = LlamaCppOptions(max_model_len=1024)


def model(layers: tuple[int, ...], *, embedding: int = 300, output: int = 200, **facts: Any) -> GgufModel:
    """A model of layers of so many MiB, each with 4 MiB of cache."""
    usual: dict[str, Any] = {
        "kind": "llama", "hidden_size": 64, "vocab_size": 1000, "heads": 8, "query_width": 64, "feed_forward": 128,
        "weights": GgufWeights(
            embedding=embedding * MIB, layers=tuple(size * MIB for size in layers), output=output * MIB,
            largest_tensor=max(layers) * MIB // 2,
        ),
        "caches": ((KeysAndValues(kv_heads=8, head_dim=128, v_head_dim=128),),) * len(layers),
    }  # fmt: skip
    return GgufModel(**{**usual, **facts})


def estimate(model: GgufModel, n_gpu_layers: int | None) -> LlamaCppEstimate:
    """The estimate of a known model."""
    found = estimate_llamacpp(model, OPTIONS, n_gpu_layers=n_gpu_layers)
    assert isinstance(found, LlamaCppEstimate)
    return found


# Even layers, a first layer smaller than what is copied for the others, one layer; a host that is short, or not.
MODELS = [model((100,) * 6), model((10, 300, 300, 300)), model((500,)), model((50, 60, 70, 80), output=0)]
WORLDS = list(product(MODELS, range(0, 2400, 60), (None, 350, 700, 1000)))


@pytest.mark.parametrize("model", MODELS)
def test_the_most_layers_that_fit_are_found(model: GgufModel) -> None:
    """
    Beside every number of layers: the answer fits, and none that is larger does.
    """
    for known, card, host in WORLDS:
        if known is not model:
            continue
        fitting = [n for n in range(1, model.layers + 2) if estimate(model, n).card <= card * MIB]
        best = max(fitting, default=None)
        host_bytes = None if host is None else host * MIB

        found = offload_layers(model, OPTIONS, card_bytes=card * MIB, host_bytes=host_bytes)

        if host_bytes is not None and estimate(model, best).host > host_bytes:
            assert isinstance(found, TooLarge)
            assert all(estimate(model, n).host > host_bytes for n in (None, *fitting))
        else:
            assert found == estimate(model, best)


@settings(deadline=1000)
@given(
    layers=st.lists(st.integers(1, 400), min_size=1, max_size=80),
    card=st.integers(0, 40_000),
    more=st.integers(0, 9000),
)
def test_more_memory_never_means_fewer_layers(layers: list[int], card: int, more: int) -> None:
    """
    Monotone in the card's budget, and never over it.
    """
    some = model(tuple(layers))
    small = offload_layers(some, OPTIONS, card_bytes=card * MIB)
    large = offload_layers(some, OPTIONS, card_bytes=(card + more) * MIB)

    assert isinstance(small, LlamaCppEstimate)
    assert isinstance(large, LlamaCppEstimate)
    assert (small.n_gpu_layers or 0) <= (large.n_gpu_layers or 0)
    assert small.card <= card * MIB
    assert large.card <= (card + more) * MIB


def test_a_card_without_room_for_a_layer_is_not_used() -> None:
    """
    Not even its context is paid for.
    """
    found = offload_layers(model((100,) * 4), OPTIONS, card_bytes=0)

    assert isinstance(found, LlamaCppEstimate)
    assert (found.n_gpu_layers, found.card) == (None, 0)


def test_a_refusal_names_the_largest_term() -> None:
    """
    1,200 MiB of weights and 28 of cache for a host of 1 GiB, without a card.
    """
    found = offload_layers(model((100,) * 7), OPTIONS, card_bytes=0, host_bytes=1024 * MIB)

    assert isinstance(found, TooLarge)
    assert found.term == "weights_host"
    assert found.reason == (
        "needs 1.21 GiB of RAM, where 1.00 GiB are left, with no layers in 0.00 GiB of the card; "
        "the largest term is weights_host, 1.17 GiB"
    )


def test_nothing_is_decided_about_what_is_unknown() -> None:
    """
    The missing fact comes back.
    """
    unknown = model((1,), unknown=("block_count",))

    assert offload_layers(unknown, OPTIONS, card_bytes=MIB) == Unknown(missing=("block_count",))
