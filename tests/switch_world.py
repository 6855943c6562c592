"""
A switcher on engines in memory, for tests: what it was asked is written down, and it fails as it is told to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from common.errors import EngineDied
from common.schemas import SwitchRecord, SwitchTime
from tests.factories import GIB, make_machine, make_placement, make_spec
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Call, Completion, EngineState, Loaded, StopSignal
from worker.engines.stub import StubEngine
from worker.hardware.gpu import Machine
from worker.memory.measured import Measured
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.parts import SwitchLimits
from worker.residency.sleep_notes import SleepNotes
from worker.residency.switcher import Switcher
from worker.selection.placement import Placement
from worker.state.backlog import Backlog
from worker.state.residency import Level, Residency

LIMITS = SwitchLimits(
    attempt_s=5, attempts=3, drain_s=5, quarantine_s=60, load=LoadLimits(max_temperature_c=85, max_power_share=0.95)
)


class TellingEngine(StubEngine):
    """A stub that writes down what it was asked, and fails as it is told to."""

    def __init__(self, deeds: list[str], *, load_s: float = 0.0, wake_s: Mapping[Level, float] | None = None) -> None:
        super().__init__(load_s=load_s, wake_s=wake_s)
        self._deeds = deeds
        self.load_errors: list[Exception] = []  # one for each of the next loads
        self.stop_errors: list[Exception] = []  # and stops
        self.sleep_errors: list[Exception] = []  # and times of falling asleep
        self.on_load: Callable[[], object] = lambda: None
        self.canary: Callable[[Completion], Completion] = lambda completion: completion
        self.loaded: Callable[[Loaded], Loaded] = lambda loaded: loaded
        self.standing = 0  # bytes of a process that stands ready for any model
        self.placements: list[Placement] = []  # of the loads, also of those that failed
        self.timeouts: list[float] = []  # of the loads
        self.calls: list[Call] = []

    def ensure_ready(self, placement: Placement, *, timeout_s: float) -> Loaded:
        asleep = self.state(placement.model_id) is EngineState.ASLEEP
        self._deeds.append(f"{'wake' if asleep else 'load'} {placement.model_id}")
        self.placements.append(placement)
        self.timeouts.append(timeout_s)
        if self.load_errors:
            raise self.load_errors.pop(0)
        self.on_load()
        return self.loaded(super().ensure_ready(placement, timeout_s=timeout_s))

    def standby_bytes(self) -> int:
        return self.standing

    def ensure_asleep(self, model_id: str, level: Level, *, timeout_s: float) -> None:
        self._deeds.append(f"{level} {model_id}")
        if self.sleep_errors:
            raise self.sleep_errors.pop(0)
        super().ensure_asleep(model_id, level, timeout_s=timeout_s)

    def ensure_stopped(self, model_id: str, *, timeout_s: float) -> None:
        self._deeds.append(f"stop {model_id}")
        if self.stop_errors:
            raise self.stop_errors.pop(0)
        super().ensure_stopped(model_id, timeout_s=timeout_s)

    def generate(self, model_id: str, call: Call, stop: StopSignal) -> Completion:
        self.calls.append(call)
        return self.canary(super().generate(model_id, call, stop))


@dataclass
class World:
    """A switcher, everything it touches, and what it did."""

    machine: Machine = field(default_factory=lambda: make_machine(24))
    limits: SwitchLimits = LIMITS
    placements: Mapping[str, Placement] = field(
        default_factory=lambda: {
            name: make_placement(name, spec=make_spec(name, engine=EngineKind.STUB), gpus=(0,)) for name in "ab"
        }
    )
    deeds: list[str] = field(default_factory=list)  # in the order in which they happened
    records: list[SwitchRecord] = field(default_factory=list)
    handed_back: threading.Event = field(default_factory=threading.Event)
    on_fetch: Callable[[], object] = lambda: None
    on_look: Callable[[], object] = lambda: None  # at the machine
    tell: Callable[[SwitchRecord], object] = lambda _record: None
    keep: Callable[[Measured], object] = lambda _measured: None
    capacity: int = 24 * GIB  # of the one card
    host: int = 24 * GIB
    max_residents: int = 1
    epoch: int = 0
    load_s: float = 0.0
    load_speed: float | None = None
    wake_s: Mapping[Level, float] | None = None  # None = the engine cannot sleep
    times: tuple[SwitchTime, ...] = ()
    backlog: Backlog = field(default_factory=Backlog)
    sleeps: SleepNotes = field(default_factory=SleepNotes)  # what earlier starts learned
    waits: Callable[[str], bool] = lambda _model_id: False  # do jobs wait for it that another model may answer?

    def __post_init__(self) -> None:
        self.board = ResidencyBoard(
            capacity=self.host,
            cards={0: self.capacity},
            max_residents=self.max_residents,
            banned=self.sleeps.banned(),
        )
        self.engine = TellingEngine(self.deeds, load_s=self.load_s, wake_s=self.wake_s)
        self.switcher = Switcher(
            board=self.board,
            placements=self.placements,
            engines=dict.fromkeys(EngineKind, self.engine),
            machine=self,
            limits=self.limits,
            fetch=self._fetch,
            hand_back=self._hand_back,
            record=self._record,
            measured=self._measured,
            load_speed=lambda: self.load_speed,
            times=lambda: self.times,
            backlog=lambda: self.backlog,
            substitutable=self.waits,
            sleeps=self.sleeps,
            epoch=self.epoch,
            pause=lambda seconds: self.deeds.append(f"pause {seconds:g}"),
        )

    def read(self) -> Machine:
        self.on_look()
        return self.machine

    def _fetch(self, spec: ModelSpec) -> None:
        self.deeds.append(f"fetch {spec.id}")
        self.on_fetch()

    def _record(self, record: SwitchRecord) -> None:
        self.tell(record)
        self.records.append(record)

    def _measured(self, _placement: Placement, measured: Measured) -> None:
        self.keep(measured)

    def _hand_back(self, model_id: str) -> None:
        self.deeds.append(f"hand back {model_id}")
        self.handed_back.set()

    def switch(self, model_id: str, **options: Any) -> SwitchRecord:
        return self.switcher.switch(
            model_id, on_stage=lambda stage, _detail: self.deeds.append(f"[{stage}]"), **options
        )

    @property
    def residency(self) -> Residency:
        return self.board.read()

    @property
    def levels(self) -> dict[str, Level]:
        return {resident.model_id: resident.level for resident in self.residency.residents}

    def with_a_ready(self) -> World:
        self.switch("a")
        self.deeds.clear()
        self.records.clear()
        return self


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises *error*, whatever it is given."""

    def fail(*_: object) -> None:
        raise error

    return fail


def crash(completion: Completion) -> Completion:
    raise EngineDied("the engine ended")
