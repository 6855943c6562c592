"""
What does a producer want of a job beside its answer? Drawn by the job's number, so that every run asks the same.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.schemas import JobState


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How one job may end, and who hears of it."""

    cancel_after_s: float | None = None  # since it was sent
    deadline_s: float | None = None  # likewise
    webhook: bool = False

    @property
    def may_end(self) -> frozenset[JobState]:
        """The ends that keep the promise."""
        ends = {JobState.ANSWERED}
        if self.cancel_after_s is not None:
            ends.add(JobState.CANCELLED)
        if self.deadline_s is not None:
            ends.add(JobState.EXPIRED)
        return frozenset(ends)


PLAIN = Wish()


def wish_of(number: int) -> Wish:
    """
    One job in ten is cancelled, at once to 4 s later; one in ten has 1 to 13 s; two in five a webhook.

    Where every fourth streams, half of both do.
    """
    turn = number // 10 % 5
    return Wish(
        cancel_after_s=float(turn) if number % 10 == 4 else None,
        deadline_s=1.0 + 3 * turn if number % 10 == 8 else None,
        webhook=number % 5 in {3, 4},
    )
