"""
What people see of a plan in the terminal.
"""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from worker.simulate.plan import Plan


def show_plan(plan: Plan, *, turns: bool) -> RenderableType:
    """Lay out the figures, and the turns if they are asked for."""
    figures = Table(box=None, show_header=False)
    for name, value in plan.as_dict(turns=False).items():
        figures.add_row(name, f"{value:,.1f}" if isinstance(value, float) else str(value))
    if not turns:
        return figures
    taken = Table("asked at", "ready at", "worker", "model", "jobs", "why", box=None)
    for turn in plan.turns:
        moments = f"{turn.asked_s:,.1f}", f"{turn.ready_s:,.1f}"
        taken.add_row(*moments, turn.worker, escape(turn.model), str(turn.jobs), escape(turn.reason))
    return Group(figures, taken)
