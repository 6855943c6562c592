"""
What each small world is offered: no machine gets more than it has room for, and every refusal says why.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from common.errors import BadSetting, DoesNotFit, EngineMissing, ModelMissing
from tests.factories import GIB, make_gpu, make_machine, make_spec
from worker.catalog.catalogue import Catalogue
from worker.catalog.spec import EngineKind
from worker.catalog.toml_file import load_catalogue
from worker.hardware.gpu import Machine
from worker.selection.choose import Choice, choose_models
from worker.selection.describe import describe_choice
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement

BOTH: dict[EngineKind, str | None] = {EngineKind.VLLM: None, EngineKind.LLAMACPP: None}
SHIPPED = load_catalogue()
CARDS: list[tuple[float, ...]] = [(), (6,), (8,), (12,), (24,), (48,), (80,), (141,), (24, 24), (24, 8), (80, 80)]
RAM = [2, 4, 16, 64]
MACHINES = [make_machine(*cards, ram_gib=ram) for cards in CARDS for ram in RAM]
OVERRIDES = [
    Overrides(),
    Overrides(max_model_len=4096),
    Overrides(max_model_len=131072),
    Overrides(gpu_memory_utilization=0.8),
    Overrides(tensor_parallel_size=2),
    Overrides(quantization="fp8"),
    Overrides(max_num_seqs=256, llamacpp_parallel=1),
    Overrides(n_gpu_layers=10),
    Overrides(n_gpu_layers=-1),
    Overrides(n_gpu_layers=0),
]


def choose(machine: Machine, overrides: Overrides | None = None, catalogue: Catalogue = SHIPPED) -> Choice:
    return choose_models(machine, catalogue, engines=BOTH, overrides=overrides)


def ids(choice: Choice) -> set[str]:
    return {placement.model_id for placement in choice.placements}


def only(choice: Choice) -> Placement:
    (placement,) = choice.placements
    return placement


# --- What always holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("machine", MACHINES)
def test_no_placement_is_larger_than_its_place(machine: Machine, overrides: Overrides) -> None:
    """
    On every card it uses, and in RAM where it uses none, there is more free than the placement takes.
    """
    for placement in choose(machine, overrides).placements:
        assert placement.memory.total <= min(
            (machine.gpus[index].free_bytes or 0 for index in placement.gpus), default=machine.ram_available_bytes
        )
        assert placement.memory.host <= machine.ram_available_bytes
        assert placement.kv_cache_bytes == placement.memory.kv_cache
        assert placement.kv_cache_bytes > 0 or placement.n_gpu_layers > 0  # else no layer that keeps any is on the card


@pytest.mark.parametrize("overrides", OVERRIDES)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_model_is_served_or_left_out_with_a_reason(machine: Machine, overrides: Overrides) -> None:
    """
    No model of the catalogue is forgotten, none is told twice, and the lines for people name each.
    """
    choice = choose(machine, overrides)
    left = [left.model_id for left in choice.left_out]

    assert sorted([*ids(choice), *left]) == sorted(SHIPPED.ids)
    assert all(left.reason for left in choice.left_out)
    assert len(describe_choice(choice)) == 1 + len(SHIPPED)


@pytest.mark.parametrize("machine", MACHINES)
def test_one_model_of_each_tier_is_for_the_router(machine: Machine) -> None:
    """
    And it is trusted with at least as much as the others of its tier; what starts is one of these. One more of a
    tier may embed.
    """
    choice = choose(machine)
    chatting = [placement for placement in choice.placements if "chat" in placement.spec.capabilities]
    for tier in {placement.spec.tier for placement in chatting}:
        peers = [placement for placement in chatting if placement.spec.tier == tier]
        (offered,) = (placement for placement in peers if placement.auto)
        assert offered.spec.complexity_up_to == max(peer.spec.complexity_up_to for peer in peers)

    assert choice.starting is None or (choice.starting.auto and choice.starting in choice.placements)


@pytest.mark.parametrize("ram", RAM)
def test_a_larger_card_never_serves_fewer_models(ram: float) -> None:
    """
    From 2 to 200 GiB, whatever one card serves the next larger one serves too, with as long a context.
    """
    for smaller, larger in pairwise(choose(make_machine(gib, ram_gib=ram)) for gib in range(2, 200)):
        for placement in smaller.placements:
            found = larger.placement(placement.model_id)
            assert found is not None
            assert found.max_model_len >= placement.max_model_len or placement.n_gpu_layers >= 0


@pytest.mark.parametrize("machine", MACHINES)
def test_several_cards_only_where_one_is_too_small(machine: Machine) -> None:
    """
    Whatever is spread over cards is refused on the largest of them alone.
    """
    for placement in choose(machine).placements:
        if len(placement.gpus) > 1:
            largest = max(machine.gpus, key=lambda gpu: gpu.total_bytes)
            assert placement.model_id not in ids(choose(replace(machine, gpus=(replace(largest, index=0),))))


# --- Some worlds by name -------------------------------------------------------------------------------


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


# --- Several models on one card -------------------------------------------------------------------------

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


# --- The tiers that users know --------------------------------------------------------------------------


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


# --- The operator's word -------------------------------------------------------------------------------


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


# --- What is not there ---------------------------------------------------------------------------------


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
