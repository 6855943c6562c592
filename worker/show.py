"""
What people see in the terminal: a choice, a status, as tables; sizes in GiB.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from common.schemas import GpuStatus, HardwareStatus, JobState, JobView, SwitchRecord
from worker.hardware.gpu import Machine
from worker.memory.case import Answer
from worker.memory.measured import Measurement
from worker.selection.choose import Choice
from worker.selection.describe import describe_placement
from worker.selection.placement import Placement

if TYPE_CHECKING:
    from worker.doctor import Report  # it knows every part of a worker, and whoever only asks has only some

Measured = Callable[[Placement], Measurement | None]  # what the last load of a placement took

_GIB = 2**30


def gib(size: int | None) -> str:
    """Bytes for people; "?" for unknown."""
    return "?" if size is None else f"{size / _GIB:.1f} GiB"


def machine_line(machine: Machine) -> str:
    """One line: the cards, or that there is none, and the host."""
    cards = ", ".join(f"{gpu.name} {gib(gpu.total_bytes)} ({gib(gpu.free_bytes)} free)" for gpu in machine.gpus)
    host = f"{machine.cpu_count} cores, {gib(machine.ram_total_bytes)} RAM ({gib(machine.ram_available_bytes)} free)"
    return f"{cards or 'no GPU'}; {host}; read by {machine.source}"


def job_lines(view: JobView) -> str:
    """How a job is: its state and model, what is before it, and when it will have ended."""
    where, why = f" on {view.model}" if view.model else "", f": {view.why}" if view.why else ""
    lines = [f"{view.job_id} is {view.state}{where}{why}"]
    if view.ahead is not None:
        lines.append(f"{view.ahead} jobs of its model are served before it")
    if (finish := view.finish) is not None:
        switches = f", {finish.switches} switches before it" if finish.switches else ""
        lines.append(f"ends in {finish.low_s:,.0f} to {finish.high_s:,.0f} s, 8 of 10 times{switches}")
    elif view.state in (JobState.QUEUED, JobState.ROUTED, JobState.RUNNING):
        lines.append("nobody knows yet when it ends")
    return escape("\n".join(lines))


def choice_table(choice: Choice, measured: Measured) -> Table:
    """Every model of the catalogue: how it is served, or why it is not; and what its last load really took."""
    table = Table("model", "tier", "served", "measured", box=None, pad_edge=False, caption_justify="left")
    for placement in choice.placements:
        start = " [bold](starts)[/]" if placement == choice.starting else ""
        served = describe_placement(placement)
        table.add_row(placement.model_id + start, str(placement.spec.tier), served, _measured_line(measured(placement)))
    for left in choice.left_out:
        table.add_row(left.model_id, "", f"no: {left.reason}", "", style="dim")
    table.caption = f"Starts with {choice.starting.model_id if choice.starting else 'nothing'}: {choice.reason}."
    return table


def _measured_line(found: Measurement | None) -> str:
    """Predicted, measured, and by how much the prediction was off; nothing for a model that was never loaded."""
    if found is None or found.error is None:
        return ""
    return f"{gib(found.measured.total)}, {gib(found.predicted.total)} predicted ({found.error:+.1%})"


def choice_as_dict(choice: Choice, measured: Measured) -> dict[str, Any]:
    """The choice for programs; sizes in bytes."""
    loads = {placement.model_id: measured(placement) for placement in choice.placements}
    return {
        "starting": choice.starting.model_id if choice.starting else None,
        "reason": choice.reason,
        "models": [
            {
                "id": placement.model_id,
                "engine": placement.spec.engine,
                "tier": placement.spec.tier,
                "auto": placement.auto,
                "gpus": list(placement.gpus),
                "max_model_len": placement.max_model_len,
                "max_num_seqs": placement.max_num_seqs,
                "n_gpu_layers": placement.n_gpu_layers,
                "weights_bytes": placement.memory.weights,
                "kv_cache_bytes": placement.memory.kv_cache,
                "overhead_bytes": placement.memory.overhead,
                "total_bytes": placement.memory.total,
                "measured": _load_as_dict(loads[placement.model_id]),
            }
            for placement in choice.placements
        ],
        "left_out": {left.model_id: left.reason for left in choice.left_out},
    }


def _load_as_dict(found: Measurement | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "at": found.at.isoformat(),
        "predicted_bytes": found.predicted.total,
        "measured_bytes": found.measured.total,
        "error": found.error,
        "terms": {name: size for name, size in asdict(found.measured).items() if size is not None},
    }


def answer_table(answer: Answer) -> Table:
    """What one model takes: a line for each term, with its source."""
    rows = (
        ("weights", answer.weights_bytes, "weights"),
        ("activation", answer.activation_bytes, "activation"),
        ("CUDA graphs", answer.cuda_graph_bytes, "cuda_graphs"),
        ("non-torch", answer.non_torch_bytes, "non_torch"),
        ("CUDA context", answer.cuda_context_bytes, "cuda_context"),
        ("KV cache", answer.kv_pool_bytes, "kv_pool"),
    )
    table = Table("term", "on each card", "from", box=None, pad_edge=False, caption_justify="left")
    for name, size, key in rows:
        table.add_row(name, "?" if size is None else f"{size / _GIB:.2f} GiB", answer.sources.get(key, ""))
    if answer.host_bytes:
        table.add_row("RAM beside it", gib(answer.host_bytes), "")
    per_token = "?" if answer.kv_bytes_per_token is None else f"{answer.kv_bytes_per_token / 1024:.1f} KiB"
    holds = (
        "" if answer.kv_tokens is None else f"; {answer.kv_tokens:,} tokens, {answer.max_concurrency or 0:.2f} requests"
    )
    fits = {True: "It fits", False: "It does not fit", None: "Whether it fits is not known"}[answer.fits]
    table.caption = (
        f"{fits}: {answer.reason}. A token takes {per_token}{holds} of {answer.max_model_len or 0:,} tokens."
    )
    return table


def doctor_report(report: Report) -> Group:
    """The findings, a mark before each, then the choice."""
    marks = {True: "[green]ok[/]     ", False: "[bold red]missing[/]", None: "[yellow]note[/]   "}
    lines = [f"{marks[finding.good]} [bold]{finding.what}[/]: {escape(finding.detail)}" for finding in report.findings]
    return Group(*lines, *([choice_table(report.choice, report.measured)] if report.choice else []))


def status_panel(status: HardwareStatus) -> Panel:
    """One worker: cards, residents, queues, last switches, alerts."""
    parts: list[Any] = [
        *(_gpu_line(gpu) for gpu in status.gpus),
        f"host: {gib(status.ram_available_bytes)} of {gib(status.ram_total_bytes)} RAM free",
        *(
            f"[bold]{r.model}[/] {r.level}, {gib(r.bytes)}, {r.in_flight} jobs in flight, since {r.since:%H:%M:%S}"
            for r in status.residents
        ),
    ]
    if status.switching_to:
        parts.append(f"switching to [bold]{status.switching_to}[/]: {status.stage or 'asked for'}")
    waiting = {model: queue for model, queue in status.backlog.items() if queue.waiting}
    parts += [
        f"{model}: {queue.waiting} waiting, oldest {queue.oldest_s or 0:.0f} s" for model, queue in waiting.items()
    ]
    if waiting and status.turn is not None and status.turn.model is not None:
        parts.append(f"the turn is {escape(status.turn.model)}'s: {escape(status.turn.why)}")
    parts += [f"[yellow]{escape(alert)}[/]" for alert in status.alerts]
    if status.switches:
        parts.append(switch_table(status.switches))
    title = f"{status.worker}: {status.state} ({status.source}, {status.at:%H:%M:%S} UTC)"
    return Panel(Group(*parts), title=title, title_align="left")


def _gpu_line(gpu: GpuStatus) -> str:
    def known(value: float | None, form: str) -> str:
        return "?" if value is None else form.format(value)

    return (
        f"card {gpu.index}: {gpu.name}, {gib(gpu.used_bytes)} of {gib(gpu.total_bytes)} used, "
        f"{known(gpu.utilization, '{:.0%}')} busy, {known(gpu.temperature_c, '{:.0f} C')}, "
        f"{known(gpu.power_w, '{:.0f} W')}{' ' + ', '.join(gpu.throttle_reasons) if gpu.throttle_reasons else ''}"
    )


def switch_table(switches: tuple[SwitchRecord, ...]) -> Table:
    """The last switches, newest first."""
    table = Table("switch", "outcome", "seconds", "stages", "why", box=None, pad_edge=False)
    for record in switches:
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in record.stages.items())
        table.add_row(
            f"{record.from_model or 'nothing'} -> {record.to_model}",
            record.outcome, f"{record.seconds:.2f}", stages, escape(record.reason),
        )  # fmt: skip
    return table
