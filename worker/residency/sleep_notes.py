"""
How each model sleeps at each level, as far as it is known: noted as it is learned, and kept over restarts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime

from common.schemas import utc_now
from worker.state.residency import Level


@dataclass(frozen=True, kw_only=True)
class SleepNote:
    """What is known of one model at one level; None = nothing."""

    model_id: str
    level: Level
    weights: int = 0  # bytes, of the load that was measured: of other weights, its figures say nothing
    sleep_s: float | None = None  # to fall asleep, the last time
    host_bytes: int | None = None  # of the host, while it sleeps
    banned: str | None = None  # why it sleeps at this level no more; None = it may
    at: datetime


class SleepNotes:
    """
    Remembers how models sleep, and gives each note that changes to *keep* (Redis, say).

    *notes* is what earlier starts of this worker learned.
    """

    def __init__(
        self, notes: Iterable[SleepNote] = (), *, keep: Callable[[SleepNote], object] = lambda _note: None
    ) -> None:
        self._notes = {(note.model_id, note.level): note for note in notes}
        self._keep = keep
        self._lock = threading.Lock()

    def seconds(self, model_id: str, *, weights: int) -> Mapping[Level, float]:
        """How long a model with so many bytes of *weights* takes to fall asleep, by level; unknown = absent."""
        known = self._of(model_id, weights)
        return {note.level: note.sleep_s for note in known if note.sleep_s is not None}

    def host_bytes(self, model_id: str, *, weights: int) -> Mapping[Level, int]:
        """What a model with so many bytes of *weights* takes of the host while it sleeps; unknown = absent."""
        known = self._of(model_id, weights)
        return {note.level: note.host_bytes for note in known if note.host_bytes is not None}

    def banned(self) -> Mapping[tuple[str, Level], str]:
        """Each model, and how it sleeps no more -> why."""
        with self._lock:
            return {kind: note.banned for kind, note in self._notes.items() if note.banned is not None}

    def slept(self, model_id: str, level: Level, *, weights: int, sleep_s: float, host_bytes: int) -> None:
        """Note what falling asleep took, and what the sleep takes."""
        self._note(model_id, level, weights=weights, sleep_s=round(sleep_s, 4), host_bytes=host_bytes)

    def ban(self, model_id: str, level: Level, reason: str) -> None:
        """Note that a model sleeps at this level no more."""
        self._note(model_id, level, banned=reason)

    def _of(self, model_id: str, weights: int) -> list[SleepNote]:
        with self._lock:
            return [note for note in self._notes.values() if (note.model_id, note.weights) == (model_id, weights)]

    def _note(self, model_id: str, level: Level, **news: object) -> None:
        with self._lock:
            before = self._notes.get((model_id, level)) or SleepNote(model_id=model_id, level=level, at=utc_now())
            after = replace(before, at=utc_now(), **news)  # type: ignore[arg-type]  # its own field names
            self._notes[model_id, level] = after
        self._keep(after)
