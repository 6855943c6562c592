"""
Models that sleep instead of ending: how they leave, how they come back, and what happens when they do not.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from common.errors import EngineFailed, LoadFailed, OutOfMemory
from common.schemas import SwitchStage, SwitchTime
from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from tests.switch_world import LIMITS, World
from worker.catalog.spec import EngineKind
from worker.engines.base import Completion, EngineState
from worker.memory.estimate import MemoryEstimate
from worker.residency import unloader
from worker.residency.sleep_notes import SleepNote, SleepNotes
from worker.state.backlog import Backlog, Waiting
from worker.state.residency import Level

ONE, TWO = Level.ASLEEP_1, Level.ASLEEP_2
BOTH = {ONE: 0.0, TWO: 0.0}
WEIGHTS, KV, CONTEXT = 10 * GIB, 4 * GIB, GIB
CARD = 24 * GIB


def placements(names: str = "ab") -> dict[str, object]:
    memory = MemoryEstimate(weights=WEIGHTS, kv_cache=KV, cuda_context=CONTEXT)
    return {
        name: make_placement(name, spec=make_spec(name, engine=EngineKind.STUB), gpus=(0,), memory=memory)
        for name in names
    }


class Box(World):
    """A card and a host whose memory goes and comes as models load, sleep, wake and end."""

    stuck: int = 0  # bytes that no sleep gives back
    others: int = 0  # bytes of the card that other programs hold
    ram: int = 64 * GIB

    def read(self) -> object:
        used, ram = self.others, 0
        for name in self.placements:
            state = self.engine.state(name)
            level = self.engine._models[name].level if state is not EngineState.STOPPED else None
            if state is EngineState.READY:
                used += WEIGHTS + KV + CONTEXT
            elif state is EngineState.ASLEEP:
                used += CONTEXT + self.stuck
                ram += WEIGHTS if level is ONE else 0
        card = make_gpu(24, free_gib=(CARD - used) / GIB)
        host = make_machine(24, ram_gib=64, ram_available_gib=(self.ram - ram) / GIB)
        self.machine = replace(host, gpus=(card,))
        return super().read()


def box(
    names: str = "ab",
    *,
    asleep: int = 2,
    ram_gib: float = 64,
    attempt_s: float = 5,
    drain_s: float = 5,
    **options: object,
) -> Box:
    made = Box(
        placements=placements(names),
        wake_s=BOTH,
        limits=replace(LIMITS, asleep=asleep, attempt_s=attempt_s, drain_s=drain_s),
        host=64 * GIB,
        **options,
    )  # type: ignore[arg-type]
    made.ram = int(ram_gib * GIB)
    return made


def measured(model_id: str, level: str, seconds: float, from_model: str | None = "b") -> SwitchTime:
    return SwitchTime(
        from_model=from_model, to_model=model_id, level=level, mean_s=seconds, last_s=seconds, load_s=seconds,
        load_bytes=WEIGHTS, count=1, at=datetime(2026, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def test_a_model_that_must_leave_falls_asleep_and_is_woken_when_its_turn_comes() -> None:
    """Drained first; asleep it holds what its process keeps of the card, and its weights of the host."""
    world = box().with_a_ready()
    away = world.switch("b")

    assert world.deeds == [
        "fetch b", "[draining]", "[unloading]", "asleep_1 a", "[loading]", "load b", "[verifying]", "[ready]",
    ]  # fmt: skip
    assert world.levels == {"a": ONE, "b": Level.READY}
    sleeper = world.residency.resident("a")
    assert sleeper is not None
    assert (sleeper.bytes, sleeper.host_bytes) == (CONTEXT, WEIGHTS)
    assert "b takes the place of a, a falls asleep (asleep_1)" in away.reason

    world.deeds.clear()
    back = world.switch("a")
    assert world.deeds == [
        "fetch a", "[draining]", "[unloading]", "asleep_1 b", "[loading]", "wake a", "[verifying]", "[ready]",
    ]  # fmt: skip
    assert (away.level, back.level, back.outcome) == (Level.COLD, ONE, "ready")
    assert world.levels == {"a": Level.READY, "b": ONE}
    assert world.residency.unfreed == {}


def test_without_room_on_the_host_for_its_weights_it_sleeps_without_them() -> None:
    """Pinned memory may take twice the weights: 20 GiB are not to be had beside the reserve."""
    world = box(ram_gib=24).with_a_ready()
    world.switch("b")

    assert world.levels == {"a": TWO, "b": Level.READY}
    assert world.switch("a").level == TWO


def test_what_was_measured_of_a_sleep_is_what_the_next_one_is_planned_with() -> None:
    """The second sleep of the same model needs the 10 GiB that were seen, not the 20 that were feared."""
    world = box().with_a_ready()
    world.switch("b")
    world.switch("a")
    world.ram = 18 * GIB + WEIGHTS  # b sleeps in 10 of them

    world.switch("b")
    assert world.levels == {"a": ONE, "b": Level.READY}


@pytest.mark.parametrize(("ram_gib", "level"), [(45, ONE), (30, TWO)])
def test_pinned_memory_that_a_woken_model_keeps_is_not_given_to_another(ram_gib: float, level: Level) -> None:
    """10 GiB are kept awake (PyTorch holds on to them), 6.4 are the reserve, b may need 20: 45 will do, 30 not."""
    world = box(ram_gib=ram_gib).with_a_ready()
    world.switch("b")
    world.switch("a")

    found = world.residency.resident("a")
    assert found is not None
    assert found.host_bytes == WEIGHTS
    assert world.levels == {"a": Level.READY, "b": level}


def test_what_a_sleeper_keeps_of_its_card_counts_as_free_for_its_own_wake() -> None:
    """It needs 15 GiB, 14 are free, and it has one of them already."""
    world = box().with_a_ready()
    world.switch("b")
    world.others = 8 * GIB
    record = world.switch("a")

    assert (record.outcome, record.level, record.attempts) == ("ready", ONE, 1)


def test_a_sleeper_for_which_the_card_has_too_little_is_ended_before_it_is_given_up() -> None:
    """Only a smaller plan could fit now, and that is no wake; nor has the model that was there room any more."""
    world = box().with_a_ready()
    world.switch("b")
    world.others = 10 * GIB
    record = world.switch("a")

    assert (record.outcome, record.attempts) == ("failed", 6)
    assert world.engine.state("a") is EngineState.STOPPED
    assert world.levels == {}
    assert world.residency.banned == {}


def test_a_model_ends_instead_of_sleeping_where_other_programs_hold_what_its_sleep_would_keep() -> None:
    """The card has just enough for the one that wakes: what stays of a sleeper there is room that others took."""
    world = box().with_a_ready()
    world.switch("b")
    world.others = 9 * GIB
    record = world.switch("a")

    assert (record.outcome, record.level, record.attempts) == ("ready", ONE, 1)
    assert world.levels == {"a": Level.READY}


@pytest.mark.parametrize(("asleep", "wake_s"), [(0, BOTH), (2, None)])
def test_where_nothing_sleeps_models_end(asleep: int, wake_s: dict[Level, float] | None) -> None:
    """Turned off, or an engine that cannot."""
    world = box(asleep=asleep)
    world.engine._wake_s = wake_s or {}
    world.with_a_ready().switch("b")

    assert "stop a" in world.deeds
    assert world.levels == {"b": Level.READY}


def test_a_level_that_saves_nothing_is_not_used() -> None:
    """Measured: its start takes 5 s; awake from level 1 takes 9, from level 2 only 3."""
    times = (measured("a", "cold", 5), measured("a", ONE, 9), measured("a", TWO, 3))
    world = box(times=times).with_a_ready()
    world.switch("b")

    assert world.levels == {"a": TWO, "b": Level.READY}


def test_the_sleeper_that_is_needed_later_ends_first() -> None:
    """One may sleep; jobs wait for a, none for b."""
    world = box("abc", asleep=1, backlog=Backlog(by_model={"a": Waiting(count=3, oldest_at=5.0)}))
    for name in "abc":
        world.switch(name)

    assert world.levels == {"a": ONE, "c": Level.READY}
    assert world.engine.state("b") is EngineState.STOPPED


def test_without_jobs_the_one_that_was_used_last_sleeps_on() -> None:
    """The older sleeper ends."""
    world = box("abc", asleep=1)
    for name in "abc":
        world.switch(name)

    assert world.levels == {"b": ONE, "c": Level.READY}


def other(completion: Completion) -> Completion:
    [choice] = completion.response["choices"]
    changed = {**choice, "message": {"role": "assistant", "content": "!!!!!!!!"}}
    return replace(completion, response={**completion.response, "choices": [changed]})


def test_a_model_that_wakes_with_other_tokens_is_started_cold_and_sleeps_so_no_more() -> None:
    """No answer of it is served; the alert stands on the board; the other level may still be used."""
    world = box().with_a_ready()
    world.switch("b")
    world.deeds.clear()
    wrong = [True]
    world.engine.canary = lambda completion: other(completion) if wrong and wrong.pop() else completion
    record = world.switch("a")

    assert (record.outcome, record.level) == ("ready", Level.COLD)
    assert "a woke from asleep_1 and answers its canary prompt otherwise" in record.reason
    assert world.deeds[world.deeds.index("wake a") :] == [
        "wake a", "[verifying]", "stop a", "[loading]", "load a", "[verifying]", "[ready]",
    ]  # fmt: skip
    assert [kind for kind, _ in world.residency.banned.items()] == [("a", ONE)]
    assert world.residency.quarantined == {}

    world.switch("b")
    assert world.levels == {"a": TWO, "b": Level.READY}


def test_what_is_known_of_sleep_outlives_the_worker() -> None:
    """The next start uses the level no more that was wrong, says why, and plans with the bytes that were measured."""
    kept: dict[tuple[str, Level], SleepNote] = {}

    def started(*, ram_gib: float = 64) -> Box:
        notes = SleepNotes(kept.values(), keep=lambda note: kept.update({(note.model_id, note.level): note}))
        return box(sleeps=notes, ram_gib=ram_gib).with_a_ready()

    world = started()
    world.switch("b")
    wrong = [True]
    world.engine.canary = lambda completion: other(completion) if wrong and wrong.pop() else completion
    world.switch("a")
    assert world.levels == {"a": Level.READY, "b": ONE}
    assert list(world.residency.banned) == [("a", ONE)]

    again = started(ram_gib=20)  # not room for twice the weights beside the reserve, which an unmeasured sleep asks for
    assert again.residency.banned == world.residency.banned
    again.switch("b")
    assert again.levels == {"a": TWO, "b": Level.READY}
    again.switch("a")
    assert again.levels == {"a": Level.READY, "b": ONE}


@pytest.mark.parametrize(("error", "banned"), [(LoadFailed("it hangs"), True), (OutOfMemory("full"), False)])
def test_a_model_that_does_not_wake_is_started_cold(error: Exception, banned: bool) -> None:  # noqa: FBT001
    """Want of memory is no fault of the sleep."""
    world = box().with_a_ready()
    world.switch("b")
    world.engine.load_errors = [error]
    record = world.switch("a")

    assert (record.outcome, record.level) == ("ready", Level.COLD)
    assert (("a", ONE) in world.residency.banned) == banned


def test_a_sleeper_that_keeps_its_memory_is_ended() -> None:
    """Looked at for 10 s; then its card is cleared for the next one, and it sleeps so no more."""
    world = box().with_a_ready()
    world.stuck = 8 * GIB
    record = world.switch("b")

    assert record.outcome == "ready"
    assert world.deeds.count("pause 0.2") == 50
    assert world.levels == {"b": Level.READY}
    assert "a fell asleep and kept its memory" in world.residency.banned["a", ONE]


def test_a_model_that_does_not_fall_asleep_is_ended() -> None:
    """The switch goes on."""
    world = box().with_a_ready()
    world.engine.sleep_errors = [EngineFailed("it hangs")]
    record = world.switch("b")

    assert record.outcome == "ready"
    assert world.levels == {"b": Level.READY}
    assert world.residency.banned == {("a", ONE): "it hangs"}


def test_a_sleeper_that_dies_is_taken_off_the_board() -> None:
    """Its next start is a cold one."""
    world = box().with_a_ready()
    world.switch("b")
    world.engine.die("a")

    assert world.switcher.note_deaths() == ("a",)
    assert world.switch("a").level == Level.COLD


def test_a_card_too_hot_for_a_wake_leaves_the_sleeper_asleep() -> None:
    """Nothing is broken, and its sleep is still worth something."""
    world = box("ab").with_a_ready()
    world.switch("b")
    read = world.read

    def hot() -> object:
        machine = read()
        return replace(machine, gpus=(replace(machine.gpus[0], temperature_c=99.0),))

    world.read = hot  # type: ignore[method-assign]
    record = world.switch("a")

    assert (record.outcome, "wake a" in world.deeds) == ("failed", False)
    assert world.levels == {"a": ONE, "b": Level.READY}


def test_a_model_that_was_loaded_smaller_than_planned_does_not_sleep() -> None:
    """Its next start may have room for all of it."""
    world = box().with_a_ready()
    found = world.residency.resident("a")
    assert found is not None
    world.board.put(replace(found, smaller="smaller than planned"))
    world.switch("b")

    assert world.levels == {"b": Level.READY}


def test_the_level_a_model_is_at_is_known() -> None:
    """What a switch to it would take depends on it."""
    world = box().with_a_ready()
    world.switch("b")

    assert (world.switcher.level("a"), world.switcher.level("b")) == (ONE, Level.COLD)


def test_a_worker_that_leaves_does_not_wait_for_a_model_that_falls_asleep() -> None:
    """Copying its weights may take a minute; it is ended, and nothing is held against its sleep."""
    world = box(attempt_s=60).with_a_ready()
    world.engine._sleep_s = 30
    unloading = threading.Event()

    def listen(stage: SwitchStage, _detail: str) -> None:
        if stage is SwitchStage.UNLOADING:
            unloading.set()

    with ThreadPoolExecutor(1) as pool:
        switch = pool.submit(world.switcher.switch, "b", on_stage=listen)
        assert unloading.wait(10)
        world.switcher.abandon()
        record = switch.result(10)

    assert record.reason.startswith("the worker leaves")
    assert world.engine.state("a") is EngineState.STOPPED
    assert (world.residency.banned, world.residency.quarantined) == ({}, {})


def test_a_model_whose_jobs_do_not_leave_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep, vLLM would give them what they have so far as their answer; ended, they run again."""
    monkeypatch.setattr(unloader, "_HANDBACK_S", 0.01)
    world = box(drain_s=0.01).with_a_ready()
    with world.board.enter("a"):
        record = world.switch("b")

    assert record.outcome == "ready"
    assert ("stop a" in world.deeds, "asleep_1 a" in world.deeds) == (True, False)
