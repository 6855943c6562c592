"""
What must be stopped so that a model can start? A pure answer, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from worker.state.residency import Residency, Resident


@dataclass(frozen=True, kw_only=True)
class SwitchPlan:
    """The residents to stop, in order, before the model starts; `start` is None if it should not or need not."""

    stop: tuple[str, ...] = ()
    start: str | None = None
    reason: str


def plan_switch(residency: Residency, model_id: str, size: int) -> SwitchPlan:
    """
    Decide how to make *model_id*, which takes *size* bytes, ready.

    The questions, in order:

    1. Is it ready already?                       Change nothing.
    2. Is it larger than everything there is?     Change nothing.
    3. Does it fit beside the others?             Start it.
    4. Otherwise                                  Stop the group of residents that costs least, then start it.

    A group costs its jobs in flight first, then how many models it stops, then its bytes; ties go by name.
    """
    # (1) Ready already.
    if residency.ready(model_id):
        return SwitchPlan(reason=f"{model_id} is ready already")

    # (2) Larger than everything there is.
    if size > residency.capacity:
        return SwitchPlan(reason=f"{model_id} takes {size} bytes, more than the {residency.capacity} there are")

    # (3) Fits beside the others. What is left of an earlier, broken load of the same model goes first.
    remains = tuple(r.model_id for r in residency.residents if r.model_id == model_id)
    others = tuple(sorted((r for r in residency.residents if r.model_id != model_id), key=lambda r: r.model_id))
    if _room(residency, others, size):
        reason = f"{model_id} fits beside {', '.join(r.model_id for r in others)}" if others else "nothing is loaded"
        return SwitchPlan(stop=remains, start=model_id, reason=reason)

    # (4) Make room.
    stop = min(
        (group for group in _groups(others) if _room(residency, tuple(r for r in others if r not in group), size)),
        key=_cost,
    )
    names = tuple(sorted(r.model_id for r in stop))
    return SwitchPlan(
        stop=(*remains, *names), start=model_id, reason=f"{model_id} takes the place of {', '.join(names)}"
    )


def _room(residency: Residency, staying: tuple[Resident, ...], size: int) -> bool:
    """Is there room for *size* more bytes and one more model beside those that stay?"""
    return len(staying) < residency.max_residents and sum(r.bytes for r in staying) + size <= residency.capacity


def _groups(residents: tuple[Resident, ...]) -> list[tuple[Resident, ...]]:
    return [group for count in range(1, len(residents) + 1) for group in combinations(residents, count)]


def _cost(group: tuple[Resident, ...]) -> tuple[int, int, int, tuple[str, ...]]:
    in_flight = sum(resident.in_flight for resident in group)
    return in_flight, len(group), sum(r.bytes for r in group), tuple(sorted(r.model_id for r in group))
