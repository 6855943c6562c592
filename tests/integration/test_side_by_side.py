"""
Two models that fit a card together, and one that needs it alone: the planner moves between both and one by the backlog.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from common.schemas import HardwareStatus
from tests.factories import GIB, make_machine, make_placement, make_spec
from tests.switch_world import LIMITS
from tests.switch_world import World as Box
from worker.catalog.spec import EngineKind
from worker.hardware.gpu import Machine
from worker.memory.estimate import MemoryEstimate
from worker.residency.plan import fitting_beside
from worker.residency.run import needs_of
from worker.runtime import Runtime
from worker.scheduling.pick import Knowledge, Turn
from worker.state.backlog import Backlog, Waiting
from worker.state.residency import Level, Residency

SIZES = {"a": 10, "b": 12, "c": 20}  # GiB, of a card of 24


class World:
    """The runtime's world around a real switcher: a switch is made as it is asked for, a job takes no time."""

    def __init__(self, *, wake_s: Mapping[Level, float] | None = None, asleep: int = 0) -> None:
        machine = make_machine(24)
        silent = replace(machine, gpus=tuple(replace(gpu, used_bytes=None, free_bytes=None) for gpu in machine.gpus))
        self.box = Box(
            machine=silent,  # nobody says what is free: the plan is what counts here
            limits=replace(LIMITS, asleep=asleep),
            wake_s=wake_s,
            placements={
                name: make_placement(
                    name,
                    spec=make_spec(name, engine=EngineKind.STUB),
                    gpus=(0,),
                    memory=MemoryEstimate(weights=size * GIB, kv_cache=0),
                )
                for name, size in SIZES.items()
            },
            max_residents=2,
        )
        self.now = 1000.0
        self.waiting: Counter[str] = Counter()
        self.served: list[set[str]] = []  # step by step
        self.switches: list[str] = []
        self.runtime = Runtime(
            self,
            models=list(SIZES),
            larger={},
            starting="a",
            max_wait_s=600,
            min_turn_s=30,
            status_every_s=5,
            clock=lambda: self.now,
        )

    def machine(self) -> Machine:
        return self.box.machine

    def backlog(self) -> Backlog:
        return Backlog(by_model={m: Waiting(count=n, oldest_at=self.now - 1) for m, n in self.waiting.items() if n})

    def residency(self) -> Residency:
        residency = self.box.residency
        assert min(residency.free().values()) >= 0, "more than the card has"
        needs = {name: needs_of(placement) for name, placement in self.box.placements.items()}
        return replace(residency, beside=fitting_beside(residency, needs))

    def knowledge(self, *_: Any, **__: Any) -> Knowledge:
        return Knowledge()

    def ask_for_switch(self, turn: Turn, _residency: Residency) -> None:
        assert turn.model_id is not None
        assert self.box.switch(turn.model_id).outcome == "ready"
        self.switches.append(turn.model_id)

    def serve(self, models: Iterable[str]) -> None:
        now = {model for model in models if self.waiting[model]}
        for model in now:
            self.waiting[model] -= 1
        if now:
            self.served.append(now)

    def publish(self, *_: Any, **__: Any) -> HardwareStatus | None:
        return None

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None  # nothing is cancelled, prefetched, or sent elsewhere

    def play(self, **jobs: int) -> None:
        """Step until *jobs* more, by model, are done."""
        self.served.clear()
        self.waiting.update(jobs)
        for _ in range(200):
            self.now += 60  # longer than a turn must be
            self.runtime.step()
            if not self.waiting.total():
                return
        raise AssertionError(f"jobs wait for ever: {self.waiting}")


def test_both_while_jobs_wait_for_both_and_one_while_they_wait_for_that() -> None:
    """Both, c alone, both again: never more than the card holds, and no switch but those between the three phases."""
    world = World()
    world.play(a=5, b=5)
    assert world.box.residency.ready_models == ("a", "b")
    assert world.served.count({"a", "b"}) >= 4, "both queues are served at once"
    both = len(world.switches)
    assert both == 2

    world.play(c=5)
    assert world.box.residency.ready_models == ("c",)
    assert world.switches[both:] == ["c"]

    world.play(a=5, b=5)
    assert world.box.residency.ready_models == ("a", "b")
    assert world.served.count({"a", "b"}) >= 4
    assert sorted(world.switches[both + 1 :]) == ["a", "b"]


def test_jobs_for_all_three_are_all_answered() -> None:
    """By turns: the two together, the large one alone."""
    world = World()
    world.play(a=3, b=3, c=3)

    assert {"a", "b", "c"} == set().union(*world.served)
    assert all("c" not in models or models == {"c"} for models in world.served)


def test_a_sleeper_that_is_needed_next_is_woken_while_the_other_one_works() -> None:
    """As far as memory allows: beside b there is room for a, which sleeps, and not for c."""
    world = World(wake_s={Level.ASLEEP_1: 0.0}, asleep=1)
    world.play(a=1)
    world.play(c=1)
    assert world.box.levels == {"a": Level.ASLEEP_1, "c": Level.READY}
    world.play(b=1)
    world.box.deeds.clear()

    world.play(b=20, a=1)
    assert "wake a" in world.box.deeds
    assert world.box.residency.ready_models == ("a", "b")
    assert world.served[-1] == {"b"}, "b has worked on"
