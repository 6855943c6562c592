"""
What waits: a frozen reading of the queues, in sums, never job by job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

USUAL_PRIORITY = 3  # of a job that does not say


@dataclass(frozen=True, kw_only=True)
class Lane:
    """The jobs of one tenant and one job class (its priority) that wait for one model, and all name it or none does."""

    count: int
    oldest_at: float | None = None  # Unix seconds when the first of them was routed; None = unknown
    newest_at: float | None = None  # likewise of the last of them
    priority: int = USUAL_PRIORITY  # 0 is served first
    tenant: str = "default"
    prompt_tokens: int | None = None  # of all of them together; None = not counted
    output_tokens: int | None = None
    deadline_at: float | None = None  # Unix seconds, the earliest; None = none has one
    max_wait_s: float | None = None  # the bound of this tenant and class; None = the worker's
    any_model: bool = False  # its jobs name no model: a larger one may take them


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """The jobs that wait for one model."""

    count: int
    oldest_at: float | None  # Unix seconds when the job at the head was routed; None = unknown or empty
    lanes: tuple[Lane, ...] = ()  # the same jobs by tenant and class; empty = not told apart

    @property
    def by_class(self) -> tuple[Lane, ...]:
        """The lanes; where nobody told them apart, one of usual priority."""
        return self.lanes or ((Lane(count=self.count, oldest_at=self.oldest_at),) if self.count else ())


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
