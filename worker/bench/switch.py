"""
How long does a switch take, beside a restart of vLLM's own server?
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import LoadFailed
from common.schemas import SwitchRecord
from worker.bench.place import place_written
from worker.catalog.spec import EngineKind
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.base import Engine
from worker.hardware.gpu import MachineReader
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.parts import SwitchLimits
from worker.residency.switcher import Switcher
from worker.residency.verify import verify
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement

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
    folder: Path, reader: MachineReader, *, ours: Engine, theirs: Engine, runs: int, tell: Callable[[str], None]
) -> SwitchTimes:
    """
    Switch between two tiny models and restart vLLM's server between them, in turns.

    *ours* is this worker's engine for vLLM, *theirs* runs its server; both are closed. Neither model is resident
    before its switch: the one before ended it.
    """
    machine = reader.read()
    # Each side holds a model while the other is timed, so no model may fill the card.
    overrides = Overrides(max_model_len=_LENGTH, residents=2)
    placements = {
        name: place_written(make_tiny_hf(folder / name, seed=seed, context=_LENGTH), machine, overrides)
        for seed, name in enumerate(("tiny-a", "tiny-b"))
    }
    switcher = _switcher(placements, ours, reader)
    try:
        return measure_in_turns(
            *placements,
            switch=lambda after: _ready(switcher.switch(after)),
            restart=lambda before, after: _restart(theirs, placements[before], placements[after]),
            runs=runs,
            tell=tell,
        )
    finally:
        switcher.close()
        theirs.close()


def measure_in_turns(
    before: str,
    after: str,
    *,
    switch: Callable[[str], float],
    restart: Callable[[str, str], float],
    runs: int,
    tell: Callable[[str], None],
) -> SwitchTimes:
    """
    Switch there, back and there again, then restart from the one to the other; the next run goes the other way.

    *switch* takes the model to make ready, *restart* the one to stop and the one to start; both give seconds.
    """
    tell("starting both for the first time")
    switch(before)
    restart(after, before)
    switches, seconds, restarts = list[float](), list[float](), list[float]()
    for run in range(1, runs + 1):
        switches.append(switch(after))
        seconds.append(switch(before))
        switch(after)
        restarts.append(restart(before, after))
        before, after = after, before
        tell(f"run {run}: switch {switches[-1]:.2f} s, second {seconds[-1]:.2f} s, restart {restarts[-1]:.2f} s")
    return SwitchTimes(
        switch_s=round(statistics.median(switches), 3),
        second_switch_s=round(statistics.median(seconds), 3),
        restart_s=round(statistics.median(restarts), 3),
        runs=runs,
    )


def _switcher(placements: dict[str, Placement], engine: Engine, reader: MachineReader) -> Switcher:
    machine = reader.read()
    return Switcher(
        board=ResidencyBoard(
            capacity=machine.ram_total_bytes,
            cards={gpu.index: gpu.total_bytes for gpu in machine.gpus},
            max_residents=1,
        ),
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


def _restart(server: Engine, before: Placement, after: Placement) -> float:
    """Seconds until vLLM's own server, stopped and started again, has answered the same canary."""
    began = time.monotonic()
    server.ensure_stopped(before.model_id, timeout_s=_START_S)
    server.ensure_ready(after, timeout_s=_START_S)
    verify(server, after, timeout_s=_START_S)
    return time.monotonic() - began
