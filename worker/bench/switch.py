"""
How long does a switch take, beside a restart of vLLM's own server?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common.errors import LoadFailed
from common.schemas import SwitchRecord
from common.settings import Settings
from worker.catalog.download import resolve_files
from worker.catalog.local import spec_from_path
from worker.catalog.spec import EngineKind
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.base import Engine
from worker.engines.vllm_server import VllmServerEngine, find_python
from worker.hardware.detect import open_reader
from worker.hardware.gpu import MachineReader
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.parts import SwitchLimits
from worker.residency.switcher import Switcher
from worker.residency.verify import verify
from worker.selection.overrides import Overrides
from worker.selection.place import place_model
from worker.selection.placement import Placement
from worker.selection.places import Refusal

_START_S = 300.0  # for one start of vLLM's server on a slow machine
_LENGTH = 512  # tokens


@dataclass(frozen=True, kw_only=True)
class SwitchTimes:
    """Seconds, medians of the runs."""

    switch_s: float  # from the decision until the new model's canary answered, the old process gone
    second_switch_s: float  # begun at once after the first
    restart_s: float  # vLLM's own server stopped, started with the other model, its first token
    runs: int


def bench_switch(
    settings: Settings, folder: Path, *, runs: int, ours: Engine, tell: Callable[[str], None]
) -> SwitchTimes:
    """
    Switch between two tiny models and restart vLLM's server between them, in turns.

    *ours* is this worker's engine for vLLM. Neither model is resident before its switch: the one before ended it.
    """
    reader = open_reader(settings.worker).reader
    placements = _two_placements(folder, reader)
    server = VllmServerEngine(run_dir=folder / "server", files_of=resolve_files, python=find_python(settings.vllm))
    switcher = _switcher(placements, ours, reader)
    try:
        names = _in_turns(list(placements))
        switches, seconds, restarts = [], [], []
        tell("starting both for the first time")
        first = next(names)
        _ready(switcher.switch(first))
        _restart(server, None, placements[first])
        for run in range(1, runs + 1):
            before, after = first, next(names)
            switches.append(_ready(switcher.switch(after)))
            seconds.append(_ready(switcher.switch(before)))
            _ready(switcher.switch(after))
            restarts.append(_restart(server, placements[before], placements[after]))
            first = after
            tell(f"run {run}: switch {switches[-1]:.2f} s, second {seconds[-1]:.2f} s, restart {restarts[-1]:.2f} s")
    finally:
        switcher.close()
        server.close()
    return SwitchTimes(
        switch_s=round(statistics.median(switches), 3),
        second_switch_s=round(statistics.median(seconds), 3),
        restart_s=round(statistics.median(restarts), 3),
        runs=runs,
    )


def _two_placements(folder: Path, reader: MachineReader) -> dict[str, Placement]:
    found: dict[str, Placement] = {}
    for seed, name in enumerate(("tiny-a", "tiny-b")):
        spec = spec_from_path(str(make_tiny_hf(folder / name, seed=seed, context=_LENGTH)))
        placement = place_model(spec, reader.read(), Overrides(model=spec, max_model_len=_LENGTH), asked=True)
        if isinstance(placement, Refusal):
            raise LoadFailed(f"{name} has no place here: {placement.reason}")
        found[name] = placement
    return found


def _switcher(placements: dict[str, Placement], engine: Engine, reader: MachineReader) -> Switcher:
    machine = reader.read()
    capacity = sum(gpu.total_bytes for gpu in machine.gpus) or machine.ram_total_bytes
    return Switcher(
        board=ResidencyBoard(capacity=capacity, max_residents=1),
        placements=placements,
        engines={EngineKind.VLLM: engine},
        machine=reader,
        limits=SwitchLimits(
            attempt_s=_START_S,
            attempts=1,
            drain_s=1,
            quarantine_s=1,
            load=LoadLimits(max_temperature_c=1000, max_power_share=10),
        ),
        fetch=lambda _spec: None,
        hand_back=lambda _model_id: None,
        record=lambda _record: None,
    )


def _ready(record: SwitchRecord) -> float:
    if record.outcome != "ready":
        raise LoadFailed(f"The switch to {record.to_model} failed: {record.reason}")
    return record.seconds


def _restart(server: Engine, before: Placement | None, after: Placement) -> float:
    """Seconds until vLLM's own server, stopped and started again, has answered the same canary."""
    began = time.monotonic()
    if before is not None:
        server.ensure_stopped(before.model_id, timeout_s=_START_S)
    server.ensure_ready(after, timeout_s=_START_S)
    verify(server, after, timeout_s=_START_S)
    return time.monotonic() - began


def _in_turns(names: list[str]) -> Iterator[str]:
    while True:
        yield from names
