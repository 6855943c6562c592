"""
What must be stopped so that a model can start? A pure answer, with its reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from worker.state.residency import HOST, Residency, Resident


@dataclass(frozen=True, kw_only=True)
class SwitchPlan:
    """The residents to stop, in order, before the model starts; `start` is None if it should not or need not."""

    stop: tuple[str, ...] = ()
    start: str | None = None
    reason: str


def plan_switch(residency: Residency, model_id: str, needs: Mapping[int, int]) -> SwitchPlan:
    """
    Decide how to make *model_id*, which *needs* so many bytes by card and HOST, ready.

    Each card counts for itself: what is free on one is of no use to a model on another.

    The questions, in order:

    1. Is it ready already?                             Change nothing.
    2. Does it need more of a place than all there is?  Change nothing.
    3. Does it fit beside the others?                   Start it.
    4. Otherwise                                        Stop the group of residents that costs least, then start it.

    A group costs its jobs in flight first, then how many models it stops, then its bytes; ties go by name.
    """
    # (1) Ready already.
    if residency.ready(model_id):
        return SwitchPlan(reason=f"{model_id} is ready already")

    # (2) Larger than everything there is.
    for place, size in sorted(needs.items()):
        if size > (there := residency.places.get(place, 0)):
            name = "the host" if place == HOST else f"card {place}"
            return SwitchPlan(reason=f"{model_id} takes {size} bytes of {name}, more than the {there} there are")

    # (3) Fits beside the others. What is left of an earlier, broken load of the same model goes first.
    remains = tuple(r.model_id for r in residency.residents if r.model_id == model_id)
    others = tuple(sorted((r for r in residency.residents if r.model_id != model_id), key=lambda r: r.model_id))
    if _room(residency, others, needs):
        reason = f"{model_id} fits beside {', '.join(r.model_id for r in others)}" if others else "nothing is loaded"
        return SwitchPlan(stop=remains, start=model_id, reason=reason)

    # (4) Make room.
    stop = min(
        (group for group in _groups(others) if _room(residency, tuple(r for r in others if r not in group), needs)),
        key=_cost,
    )
    names = tuple(sorted(r.model_id for r in stop))
    return SwitchPlan(
        stop=(*remains, *names), start=model_id, reason=f"{model_id} takes the place of {', '.join(names)}"
    )


def fitting_beside(residency: Residency, models: Mapping[str, Mapping[int, int]]) -> frozenset[str]:
    """Name those of *models* (name -> its needs) that could be loaded now without stopping any."""
    plans = {model_id: plan_switch(residency, model_id, needs) for model_id, needs in models.items()}
    return frozenset(model_id for model_id, plan in plans.items() if plan.start is not None and not plan.stop)


def _room(residency: Residency, staying: tuple[Resident, ...], needs: Mapping[int, int]) -> bool:
    """Is there room for one more model, and on each card for its bytes, beside those that stay?"""
    free = residency.free(staying)
    return len(staying) < residency.max_residents and all(size <= free[place] for place, size in needs.items())


def _groups(residents: tuple[Resident, ...]) -> list[tuple[Resident, ...]]:
    return [group for count in range(1, len(residents) + 1) for group in combinations(residents, count)]


def _cost(group: tuple[Resident, ...]) -> tuple[int, int, int, tuple[str, ...]]:
    in_flight = sum(resident.in_flight for resident in group)
    held = sum(sum(resident.held.values()) for resident in group)
    return in_flight, len(group), held, tuple(sorted(r.model_id for r in group))
