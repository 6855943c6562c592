"""
What does the end of one call mean for a webhook: delivered, once more, or given up? Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

_FIRST_S, _TIMES, _LONGEST_S = (
    5.0,
    3.0,
    3600.0,
)  # between two calls: 5 s, 15 s, 45 s, 2 min, 7 min, 20 min, 1 h, 1 h ...
_GONE = 410
_SLOW_DOWN = {429, 502, 503, 504}


@dataclass(frozen=True, kw_only=True)
class Owed:
    """A webhook whose call is due."""

    job_id: str
    url: str
    calls: int  # those that were made, in vain
    since: float  # Unix seconds, when the job ended


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one call ended."""

    status: int | None = None  # HTTP's; None = there was no answer
    retry_after_s: float | None = None  # as the answer says
    problem: str = ""  # why there was none
    refused: bool = False  # the address is none that we may call


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What follows. Without *again_in_s* it was the last call: delivered, or given up."""

    delivered: bool
    reason: str
    again_in_s: float | None = None


def judge(owed: Owed, ended: Ended, *, now: float, give_up_s: float) -> Verdict:
    """
    Decide what follows from the end of a call.

    1. Did it answer 2xx?                    Delivered.
    2. Is the address refused, or did it     Given up: another call would be refused too; Standard Webhooks means by
       answer 410 Gone?                      410 that nobody wants to hear of it any more.
    3. Would the next call come later than   Given up.
       *give_up_s* after the job's end?
    4. Otherwise                             Once more: three times later than the last time, or when the answer says,
                                             if that is later still; an hour at most.
    """
    why = ended.problem or f"HTTP {ended.status}"
    # (1) Delivered.
    if ended.status is not None and 200 <= ended.status < 300:  # noqa: PLR2004
        return Verdict(delivered=True, reason=why)

    # (2) In vain for ever.
    if ended.refused or ended.status == _GONE:
        return Verdict(delivered=False, reason=f"given up: {why}")

    # (3) Too late. (4) Once more.
    pause_s = _FIRST_S * _TIMES ** min(owed.calls, 20)
    if ended.status in _SLOW_DOWN and ended.retry_after_s is not None:
        pause_s = max(pause_s, ended.retry_after_s)
    pause_s = min(pause_s, _LONGEST_S)
    if now + pause_s > owed.since + give_up_s:
        return Verdict(delivered=False, reason=f"given up after {owed.calls + 1} calls: {why}")
    return Verdict(delivered=False, reason=why, again_in_s=pause_s)
