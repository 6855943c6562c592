"""
Sees the memory of engines that ended, or fell asleep, come back, card by card, before the next load.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import ERROR, INFO

from common.logs import get_logger
from worker.hardware.gpu import Machine, MachineReader
from worker.residency.board import ResidencyBoard
from worker.residency.confirm import (
    Held,
    Owed,
    confirm_freed,
    owed_after_failure,
    owed_after_sleep,
    owed_after_stop,
    shifted,
)
from worker.selection.placement import Placement

logger = get_logger(__name__)

_LOOKS = 50  # while the driver gives an ended process's memory back; together 10 s
_LOOK_S = 0.2


class Reclaimer:
    """
    Knows what loaded models hold of their cards, and what those that ended have not given back.

    The host needs none of it: the kernel gives a process's memory back with the process, and its end is seen.
    """

    def __init__(
        self,
        *,
        board: ResidencyBoard,
        machine: MachineReader,
        leaving: threading.Event,
        pause: Callable[[float], object],
    ) -> None:
        self._board = board
        self._machine = machine
        self._leaving = leaving
        self._pause = pause
        self._held: dict[str, Held] = {}
        self._owed: list[Owed] = []  # waited for before the next load
        self._lacking: list[Owed] = []  # waited for in vain

    def note_loaded(self, placement: Placement, pids: tuple[int, ...], before: Machine) -> None:
        """Note what a model that was loaded on cards, or woken, holds of them; *before* is the machine as it was."""
        held = replace(self._held.get(placement.model_id, Held()), pids=pids)
        self._held[placement.model_id] = shifted(held, before, self._machine.read(), placement.gpus)

    def pids(self, model_id: str) -> tuple[int, ...]:
        """The processes of a model that is loaded on cards."""
        return self._held.get(model_id, Held()).pids

    def see_asleep(self, placement: Placement, before: Machine, *, freed: int) -> tuple[str, ...]:
        """
        Wait until the cards show that a model which fell asleep gave back *freed* bytes; list what is lacking.

        *before* is the machine while it was awake.
        """
        owed = owed_after_sleep(placement.model_id, before, placement.gpus, freed)
        machine = self._watch((owed,))
        if (held := self._held.get(placement.model_id)) is not None:
            self._held[placement.model_id] = shifted(held, before, machine, placement.gpus)
        return confirm_freed(owed, machine)

    def owed_by(self, placement: Placement, *, begun_at: Machine | None) -> Owed | None:
        """
        Say what a model that is about to be stopped will owe; None if nobody can see it.

        *begun_at* is the machine as its load found it, if that load has failed.
        """
        if begun_at is not None:
            return owed_after_failure(placement.model_id, begun_at, placement.gpus)
        held = self._held.get(placement.model_id)
        if held is None:
            return None
        return owed_after_stop(placement.model_id, held, self._machine.read(), placement.gpus)

    def note_ended(self, owed: Owed | None) -> None:
        """Note that the engine has ended which owes this."""
        if owed is not None:
            self._held.pop(owed.model_id, None)
            self._owed.append(owed)

    def see_freed(self) -> None:
        """
        Wait until the cards show that everything owed is back.

        What is not back at the deadline is an alert, and no longer waited for: the check before the load sees
        whether enough is free all the same. The alert ends as soon as it is back.
        """
        if not (self._owed or self._lacking):
            return
        machine = self._watch(self._owed)
        self._lacking = [owed for owed in (*self._lacking, *self._owed) if confirm_freed(owed, machine)]
        self._owed = []
        lacks = {owed.model_id: "; ".join(confirm_freed(owed, machine)) for owed in self._lacking}
        if lacks != self._board.read().unfreed:
            logger.log(ERROR if lacks else INFO, "residency.unfreed", lacks=lacks)
            self._board.unfreed(lacks)

    def _watch(self, owed: Sequence[Owed]) -> Machine:
        """Look at the cards until all is back that is *owed*, or the time for it is over; gives the last look."""
        machine = self._machine.read()
        for _ in range(_LOOKS):
            if self._leaving.is_set() or not any(confirm_freed(each, machine) for each in owed):
                break
            self._pause(_LOOK_S)
            machine = self._machine.read()
        return machine
