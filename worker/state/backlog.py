"""
What waits: a frozen reading of the queues.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """The jobs that wait for one model."""

    count: int
    oldest_at: float | None  # Unix seconds when the job at the head was routed; None = unknown or empty


@dataclass(frozen=True, kw_only=True)
class Backlog:
    """The waiting jobs of every model that this worker can serve."""

    by_model: Mapping[str, Waiting] = field(default_factory=dict)

    def count(self, model_id: str) -> int:
        """How many jobs wait for *model_id*."""
        return waiting.count if (waiting := self.by_model.get(model_id)) else 0

    def oldest_at(self, model_id: str) -> float | None:
        """When the oldest waiting job of *model_id* was routed, Unix seconds."""
        return waiting.oldest_at if (waiting := self.by_model.get(model_id)) else None
