"""
What will happen to whom, and when? Drawn from a seed, so that a run can be repeated.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Target(StrEnum):
    """Who is hit."""

    ENGINE = "engine"
    HOST = "engine host"
    WORKER = "worker"
    OTHER = "other worker"
    ROUTER = "router"
    REDIS = "redis"
    ALL = "all"


class Kind(StrEnum):
    """What happens to it."""

    KILL = "killed"  # SIGKILL; programs are started again when the fault is over
    PAUSE = "paused"  # SIGSTOP, then SIGCONT
    CUT = "cut off"  # from Redis


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong."""

    target: Target
    kind: Kind
    after_s: float  # since the fault before it began
    lasts_s: float

    def __str__(self) -> str:
        return f"{self.target} {self.kind}"


_ENGINES = (Target.ENGINE, Target.HOST)
_PROGRAMS = (Target.WORKER, Target.OTHER, Target.ROUTER)
EVERY_KIND = (
    *((target, Kind.KILL) for target in Target),
    *((target, Kind.PAUSE) for target in (*_ENGINES, *_PROGRAMS, Target.REDIS)),
    *((target, Kind.CUT) for target in _PROGRAMS),
)


def draw_faults(seed: int, count: int, *, lease_s: float) -> tuple[Fault, ...]:
    """
    Draw *count* faults.

    Each of `EVERY_KIND` comes equally often, give or take one. A pause or a cut lasts between a tenth of a lease and
    three: long enough for others to take the jobs away. A new fault often begins before the last one is over.
    """
    dice = random.Random(seed)
    kinds: list[tuple[Target, Kind]] = []
    while len(kinds) < count:
        kinds += dice.sample(EVERY_KIND, k=min(len(EVERY_KIND), count - len(kinds)))
    return tuple(
        Fault(
            target=target,
            kind=kind,
            after_s=dice.uniform(0.2, 4.0),
            lasts_s=dice.uniform(0.0, 2.0) if kind is Kind.KILL else dice.uniform(0.1, 3.0) * lease_s,
        )
        for target, kind in kinds
    )
