"""
Which model's files should be brought into the page cache while another model works? Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from worker.state.backlog import Backlog
from worker.state.residency import Level, Residency


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """The model whose files to read, and how many bytes of them at most; None = none."""

    model_id: str | None = None
    most_bytes: int = 0
    reason: str


def choose_prefetch(
    backlog: Backlog, residency: Residency, models: Iterable[str], *, spare_bytes: int, now: float
) -> Prefetch:
    """
    Choose among *models* at *now* (Unix seconds); *spare_bytes* of RAM are free beyond what must stay so.

    The questions, in order:

    1. Is a switch asked for or under way?             None: its load has the disk to itself. (A model that fits beside
                                                       those that work, asleep or not, is made ready at once: that is
                                                       `pick_turn`'s second question.)
    2. Do jobs wait for a model whose weights are in   The one whose job waits longest: it is loaded next.
       its files only? Not one that failed a short
       while ago.
    3. Is there memory for its files?                  As much of them as there is, from the beginning; what is read
                                                       beyond it would drive out what was read before.
    """
    # (1) A switch.
    if residency.switching is not None:
        return Prefetch(reason=f"a switch to {residency.switching.to_model} is under way")

    # (2) The next one.
    absent = [
        model
        for model in sorted(models)
        if backlog.count(model) and _only_in_files(residency, model) and not residency.is_quarantined(model, now)
    ]
    if not absent:
        return Prefetch(reason="no job waits for a model that is not loaded")
    after = min(absent, key=lambda model: (_waiting_since(backlog, model), model))

    # (3) Memory.
    if spare_bytes <= 0:
        return Prefetch(reason=f"{after} is next, and no memory is to spare for its files")
    return Prefetch(
        model_id=after, most_bytes=spare_bytes, reason=f"{backlog.count(after)} jobs wait for {after}, it is next"
    )


def _only_in_files(residency: Residency, model: str) -> bool:
    found = residency.resident(model)
    return found is None or found.level is Level.ASLEEP_2


def _waiting_since(backlog: Backlog, model: str) -> float:
    oldest_at = backlog.oldest_at(model)
    return float("inf") if oldest_at is None else oldest_at
