"""
Should a larger model that is ready take the jobs of a smaller one? Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from worker.scheduling.pick import Knowledge
from worker.selection.placement import Placement
from worker.state.backlog import Backlog, Lane
from worker.state.pace import Pace
from worker.state.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """The jobs of *model_id* that name no model run with *by*; None = nobody's do."""

    model_id: str | None = None
    by: str | None = None
    reason: str


def find_larger(placements: Sequence[Placement]) -> Mapping[str, Sequence[str]]:
    """Say for each model which others may take its jobs, the next larger first: those that "auto" may choose."""
    chosen = sorted((p for p in placements if p.auto), key=lambda p: (p.spec.tier, p.model_id))
    return {
        small.model_id: tuple(
            large.model_id
            for large in chosen
            if large.spec.tier > small.spec.tier and large.spec.complexity_up_to >= small.spec.complexity_up_to
        )
        for small in chosen
        if small.spec.substitute
    }


def choose_substitute(
    backlog: Backlog,
    residency: Residency,
    larger: Mapping[str, Sequence[str]],
    *,
    known: Knowledge,
    now: float,
) -> Substitution:
    """
    Choose at *now* (Unix seconds) whose waiting jobs a larger model takes over; *larger*: model -> who may.

    Only jobs that name no model may be taken, and no others are counted. The questions, in order:

    1. Which models have such jobs, and are not ready    Each of them, the one whose job waits longest first.
       here or elsewhere? None during a switch.
    2. Is a larger one ready that may take them?         The first in order of *larger*.
    3. Do its jobs and these end sooner with it than     Yes: it takes them, all of them. Unknown: no.
       after a switch, which waits for its own jobs?
    """
    lanes = {model: _of_any_model(backlog, model) for model in larger} if residency.switching is None else {}
    absent = sorted(
        (m for m in lanes if lanes[m] and not residency.ready(m) and not known.elsewhere.get(m)),
        key=lambda model: (min(now if lane.oldest_at is None else lane.oldest_at for lane in lanes[model]), model),
    )
    for model in absent:
        by = next((other for other in larger[model] if residency.ready(other)), None)
        if by is None:
            continue
        own_s, with_s = (_work_s(known.paces.get(each), lanes[model]) for each in (model, by))
        switch_s = residency.switch_s.get(model)
        if own_s is not None and switch_s is not None and with_s is not None and with_s < switch_s + own_s:
            alone = f"a switch and {model} {switch_s + own_s:.1f} s"
            return Substitution(
                model_id=model, by=by, reason=f"{by} is ready and takes {with_s:.1f} s for them, {alone}"
            )
    return Substitution(reason="no larger model that is ready ends the jobs of a smaller one sooner")


def _of_any_model(backlog: Backlog, model: str) -> tuple[Lane, ...]:
    waiting = backlog.by_model.get(model)
    return tuple(lane for lane in waiting.lanes if lane.any_model) if waiting else ()


def _work_s(pace: Pace | None, lanes: Sequence[Lane]) -> float | None:
    works = [pace.work_s(lane) if pace else None for lane in lanes]
    known = [work for work in works if work is not None]
    return sum(known) if len(known) == len(works) else None
