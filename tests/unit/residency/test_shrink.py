"""
The smaller plans, on every small world: each engine, each size of card, of pool and of context, each lack of memory.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Machine
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.estimate_vllm import VllmLoad, estimate_vllm
from worker.residency.check import check_memory
from worker.residency.shrink import MOST_PLANS, shrink, what_changed
from worker.selection.fit_llamacpp import fit_llamacpp, gguf_model
from worker.selection.fit_vllm import SHORTEST, fit_vllm
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, Refusal, host_place, to_spare

VLLM = make_spec("vllm", engine=EngineKind.VLLM)
LLAMACPP = make_spec("llamacpp")
ADA, AMPERE = (8, 9), (8, 6)


def machine_of(gib: float, *, free: float = 1.0, capability: tuple[int, int] = ADA, cards: int = 1) -> Machine:
    """Equal cards with a share of *free* memory; 0 GiB: a host of 16 GiB."""
    if not gib:
        return make_machine(ram_gib=16, ram_available_gib=16 * free)
    gpus = tuple(
        make_gpu(gib, index=index, free_gib=gib * free, compute_capability=capability) for index in range(cards)
    )
    return replace(make_machine(ram_gib=64), source="stub", gpus=gpus)


def placed(spec: ModelSpec, machine: Machine, overrides: Overrides) -> Placement | Refusal:
    """The full plan, on all cards of *machine*."""
    gpus = machine.gpus
    place = Place(gpus=gpus, budget=min(map(to_spare, gpus), default=host_place(machine).budget))
    return (fit_vllm if spec.engine is EngineKind.VLLM else fit_llamacpp)(spec, overrides, place)


WORLDS = [
    pytest.param(spec, gib, free, overrides, capability, id=f"{spec.id}-{gib}-{free}-{number}-{capability}")
    for spec, gib, free, (number, overrides), capability in product(
        (VLLM, LLAMACPP),
        (0, 4, 6, 24),
        (0.2, 0.4, 0.9, 1.0),
        enumerate(
            (
                Overrides(),
                Overrides(max_num_seqs=1, llamacpp_parallel=1),
                Overrides(max_model_len=SHORTEST, residents=2),
                Overrides(max_model_len=SHORTEST, max_num_seqs=1, llamacpp_parallel=1, residents=2),
            )
        ),
        (ADA, AMPERE),
    )
]


@pytest.mark.parametrize(("spec", "gib", "free", "overrides", "capability"), WORLDS)
def test_every_plan_is_smaller_than_the_one_before_and_gives_nothing_back(
    spec: ModelSpec, gib: float, free: float, overrides: Overrides, capability: tuple[int, int]
) -> None:
    """In total; no term that it gave up grows again; and what it says of itself is what it changed."""
    full = placed(spec, machine_of(gib, capability=capability), overrides)
    assert isinstance(full, Placement)
    plans = shrink(full, machine_of(gib, free=free, capability=capability))

    assert len(plans) <= MOST_PLANS
    for before, after in zip((full, *plans), plans, strict=False):
        assert after.memory.total < before.memory.total
        assert SHORTEST <= after.max_model_len <= before.max_model_len
        assert 1 <= after.max_num_seqs <= before.max_num_seqs
        assert before.kv_cache_dtype in (None, after.kv_cache_dtype)
        assert after.kv_cache_bytes == after.memory.kv_cache
        assert (after.spec, after.gpus, after.auto) == (before.spec, before.gpus, before.auto)
        assert what_changed(full, after)
        if spec is VLLM and full.gpu_memory_utilization is not None:
            assert after.gpu_memory_utilization is not None
            assert before.gpu_memory_utilization is not None
            assert 0 < after.gpu_memory_utilization < before.gpu_memory_utilization
            assert after.kv_cache_dtype is None or capability >= ADA


@pytest.mark.parametrize(("spec", "gib", "free", "overrides", "capability"), WORLDS)
def test_every_plan_can_be_loaded_by_its_engine(
    spec: ModelSpec, gib: float, free: float, overrides: Overrides, capability: tuple[int, int]
) -> None:
    """In vLLM the pool holds one request of the full length; llama.cpp takes what its own estimate says."""
    full = placed(spec, machine_of(gib, capability=capability), overrides)
    assert isinstance(full, Placement)
    for plan in shrink(full, machine_of(gib, free=free, capability=capability)):
        if spec is VLLM:
            assert plan.kv_cache_bytes >= one_request(plan)
        else:
            estimate = llamacpp_estimate(plan)
            assert plan.memory.total == (estimate.card if plan.gpus else estimate.host)


@pytest.mark.parametrize(
    ("spec", "gib", "free", "overrides", "capability"), [world for world in WORLDS if world.values[0] is LLAMACPP]
)
def test_a_plan_that_could_have_kept_more_did(
    spec: ModelSpec, gib: float, free: float, overrides: Overrides, capability: tuple[int, int]
) -> None:
    """The next longer context would not have fitted, or would not have been smaller (in vLLM the pool decides)."""
    machine = machine_of(gib, free=free, capability=capability)
    full = placed(spec, machine_of(gib, capability=capability), overrides)
    assert isinstance(full, Placement)
    before = full
    budget = min(map(to_spare, machine.gpus), default=host_place(machine).budget)
    for plan in shrink(full, machine):
        longer = replace(plan, max_model_len=2 * plan.max_model_len)
        if longer.max_model_len < before.max_model_len:
            estimate = llamacpp_estimate(longer)
            taken = estimate.card if plan.gpus else estimate.host
            assert taken > budget or taken >= before.memory.total or plan.n_gpu_layers != before.n_gpu_layers
        before = plan


def one_request(plan: Placement) -> int:
    """Bytes that vLLM needs for one request of the plan's length."""
    assert plan.spec.architecture is not None
    assert plan.max_num_batched_tokens is not None
    load = VllmLoad(
        max_model_len=plan.max_model_len, max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens, kv_cache_dtype=plan.kv_cache_dtype or "auto",
    )  # fmt: skip
    cache = estimate_vllm(plan.spec.architecture, load).cache
    assert cache is not None
    return cache.request_bytes


def llamacpp_estimate(plan: Placement) -> LlamaCppEstimate:
    """What llama.cpp takes for the plan."""
    model, kept_as = gguf_model(plan.spec), plan.kv_cache_dtype or "F16"
    options = LlamaCppOptions(
        max_model_len=plan.max_model_len, slots=plan.max_num_seqs, key_type=kept_as, value_type=kept_as
    )
    layers = (model.layers + 1 if plan.n_gpu_layers < 0 else plan.n_gpu_layers) if plan.gpus else None
    estimate = estimate_llamacpp(model, options, n_gpu_layers=layers)
    assert isinstance(estimate, LlamaCppEstimate)
    return estimate


def test_the_order_of_least_harm_in_vllm() -> None:
    """First fewer at once, then the cache in 8 bits, then a shorter context: here on a card where all would fit."""
    machine = machine_of(24)
    full = placed(VLLM, machine, Overrides())
    assert isinstance(full, Placement)

    fewer, fp8, shorter = shrink(full, machine)

    assert (fewer.max_num_seqs, fewer.kv_cache_dtype, fewer.max_model_len) == (32, None, 32768)
    assert fewer.kv_cache_bytes == full.kv_cache_bytes // 2
    assert (fp8.max_num_seqs, fp8.kv_cache_dtype, fp8.max_model_len) == (32, "fp8", 32768)
    assert (shorter.max_num_seqs, shorter.kv_cache_dtype, shorter.max_model_len) == (32, "fp8", 16384)


def test_what_is_lacking_is_all_that_is_given_up() -> None:
    """Another program took 3 of 24 GiB: the pool gets smaller by them, and by no more."""
    full = placed(VLLM, machine_of(24), Overrides())
    assert isinstance(full, Placement)
    now = machine_of(24, free=21 / 24)

    first = shrink(full, now)[0]

    assert check_memory(now, full)
    assert first.memory.total == to_spare(now.gpus[0])
    assert first.max_model_len == full.max_model_len


def test_the_order_of_least_harm_in_llamacpp() -> None:
    """Slots, then the cache in 8 bits with a shorter context, and at last fewer layers on the card."""
    machine = machine_of(24)
    full = placed(LLAMACPP, machine, Overrides())
    assert isinstance(full, Placement)

    fewer, shorter, layers = shrink(full, machine)

    assert (fewer.max_num_seqs, fewer.kv_cache_dtype, fewer.n_gpu_layers) == (4, None, -1)
    assert (shorter.kv_cache_dtype, shorter.max_model_len, shorter.n_gpu_layers) == ("q8_0", 8192, -1)
    assert 0 < layers.n_gpu_layers <= 24
    assert layers.memory.host > shorter.memory.host


def test_layers_go_to_the_host_only_where_it_has_room() -> None:
    """A full host is no place for what the card cannot hold."""
    full = placed(LLAMACPP, machine_of(24), Overrides())
    assert isinstance(full, Placement)

    plans = shrink(full, replace(machine_of(24), ram_available_bytes=GIB))

    assert {plan.n_gpu_layers for plan in plans} == {-1}


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(make_placement(spec=make_spec("stub", engine=EngineKind.STUB), gpus=(0,)), id="a stub"),
        pytest.param(make_placement(spec=VLLM, gpus=(0,), kv_cache_bytes=0), id="forced"),
        pytest.param(make_placement(spec=VLLM, gpus=(7,)), id="its card is gone"),
        pytest.param(make_placement(spec=replace(VLLM, architecture=None), gpus=(0,)), id="nothing is known of it"),
        pytest.param(make_placement(spec=replace(LLAMACPP, architecture=None)), id="nothing is known of its layers"),
    ],
)
def test_what_cannot_be_estimated_cannot_shrink(placement: Placement) -> None:
    """No plan is better than one that is called smaller and is not."""
    assert shrink(placement, machine_of(24)) == ()


def test_a_pool_too_small_for_its_length_is_cured_by_a_shorter_context() -> None:
    """What vLLM refuses with "KV cache is needed, which is larger": the plan must hold one whole request."""
    asked = make_placement(spec=VLLM, max_model_len=32768, max_num_seqs=4, kv_cache_bytes=100 * 2**20)
    asked = replace(asked, memory=replace(asked.memory, kv_cache=asked.kv_cache_bytes))
    assert one_request(replace(asked, max_num_batched_tokens=2048)) > asked.kv_cache_bytes

    (shorter,) = shrink(asked, machine_of(0))

    assert shorter.max_model_len < 32768
    assert one_request(replace(shorter, max_num_batched_tokens=2048)) <= shorter.kv_cache_bytes < asked.kv_cache_bytes
