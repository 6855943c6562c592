"""
Should a larger model that is ready take the jobs of a smaller one? Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from worker.state.backlog import Backlog, Lane
from worker.state.pace import Pace
from worker.state.residency import Residency


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """The jobs of *model_id* that name no model run with *by*; None = nobody's do."""

    model_id: str | None = None
    by: str | None = None
    reason: str


def choose_substitute(
    backlog: Backlog,
    residency: Residency,
    larger: Mapping[str, Sequence[str]],
    *,
    paces: Mapping[str, Pace],
    now: float,
) -> Substitution:
    """
    Choose at *now* (Unix seconds) whose waiting jobs a larger model takes over; *larger*: model -> who may.

    Only jobs of `model: auto` may be taken; *backlog* should count no others. The questions, in order:

    1. Which models have jobs and are not ready?         Each of them, the one whose job waits longest first.
    2. Is a larger one ready that may take them?         The first in order of *larger*.
    3. Do its jobs and these end sooner with it than     Yes: it takes them, all of them. Unknown: no.
       after a switch, which waits for its own jobs?
    """
    absent = sorted(
        (model for model in larger if backlog.count(model) and residency.resident(model) is None),
        key=lambda model: (at if (at := backlog.oldest_at(model)) is not None else now, model),
    )
    for model in absent:
        for by in larger[model]:
            if not residency.ready(by):
                continue
            alone_s, with_s = _seconds(backlog, residency, paces, model, by)
            if alone_s is not None and with_s is not None and with_s < alone_s:
                reason = f"{by} is ready and takes {with_s:.0f} s for them, a switch and {model} {alone_s:.0f} s"
                return Substitution(model_id=model, by=by, reason=reason)
            break
    return Substitution(reason="no larger model that is ready ends the jobs of a smaller one sooner")


def _seconds(
    backlog: Backlog, residency: Residency, paces: Mapping[str, Pace], model: str, by: str
) -> tuple[float | None, float | None]:
    """Seconds for the jobs of *model* by itself, its switch before them, and with *by*; None = nobody knows."""
    lanes = backlog.by_model[model].by_class
    own_s = _work_s(paces.get(model), lanes)
    switch_s = residency.switch_s.get(model)
    return (None if own_s is None or switch_s is None else switch_s + own_s), _work_s(paces.get(by), lanes)


def _work_s(pace: Pace | None, lanes: Sequence[Lane]) -> float | None:
    works = [pace.work_s(lane) if pace else None for lane in lanes]
    known = [work for work in works if work is not None]
    return sum(known) if len(known) == len(works) else None
