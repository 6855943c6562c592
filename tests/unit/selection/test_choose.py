"""
What some machines are offered, by name, and why the rest is left out.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import EngineMissing, ModelMissing
from tests.choices import BOTH, SHIPPED, choose, ids, only
from tests.factories import GIB, make_gpu, make_machine, make_spec
from worker.catalog.catalogue import Catalogue
from worker.catalog.spec import EngineKind
from worker.selection.choose import choose_models
from worker.selection.overrides import Overrides


def test_70b_awq_is_refused_on_24_gib_with_the_arithmetic() -> None:
    """
    Its weights alone are 37 GiB; the refusal shows every term, the sum, and what there is.
    """
    (left,) = (left for left in choose(make_machine(24)).left_out if left.model_id == "llama-3.1-70b-awq")

    # 0.7 KV = (2048 + 128) x 320 KiB, for one block is never used
    # 1.8 overhead = 0.4 forward + 0.25 non-torch + 0.5 context + 0.6 graphs
    assert left.reason == (
        "needs 37.1 GiB weights + 0.7 GiB KV at 2048 tokens + 1.8 GiB overhead = 39.5 GiB on one card; "
        "the largest has 23.5 GiB to spare"
    )


def test_70b_awq_is_chosen_on_48_gib() -> None:
    """
    There it fits on one card, is the strongest, and starts.
    """
    starting = choose(make_machine(48)).starting

    assert starting is not None
    assert (starting.model_id, starting.gpus) == ("llama-3.1-70b-awq", (0,))


def test_two_equal_cards_carry_what_one_cannot() -> None:
    """
    A 14B model in 16 bit is split over 2x24 GiB, and not over 24 + 8.
    """
    split = choose(make_machine(24, 24)).placement("qwen3-14b")

    assert split is not None
    assert (split.gpus, split.tensor_parallel_size) == ((0, 1), 2)
    assert "qwen3-14b" not in ids(choose(make_machine(24, 8)))


def test_the_card_with_the_most_free_memory_is_taken() -> None:
    """
    The larger card is busy with something else, so the smaller one has more to give.
    """
    busy = make_gpu(48, index=0, free_gib=10)
    machine = replace(make_machine(), gpus=(busy, make_gpu(24, index=1)))
    placement = choose(machine).placement("qwen3-8b")

    assert placement is not None
    assert placement.gpus == (1,)


def test_a_card_too_small_for_all_layers_takes_some() -> None:
    """
    7B on 6 GiB is a planned case: most layers on the card, the others in RAM.
    """
    placement = choose(make_machine(6)).placement("qwen2.5-7b")

    assert placement is not None
    assert placement.gpus == (0,)
    assert 20 <= placement.n_gpu_layers <= 28  # 29 is all of them, with the output


def test_the_host_must_have_room_for_the_other_layers() -> None:
    """
    The same card beside too little RAM: the layers that the card cannot take have nowhere to go.
    """
    assert "qwen2.5-7b" in ids(choose(make_machine(2, ram_gib=16)))
    assert "qwen2.5-7b" not in ids(choose(make_machine(2, ram_gib=4)))


@pytest.mark.parametrize(("heads", "kv_heads", "count"), [(32, 8, 4), (32, 2, 4), (30, 6, None), (6, 6, None)])
def test_cards_must_divide_the_heads_and_be_a_power_of_two(heads: int, kv_heads: int, count: int | None) -> None:
    """
    48 GiB of weights on 24 GiB cards need three of them or more: four if that divides the heads, never three. KV heads
    are copied where there are more cards than of them.
    """
    config = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    spec = make_spec("wide", engine=EngineKind.VLLM, loaded_bytes=48 * GIB, config=config)
    placement = choose(make_machine(24, 24, 24, 24), catalogue=Catalogue(models=(spec,))).placement("wide")

    assert (placement.tensor_parallel_size if placement else None) == count


def test_three_cards_are_used_as_two() -> None:
    """
    The third of three equal cards stays free: three does not split layers evenly.
    """
    config = {"num_attention_heads": 6, "num_key_value_heads": 6}
    large, larger = (make_spec("wide", engine=EngineKind.VLLM, loaded_bytes=n * GIB, config=config) for n in (40, 48))
    machine = make_machine(24, 24, 24)

    assert only(choose(machine, catalogue=Catalogue(models=(large,)))).gpus == (0, 1)
    assert choose(machine, catalogue=Catalogue(models=(larger,))).placements == ()


def test_a_cpu_gets_a_small_pool() -> None:
    """
    On the CPU vLLM allocates its pool at every start, a second for 256 MiB: 1 GiB is enough.
    """
    short = Overrides(model="qwen3-4b-instruct", max_model_len=2048)

    assert only(choose(make_machine(ram_gib=64), short)).kv_cache_bytes == GIB


def test_a_model_that_has_the_card_to_itself_leaves_nothing_idle() -> None:
    """
    Its KV pool takes all the room; where models share the card it takes what its jobs at once need.
    """
    alone = only(choose(make_machine(80), Overrides(model="qwen3-4b-instruct", max_model_len=2048)))
    sharing = only(choose(make_machine(80), Overrides(model="qwen3-4b-instruct", max_model_len=2048, residents=2)))

    assert alone.memory.total == 80 * GIB - int(0.02 * 80 * GIB)
    assert sharing.kv_cache_bytes == 64 * 2048 * 147456  # 2 x 36 x 8 x 128 x 2 bytes


def test_a_cpu_machine_starts_small_and_a_gpu_machine_strong() -> None:
    """
    On a CPU the smallest model is ready and answers soonest; on cards nothing speaks against the strongest.
    """
    cpu = choose(make_machine(ram_gib=16)).starting
    strongest = [choose(make_machine(gib)).starting for gib in (6, 12, 24, 48)]

    assert cpu is not None
    assert cpu.model_id == "qwen2.5-0.5b"
    assert [placement.spec.tier for placement in strongest if placement] == [3, 5, 6, 6]


def test_a_model_with_layers_in_ram_is_served_but_does_not_start() -> None:
    """
    6 GiB take a part of a 14B; a smaller model that is wholly on the card answers several times faster.
    """
    choice = choose(make_machine(6))
    partly, starting = choice.placement("qwen3-14b-gguf"), choice.starting

    assert partly is not None
    assert starting is not None
    assert 0 < partly.n_gpu_layers < 41
    assert partly.spec.tier > starting.spec.tier
    assert starting.n_gpu_layers == -1


def test_vllm_on_the_cpu_waits_to_be_asked() -> None:
    """
    Left out by itself; placed in RAM if VLLM_MODEL names it, or if its files are local.
    """
    machine = make_machine(ram_gib=32)
    local = make_spec("local", engine=EngineKind.VLLM, repo=None, path=Path("local"))

    assert "qwen3-4b-instruct" not in ids(choose(machine))
    assert only(choose(machine, Overrides(model="qwen3-4b-instruct"))).gpus == ()
    assert only(choose(machine, catalogue=Catalogue(models=(local,)))).gpu_memory_utilization is None


def test_nothing_fits_into_nothing() -> None:
    """
    A machine without memory to spare serves nothing, and says so instead of raising.
    """
    choice = choose(make_machine(ram_gib=1))

    assert choice.placements == ()
    assert choice.starting is None
    assert "no model" in choice.reason


def test_a_stub_needs_nothing() -> None:
    """
    With only the stand-in for an engine every model is served, whatever the machine.
    """
    catalogue = Catalogue(models=tuple(replace(spec, engine=EngineKind.STUB) for spec in SHIPPED))
    choice = choose_models(make_machine(ram_gib=1), catalogue, engines={EngineKind.STUB: None})

    assert ids(choice) == set(SHIPPED.ids)


@pytest.mark.parametrize(
    ("gib", "length"),
    [(4, None), (6, None), (7.5, 2048), (8, 4096), (10, 16384), (12, 32768)],
)
def test_8b_awq_takes_the_length_that_its_card_holds(gib: float, length: int | None) -> None:
    """
    The usual table gives 8B-AWQ 4096 tokens on 6 GB, where its 5.4 GiB of weights leave no room for vLLM itself; and
    8192 on 10 GB, where there is room for more (docs/decisions/0007-tiers-are-computed.md).
    """
    placement = choose(make_machine(gib)).placement("llama-3.1-8b-awq")

    assert (placement.max_model_len if placement else None) == length


def test_an_engine_that_is_not_there_leaves_its_models_out() -> None:
    """
    With the engine's own reason; a model named by the operator is an error with that reason.
    """
    engines = {EngineKind.VLLM: "vLLM is not installed", EngineKind.LLAMACPP: None}
    choice = choose_models(make_machine(24), SHIPPED, engines=engines)

    assert all(placement.spec.engine is EngineKind.LLAMACPP for placement in choice.placements)
    assert {left.reason for left in choice.left_out} == {"vLLM is not installed"}
    with pytest.raises(EngineMissing, match="vLLM is not installed"):
        choose_models(make_machine(24), SHIPPED, engines=engines, overrides=Overrides(model="qwen3-8b"))


def test_files_that_are_not_there_leave_their_model_out() -> None:
    """
    With the reason; a model named by the operator is an error with that reason.
    """
    missing = {"qwen3-8b": "there is nothing at models/x"}
    choice = choose_models(make_machine(24), SHIPPED, engines=BOTH, missing=missing)

    assert "qwen3-8b" not in ids(choice)
    with pytest.raises(ModelMissing, match="there is nothing at models/x"):
        choose_models(make_machine(24), SHIPPED, engines=BOTH, missing=missing, overrides=Overrides(model="qwen3-8b"))
