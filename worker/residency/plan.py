"""
What must leave so that a model can be made ready, and does it sleep or end? A pure answer, with its reason.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

from worker.hardware.gpu import Machine
from worker.residency.settle import Leaver, Rest, settle
from worker.state.residency import HOST, Level, Residency, Resident


@dataclass(frozen=True, kw_only=True)
class SwitchPlan:
    """What ends and what falls asleep before the model is made ready; `start` is None if it should not or need not."""

    stop: tuple[str, ...] = ()
    sleep: tuple[tuple[str, Level], ...] = ()
    start: str | None = None
    reason: str


@dataclass(frozen=True, kw_only=True)
class Sleeping:
    """How models may sleep here; by default none does."""

    rests: Mapping[str, tuple[Rest, ...]] = field(default_factory=dict)  # of models that are ready, the best first
    order: Sequence[str] = ()  # all residents, the one that is needed next first
    most: int = 0  # models asleep at once
    host_bytes: int | None = None  # of the host, that residents may take together; None = all of it


@dataclass(frozen=True, kw_only=True)
class Missed:
    """What it costs that a model leaves; by default nobody knows."""

    waited_for: Collection[str] = ()  # models for which jobs wait
    back_s: Mapping[str, float] = field(default_factory=dict)  # seconds to make each ready again; unknown = absent


def plan_switch(
    residency: Residency,
    model_id: str,
    needs: Mapping[int, int],
    sleeping: Sleeping | None = None,
    missed: Missed | None = None,
) -> SwitchPlan:
    """
    Decide how to make *model_id*, which *needs* so many bytes by card and HOST while it is ready, ready.

    Each card counts for itself: what is free on one is of no use to a model on another. What other programs hold is
    room for nobody: where a model needs some of that too, ours leave, and a smaller plan has to do with the rest.

    The questions, in order:

    1. Is it ready already?                             Change nothing.
    2. Does it need more of a place than all there is?  Change nothing.
    3. Does it fit beside those that are awake?         None of them leaves.
    4. Otherwise                                        The group of them leaves that costs least.
    5. Does what leaves, and what sleeps, have room     It sleeps; the one that is needed next has the first choice
       beside all that?                                 (see `settle`). Who has none ends.

    A group costs its jobs in flight first; then how many of it jobs wait for, for each of them must come back; then
    the seconds that bringing all of it back takes, unless they are unknown of any model that is awake; then how many
    leave, then its bytes; ties go by name.
    """
    sleeping, missed = sleeping or Sleeping(), missed or Missed()

    # (1) Ready already.
    if residency.ready(model_id):
        return SwitchPlan(reason=f"{model_id} is ready already")

    # (2) Larger than everything there is.
    for place, size in sorted(needs.items()):
        if size > (there := residency.places.get(place, 0)):
            name = "the host" if place == HOST else f"card {place}"
            return SwitchPlan(reason=f"{model_id} takes {size} bytes of {name}, more than the {there} there are")

    # (3) Fits beside the others. What is left of an earlier, broken load of the same model goes first.
    remains = tuple(r.model_id for r in residency.awake if r.model_id == model_id)
    awake = tuple(sorted((r for r in residency.awake if r.model_id != model_id), key=lambda r: r.model_id))
    leaving: tuple[Resident, ...] = ()
    most = residency.free(())
    wanted = {place: min(size, most[place]) for place, size in needs.items()}
    reason = f"{model_id} fits beside {', '.join(r.model_id for r in awake)}" if awake else "nothing is loaded"

    # (4) Make room.
    if not _room(residency, awake, wanted):
        if any(r.model_id not in missed.back_s for r in awake):
            missed = replace(missed, back_s={})
        groups = (group for count in range(1, len(awake) + 1) for group in combinations(awake, count))
        enough = (group for group in groups if _room(residency, _without(awake, group), wanted))
        leaving = min(enough, key=lambda group: _cost(group, missed))
        reason = f"{model_id} takes the place of {', '.join(sorted(r.model_id for r in leaving))}"

    # (5) Asleep, or ended.
    asleep = tuple(r for r in residency.residents if r.level.asleep and r.model_id != model_id)
    left = _left(residency, _without(awake, leaving), needs, sleeping)
    levels = settle(_leavers((*leaving, *asleep), sleeping), left, most=sleeping.most)
    sleep = tuple(sorted((r.model_id, levels[r.model_id]) for r in leaving if r.model_id in levels))
    ended = tuple(sorted(r.model_id for r in (*leaving, *asleep) if r.model_id not in levels))
    details = [
        *(f"{model} falls asleep ({level})" for model, level in sleep),
        *(f"{r.model_id} slept and ends" for r in sorted(asleep, key=lambda r: r.model_id) if r.model_id in ended),
    ]
    return SwitchPlan(stop=(*remains, *ended), sleep=sleep, start=model_id, reason=", ".join([reason, *details]))


def fitting_beside(residency: Residency, models: Mapping[str, Mapping[int, int]]) -> frozenset[str]:
    """Name those of *models* (name -> its needs) that could be made ready while all that are awake stay so."""
    plans = {model_id: plan_switch(residency, model_id, needs) for model_id, needs in models.items()}
    awake = {resident.model_id for resident in residency.awake}
    return frozenset(model for model, plan in plans.items() if plan.start is not None and not awake & {*plan.stop})


def see_others(residency: Residency, machine: Machine) -> Residency:
    """
    Note on *residency* what other programs hold, by what is free on *machine* now.

    That is what our own count calls free and the machine does not. A card that does not say what is free speaks
    against nothing.
    """
    free = {HOST: machine.ram_available_bytes, **{gpu.index: gpu.free_bytes for gpu in machine.gpus}}
    counted = replace(residency, others={}).free()
    others = {at: max(0, size - left) for at, size in counted.items() if (left := free.get(at)) is not None}
    return replace(residency, others=others)


def _room(residency: Residency, staying: tuple[Resident, ...], needs: Mapping[int, int]) -> bool:
    """Is there room for one more model, and on each card for its bytes, beside those that stay?"""
    free = residency.free(staying)
    return len(staying) < residency.max_residents and all(size <= free[place] for place, size in needs.items())


def _left(
    residency: Residency, staying: tuple[Resident, ...], needs: Mapping[int, int], sleeping: Sleeping
) -> Mapping[int, int]:
    """What the model and those that stay leave of each place, for sleepers."""
    free = {place: size - needs.get(place, 0) for place, size in residency.free(staying).items()}
    if sleeping.host_bytes is not None:
        free[HOST] -= max(0, residency.free(())[HOST] - sleeping.host_bytes)
    return free


def _leavers(residents: Sequence[Resident], sleeping: Sleeping) -> list[Leaver]:
    """Who leaves or sleeps, the one that is needed next first; who sleeps can stay so, and cannot sleep otherwise."""

    def rank(resident: Resident) -> tuple[int, str]:
        known = resident.model_id in sleeping.order
        return sleeping.order.index(resident.model_id) if known else len(sleeping.order), resident.model_id

    return [
        Leaver(
            model_id=r.model_id,
            rests=(Rest(level=r.level, held=r.held),) if r.level.asleep else sleeping.rests.get(r.model_id, ()),
        )
        for r in sorted(residents, key=rank)
    ]


def _without(residents: tuple[Resident, ...], group: tuple[Resident, ...]) -> tuple[Resident, ...]:
    return tuple(r for r in residents if r not in group)


def _cost(group: tuple[Resident, ...], missed: Missed) -> tuple[int, int, float, int, int, tuple[str, ...]]:
    names = tuple(sorted(r.model_id for r in group))
    in_flight = sum(resident.in_flight for resident in group)
    waited_for = sum(name in missed.waited_for for name in names)
    back_s = sum(missed.back_s.get(name, 0.0) for name in names)
    held = sum(sum(resident.held.values()) for resident in group)
    return in_flight, waited_for, back_s, len(group), held, names
