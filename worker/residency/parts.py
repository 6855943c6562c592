"""
What every switch works with: the board, the engines, the machine, the limits, and what earlier switches left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from common.logs import get_logger
from common.schemas import SwitchRecord, SwitchTime
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Engine
from worker.hardware.gpu import MachineReader
from worker.memory.measured import Measured
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.reclaimer import Reclaimer
from worker.residency.sleep_notes import SleepNotes
from worker.residency.verify import Said
from worker.selection.placement import Placement
from worker.state.backlog import Backlog
from worker.state.residency import Level

logger = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class SwitchLimits:
    """How long and how often."""

    attempt_s: float  # to load and verify, at least; more where a model's size says so
    attempts: int
    drain_s: float  # for jobs in flight to end by themselves
    quarantine_s: float  # the first pause after failing; doubles each time
    load: LoadLimits
    asleep: int = 0  # models that may sleep beside those that are ready


class Handback(Protocol):
    """Tells the jobs that run on a model to stop and go back to their queue."""

    def __call__(self, model_id: str) -> None:
        """Tell them; returns at once."""


@dataclass(kw_only=True)
class Learned:
    """What switches have learned of each model: since the worker began, and of its sleep by earlier starts too."""

    ran_out: dict[str, int | None] = field(default_factory=dict)  # bytes that were free when its plan ran out of them
    said: dict[str, Said] = field(default_factory=dict)  # its canary's answer after its last start
    sleeps: SleepNotes = field(default_factory=SleepNotes)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Everything; see `Switcher` for who gives it."""

    board: ResidencyBoard
    placements: Mapping[str, Placement]
    engines: Mapping[EngineKind, Engine]
    machine: MachineReader
    limits: SwitchLimits
    fetch: Callable[[ModelSpec], object]
    hand_back: Handback
    record: Callable[[SwitchRecord], None]
    measured: Callable[[Placement, Measured], object]
    load_speed: Callable[[], float | None]
    times: Callable[[], Iterable[SwitchTime]]
    backlog: Callable[[], Backlog]
    reclaimer: Reclaimer
    leaving: threading.Event  # the worker leaves
    pause: Callable[[float], object]
    learned: Learned = field(default_factory=Learned)

    def engine(self, model_id: str) -> Engine:
        """The engine that runs *model_id*."""
        return self.engines[self.placements[model_id].spec.engine]

    def level(self, model_id: str) -> Level:
        """From where *model_id* would be made ready now."""
        found = self.board.read().resident(model_id)
        return found.level if found is not None and found.level.asleep else self.engine(model_id).standby

    def ban(self, model_id: str, level: Level, reason: str) -> None:
        """Never put *model_id* to sleep at *level* again."""
        logger.error("residency.sleeps_no_more", model_id=model_id, asleep=level, reason=reason)
        self.board.ban(model_id, level, reason)
        self.learned.sleeps.ban(model_id, level, reason)

    def count_standby(self) -> None:
        """Put on the board what the processes that stand ready take of the host."""
        self.board.standby(sum(engine.standby_bytes() for engine in set(self.engines.values())))
