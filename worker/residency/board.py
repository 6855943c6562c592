"""
The board: the one place where it stands what is loaded, and the door every job goes through.

`enter` and `leave` are the jobs' side: nobody gets in unless his model is ready, so no job runs under the
wrong model. Everything else is the switcher's, its only writer. Readers take a frozen `Residency`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from common.errors import EngineNotReady
from worker.state.residency import Level, Quarantine, Residency, Resident, Switching


class ResidencyBoard:
    """What is loaded now, for many threads."""

    def __init__(
        self,
        *,
        capacity: int,
        max_residents: int,
        cards: Mapping[int, int] | None = None,
        banned: Mapping[tuple[str, Level], str] | None = None,
    ) -> None:
        self._residency = Residency(
            capacity=capacity, cards=cards or {}, max_residents=max_residents, banned=banned or {}
        )
        self._changed = threading.Condition()

    def read(self) -> Residency:
        """What is loaded now."""
        return self._residency

    @contextmanager
    def enter(self, model_id: str) -> Iterator[None]:
        """
        Hold *model_id* ready while a job runs on it.

        Raises
        ------
        EngineNotReady
            It is not ready, or no longer.
        """
        with self._changed:
            found = self._residency.resident(model_id)
            if found is None or found.level is not Level.READY:
                raise EngineNotReady(f"Model {model_id} is not ready on this worker; the job waits in its queue.")
            begun = time.time()
            self.put(replace(found, in_flight=found.in_flight + 1, begun=(*found.begun, begun)))
        try:
            yield
        finally:
            self._leave(model_id, found.since, begun)

    def _leave(self, model_id: str, since: float, begun: float) -> None:
        with self._changed:
            found = self._residency.resident(model_id)
            # The engine may have died under the job, and another one be ready that knows nothing of it.
            if found is not None and found.since == since:
                place = found.begun.index(begun)
                others = found.begun[:place] + found.begun[place + 1 :]
                self.put(replace(found, in_flight=found.in_flight - 1, begun=others))

    def wait_empty(self, model_id: str, *, timeout_s: float) -> bool:
        """Wait until no job runs on *model_id*; False if *timeout_s* was not enough."""
        with self._changed:
            return self._changed.wait_for(lambda: self._in_flight(model_id) == 0, timeout_s)

    def _in_flight(self, model_id: str) -> int:
        found = self._residency.resident(model_id)
        return found.in_flight if found else 0

    # --- the switcher's side -------------------------------------------------------------------------

    def put(self, resident: Resident) -> None:
        """Add *resident*, or replace what is known of it."""
        with self._changed:
            others = tuple(r for r in self._residency.residents if r.model_id != resident.model_id)
            self._set(residents=(*others, resident))

    def set_level(self, model_id: str, level: Level) -> None:
        """Change how far *model_id* is from answering."""
        with self._changed:
            found = self._residency.resident(model_id)
            if found is not None:
                self.put(replace(found, level=level))

    def remove(self, model_id: str) -> None:
        """*model_id* holds nothing any more."""
        with self._changed:
            self._set(residents=tuple(r for r in self._residency.residents if r.model_id != model_id))

    def switching(self, switching: Switching | None) -> None:
        """A switch was asked for, has moved on, or has ended."""
        self._set(switching=switching)

    def quarantine(self, model_id: str, quarantine: Quarantine | None) -> None:
        """Leave *model_id* alone for a while, or forget that it failed."""
        with self._changed:
            others = {name: q for name, q in self._residency.quarantined.items() if name != model_id}
            self._set(quarantined=others if quarantine is None else {**others, model_id: quarantine})

    def unfreed(self, unfreed: Mapping[str, str]) -> None:
        """What of the memory of models that ended is not back."""
        self._set(unfreed=unfreed)

    def ban(self, model_id: str, level: Level, reason: str) -> None:
        """*model_id* sleeps at *level* no more."""
        with self._changed:
            self._set(banned={**self._residency.banned, (model_id, level): reason})

    def standby(self, size: int) -> None:
        """A process that stands ready for any model takes so many bytes of the host."""
        self._set(standby_bytes=size)

    def _set(self, **fields: object) -> None:
        with self._changed:
            self._residency = replace(self._residency, **fields)  # type: ignore[arg-type]  # its own field names
            self._changed.notify_all()
