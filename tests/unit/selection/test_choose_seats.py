"""
Several models that share one card: those that are ready together fit together.
"""

from __future__ import annotations

import pytest

from tests.choices import SHIPPED
from tests.factories import GIB, make_machine
from worker.catalog.spec import EngineKind
from worker.selection.choose import Choice, choose_models
from worker.selection.overrides import Overrides

LLAMACPP_ALONE: dict[EngineKind, str | None] = {EngineKind.VLLM: "not installed", EngineKind.LLAMACPP: None}


def seated(gib: float, *, residents: int = 2, slots: int = 2) -> Choice:
    overrides = Overrides(residents=residents, llamacpp_parallel=slots)
    return choose_models(make_machine(gib, ram_gib=32), SHIPPED, engines=LLAMACPP_ALONE, overrides=overrides)


@pytest.mark.parametrize("gib", [4, 5, 6, 8, 10, 12, 16, 24])
@pytest.mark.parametrize("residents", [2, 3])
def test_models_that_are_ready_together_fit_together(gib: float, residents: int) -> None:
    """
    The model that starts and those named with it take no more than the card and the host have.
    """
    choice = seated(gib, residents=residents)
    together = [p for p in choice.placements if p.model_id in choice.reason.partition("together with")[2]]
    together += [choice.starting] if choice.starting else []

    assert sum(placement.memory.total for placement in together) <= gib * GIB
    assert sum(placement.memory.host for placement in together) <= 32 * GIB


def test_a_small_model_wholly_and_a_larger_one_with_the_layers_that_still_fit() -> None:
    """
    The planned case of a 6 GiB card: 4B wholly on it, 8B beside it with some layers in RAM, ready at once.
    """
    choice = seated(6)
    small, large = choice.placement("qwen3-4b-instruct-gguf"), choice.placement("qwen3-8b-gguf")

    assert choice.starting == small
    assert small is not None
    assert large is not None
    assert (small.n_gpu_layers, small.gpus, large.gpus) == (-1, (0,), (0,))
    assert 0 < large.n_gpu_layers < 36
    assert "together with qwen3-8b-gguf" in choice.reason


def test_one_resident_at_a_time_gets_the_whole_card() -> None:
    """
    Without room for a second model nothing is planned together.
    """
    alone, together = seated(6, residents=1).placement("qwen3-8b-gguf"), seated(6).placement("qwen3-8b-gguf")

    assert alone is not None
    assert together is not None
    assert alone.n_gpu_layers > together.n_gpu_layers
