"""
Every rung of the ladder with a real small engine that misbehaves: what the switcher does, and what is left running.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from structlog.testing import CapturingLogger

from common.schemas import SwitchRecord
from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from tests.integration.test_server_engine import FAKE, processes_below
from worker.catalog.spec import EngineKind
from worker.engines.base import EngineState, Loaded, StopSignal
from worker.engines.process import Launch
from worker.engines.server_engine import ServerEngine
from worker.hardware.gpu import Machine
from worker.memory.estimate import MemoryEstimate
from worker.residency import switcher
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.parts import SwitchLimits
from worker.residency.recover import Rung
from worker.residency.shrink import shrink
from worker.residency.switcher import Switcher
from worker.selection.fit_vllm import fit_vllm
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, to_spare
from worker.state.residency import Level

LIMITS = SwitchLimits(
    attempt_s=20, attempts=2, drain_s=5, quarantine_s=60, load=LoadLimits(max_temperature_c=85, max_power_share=1)
)
SHORT_S = 1.5  # for an engine that never answers; the fake needs a quarter of it to start


class Fakes(ServerEngine):
    """The fake engine for several models, each with flags of its own; on a card they can sleep."""

    kind: ClassVar[EngineKind] = EngineKind.VLLM

    def __init__(self, run_dir: Path, flags: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(run_dir=run_dir, files_of=lambda spec: spec.source)
        self.flags = flags
        self.started: list[Placement] = []
        self.asleep: set[str] = set()

    def launch(self, placement: Placement, files: Path | str, socket: Path) -> Launch:
        """Start the fake."""
        self.started.append(placement)
        flags = self.flags.get(placement.model_id, ())
        return Launch(command=[sys.executable, str(FAKE), "--uds", str(socket), *flags], env=os.environ)

    def sleep_levels(self, placement: Placement) -> tuple[Level, ...]:
        """One."""
        return (Level.ASLEEP_1,) if placement.gpus else ()

    def ensure_asleep(self, model_id: str, level: Level, *, timeout_s: float) -> None:
        """Its process stays, and is told."""
        self.tell(model_id, "/sleep", timeout_s)
        self.asleep.add(model_id)

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        """Start it, or wake it."""
        if (model_id := placement.model_id) not in self.asleep:
            return super().ensure_ready(placement, timeout_s=timeout_s)
        self.asleep.remove(model_id)
        self.tell(model_id, "/wake_up", timeout_s)
        return replace(super().ensure_ready(placement, timeout_s=timeout_s), level=Level.ASLEEP_1)

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        """One that sleeps ends as well."""
        self.asleep.discard(model_id)
        super().ensure_stopped(model_id, timeout_s=timeout_s)

    def state(self, model_id: str) -> EngineState:
        """Asleep it takes no jobs."""
        return EngineState.ASLEEP if model_id in self.asleep else super().state(model_id)

    def tell(self, model_id: str, path: str, timeout_s: float) -> None:
        """Order what is no job."""
        socket = self._processes[model_id].socket
        self._http.post(socket, path, {}, timeout_s=timeout_s, stop=StopSignal())


class Box:
    """A switcher on the fake engine; the machine is what the test says."""

    def __init__(
        self,
        run_dir: Path,
        flags: Mapping[str, tuple[str, ...]],
        *,
        placements: Mapping[str, Placement] | None = None,
        machine: Callable[[], Machine] = make_machine,
        limits: SwitchLimits = LIMITS,
        waits: tuple[str, ...] = (),
        cloud: tuple[str, ...] = (),
    ) -> None:
        self.engine = Fakes(run_dir, flags)
        self.records: list[SwitchRecord] = []
        self.pauses: list[float] = []
        self.read = machine
        self.board = ResidencyBoard(capacity=64 * GIB, cards={0: 24 * GIB}, max_residents=1)
        self.switcher = Switcher(
            board=self.board,
            placements=placements or {name: on_host(name, tier) for tier, name in enumerate(("4b", "8b", "14b"))},
            engines=dict.fromkeys(EngineKind, self.engine),
            machine=self,
            limits=limits,
            fetch=lambda _: None,
            hand_back=lambda _: None,
            record=self.records.append,
            substitutable=waits.__contains__,
            cloud=cloud.__contains__,
            pause=self.pauses.append,
        )

    def switch(self, model_id: str) -> SwitchRecord:
        return self.switcher.switch(model_id)

    @property
    def ends(self) -> list[tuple[str, str]]:
        return [(record.to_model, record.outcome) for record in self.records]


def on_host(name: str, tier: int) -> Placement:
    return make_placement(name, spec=make_spec(name, tier=tier))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Box]]:
    """Make boxes; nothing of their engines may be left running after the test."""
    made: list[Box] = []

    def make_box(flags: Mapping[str, tuple[str, ...]] | None = None, **options: object) -> Box:
        made.append(Box(tmp_path / "run", flags or {}, **options))  # type: ignore[arg-type]  # its own parameters
        return made[-1]

    yield make_box
    for box in made:
        box.switcher.close()
    assert processes_below(tmp_path) == []


BREAKS = {
    "--die-on-load": "exit code 3",
    "--wrong-canary": "answered its canary prompt with nothing",
    "--wrong-answer": "its canary prompt failed",
    "--fail": "out of luck",
}


@pytest.mark.parametrize("flag", BREAKS)
def test_retry(make: Callable[..., Box], tmp_path: Path, flag: str) -> None:
    """What breaks once is started again, and is ready then; nothing of the first start is left."""
    box = make({"4b": (flag, "--only-first", str(tmp_path / "seen"))})
    record = box.switch("4b")

    assert (record.outcome, record.attempts) == ("ready", 2)
    assert len(box.engine.started) == 2
    assert len(processes_below(tmp_path)) == 2  # one guard, one engine


@pytest.mark.parametrize("flag", ["--hang-on-load", "--half-open", "--mute", "--load-seconds=600"])
def test_retry_after_a_deadline(make: Callable[..., Box], tmp_path: Path, flag: str) -> None:
    """An engine that never answers, in four ways, costs its deadline and is ended."""
    flags = ("--ignore-sigterm", flag, "--only-first", str(tmp_path / "seen"))
    box = make({"4b": flags}, limits=replace(LIMITS, attempt_s=SHORT_S))
    record = box.switch("4b")

    assert (record.outcome, record.attempts) == ("ready", 2)
    assert len(processes_below(tmp_path)) == 2


def test_a_slow_load_is_waited_for(make: Callable[..., Box]) -> None:
    """Slow is no failure: within its deadline nothing is tried a second time."""
    box = make({"4b": ("--load-seconds=1",)})
    record = box.switch("4b")

    assert (record.outcome, record.attempts) == ("ready", 1)
    assert record.stages["loading"] > 1


@pytest.mark.parametrize("flag", BREAKS)
def test_previous_model(make: Callable[..., Box], flag: str) -> None:
    """What breaks every time is left alone with its reason, and the model that was there is back."""
    box = make({"14b": (flag,)})
    box.switch("4b")
    record = box.switch("14b")

    assert (record.outcome, record.attempts) == ("failed", 2)
    assert BREAKS[flag] in record.reason
    assert box.board.read().ready_models == ("4b",)
    assert BREAKS[flag] in box.board.read().quarantined["14b"].reason
    assert box.ends == [("4b", "ready"), ("14b", "failed"), ("4b", "ready")]


def test_next_of_the_cascade(make: Callable[..., Box]) -> None:
    """Jobs wait that any model may answer: the next smaller one that loads takes them."""
    box = make({"14b": ("--die-on-load",), "8b": ("--wrong-canary",)}, waits=("14b", "8b"))
    box.switch("14b")

    assert box.ends == [("14b", "failed"), ("8b", "failed"), ("4b", "ready")]
    assert box.records[-1].reason.startswith("next model of the cascade: 8b failed, 4b is the next smaller one")


def test_cloud_endpoint(make: Callable[..., Box], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing loads, and of the last model tried jobs wait that may leave the machine: they do, and the others wait."""
    box = make(dict.fromkeys(("8b", "4b"), ("--die-on-load",)), cloud=("4b",))
    told = CapturingLogger()  # structlog's own is kept by whoever has logged before
    monkeypatch.setattr(switcher, "logger", told)
    box.switch("8b")

    recovering = [call.kwargs for call in told.calls if call.args == ("residency.recovering",)]
    rungs = [(step["model_id"], step["rung"]) for step in recovering]
    assert rungs == [("4b", Rung.CASCADE), (None, Rung.CLOUD)]
    assert box.board.read().residents == ()
    assert set(box.board.read().quarantined) == {"8b", "4b"}  # which is what lets their jobs go


def test_hold_the_jobs(make: Callable[..., Box], tmp_path: Path) -> None:
    """Nothing loads: every model was tried, no process is left, and each reason stands on the board."""
    box = make(dict.fromkeys(("14b", "8b", "4b"), ("--die-on-load",)), waits=("14b",))
    box.switch("14b")

    assert [outcome for _, outcome in box.ends] == ["failed"] * 3
    assert box.board.read().residents == ()
    assert set(box.board.read().quarantined) == {"14b", "8b", "4b"}
    assert processes_below(tmp_path) == []


# --- On a card ---------------------------------------------------------------------------------------------


def card(*, free_gib: float = 24, processes: Mapping[int, int] | None = None) -> Machine:
    gpu = make_gpu(24, free_gib=free_gib, compute_capability=(8, 9), processes=processes or {})
    return replace(make_machine(24), gpus=(gpu,))


def on_card() -> Placement:
    place = Place(gpus=card().gpus, budget=min(map(to_spare, card().gpus)))
    found = fit_vllm(make_spec("big", engine=EngineKind.VLLM), Overrides(), place)
    assert isinstance(found, Placement)
    return found


def sleepers(make: Callable[..., Box], **flags: tuple[str, ...]) -> Box:
    """A box whose models sleep on a card, on which no two of them fit; it shows what the engines hold."""
    memory = MemoryEstimate(weights=10 * GIB, kv_cache=6 * GIB)

    def machine() -> Machine:
        awake = [p for p in plans.values() if box.engine.state(p.model_id) is EngineState.READY]
        return card(free_gib=24 - sum(p.memory.total for p in awake) / GIB)

    spec = {name: make_spec(name, engine=EngineKind.VLLM) for name in ("big", "other")}
    plans = {name: make_placement(name, spec=spec[name], gpus=(0,), memory=memory) for name in spec}
    box = make(flags, placements=plans, machine=machine, limits=replace(LIMITS, asleep=1))
    return box


def test_colder_level(make: Callable[..., Box], tmp_path: Path) -> None:
    """
    A model that wakes with other weights is ended, and started from its files; it sleeps so no more.

    Its template has another day in it than at the load, and that hides nothing.
    """
    seen = str(tmp_path / "seen")
    box = sleepers(make, big=("--wrong-after-wake", "--only-first", seen))
    for name in ("big", "other"):
        box.switch(name)
    assert box.engine.asleep == {"big"}
    record = box.switch("big")

    assert (record.outcome, record.level, record.attempts) == ("ready", Level.COLD, 2)
    assert "big woke from asleep_1 and answers its canary prompt otherwise" in record.reason
    assert [placement.model_id for placement in box.engine.started] == ["big", "other", "big"]
    assert list(box.board.read().banned) == [("big", Level.ASLEEP_1)]
    assert box.board.read().quarantined == {}


def test_a_wake_on_another_day_is_no_failure(make: Callable[..., Box]) -> None:
    """The same weights answer the prompt of the load's day as they did then: nothing is started anew."""
    box = sleepers(make)
    for name in ("big", "other", "big"):
        record = box.switch(name)

    assert (record.outcome, record.level, record.attempts) == ("ready", Level.ASLEEP_1, 1)
    assert [placement.model_id for placement in box.engine.started] == ["big", "other"]
    assert box.board.read().banned == {}


@pytest.mark.parametrize(
    ("flag", "says"), [("--out-of-memory", "CUDA out of memory"), ("--killed-on-load", "exit code 137")]
)
def test_smaller_plan(make: Callable[..., Box], tmp_path: Path, flag: str, says: str) -> None:
    """Out of memory in the engine's words, or in the kernel's: no second try of the same plan, the next smaller one."""
    full = on_card()
    box = make({"big": (flag, "--only-first", str(tmp_path / "seen"))}, placements={"big": full}, machine=card)
    record = box.switch("big")

    assert (record.outcome, record.attempts) == ("ready", 2)
    assert box.engine.started == [full, shrink(full, card())[0]]
    assert says in record.reason
    assert "smaller than planned" in record.reason


def test_memory_that_is_not_freed(make: Callable[..., Box], tmp_path: Path) -> None:
    """
    The driver still counts the ended engine's process: the next load waits, then begins with an alert.

    The card is a file in which the engine notes its pid, and which nobody clears when it ends.
    """
    noted = tmp_path / "card"

    def machine() -> Machine:
        pids = noted.read_text().split() if noted.exists() else []
        return card(free_gib=24 - 20 * len(pids), processes=dict.fromkeys(map(int, pids), 20 * GIB))

    plans = {name: make_placement(name, gpus=(0,)) for name in ("big", "other")}
    box = make({"big": ("--memory-not-freed", str(noted))}, placements=plans, machine=machine)
    box.switch("big")
    record = box.switch("other")

    assert record.outcome == "ready"
    assert box.pauses == [0.2] * 50
    engine_pid = noted.read_text().strip()
    assert box.board.read().unfreed == {"big": f"process {engine_pid} still holds 20.0 GiB of card 0"}

    noted.unlink()
    box.switch("big")
    assert box.board.read().unfreed == {}
