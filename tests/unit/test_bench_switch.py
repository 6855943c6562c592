"""
`shiftworker bench switch`: its turns and medians on known figures, and the whole of it on stand-ins for two engines.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import LoadFailed
from tests.factories import GIB, make_gpu, make_machine
from worker.bench.switch import SwitchTimes, bench_switch, measure_in_turns
from worker.engines.base import EngineState, Loaded
from worker.engines.stub import StubEngine
from worker.hardware.gpu import Machine
from worker.selection.placement import Placement


class Recorded(StubEngine):
    """Notes what it starts and stops, and says what that takes of the card."""

    def __init__(self, side: str, told: list[str], *, load_s: float = 0.0) -> None:
        super().__init__(load_s=load_s)
        self.side, self.told = side, told
        self.placed = dict[str, Placement]()

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        self.placed[placement.model_id] = placement
        self.told.append(f"{self.side} +{placement.model_id}")
        return super().ensure_ready(placement, timeout_s=timeout_s)

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        if self.state(model_id) is not EngineState.STOPPED:
            self.told.append(f"{self.side} -{model_id}")
        super().ensure_stopped(model_id, timeout_s=timeout_s)

    def taken(self) -> int:
        """Bytes of the card that its models have."""
        return sum(p.memory.total for name, p in self.placed.items() if self.state(name) is not EngineState.STOPPED)


class Card:
    """24 GiB, of which both engines' models have theirs; without a card where *gib* is 0."""

    def __init__(self, *engines: Recorded, gib: int = 24) -> None:
        self.engines, self.gib = engines, gib

    def read(self) -> Machine:
        if not self.gib:
            return make_machine()
        free = self.gib - sum(engine.taken() for engine in self.engines) / GIB
        assert free >= 0, "out of the card's memory"
        return replace(make_machine(self.gib), gpus=(make_gpu(self.gib, free_gib=free),))


@pytest.mark.parametrize("gib", [24, 0])
def test_both_sides_switch_in_turns_on_a_card_and_without_one(tmp_path: Path, gib: int) -> None:
    """Each side has one model at a time, both have room side by side, and in the end nothing is left."""
    told: list[str] = []
    ours, theirs = Recorded("ours", told), Recorded("theirs", told)

    found = bench_switch(tmp_path, Card(ours, theirs, gib=gib), ours=ours, theirs=theirs, runs=2, tell=told.append)

    there = ["ours -tiny-a", "ours +tiny-b"]
    back = ["ours -tiny-b", "ours +tiny-a"]
    events = [line for line in told if line.startswith(("ours", "theirs"))]
    assert events == [
        "ours +tiny-a", "theirs +tiny-a",
        *there, *back, *there, "theirs -tiny-a", "theirs +tiny-b",
        *back, *there, *back, "theirs -tiny-b", "theirs +tiny-a",
        "ours -tiny-a", "theirs -tiny-a",
    ]  # fmt: skip
    assert found.runs == 2
    assert all(placement.gpus == ((0,) if gib else ()) for placement in ours.placed.values())


def test_what_an_engine_takes_to_start_is_in_the_figures(tmp_path: Path) -> None:
    """A fifth of a second for ours in both switches, a quarter for theirs in the restart."""
    ours, theirs = Recorded("ours", [], load_s=0.2), Recorded("theirs", [], load_s=0.25)

    found = bench_switch(tmp_path, Card(ours, theirs), ours=ours, theirs=theirs, runs=1, tell=lambda _line: None)

    assert found.switch_s >= 0.2
    assert found.second_switch_s >= 0.2
    assert found.restart_s >= 0.25


def test_the_figures_are_medians_of_the_runs_without_the_first_start() -> None:
    """Starts of 100 s do not count; 1, 9, 2 are 2, and so for each of the three."""
    switches = iter([100.0, 1.0, 4.0, 100.0, 9.0, 6.0, 100.0, 2.0, 5.0, 100.0])
    restarts = iter([100.0, 30.0, 10.0, 20.0])

    found = measure_in_turns(
        "a", "b", switch=lambda _to: next(switches), restart=lambda _from, _to: next(restarts), runs=3,
        tell=lambda _line: None,
    )  # fmt: skip

    assert found == SwitchTimes(switch_s=2.0, second_switch_s=5.0, restart_s=20.0, runs=3)


def test_a_switch_that_fails_ends_the_bench_and_both_engines(tmp_path: Path) -> None:
    """No figure comes of a run that did not work, and nothing stays behind."""

    class Broken(Recorded):
        def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
            if placement.model_id == "tiny-b":
                raise LoadFailed("no")
            return super().ensure_ready(placement, timeout_s=timeout_s)

    ours, theirs = Broken("ours", []), Recorded("theirs", [])
    with pytest.raises(LoadFailed, match="tiny-b"):
        bench_switch(tmp_path, Card(ours, theirs), ours=ours, theirs=theirs, runs=1, tell=lambda _line: None)

    assert ours.taken() == theirs.taken() == 0
