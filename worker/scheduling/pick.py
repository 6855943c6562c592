"""
Whose turn is it? A pure answer, with its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from worker.state.backlog import Backlog
from worker.state.residency import Level, Residency, Resident


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
    2. Is there room for a model with jobs beside     That one: whatever is ready stays so. Of several, the model of
       those that are loaded?                         the job that waits longest. Not while (4) is the matter.
    3. Has a model with jobs just become ready?       Keep it for *min_turn_s*, lest an overload only switches.
    4. Has a job waited longer than *max_wait_s*?     The model of the one that waits longest.
    5. Are there jobs for a model that is ready?      Keep it: a switch costs seconds, its next job nothing.
    6. Do jobs run that a switch would wait for?      Keep their model: what arrives meanwhile runs with them.
    7. Otherwise                                      The model of the job that waits longest.

    A model in quarantine gets no turn. A job whose age is unknown counts as new; ties go by name.
    """
    possible = [model for model in sorted(models) if not residency.is_quarantined(model, now)]
    waiting = [model for model in possible if backlog.count(model)]
    ready = sorted(
        (r for r in residency.residents if r.level is Level.READY and r.model_id in possible), key=lambda r: r.model_id
    )

    def age(model: str) -> float:
        oldest_at = backlog.oldest_at(model)
        return 0.0 if oldest_at is None else now - oldest_at

    # (1) Nothing waits.
    if not waiting:
        return _idle_turn(ready, starting if starting in possible else None)

    at_work = sorted((r for r in ready if r.model_id in waiting), key=lambda r: (-age(r.model_id), r.model_id))

    # (2) Room for one more.
    longest = min(waiting, key=lambda model: (-age(model), model))
    beside = [model for model in waiting if residency.residents and model in residency.beside]
    if beside and (longest in beside or age(longest) <= max_wait_s):
        first = min(beside, key=lambda model: (-age(model), model))
        return Turn(
            model_id=first, reason=f"{backlog.count(first)} of its jobs wait, and it fits beside what is loaded"
        )

    # (3) A turn just begun.
    if fresh := next((r for r in at_work if now - r.since < min_turn_s), None):
        return Turn(model_id=fresh.model_id, reason=f"its turn began {now - fresh.since:.0f} s ago")

    # (4) Over the bound.
    if age(longest) > max_wait_s:
        return Turn(model_id=longest, reason=f"a job has waited {age(longest):.0f} s, the bound is {max_wait_s:.0f} s")

    # (5) Collate.
    if at_work:
        first = at_work[0].model_id
        return Turn(model_id=first, reason=f"{backlog.count(first)} of its jobs wait and it is ready")

    # (6) Jobs that a switch would have to wait for.
    full = len(residency.residents) >= residency.max_residents
    if full and (busy := next((r for r in ready if r.in_flight), None)):
        return Turn(
            model_id=busy.model_id, reason=f"{busy.in_flight} of its jobs run, and a switch would wait for them"
        )

    # (7) Switch.
    return Turn(model_id=longest, reason=f"{backlog.count(longest)} of its jobs wait, none for what is ready")


def _idle_turn(ready: Sequence[Resident], starting: str | None) -> Turn:
    if ready:
        return Turn(model_id=ready[0].model_id, reason="nothing waits; it stays ready")
    if starting is not None:
        return Turn(model_id=starting, reason="nothing waits; the model to start with")
    return Turn(model_id=None, reason="nothing waits, and no model can be loaded")
