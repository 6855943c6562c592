"""
What people see of a plan in the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from worker.simulate.live import LivePlan
from worker.simulate.plan import Plan
from worker.simulate.run import TurnTaken


def show_plan(plan: Plan, *, turns: bool) -> RenderableType:
    """Lay out the figures, and the turns if they are asked for."""
    figures = Table(box=None, show_header=False)
    for name, value in plan.as_dict(turns=False).items():
        figures.add_row(name, f"{value:,.1f}" if isinstance(value, float) else str(value))
    return Group(figures, _show_turns(plan.turns)) if turns else figures


def show_live_plan(plan: LivePlan, *, turns: bool) -> RenderableType:
    """Lay out when each model's jobs will have ended, and the turns if they are asked for."""
    lines: list[RenderableType] = [
        f"{escape(model)}: {count:,} jobs, the last ends in {plan.finish_s[model]:,.0f} s"
        for model, count in plan.jobs.items()
    ]
    lines += [
        f"[yellow]{escape(model)}: {count:,} jobs, and no worker that is alive serves it[/]"
        for model, count in plan.unserved.items()
    ]
    lines.append(f"{plan.switches} switches on {plan.workers} workers")
    return Group(*lines, *([_show_turns(plan.turns)] if turns else []))


def _show_turns(turns: Sequence[TurnTaken]) -> RenderableType:
    taken = Table("asked at", "ready at", "worker", "model", "jobs", "why", box=None)
    for turn in turns:
        moments = f"{turn.asked_s:,.1f}", f"{turn.ready_s:,.1f}"
        taken.add_row(*moments, turn.worker, escape(turn.model), str(turn.jobs), escape(turn.reason))
    return taken
