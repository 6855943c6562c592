"""
One HardwareStatus out of the machine, the residents and the backlog. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from common.schemas import (
    GpuStatus,
    HardwareStatus,
    QueueStatus,
    ResidentStatus,
    SwitchRecord,
    SwitchTime,
    TurnStatus,
    WorkerState,
)
from worker.hardware.gpu import Gpu, Machine
from worker.scheduling.pick import Turn
from worker.state.backlog import Backlog
from worker.state.residency import Residency


def summarize(
    *,
    worker: str,
    machine: Machine,
    residency: Residency,
    backlog: Backlog,
    switches: Sequence[SwitchRecord],
    max_temperature_c: float,
    stopping: bool,
    now: float,
    turn: Turn | None = None,
    switch_times: Sequence[SwitchTime] = (),
    cloud_alerts: Sequence[str] = (),
) -> HardwareStatus:
    """Say what the worker *worker* is at *now* (Unix seconds); *cloud_alerts* are told as they are."""
    switching = residency.switching
    return HardwareStatus(
        worker=worker,
        at=_moment(now),
        state=_state(residency, backlog, switches, stopping=stopping),
        source=machine.source,
        gpus=tuple(_gpu(gpu) for gpu in machine.gpus),
        ram_total_bytes=machine.ram_total_bytes,
        ram_available_bytes=machine.ram_available_bytes,
        stage=switching.stage if switching else None,
        switching_to=switching.to_model if switching else None,
        residents=tuple(
            ResidentStatus(
                model=r.model_id,
                level=r.level,
                bytes=r.bytes,
                in_flight=r.in_flight,
                since=_moment(r.since),
                smaller=r.smaller,
                max_model_len=r.max_model_len,
            )
            for r in sorted(residency.residents, key=lambda r: r.model_id)
        ),
        backlog={
            model: QueueStatus(
                waiting=waiting.count,
                oldest_s=None if waiting.oldest_at is None else round(max(0.0, now - waiting.oldest_at), 1),
            )
            for model, waiting in sorted(backlog.by_model.items())
        },
        turn=None if turn is None else TurnStatus(model=turn.model_id, why=turn.reason),
        switches=tuple(switches),
        switch_times=tuple(switch_times),
        alerts=(*_alerts(machine, residency, max_temperature_c, turn, now), *cloud_alerts),
    )


def _state(residency: Residency, backlog: Backlog, switches: Sequence[SwitchRecord], *, stopping: bool) -> WorkerState:
    if stopping:
        return WorkerState.DRAINING
    if residency.switching is not None:
        return WorkerState.SWITCHING if switches else WorkerState.STARTING
    if not residency.ready_models and not switches:
        return WorkerState.STARTING
    busy = any(r.in_flight for r in residency.residents) or any(w.count for w in backlog.by_model.values())
    return WorkerState.SERVING if busy else WorkerState.IDLE


def _alerts(
    machine: Machine, residency: Residency, max_temperature_c: float, turn: Turn | None, now: float
) -> tuple[str, ...]:
    hot = (
        f"card {gpu.index} is at {gpu.temperature_c:.0f} C: no model is loaded above {max_temperature_c:.0f} C"
        for gpu in machine.gpus
        if gpu.temperature_c is not None and gpu.temperature_c > max_temperature_c
    )
    quarantined = (
        f"{model} failed to load {found.failures} times and is left alone for {found.until - now:.0f} s: {found.reason}"
        for model, found in sorted(residency.quarantined.items())
        if now < found.until
    )
    smaller = (
        f"{r.model_id} had too little memory and is {r.smaller}"
        for r in sorted(residency.residents, key=lambda r: r.model_id)
        if r.smaller is not None
    )
    unfreed = (
        f"the memory of {model} is not all back although it has ended: {lacking}"
        for model, lacking in sorted(residency.unfreed.items())
    )
    banned = (
        f"{model} is put to sleep no more at level {level}: {reason}"
        for (model, level), reason in sorted(residency.banned.items())
    )
    overload = () if turn is None or turn.overload is None else (f"overload: {turn.overload}",)
    return (*overload, *hot, *quarantined, *smaller, *unfreed, *banned)


def _gpu(gpu: Gpu) -> GpuStatus:
    return GpuStatus(
        index=gpu.index, uuid=gpu.uuid, name=gpu.name, total_bytes=gpu.total_bytes, used_bytes=gpu.used_bytes,
        free_bytes=gpu.free_bytes, utilization=gpu.utilization, temperature_c=gpu.temperature_c, power_w=gpu.power_w,
        power_limit_w=gpu.power_limit_w, sm_clock_mhz=gpu.sm_clock_mhz, throttle_reasons=gpu.throttle_reasons,
        processes=dict(gpu.processes),
    )  # fmt: skip


def _moment(unix_s: float) -> datetime:
    return datetime.fromtimestamp(unix_s, UTC)
