"""
How long may a job of a tenant and class wait before its model gets a turn?
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

from common.keys import PRIORITY_STEPS

_ANY = "*"
_LEAST = 9  # priority of a job; 0 is the highest


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Seconds by tenant and class (a step of PRIORITY_STEPS), None = any; *usual_s* for who is not named."""

    usual_s: float
    by: Mapping[tuple[str | None, int | None], float] = field(default_factory=dict)

    @classmethod
    def parse(cls, usual_s: float, texts: Iterable[str]) -> Self:
        """
        Read "acme=60", "*:9=3600", "acme:0=10": a tenant, a priority, either of them, and seconds.

        Raises
        ------
        ValueError
            One of them is none of that; the message names it.
        """
        return cls(usual_s=usual_s, by=dict(map(_parse, texts)))

    def of(self, tenant: str, step: int) -> float:
        """Seconds that a job may wait; what names the tenant and the class counts first, then the tenant."""
        asked = ((tenant, step), (tenant, None), (None, step), (None, None))
        return next((self.by[who] for who in asked if who in self.by), self.usual_s)


def _parse(text: str) -> tuple[tuple[str | None, int | None], float]:
    who, _, seconds_text = text.rpartition("=")
    tenant, colon, priority = who.rpartition(":")
    if not colon:
        tenant, priority = who, _ANY
    try:
        seconds = float(seconds_text)
        step = None if priority == _ANY else max(step for step in PRIORITY_STEPS if step <= int(priority) <= _LEAST)
    except ValueError:
        seconds, step = math.nan, None
    if not tenant or not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is not TENANT=SECONDS, TENANT:PRIORITY=SECONDS or *:PRIORITY=SECONDS")
    return (None if tenant == _ANY else tenant, step), seconds
