"""
A load that runs out of memory: the next smaller plan, never the same one again, and at the end a model left alone.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import EngineDied, LoadFailed, OutOfMemory
from common.schemas import SwitchRecord
from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from tests.switch_world import LIMITS, World, crash, raising
from worker.catalog.spec import EngineKind
from worker.hardware.gpu import Machine
from worker.memory.measured import Measured
from worker.residency.shrink import shrink
from worker.selection.fit_vllm import fit_vllm
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, to_spare
from worker.state.residency import HOST, Level, Resident

ADA = (8, 9)


def card(free_gib: float = 24) -> Machine:
    """One card of 24 GiB that can compute in FP8."""
    return replace(make_machine(24), gpus=(make_gpu(24, free_gib=free_gib, compute_capability=ADA),))


def plan_for(machine: Machine) -> Placement:
    """The full plan of a vLLM model that has the card to itself."""
    place = Place(gpus=machine.gpus, budget=min(map(to_spare, machine.gpus)))
    found = fit_vllm(make_spec("big", engine=EngineKind.VLLM), Overrides(), place)
    assert isinstance(found, Placement)
    return found


FULL = plan_for(card())
SMALLER = shrink(FULL, card())


def world_of(machine: Machine, **options: object) -> World:
    """The card, and the one model that is placed on it."""
    return World(machine=machine, placements={"big": FULL}, **options)  # type: ignore[arg-type]


def out_of_memory(count: int) -> list[Exception]:
    return [OutOfMemory(f"big ended while it was loading, number {number}") for number in range(1, count + 1)]


def resident(world: World) -> Resident:
    found = world.residency.resident("big")
    assert found is not None
    return found


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_the_next_smaller_plan_is_loaded_each_time_memory_runs_out(failures: int) -> None:
    """Without a pause and without a second try of the same plan; the last of the three loads too."""
    world = world_of(card())
    world.engine.load_errors = out_of_memory(failures)
    record = world.switch("big")

    assert (record.outcome, record.attempts) == ("ready", failures + 1)
    assert world.engine.placements == [FULL, *SMALLER[:failures]]
    assert "pause 2" not in world.deeds
    assert world.residency.quarantined == {}
    assert resident(world).level is Level.READY
    assert resident(world).bytes == SMALLER[failures - 1].memory.total


def test_every_larger_plan_is_told_with_its_reason() -> None:
    """In the record of the switch, on the board, and to whoever listens to its stages."""
    world = world_of(card())
    world.engine.load_errors = out_of_memory(3)
    told: list[str] = []
    record = world.switcher.switch("big", on_stage=lambda _stage, detail: told.append(detail))

    for number in (1, 2, 3):
        assert f"number {number}" in record.reason
    assert "smaller than planned: 16,384 instead of 32,768 tokens, 32 instead of 64 requests at once" in record.reason
    assert "attempt 1 of 3; smaller than planned: 32 instead of 64 requests" in "\n".join(told)
    assert "a KV cache in fp8" in (resident(world).smaller or "")
    assert resident(world).max_model_len == 16384


def test_a_plan_that_keeps_the_length_says_nothing_of_it() -> None:
    """What is offered does not change."""
    world = world_of(card())
    world.engine.load_errors = out_of_memory(1)
    world.switch("big")

    assert resident(world).max_model_len is None
    assert resident(world).smaller


def test_when_the_smallest_plan_runs_out_too_the_model_is_left_alone() -> None:
    """Four loads, no more; nothing remains of them, and the reason has all four."""
    world = world_of(card())
    world.engine.load_errors = out_of_memory(9)
    record = world.switch("big")

    assert (record.outcome, record.attempts) == ("failed", 4)
    assert world.engine.placements == [FULL, *SMALLER]
    assert world.residency.residents == ()
    assert world.residency.is_quarantined("big", now=record.at.timestamp())
    assert all(f"number {number}" in record.reason for number in (1, 2, 3, 4))


def test_too_little_free_memory_is_waited_for_and_then_a_plan_is_loaded_that_it_holds() -> None:
    """Another program has taken 3 GiB: it is asked for three times, then the pool is smaller by what is lacking."""
    world = world_of(card(free_gib=21))
    record = world.switch("big")

    assert record.outcome == "ready"
    assert world.deeds.count("pause 2") == 2
    (loaded,) = world.engine.placements
    assert loaded.memory.total <= 21 * GIB < FULL.memory.total
    assert "card 0 has 21.0 GiB free" in record.reason


def test_plans_that_are_too_large_for_what_is_free_are_passed_over() -> None:
    """Only the last of them fits: it is the only one that is loaded."""
    shortest = shrink(FULL, card(free_gib=2))[-1]
    assert shortest.memory.total <= 2 * GIB < shrink(FULL, card(free_gib=2))[-2].memory.total
    world = world_of(card(free_gib=2))

    assert world.switch("big").outcome == "ready"
    assert world.engine.placements == [shortest]


def test_where_nothing_fits_nothing_is_loaded() -> None:
    """A full card costs no start of an engine; the reason has the arithmetic of every plan."""
    world = world_of(card(free_gib=1))
    record = world.switch("big")

    assert (record.outcome, record.attempts) == ("failed", 3)
    assert world.engine.placements == []
    assert record.reason.count("card 0 has 1.0 GiB free") == 1 + len(shrink(FULL, card(free_gib=1)))
    assert "big" in world.residency.quarantined


def test_a_plan_that_ran_out_is_not_tried_again_before_more_is_free() -> None:
    """No crash at every switch to the model; with more free memory the full plan has its chance, and keeps it."""
    world = world_of(card(free_gib=23.5))
    world.engine.load_errors = out_of_memory(1)
    world.switch("big")
    world.switcher.close()
    world.engine.placements.clear()

    again = world.switch("big")
    assert [plan.max_num_seqs for plan in world.engine.placements] == [32]
    assert "ran out of memory with" in again.reason

    world.switcher.close()
    world.engine.placements.clear()
    world.machine = card(free_gib=24)
    assert world.switch("big").reason == "nothing is loaded"
    assert world.engine.placements == [FULL]
    assert resident(world).smaller is None

    world.switcher.close()
    world.engine.placements.clear()
    world.machine = card(free_gib=23.5)
    world.switch("big")
    assert world.engine.placements == [FULL]


def test_a_person_may_insist_on_the_full_plan() -> None:
    """`--force` looks at no memory; what the engine cannot allocate is given up all the same."""
    world = world_of(card(free_gib=1))
    assert world.switch("big", force=True).outcome == "ready"
    assert world.engine.placements == [FULL]

    world = world_of(card(free_gib=1))
    world.engine.load_errors = out_of_memory(1)
    assert world.switch("big", force=True).outcome == "ready"
    assert len(world.engine.placements) == 2


def test_a_load_that_fails_for_another_reason_is_not_made_smaller() -> None:
    """Broken files stay broken at any size."""
    world = world_of(card())
    world.engine.load_errors = [LoadFailed("the weights are not here")] * 3
    record = world.switch("big")

    assert record.outcome == "failed"
    assert world.engine.placements == [FULL] * 3


def test_a_smaller_plan_that_the_engine_cannot_load_at_all_makes_way_for_the_next() -> None:
    """FP8 on a card whose kernels do not know it, say: tried as often as any load, then passed over."""
    world = world_of(card(), limits=replace(LIMITS, attempts=2))
    world.engine.load_errors = [*out_of_memory(2), LoadFailed("no kernel for fp8"), LoadFailed("no kernel for fp8")]
    record = world.switch("big")

    assert record.outcome == "ready"
    assert world.engine.placements == [FULL, SMALLER[0], SMALLER[1], SMALLER[1], SMALLER[2]]


def test_a_model_that_cannot_shrink_is_left_alone_at_once() -> None:
    """One load, as long as nothing can be known of a smaller one."""
    world = World()
    world.engine.load_errors = out_of_memory(2)
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("failed", 1)
    assert record.reason == "big ended while it was loading, number 1"


def test_a_worker_that_leaves_begins_no_smaller_plan() -> None:
    """Leaving is no fault of the model."""
    world = world_of(card())
    world.engine.load_errors = out_of_memory(4)
    on_stop = world.engine.ensure_stopped

    def leaves(model_id: str, *, timeout_s: float) -> None:
        world.switcher._leaving.set()
        on_stop(model_id, timeout_s=timeout_s)

    world.engine.ensure_stopped = leaves  # type: ignore[method-assign]
    record = world.switch("big")

    assert record.reason.startswith("the worker leaves: ")
    assert world.engine.placements == [FULL]
    assert world.residency.quarantined == {}


def test_what_a_load_took_is_kept_and_counts_as_the_size_of_the_resident() -> None:
    """What the engine says, and what the driver counts for its processes on the card where they hold most."""
    kept: list[Measured] = []
    said = Measured(weights=GIB, kv_pool=FULL.kv_cache_bytes)
    world = world_of(card(), keep=kept.append)
    world.engine.loaded = lambda loaded: replace(loaded, pids=(7, 8), measured=said)
    held = 20 * GIB
    gpu = make_gpu(24, processes={7: held - GIB, 8: GIB, 9: 3 * GIB})
    world.machine = replace(card(), gpus=(gpu, make_gpu(24, index=1, processes={7: GIB})))
    world.switch("big")

    assert kept == [replace(said, total=held)]
    expected = replace(FULL.memory, weights=GIB).total
    assert resident(world).bytes == max(expected, held)


def test_on_a_host_the_resident_bytes_of_the_process_tree_are_kept() -> None:
    """There is no card to ask."""
    kept: list[Measured] = []
    on_host = replace(FULL, gpus=(), gpu_memory_utilization=None)
    world = World(machine=make_machine(ram_gib=64), placements={"big": on_host}, keep=kept.append, capacity=64 * GIB)
    world.engine.loaded = lambda loaded: replace(loaded, rss_bytes=GIB)
    world.switch("big")

    assert kept == [Measured(total=GIB)]
    assert resident(world).bytes == FULL.memory.total


@pytest.mark.parametrize("fault", [OSError("Redis is away"), EngineDied("whatever")])
def test_a_measurement_that_cannot_be_kept_stops_nothing(fault: Exception) -> None:
    """The model is ready all the same."""
    world = world_of(card(), keep=raising(fault))

    assert world.switch("big").outcome == "ready"


def test_a_load_that_is_not_verified_is_not_measured() -> None:
    """What does not answer may not have loaded what it should."""
    kept: list[Measured] = []
    records: list[SwitchRecord] = []
    world = world_of(card(), keep=kept.append, tell=records.append)
    world.engine.canary = crash
    world.switch("big")

    assert kept == []
    assert records[0].outcome == "failed"


# --- A process that stands ready -----------------------------------------------------------------------------


def on_host() -> World:
    """A model of 1.5 GiB, and 4 GiB for it."""
    return World(placements={"a": make_placement("a")}, machine=make_machine(), host=4 * GIB)


def test_what_a_process_that_stands_ready_takes_is_not_planned_with() -> None:
    """It came since the last switch: with its 3 GiB of the host the model fits no more."""
    world = on_host()
    world.engine.standing = 3 * GIB
    record = world.switch("a")

    assert record.outcome == "failed"
    assert world.engine.placements == []
    assert world.residency.free()[HOST] == GIB


def test_a_process_that_the_load_left_ready_is_counted_after_it() -> None:
    """The first load starts it: what is free afterwards is free of both."""
    world = on_host()
    world.engine.on_load = lambda: setattr(world.engine, "standing", 2 * GIB)

    assert world.switch("a").outcome == "ready"
    assert world.residency.free()[HOST] == 4 * GIB - 2 * GIB - world.placements["a"].memory.total
