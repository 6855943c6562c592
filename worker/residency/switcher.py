"""
Makes models ready, one after the other; where one cannot be, what comes in its place.

The only writer of the board. One switch at a time, on the thread of the switch task. Every wait has an end, and every
stage is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress

from common.errors import ShiftworkerError, UnknownModel
from common.logs import get_logger
from common.schemas import SwitchRecord, SwitchStage, SwitchTime
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Engine
from worker.hardware.gpu import MachineReader
from worker.memory.measured import Measured
from worker.residency.board import ResidencyBoard
from worker.residency.parts import Handback, Learned, Parts, SwitchLimits
from worker.residency.reclaimer import Reclaimer
from worker.residency.recover import Failure, Others, Recovery, recover
from worker.residency.run import SwitchRun
from worker.residency.sleep_notes import SleepNotes
from worker.residency.unloader import Unloader
from worker.selection.placement import Placement
from worker.state.backlog import Backlog
from worker.state.residency import Level, Switching

logger = get_logger(__name__)

_ABANDON_S = 5.0  # for a load to be interrupted; then it is asked again
_LOOK_S = 0.2  # between two looks whether a switch has ended, or must


class Switcher:
    """Makes models ready, one after the other."""

    def __init__(
        self,
        *,
        board: ResidencyBoard,
        placements: Mapping[str, Placement],
        engines: Mapping[EngineKind, Engine],
        machine: MachineReader,
        limits: SwitchLimits,
        fetch: Callable[[ModelSpec], object],
        hand_back: Handback,
        record: Callable[[SwitchRecord], None],
        measured: Callable[[Placement, Measured], object] = lambda _placement, _measured: None,
        load_speed: Callable[[], float | None] = lambda: None,
        times: Callable[[], Iterable[SwitchTime]] = tuple,
        backlog: Callable[[], Backlog] = Backlog,
        substitutable: Callable[[str], bool] = lambda _model_id: False,
        cloud: Callable[[str], bool] = lambda _model_id: False,
        sleeps: SleepNotes | None = None,
        epoch: int = 0,
        pause: Callable[[float], object] | None = None,
    ) -> None:
        self._board = board
        self._placements = placements
        self._engines = engines
        self._substitutable = substitutable
        self._cloud = cloud
        self._leaving = threading.Event()
        pause = pause or self._leaving.wait
        self._parts = Parts(
            board=board,
            placements=placements,
            engines=engines,
            machine=machine,
            limits=limits,
            fetch=fetch,
            hand_back=hand_back,
            record=record,
            measured=measured,
            load_speed=load_speed,
            times=times,
            backlog=backlog,
            reclaimer=Reclaimer(board=board, machine=machine, leaving=self._leaving, pause=pause),
            leaving=self._leaving,
            pause=pause,
            learned=Learned(sleeps=sleeps or SleepNotes()),
        )
        self._unloader = Unloader(self._parts)
        self._one_at_a_time = threading.Lock()
        self._asked_epoch = epoch  # switches asked of an earlier start of this worker are stale

    def ask(self, model_id: str, epoch: int) -> None:
        """Note on the board that a switch to *model_id* was asked for; any other one will do nothing."""
        self._asked_epoch = epoch  # also if it is the smaller one: Redis may have lost its counter
        self._board.switching(Switching(to_model=model_id, epoch=epoch, since=time.time()))

    def switch(
        self,
        model_id: str,
        *,
        epoch: int | None = None,
        reason: str = "",
        force: bool = False,
        on_stage: Callable[[SwitchStage, str], None] = lambda _stage, _detail: None,
    ) -> SwitchRecord:
        """
        Make *model_id* ready; returns what happened, also when it failed.

        Should that leave nothing ready, another model is made ready in its place: see `recover`.

        *epoch* None comes from a person and is always carried out; *force* skips the checks of temperature,
        power and free memory. Each stage is told to *on_stage* as it begins.

        Raises
        ------
        UnknownModel
            This worker has no placement for *model_id*.
        """
        if model_id not in self._placements:
            raise UnknownModel(
                f"This worker has no model {model_id!r}; it has {', '.join(sorted(self._placements)) or 'none'}. "
                "`shiftworker models` says why the others were left out."
            )
        with self._one_at_a_time:
            previous = next(iter(self._board.read().ready_models), None)
            stale = epoch is not None and epoch != self._asked_epoch
            run = self._run(model_id, reason=reason, force=force, on_stage=on_stage)
            if stale:
                return run.finished("stale")
            try:
                asked = run.carry_out()
                while run.error is not None:
                    after = self._after(run.placement, run.error, previous)
                    logger.info("residency.recovering", model_id=after.model_id, rung=after.rung, reason=after.reason)
                    if after.model_id is None:
                        break
                    run = self._run(after.model_id, reason=f"{after.rung}: {after.reason}", on_stage=on_stage)
                    run.carry_out()
                return asked
            finally:
                self._board.switching(None)

    def _run(
        self, model_id: str, *, reason: str, on_stage: Callable[[SwitchStage, str], None], force: bool = False
    ) -> SwitchRun:
        return SwitchRun(
            self._parts,
            self._unloader,
            self._placements[model_id],
            epoch=self._asked_epoch,
            reason=reason,
            force=force,
            on_stage=on_stage,
        )

    def _after(self, failed: Placement, error: ShiftworkerError, previous: str | None) -> Recovery:
        """Ask what comes after a model that was given up."""
        now, residency = time.time(), self._board.read()
        possible = [p for p in self._placements.values() if not residency.is_quarantined(p.model_id, now)]
        smaller = [p for p in possible if p.auto and p.spec.tier < failed.spec.tier]
        others = Others(
            ready=residency.ready_models,
            cascade=tuple(p.model_id for p in sorted(smaller, key=lambda p: (-p.spec.tier, p.model_id))),
            previous=previous if previous in {p.model_id for p in possible} else None,
            substitutable=_is_known(self._substitutable, failed.model_id),
            cloud=_is_known(self._cloud, failed.model_id),
        )
        return recover(Failure(model_id=failed.model_id, error=error), others)

    def note_deaths(self) -> tuple[str, ...]:
        """Take engines that died by themselves off the board; returns their models. Cheap; call it often."""
        return self._unloader.note_deaths()

    def level(self, model_id: str) -> Level:
        """From where *model_id* would be made ready now; cheap."""
        return self._parts.level(model_id)

    def abandon(self) -> None:
        """
        End the switch under way and begin no other: the worker leaves. Returns when that switch has ended.

        A load is interrupted, not waited for, and so is a model that falls asleep; the switch ends as failed, and its
        model is not quarantined.
        """
        self._leaving.set()
        while not self._one_at_a_time.acquire(timeout=_LOOK_S):
            # Asked again each time: a load that was just beginning had no process yet that could be ended.
            for resident in self._board.read().residents:
                if resident.level is Level.STARTING or (resident.level is Level.STOPPING and not resident.in_flight):
                    with suppress(ShiftworkerError):
                        engine = self._parts.engine(resident.model_id)
                        engine.ensure_stopped(resident.model_id, timeout_s=_ABANDON_S)
        self._one_at_a_time.release()

    def close(self) -> None:
        """End every engine: the worker leaves."""
        for engine in self._engines.values():
            engine.close()
        for resident in self._board.read().residents:
            self._board.remove(resident.model_id)


def _is_known(ask: Callable[[str], bool], model_id: str) -> bool:
    """Ask about the jobs that wait for *model_id*; no, if nobody can say."""
    try:
        return ask(model_id)
    except Exception as error:  # noqa: BLE001 - Redis away: that is no reason to be without a model
        logger.warning("residency.not_told", model_id=model_id, error=str(error))
        return False
