"""
The operator's word: it is obeyed, or refused with the arithmetic.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import BadSetting, DoesNotFit, ModelMissing
from tests.choices import choose, ids, only
from tests.factories import GIB, make_gpu, make_machine, make_spec
from worker.catalog.spec import EngineKind
from worker.selection.overrides import Overrides


@pytest.mark.parametrize("name", ["qwen3-8b", "Qwen/Qwen3-8B", "QWEN3-8B"])
def test_a_named_model_is_the_only_one(name: str) -> None:
    """
    By id, repository or another letter case: it is served alone, and starts.
    """
    choice = choose(make_machine(24), Overrides(model=name))

    assert ids(choice) == {"qwen3-8b"}
    assert choice.starting == only(choice)


def test_a_named_model_that_cannot_fit_is_refused_with_the_arithmetic() -> None:
    """
    The error shows the sum, and says what to do.
    """
    with pytest.raises(DoesNotFit, match=r"37\.1 GiB weights .* = 39\.5 GiB on one card.* VLLM_FORCE=true"):
        choose(make_machine(24), Overrides(model="llama-3.1-70b-awq"))


def test_force_places_it_all_the_same() -> None:
    """
    It gets everything there is, the engine divides it, and the reason keeps the arithmetic.
    """
    choice = choose(make_machine(24), Overrides(model="llama-3.1-70b-awq", force=True, max_model_len=512))
    placement = only(choice)

    assert (placement.max_model_len, placement.kv_cache_bytes, placement.gpus) == (512, 0, (0,))
    assert placement.memory.total < 24 * GIB
    assert "37.1 GiB weights" in choice.reason


def test_unknown_facts_are_refused_unless_forced() -> None:
    """
    Nobody can tell whether it fits; the error names the missing fact.
    """
    spec = make_spec("mystery", engine=EngineKind.VLLM, config={"num_hidden_layers": None})

    with pytest.raises(DoesNotFit, match="num_hidden_layers unknown"):
        choose(make_machine(24), Overrides(model=spec))
    assert only(choose(make_machine(24), Overrides(model=spec, force=True))).model_id == "mystery"


def test_an_unknown_name_is_no_model() -> None:
    """
    The error lists what is known.
    """
    with pytest.raises(ModelMissing, match=r"known are qwen2\.5-0\.5b"):
        choose(make_machine(24), Overrides(model="nope"))


def test_only_the_listed_models_are_served() -> None:
    """
    The others are left out by name; a list that names none of the catalogue is a mistake.
    """
    choice = choose(make_machine(24), Overrides(only=("qwen2.5-0.5b", "qwen3-8b")))

    assert ids(choice) == {"qwen2.5-0.5b", "qwen3-8b"}
    with pytest.raises(BadSetting, match="MODELS_ONLY names nope"):
        choose(make_machine(24), Overrides(only=("nope",)))


def test_a_length_is_obeyed_or_refused() -> None:
    """
    Exactly so many tokens; more than the model was made for is refused.
    """
    assert only(choose(make_machine(24), Overrides(model="qwen3-8b", max_model_len=5000))).max_model_len == 5000
    with pytest.raises(DoesNotFit, match="VLLM_MAX_MODEL_LEN=50000 is more than the 40960 tokens"):
        choose(make_machine(24), Overrides(model="qwen3-8b", max_model_len=50000))


def test_a_share_of_the_card_is_obeyed_or_refused() -> None:
    """
    0.9 of 24 GiB is divided to the last byte; a share that is not free is refused before vLLM does it.
    """
    placement = only(choose(make_machine(24), Overrides(model="qwen3-8b", gpu_memory_utilization=0.9)))

    assert placement.gpu_memory_utilization == 0.9
    assert placement.memory.total == int(0.9 * 24 * GIB)
    machine = replace(make_machine(), gpus=(make_gpu(24, free_gib=20),))
    with pytest.raises(DoesNotFit, match=r"asks for 21\.6 GiB of card 0, which has 20\.0 GiB free"):
        choose(machine, Overrides(model="qwen3-8b", gpu_memory_utilization=0.9))


@pytest.mark.parametrize(("cards", "size"), [((24, 8), 2), ((24,), 2), ((24, 24, 24), 3)])
def test_cards_that_do_not_match_are_refused(cards: tuple[float, ...], size: int) -> None:
    """
    Unequal cards, too few, or a number that does not divide the KV heads.
    """
    with pytest.raises(DoesNotFit, match=f"VLLM_TENSOR_PARALLEL_SIZE={size} needs as many equal cards"):
        choose(make_machine(*cards), Overrides(model="qwen3-8b", tensor_parallel_size=size))


def test_a_number_of_cards_is_obeyed() -> None:
    """
    Two cards although one would do.
    """
    assert only(choose(make_machine(80, 80), Overrides(model="qwen3-8b", tensor_parallel_size=2))).gpus == (0, 1)


@pytest.mark.parametrize(("layers", "gpus"), [(-1, (0,)), (10, (0,)), (0, ())])
def test_a_number_of_layers_is_obeyed(layers: int, gpus: tuple[int, ...]) -> None:
    """
    All, some, or none of them on the card.
    """
    placement = only(choose(make_machine(24), Overrides(model="qwen2.5-7b", n_gpu_layers=layers)))

    assert (placement.n_gpu_layers, placement.gpus) == (layers, gpus)
    assert placement.max_model_len == 16384  # all there is room for, as without the setting


def test_all_layers_or_nothing_is_refused_where_they_do_not_fit() -> None:
    """
    -1 asked for by the operator is not quietly made less.
    """
    with pytest.raises(DoesNotFit, match=r"4\.\d GiB weights"):
        choose(make_machine(4), Overrides(model="qwen2.5-7b", n_gpu_layers=-1))


def test_quantising_while_loading_makes_room() -> None:
    """
    A 14B in 16 bit does not fit on 24 GiB; as fp8 it does, and AWQ files beside it stay AWQ.
    """
    choice = choose(make_machine(24), Overrides(quantization="fp8"))
    fp8, awq = choice.placement("qwen3-14b"), choice.placement("qwen2.5-14b-awq")

    assert fp8 is not None
    assert awq is not None
    assert (fp8.quantization, awq.quantization) == ("fp8", "awq")
