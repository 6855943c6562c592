"""
Something failed under a job: may it run again, and in what company? Pure: its faults in, an answer with its reason out.

An engine that dies does not say whose request it was. So those that were in it are suspects: each runs again in half
the company at most, at last alone, and beside suspects only. Who is alone in an engine that dies is the culprit;
everybody else is answered on the way. Every death halves the company of at least one culprit, whoever else is there:
with c of them among n jobs the engine dies c * (log2(n) + max_deaths) times at most.

A worker dies of many things, and seldom of a job. So its first death under a job says nothing, and it takes more of
them alone; between, the same holds, but that the company is that of the whole worker.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.errors import WorkerDied
from common.schemas import Fault

_WORKER_DIED = WorkerDied.__name__
_LONGEST_PAUSE_S = 10.0  # a thread of the pool waits meanwhile


@dataclass(frozen=True, kw_only=True)
class Again:
    """What becomes of a job after a fault."""

    reason: str
    set_aside: bool = False
    company: int | None = None  # jobs in the engine at most, this one among them; None = any number: no suspect
    in_worker: bool = False  # that many in the whole worker
    pause_s: float = 0.0  # before it may run


def isolate(
    faults: Sequence[Fault], *, max_attempts: int, max_deaths: int, max_worker_deaths: int, first_pause_s: float
) -> Again:
    """
    Decide what becomes of a job with these *faults*.

    The questions, in order:

    1. Did its engine die *max_deaths* times with it alone there,  Set it aside: it is the culprit.
       or its worker *max_worker_deaths* times?
    2. Did *max_attempts* attempts fail in engines that live on?   Set it aside: one more will not help.
    3. Did its engine die, or its worker more than once?           Again, in half of the smallest company it had.
    4. Otherwise                                                   Again, after a pause that doubles.

    An engine that dies takes its time to come back, so only the last one needs a pause.
    """
    in_engine = [fault.company for fault in faults if fault.company is not None and fault.kind != _WORKER_DIED]
    in_worker = [fault.company for fault in faults if fault.company is not None and fault.kind == _WORKER_DIED]
    failures = len(faults) - len(in_engine) - len(in_worker)

    # (1) The culprit.
    if (alone := in_engine.count(1)) >= max_deaths:
        return Again(set_aside=True, reason=f"the engine died {_times(alone)} with this job alone in it")
    if (alone := in_worker.count(1)) >= max_worker_deaths:
        return Again(set_aside=True, reason=f"the worker died {_times(alone)} with this job alone in it")

    # (2) Often enough.
    if failures >= max_attempts:
        return Again(set_aside=True, reason=f"{_times(failures)} it failed in engines that lived on")

    companies = [*in_engine, *in_worker[1:]]
    company = math.ceil(min(companies) / 2) if companies else None
    died = bool(faults) and faults[-1].company is not None
    pause_s = 0.0 if died or not failures else min(_LONGEST_PAUSE_S, first_pause_s * 2 ** (failures - 1))
    if company is None:
        return Again(pause_s=pause_s, reason=f"failed {_times(failures)} of {max_attempts}")
    where = "worker" if in_worker[1:] else "engine"
    reason = f"a suspect: {company} in the {where} at most"
    return Again(company=company, in_worker=bool(in_worker[1:]), pause_s=pause_s, reason=reason)


def may_join(company: int | None, *, inside: int, suspects: Collection[int], suspects_wait: bool) -> bool:
    """
    May a job join those in an engine?

    *company* is its own bound, None = it is no suspect; *suspects* are the bounds of the suspects among *inside* jobs.

    The questions, in order:

    1. Is it no suspect?       Only where there is none, and none waits: it would become one by the next death.
    2. Is somebody no suspect? Not beside him, for the same reason.
    3. Otherwise               As far as everybody's bound goes, its own among them.
    """
    if company is None:
        return not suspects_wait and not suspects
    return len(suspects) == inside and inside < min([company, *suspects])


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
