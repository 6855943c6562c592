"""
Lets models leave: their jobs end, then they end or fall asleep, and their memory is seen free.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from common.errors import EngineFailed, ShiftworkerError
from common.logs import get_logger
from worker.engines.base import EngineState
from worker.engines.measure import count_bytes
from worker.hardware.gpu import Machine
from worker.residency.expect import allow_s
from worker.residency.parts import Parts
from worker.residency.progress import weights_of
from worker.residency.settle import rest_at
from worker.state.residency import HOST, Level, Resident

logger = get_logger(__name__)

_HANDBACK_S = 30.0  # a job that was told to stop has this long to leave before its engine is ended anyway
_STOP_S = 30.0  # for an engine's processes to be gone
_SURELY_FREED = 0.85  # of weights and KV cache by the plan, whose weights are seldom off by a tenth


class Unloader:
    """Takes models off the cards, and off the board."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._board = parts.board

    def drain(self, models: Iterable[str]) -> None:
        """Give *models* no more jobs, and wait until those that run have ended or were handed back."""
        leaving = tuple(models)
        for model_id in leaving:
            self._board.set_level(model_id, Level.STOPPING)
        drain_s = self._parts.limits.drain_s
        for model_id in leaving:
            if not self._board.wait_empty(model_id, timeout_s=drain_s):
                logger.warning("residency.handing_back", model_id=model_id, after_s=drain_s)
                self._parts.hand_back(model_id)
                self._board.wait_empty(model_id, timeout_s=_HANDBACK_S)

    def stop(self, model_id: str, *, begun_at: Machine | None = None) -> None:
        """
        End *model_id* and take it off the board; what its memory owes is noted.

        *begun_at* is the machine as a load found it that has failed.

        Raises
        ------
        EngineTimeout
            Something of it is still there; it stays on the board.
        """
        owed = self._parts.reclaimer.owed_by(self._parts.placements[model_id], begun_at=begun_at)
        self._parts.engine(model_id).ensure_stopped(model_id, timeout_s=_STOP_S)
        self._board.remove(model_id)
        self._parts.reclaimer.note_ended(owed)

    def put_to_sleep(self, model_id: str, level: Level) -> None:
        """
        Have *model_id* sleep at *level*; one that does not free its cards in time is ended.

        So is one whose jobs would not leave: vLLM would abort them, and call what they have so far their answer.

        Raises
        ------
        EngineTimeout
            See `stop`.
        """
        resident = self._board.read().resident(model_id)
        if resident is None or resident.in_flight:
            self.stop(model_id)
            return
        before, began = self._parts.machine.read(), time.monotonic()
        try:
            self._fall_asleep(model_id, level, before)
        except ShiftworkerError as error:
            if not self._parts.leaving.is_set():
                self._parts.ban(model_id, level, error.message)
            self.stop(model_id)
        else:
            self._note_asleep(resident, level, before, seconds=time.monotonic() - began)

    def _fall_asleep(self, model_id: str, level: Level, before: Machine) -> None:
        parts, placement = self._parts, self._parts.placements[model_id]
        may_take_s = allow_s(parts.limits.attempt_s, weights_of(placement), parts.load_speed())
        parts.engine(model_id).ensure_asleep(model_id, level, timeout_s=may_take_s)
        freed = int(_SURELY_FREED * (placement.memory.weights + placement.memory.kv_cache))
        if lacks := parts.reclaimer.see_asleep(placement, before, freed=freed):
            raise EngineFailed(f"{model_id} fell asleep and kept its memory: {'; '.join(lacks)}")

    def _note_asleep(self, resident: Resident, level: Level, before: Machine, *, seconds: float) -> None:
        """Put on the board what it takes asleep, as far as the machine says; else what was expected."""
        parts, model_id = self._parts, resident.model_id
        now, placement = parts.machine.read(), parts.placements[model_id]
        expected = rest_at(level, resident, placement.memory, host_bytes=None).held
        gone = before.ram_available_bytes - now.ram_available_bytes
        # Other programs come and go meanwhile; what it must hold, and can hold, bounds what is believed.
        least = weights_of(placement) if level is Level.ASLEEP_1 else 0
        host_bytes = min(expected[HOST], max(resident.host_bytes + gone, least))
        on_card = count_bytes(now, parts.reclaimer.pids(model_id)) or expected[resident.gpus[0]]
        weights = placement.memory.weights
        parts.learned.sleeps.slept(model_id, level, weights=weights, sleep_s=seconds, host_bytes=host_bytes)
        self._board.put(replace(resident, level=level, bytes=on_card, host_bytes=host_bytes, since=time.time()))
        logger.info("residency.asleep", model_id=model_id, asleep=level, seconds=round(seconds, 3), host=host_bytes)

    def note_deaths(self) -> tuple[str, ...]:
        """Take engines that died by themselves off the board; returns their models. Cheap; call it often."""
        dead = tuple(r.model_id for r in self._board.read().residents if self._died(r))
        for model_id in dead:
            logger.error("residency.engine_died", model_id=model_id)
            self._board.remove(model_id)
        return dead

    def end_the_dead(self) -> None:
        """
        End what is left of engines that are not on the board: a deaf one lives on, and holds its memory.

        Raises
        ------
        EngineTimeout
            Something of one is still there.
        """
        self.note_deaths()
        for model_id in self._parts.placements:
            if self._board.read().resident(model_id) is None and self._state(model_id) is not EngineState.STOPPED:
                logger.warning("residency.dead_engine_ends", model_id=model_id)
                self.stop(model_id)

    def _died(self, resident: Resident) -> bool:
        if resident.level.asleep:
            return self._state(resident.model_id) is not EngineState.ASLEEP
        return resident.level is Level.READY and self._state(resident.model_id) is not EngineState.READY

    def _state(self, model_id: str) -> EngineState:
        return self._parts.engine(model_id).state(model_id)
