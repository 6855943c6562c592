"""
How far one switch has come: its stages on the board, told to whoever listens, and its record at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from common.logs import get_logger
from common.schemas import SwitchRecord, SwitchStage, utc_now
from worker.residency.expect import PRICED
from worker.residency.parts import Parts
from worker.selection.placement import Placement
from worker.state.residency import Level, Switching

logger = get_logger(__name__)

OnStage = Callable[[SwitchStage, str], None]


class Progress:
    """The stages of a switch to *model_id*, asked for as *epoch*."""

    def __init__(self, parts: Parts, model_id: str, *, epoch: int, reason: str, on_stage: OnStage) -> None:
        self._parts = parts
        self._model_id = model_id
        self._epoch = epoch
        self._reason = reason
        self._on_stage = on_stage
        self._began = time.monotonic()
        self._stages: dict[SwitchStage, float] = {}
        self._stage: tuple[SwitchStage, float] | None = None
        self._priced_since: float | None = None
        ready = parts.board.read().ready_models
        self._from = ready[0] if ready else None

    def begin(self) -> None:
        """The switch is under way."""
        self._show(None)

    def enter(self, stage: SwitchStage, detail: str) -> None:
        """A stage begins, and the one before has ended."""
        self._leave()
        self._stage = (stage, time.monotonic())
        self._show(stage)
        logger.info("residency.stage", model_id=self._model_id, stage=stage, detail=detail)
        self.tell(self._on_stage, stage, detail)

    def tell(self, listener: Callable[..., object], *what: object) -> None:
        """Tell the outside; that nobody listens (Redis is away, say) does not stop a switch half way."""
        try:
            listener(*what)
        except Exception as error:  # noqa: BLE001 - whatever a listener's fault is, it is not the switch's
            logger.warning("residency.not_told", model_id=self._model_id, error=str(error))

    def finished(
        self, outcome: Any, detail: str, *, placement: Placement, attempts: int = 0, level: Level = Level.COLD
    ) -> SwitchRecord:
        """Keep the record of the switch, tell its end, and return the record."""
        self._leave()
        record = SwitchRecord(
            from_model=self._from,
            to_model=self._model_id,
            outcome=outcome,
            seconds=round(time.monotonic() - self._began, 4),
            stages={stage: round(seconds, 4) for stage, seconds in self._stages.items()},
            attempts=attempts,
            reason="; ".join(part for part in (self._reason, detail) if part),
            at=utc_now(),
            level=level,
            load_bytes=weights_of(placement),
        )
        logger.info(
            "residency.switched", from_level=record.level, **record.model_dump(mode="json", exclude={"at", "level"})
        )
        if outcome != "stale":
            stage = SwitchStage.READY if outcome == "ready" else SwitchStage.FAILED
            self.tell(self._parts.record, record)
            self._show(stage)
            self.tell(self._on_stage, stage, record.reason)
        return record

    def _show(self, stage: SwitchStage | None) -> None:
        now = time.time()
        if stage in PRICED and self._priced_since is None:
            self._priced_since = now
        self._parts.board.switching(
            Switching(
                to_model=self._model_id,
                epoch=self._epoch,
                since=now,
                priced_since=self._priced_since,
                begun=True,
                stage=stage,
            )
        )

    def _leave(self) -> None:
        if self._stage is not None:
            stage, since = self._stage
            self._stages[stage] = self._stages.get(stage, 0.0) + time.monotonic() - since
            self._stage = None


def weights_of(placement: Placement) -> int:
    """Bytes of weights that a load reads, for all its cards."""
    return placement.memory.weights * placement.tensor_parallel_size
