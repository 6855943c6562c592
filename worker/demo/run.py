"""
The demo: starts everything on free ports, answers the jobs, shows what happened, stops everything.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from common.client import JobClient
from common.errors import LoadFailed
from common.schemas import HardwareStatus, JobRequest, Outcome
from common.settings import Settings
from worker.catalog.spec import ModelSpec
from worker.demo.models import DemoModels, prepare_models, write_catalogue
from worker.embedded_redis import EmbeddedRedis, free_port
from worker.programs import programs
from worker.show import status_panel
from worker.supervisor import Program, Supervisor

_READY_S = 120.0  # for the first model to be ready
_TINY_S, _REAL_S = 300.0, 3600.0  # for all jobs; real models on two old cores take their time
_LOOK_EVERY_S = 0.2
_ANSWER_CHARS = 40
_WIDE = 150  # columns of a terminal in which the whole table fits


def run_demo(jobs: Sequence[tuple[str, JobRequest]], data: Path, out: Console, *, stay: bool = False) -> int:
    """
    Run the demo over *jobs*, each with its name; returns 0 only if every one has its answer.

    With *stay* everything keeps running afterwards, until Ctrl-C. A signal to stop ends it early, and orderly.
    """
    began = time.monotonic()
    data = data.absolute()
    data.mkdir(parents=True, exist_ok=True)
    models = _models(data, out)
    write_catalogue(models, data / "models.toml")
    for log in data.glob("*.log"):
        log.unlink()

    redis = EmbeddedRedis(data / f"redis-{time.time_ns()}")
    flower_port = free_port()
    supervisor = Supervisor(_programs(redis.url, flower_port, data), log_dir=data)
    supervisor.ask_to_stop_on_signals()
    client = JobClient(redis.url)
    try:
        redis.start()
        supervisor.start()
        out.print(f"Redis {redis.url}   Flower http://127.0.0.1:{flower_port}   logs {data}/*.log", highlight=False)
        _wait_until_ready(client, supervisor, data, out)
        out.print(f"Ready after {time.monotonic() - began:.1f} s.", highlight=False)
        ids = [client.submit(request) for _, request in jobs]
        outcomes = _follow(client, supervisor, ids, _REAL_S if models.real else _TINY_S, out)
        names = [name for name, _ in jobs]
        shown = _job_table if out.width >= _WIDE else _job_lines
        out.print(shown(names, ids, outcomes), highlight=False)
        if (status := _settled_status(client, supervisor)) is not None:
            out.print(status_panel(status))
        if stay:
            out.print(f"\nSend jobs of your own: REDIS_URL={redis.url} shiftworker submit 'Hello'. Ctrl-C stops all.")
            supervisor.run()
    except _ToldToStop:
        return 1
    finally:
        client.close()
        supervisor.stop()
        redis.stop()
        out.print("Everything is stopped.")
    answered = sum(outcome.error is None for outcome in outcomes.values())
    out.print(f"[bold]{answered} of {len(jobs)} jobs have their answer.[/]")
    return 0 if answered == len(jobs) else 1


class _ToldToStop(Exception):
    """A signal asked for the end."""


def _look_after(supervisor: Supervisor) -> None:
    """Revive what has died, and pause until the next look."""
    if supervisor.asked_to_stop:
        raise _ToldToStop
    supervisor.look()
    time.sleep(_LOOK_EVERY_S)


def _models(data: Path, out: Console) -> DemoModels:
    bars: dict[str, TaskID] = {}
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=out, transient=True) as bar:

        def fetching(spec: ModelSpec, done: int, total: int | None) -> None:
            if spec.id not in bars:
                bars[spec.id] = bar.add_task(f"fetching {spec.source}", total=total)
            bar.update(bars[spec.id], completed=done, total=total)

        models = prepare_models(data, fetching)
    out.print(models.note, highlight=False)
    return models


def _programs(redis_url: str, flower_port: int, data: Path) -> list[Program]:
    """What `shiftworker up` runs, with the demo's catalogue and without the operator's own overrides."""
    ours: Mapping[str, str] = {
        "MODELS_FILE": str(data / "models.toml"), "MODELS_ONLY": "", "VLLM_MODEL": "", "WORKER_STUB_ENGINE": "false",
        "WORKER_HARDWARE": "auto", "WORKER_NAME": "demo", "WORKER_RUN_DIR": "", "LOG_FORMAT": "json",
        "FLOWER_PASSWORD": "", "LLAMACPP_PARALLEL": "4",
    }  # fmt: skip
    return [
        Program(name=p.name, command=p.command, env={**p.env, **ours}, stop_s=p.stop_s)
        for p in programs(Settings.from_env(), redis_url=redis_url, flower_port=flower_port)
    ]


def _status(client: JobClient) -> HardwareStatus | None:
    return next(iter(client.hardware()), None)


def _settled_status(client: JobClient, supervisor: Supervisor) -> HardwareStatus | None:
    """The status once the last job has left its queue and the board; the worker publishes every few seconds."""
    until = time.monotonic() + 2 * Settings.from_env().status.interval_s
    status = _status(client)
    while status and _busy(status) and time.monotonic() < until:
        _look_after(supervisor)
        status = _status(client)
    return status


def _busy(status: HardwareStatus) -> bool:
    return any(q.waiting for q in status.backlog.values()) or any(r.in_flight for r in status.residents)


def _wait_until_ready(client: JobClient, supervisor: Supervisor, data: Path, out: Console) -> None:
    with out.status("starting router, worker and Flower") as line:
        until = time.monotonic() + _READY_S
        while time.monotonic() < until:
            status = _status(client)
            if status and any(resident.level == "ready" for resident in status.residents):
                return
            if status and status.switching_to:
                line.update(f"{status.switching_to}: {status.stage or 'asked for'}")
            _look_after(supervisor)
    tail = (data / "worker.log").read_text(errors="replace")[-2000:]
    raise LoadFailed(f"No model was ready after {_READY_S:.0f} s. The worker's log ends with:\n{tail}")


def _follow(
    client: JobClient, supervisor: Supervisor, ids: Sequence[str], timeout_s: float, out: Console
) -> dict[str, Outcome]:
    """Wait for the outcomes, with a bar; gives those that came in time, by id."""
    outcomes: dict[str, Outcome] = {}
    columns = (SpinnerColumn(), TextColumn("jobs"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=out) as bar:
        task = bar.add_task("", total=len(ids))
        until = time.monotonic() + timeout_s
        while len(outcomes) < len(ids) and time.monotonic() < until:
            for job_id in ids:
                if job_id not in outcomes and (outcome := client.result(job_id)) is not None:
                    outcomes[job_id] = outcome
            status = _status(client)
            ready = ", ".join(resident.model for resident in status.residents) if status else "no worker"
            bar.update(task, completed=len(outcomes), description=ready)
            _look_after(supervisor)
    return outcomes


def _job_table(names: Sequence[str], ids: Sequence[str], outcomes: Mapping[str, Outcome]) -> Table:
    """A row per job, for wide terminals."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("job", "complexity", "model", "why", "waited s", "switch s", "tokens", "answer"):
        number = column in {"complexity", "waited s", "switch s", "tokens"}
        table.add_column(column, justify="right" if number else "left", no_wrap=column != "why")
    for name, job_id in zip(names, ids, strict=True):
        complexity, model, why, waited, switch, tokens, answer = _cells(outcomes.get(job_id))
        table.add_row(name, complexity, model, why, waited, switch, tokens, answer)
    return table


def _job_lines(names: Sequence[str], ids: Sequence[str], outcomes: Mapping[str, Outcome]) -> str:
    """Three lines per job, for narrow terminals."""
    parts = []
    for name, job_id in zip(names, ids, strict=True):
        complexity, model, why, waited, switch, tokens, answer = _cells(outcomes.get(job_id))
        figures = f"complexity {complexity}, waited {waited} s, switch {switch} s, {tokens} tokens"
        parts.append(f"[bold]{name}[/]  {model}  {figures}\n  [dim]{why}[/]\n  {answer}")
    return "\n".join(parts)


def _cells(outcome: Outcome | None) -> tuple[str, str, str, str, str, str, str]:
    """What is told of a job: complexity, model, why, waited, switch, tokens, the answer's beginning."""
    if outcome is None:
        return "", "", "", "", "", "", "[red]no outcome in time[/]"
    ledger = outcome.ledger
    answer = f"{outcome.error.kind}: {outcome.error.message}" if outcome.error else outcome.answer or ""
    shown = escape(" ".join(answer.split())[:_ANSWER_CHARS])
    return (
        f"{ledger.complexity or 0:.2f}", ledger.model or "", ledger.why or "", f"{ledger.waited_s or 0:.2f}",
        f"{ledger.switch_s or 0:.2f}", str(ledger.completion_tokens or ""),
        f"[red]{shown}[/]" if outcome.error else shown,
    )  # fmt: skip
