"""
Whose turn is it, until when, and why? Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from common.keys import PRIORITY_STEPS
from worker.scheduling.foresee import (
    LITTLE,
    Foreseen,
    Lateness,
    Load,
    Outlook,
    by_due,
    foresee,
    harms,
    is_better,
    weigh,
)
from worker.state.backlog import Backlog
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

_LEEWAY_S = 1.0  # a turn ends that much before somebody else would be late: no decision comes to the instant
_SWITCHING = 0.2  # share of the time that switches for urgency, or out of a turn just begun, may take ...
_PATIENCE = 0.25  # ... until somebody has waited for that share of the bound; then it is _SMALL
_PAYS = 10.0  # a detour must gain this many times its price in seconds of waiting ...
_SMALL = 0.05  # ... and take at most this share of what it interrupts, and its switches this share of the turn
_RARE = 0.1  # a detour to a model that steady traffic keeps away may take this share of the turn so far ...
_FAR_LESS = 1 / 3  # ... and those it delays have waited, with it, for this share at most of what that model's have


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The model whose jobs should run now; None = nothing to do and nothing to load."""

    model_id: str | None
    reason: str
    until: float | None = None  # Unix seconds: look again then, though nothing has happened; None = no need
    overload: str | None = None  # that jobs will be late in any order; None = nothing of that kind is foreseen


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What a decision may know beside the queues and the residents; what nobody has measured is absent."""

    paces: Mapping[str, Pace] = field(default_factory=dict)  # by model
    elsewhere: Mapping[str, int] = field(default_factory=dict)  # model -> other workers that serve it, or load it


_NOTHING = Knowledge()


def pick_turn(
    backlog: Backlog,
    residency: Residency,
    models: Sequence[str],
    *,
    now: float,
    max_wait_s: float,
    min_turn_s: float,
    starting: str | None = None,
    known: Knowledge = _NOTHING,
) -> Turn:
    """
    Decide which of *models* should be ready at *now* (Unix seconds).

    Jobs are collated by model: a turn lasts while its model has jobs, and the next one is that of the job that waits
    longest. The questions, in order:

    1. Does nothing wait that is this worker's?       Keep what is ready; load *starting* if nothing is.
    2. Is there room for a model with jobs beside     That one: whatever is ready stays so. Of several, the model of
       those that are loaded?                         the job that waits longest. Not while (4) is the matter.
    3. Has a model with jobs just become ready?       Keep it for *min_turn_s*, or until it has paid for its switches
                                                      if that is sooner: an overload must not only switch. Not where
                                                      that alone would break a short bound, and nobody falls behind.
    4. Would a job be late for its bound              The model that is due first, at the last moment. The most urgent
       (*max_wait_s*) if we stay, and not if we go?   class decides that is late in one case only.
    5. Likewise for a deadline?                       That model, if no bound is broken for it; where jobs are late
                                                      anyway, once the turn has paid for the switches.
    6. Does a more urgent class wait elsewhere?       That model, once the turn has paid for the switches, if no bound
                                                      is broken for it.
    7. Are there jobs for a model that is ready?      Keep it, unless a short detour gains many times its price, or
                                                      steady traffic has kept a rare model away for long.
    8. Otherwise                                      The model of the most urgent class, if no bound is broken for
                                                      it; of several, that of the job that waits longest. In a
                                                      fleet, first one that nobody serves.

    A model in quarantine gets no turn. In a fleet, a model that others serve is this worker's only if it is ready
    here, or if a share of its jobs pays for the switch. A job whose age is unknown counts as new; ties go by name.
    """
    possible = [model for model in sorted(models) if not residency.is_quarantined(model, now)]
    ready = {r.model_id: r for r in residency.residents if r.level is Level.READY and r.model_id in possible}
    loads = [
        weigh(
            model,
            backlog.by_model[model],
            known.paces.get(model),
            ready=model in ready,
            now=now,
            switch_s=residency.switch_s.get(model, 0.0),
            bound_s=max_wait_s,
        )
        for model in possible
        if backlog.count(model)
    ]
    others = {load.model_id: known.elsewhere.get(load.model_id, 0) for load in loads}

    def rank(load: Load) -> tuple[int, int, float, str]:
        return load.job_class, 0 if load.ready else others[load.model_id], load.oldest_at, load.model_id

    at_work = sorted((load for load in loads if load.ready), key=rank)
    absent = sorted((load for load in loads if not load.ready and _is_ours(load, others[load.model_id])), key=rank)

    # (1) Nothing waits.
    if not at_work and not absent:
        return _idle_turn(sorted(ready), starting if starting in possible else None)

    def age(load: Load) -> float:
        return now - min(load.oldest_at, now)

    # (2) Room for one more.
    beside = [load for load in absent if residency.residents and load.model_id in residency.beside]
    longest = max((*absent, *at_work), key=age)
    if beside and (longest in beside or now <= longest.due_at):
        first = min(beside, key=lambda load: (-age(load), load.model_id))
        return _turn(first, f"{first.count} of its jobs wait, and it fits beside what is loaded")

    # (3) A turn just begun.
    for load in at_work:
        since = ready[load.model_id].since
        until = since + _kept_s(load, min_turn_s)
        if now < until and (kept := _keep(load, at_work, absent, ready, now=now, until=until, min_turn_s=min_turn_s)):
            return kept

    if not absent:
        why = f"{at_work[0].count} of its jobs wait and it is ready"
        return _turn(at_work[0], why, overload=_overload(foresee(at_work, now=now)))
    if not at_work:
        return _next_turn(absent, now=now, min_turn_s=min_turn_s)
    return _stay_or_leave(at_work, absent, ready, now=now, max_wait_s=max_wait_s, min_turn_s=min_turn_s)


def _keep(
    begun: Load,
    at_work: Sequence[Load],
    absent: Sequence[Load],
    ready: Mapping[str, Resident],
    *,
    now: float,
    until: float,
    min_turn_s: float,
) -> Turn | None:
    """Keep a turn that has just begun; None: it may end for a bound too short for such a turn."""
    why = f"its turn began {now - ready[begun.model_id].since:.0f} s ago"
    if not absent:
        return _turn(begun, why, until=until, overload=_overload(foresee(at_work, now=now)))
    outlook = Outlook(at_work=at_work, absent=absent, now=now, drain_s=_drain_s(at_work[0], ready))
    due = min(absent, key=by_due)
    go, stay = outlook.go(due), outlook.stay()
    pressing = due.pressing
    too_short = pressing.bound_s <= min_turn_s + due.switch_s + (pressing.work_s or 0.0)
    if too_short and not any(go.late) and not _falls_behind(at_work, now):
        if is_better(go, stay):
            return None
        until = min(until, now + max(_LEEWAY_S, go.slack_s / 2))
    return _turn(begun, why, until=until, overload=_overload(go, stay))


def _kept_s(load: Load, min_turn_s: float) -> float:
    """Seconds for which a turn that has begun is kept: the shortest turn, or until it has paid for its switches."""
    return min(min_turn_s, 2 * load.switch_s / _SWITCHING if load.switch_s else math.inf)


def _drain_s(current: Load, ready: Mapping[str, Resident]) -> float:
    """Seconds until its jobs in flight have ended: the longest of many."""
    in_flight = ready[current.model_id].in_flight
    return current.one_s * (1 + math.log(in_flight)) if in_flight else 0.0


def _next_turn(absent: Sequence[Load], *, now: float, min_turn_s: float) -> Turn:
    """Choose where no model that is ready has jobs."""
    outlook = Outlook(at_work=(), absent=absent, now=now, drain_s=0.0)

    # (4) The bound.
    due = min(absent, key=by_due)
    go, stay = outlook.go(due), outlook.go(absent[0], least_s=_kept_s(absent[0], min_turn_s))
    if due is not absent[0] and is_better(go, stay):
        return _due_turn(due, go, now)
    overload = _overload(go, stay)

    # (5) The deadlines.
    binding, meets = _find_deadline(outlook, min(go, stay, key=_late), min_turn_s)
    if meets is not None and binding is not absent[0]:
        return _deadline_turn(binding, now, overload)

    # (8) The class, then the wait.
    return _turn(absent[0], f"{absent[0].count} of its jobs wait, none for what is ready", overload=overload)


def _stay_or_leave(
    at_work: Sequence[Load],
    absent: Sequence[Load],
    ready: Mapping[str, Resident],
    *,
    now: float,
    max_wait_s: float,
    min_turn_s: float,
) -> Turn:
    """Choose where a model that is *ready* has jobs."""
    current, urgent = at_work[0], absent[0]
    resident, drain_s = ready[current.model_id], _drain_s(current, ready)
    lasted_s = now - resident.since
    share = _SMALL if _falls_behind((*at_work, *absent), now) else _SWITCHING
    outlook = Outlook(at_work=at_work, absent=absent, now=now, drain_s=drain_s)

    def paid_at(other: Load) -> float:
        return resident.since + (drain_s + current.switch_s + other.switch_s) / share

    # (4) The bound.
    due = min(absent, key=by_due)
    go, stay = outlook.go(due), outlook.stay()
    if is_better(go, stay) and (go.slack_s <= _LEEWAY_S or due.due_at <= now + drain_s + due.switch_s):
        return _due_turn(due, go, now)
    best, overload, slack_s = min(go, stay, key=_late), _overload(go, stay), go.slack_s

    # (5) The deadlines.
    binding, meets = _find_deadline(outlook, best, min_turn_s)
    if meets is not None:
        is_time = meets.slack_s <= _LEEWAY_S or binding.start_by <= now + drain_s + binding.switch_s
        if is_time and (now >= paid_at(binding) or not any((*meets.late, *best.late))):
            return _deadline_turn(binding, now, overload)
        slack_s = min(slack_s, meets.slack_s)
    until = now + max(_LEEWAY_S, min(slack_s, max_wait_s) / 2)

    # (6) A more urgent class.
    if urgent.job_class < current.job_class:
        if now < paid_at(urgent):
            until = min(until, paid_at(urgent))
        elif not harms(outlook.go(urgent, least_s=_kept_s(urgent, min_turn_s)), best, urgent.job_class):
            return _turn(urgent, f"{urgent.count} of its jobs wait, some more urgent than any of {current.model_id}")

    # (7) Collate.
    detour = _find_detour(current, absent, now=now, drain_s=drain_s, lasted_s=lasted_s)
    if detour is not None and not harms(outlook.go(detour[0]), best, detour[0].job_class):
        return _turn(*detour)
    return _turn(current, f"{current.count} of its jobs wait and it is ready", until=until, overload=overload)


def _find_detour(
    current: Load, absent: Sequence[Load], *, now: float, drain_s: float, lasted_s: float
) -> tuple[Load, str] | None:
    """Find jobs of another model that a switch there and back is worth, and why."""
    for other in absent:
        if _pays(other, current, lasted_s):
            return other, f"{other.count} short jobs wait: serving them first costs {current.model_id} little"
        if _is_kept_away(other, current, drain_s, lasted_s, now):
            return other, f"a job has waited {now - other.oldest_at:.0f} s, all of {current.model_id} came long after"
    return None


def _find_deadline(outlook: Outlook, best: Foreseen, min_turn_s: float) -> tuple[Load, Foreseen | None]:
    """
    Find the absent model whose deadline binds first, and what going there now would do to all deadlines.

    None: no more of them are met than by staying; or a bound is broken that the *best* order for the bounds keeps, as
    a turn that has begun is kept for a while.
    """
    first = min(outlook.absent, key=lambda load: (load.start_by, load.model_id))
    if first.start_by == math.inf:
        return first, None
    meets = outlook.go(first, deadlines=True)
    if not is_better(meets, outlook.stay(deadlines=True)):
        return first, None
    job_class = min(first.groups, key=lambda group: group.start_by).job_class
    return first, None if harms(outlook.go(first, least_s=_kept_s(first, min_turn_s)), best, job_class) else meets


def _late(foreseen: Foreseen) -> Lateness:
    return foreseen.late


def _falls_behind(loads: Sequence[Load], now: float) -> bool:
    """Has a job that is not batch waited for a good part of its bound? Then urgency must cost the others little."""
    batch = len(PRIORITY_STEPS) - 1
    groups = (group for load in loads for group in load.groups if group.job_class < batch)
    return any(now - group.oldest_at > _PATIENCE * group.bound_s for group in groups)


def _turn(load: Load, reason: str, *, until: float | None = None, overload: str | None = None) -> Turn:
    return Turn(model_id=load.model_id, reason=reason, until=until, overload=overload)


def _idle_turn(ready: Sequence[str], starting: str | None) -> Turn:
    if ready:
        return Turn(model_id=ready[0], reason="nothing waits; it stays ready")
    if starting is not None:
        return Turn(model_id=starting, reason="nothing waits; the model to start with")
    return Turn(model_id=None, reason="nothing waits, and no model can be loaded")


def _is_ours(load: Load, others: int) -> bool:
    """Does nobody else serve it, or does one worker more end its jobs sooner by more than the switch takes?"""
    if not others:
        return True
    return load.work_s is not None and load.work_s / others - load.work_s / (others + 1) > load.switch_s


def _pays(other: Load, current: Load, lasted_s: float) -> bool:
    """Is a detour to the jobs of *other* short, and worth many times what it costs the jobs of *current*?"""
    if other.work_s is None or current.work_s is None or other.job_class > current.job_class:
        return False
    switches_s = other.switch_s + current.switch_s
    detour_s = switches_s + other.work_s
    return (
        detour_s <= _SMALL * current.work_s
        and switches_s <= _SMALL * lasted_s
        and other.count * current.work_s >= _PAYS * current.count * detour_s
    )


def _is_kept_away(other: Load, current: Load, drain_s: float, lasted_s: float, now: float) -> bool:
    """Does *other* wait behind jobs that came long after it, and is a detour to all of its jobs short?"""
    if other.work_s is None or other.job_class > current.job_class:
        return False
    detour_s = drain_s + other.switch_s + other.work_s + current.switch_s
    waited_s = now - other.oldest_at
    return (
        detour_s <= _RARE * lasted_s
        and now - current.oldest_at + detour_s <= _FAR_LESS * waited_s
        and waited_s > _PATIENCE * other.groups[0].bound_s
    )


def _due_turn(due: Load, go: Foreseen, now: float) -> Turn:
    waited_s = now - (due.pressing.due_at - due.pressing.bound_s)
    why = f"a job has waited {waited_s:.0f} s, the bound is {due.pressing.bound_s:.0f} s"
    return _turn(due, why, overload=_overload(go))


def _deadline_turn(binding: Load, now: float, overload: str | None) -> Turn:
    why = f"a job should start within {max(0.0, binding.start_by - now):.0f} s to meet its deadline"
    return _turn(binding, why, overload=overload)


def _overload(*orders: Foreseen) -> str | None:
    """Say by how much jobs will be late in each of these orders of turns; None if one of them is on time."""
    late = max(min(one) for one in zip(*(order.late for order in orders), strict=True))
    if not LITTLE < late < math.inf:  # without end is what nobody has measured
        return None
    return f"some jobs will be late by {late:.0%} of their bound, whichever model comes first"
