"""
Whose turn is it? A pure answer, with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.state.backlog import Backlog
from worker.state.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The model whose jobs should run now; None = nothing to do and nothing to load."""

    model_id: str | None
    reason: str


def pick_turn(
    backlog: Backlog,
    residency: Residency,
    models: Sequence[str],
    *,
    now: float,
    max_wait_s: float,
    min_turn_s: float,
    starting: str | None = None,
) -> Turn:
    """
    Decide which of *models* should be ready at *now* (Unix seconds).

    Jobs are collated by model, with a bound on waiting. The questions, in order:

    1. Is nothing waiting?                            Keep what is ready; load *starting* if nothing is.
    2. Has a model with jobs just become ready?       Keep it for *min_turn_s*, lest an overload only switches.
    3. Has a job waited longer than *max_wait_s*?     The model of the one that waits longest.
    4. Are there jobs for a model that is ready?      Keep it: a switch costs seconds, its next job nothing.
    5. Otherwise                                      The model of the job that waits longest.

    A model in quarantine gets no turn. A job whose age is unknown counts as new; ties go by name.
    """
    possible = [model for model in sorted(models) if not residency.is_quarantined(model, now)]
    waiting = [model for model in possible if backlog.count(model)]
    ready = [model for model in possible if residency.ready(model)]

    def age(model: str) -> float:
        oldest_at = backlog.oldest_at(model)
        return 0.0 if oldest_at is None else now - oldest_at

    # (1) Nothing waits.
    if not waiting:
        if ready:
            return Turn(model_id=ready[0], reason="nothing waits; it stays ready")
        if starting in possible:
            return Turn(model_id=starting, reason="nothing waits; the model to start with")
        return Turn(model_id=None, reason="nothing waits, and no model can be loaded")

    at_work = sorted((model for model in waiting if model in ready), key=lambda model: (-age(model), model))

    # (2) A turn just begun.
    for model in at_work:
        resident = residency.resident(model)
        if resident is not None and now - resident.since < min_turn_s:
            return Turn(model_id=model, reason=f"its turn began {now - resident.since:.0f} s ago")

    # (3) Over the bound.
    longest = min(waiting, key=lambda model: (-age(model), model))
    if age(longest) > max_wait_s:
        return Turn(model_id=longest, reason=f"a job has waited {age(longest):.0f} s, the bound is {max_wait_s:.0f} s")

    # (4) Collate.
    if at_work:
        return Turn(model_id=at_work[0], reason=f"{backlog.count(at_work[0])} of its jobs wait and it is ready")

    # (5) Switch.
    return Turn(model_id=longest, reason=f"{backlog.count(longest)} of its jobs wait, none for what is ready")
