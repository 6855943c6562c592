"""
What does each level of sleep cost and give back on this machine's card?
"""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import EngineMissing, LoadFailed, Misconfigured
from worker.bench import bandwidth_main
from worker.bench.place import place_written
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.base import Engine
from worker.engines.environment import engine_environment
from worker.hardware.gpu import MachineReader
from worker.residency.verify import differs, verify
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.state.residency import Level

_START_S = 600.0  # vLLM imports, compiles and captures its graphs
_LENGTH = 2048  # tokens


@dataclass(frozen=True, kw_only=True)
class LevelCosts:
    """One model on one card; seconds are medians, bytes what the card's free memory changed by."""

    card: str
    weights_bytes: int
    start_s: float  # from its files, the program's imports included
    restart_s: float  # from its files, with the host standing ready
    sleep_1_s: float
    wake_1_s: float
    freed_1_bytes: int
    sleep_2_s: float
    wake_2_s: float
    freed_2_bytes: int
    kept_bytes: int  # of the card, asleep
    host_bytes: int  # that the machine has less of while it sleeps at level 1
    canary_s: float
    same_tokens: bool  # after every wake
    host_to_device: float  # bytes a second, pinned
    bus_share: float | None  # of wake_1_s that copying the weights at that speed would take


def place_on_card(folder: Path, reader: MachineReader, *, hidden: int, layers: int) -> Placement:
    """
    Write a model of random weights of that size, and place it on a card.

    Raises
    ------
    Misconfigured
        There is no card, or it has no room on one.
    """
    machine = reader.read()
    if not machine.gpus:
        raise Misconfigured("This machine has no card, and nothing sleeps on a CPU. Run it where nvidia-smi shows one.")
    path = make_tiny_hf(folder / "model", hidden=hidden, layers=layers, context=_LENGTH)
    overrides = Overrides(max_model_len=_LENGTH, tensor_parallel_size=1, residents=2, asleep=1)
    return place_written(path, machine, overrides)


def bench_levels(
    placement: Placement,
    engine: Engine,
    reader: MachineReader,
    *,
    runs: int,
    bandwidth: Callable[[], float],
    tell: Callable[[str], None],
) -> LevelCosts:
    """
    Start the model of *placement*, then put it to sleep and wake it *runs* times at each level.

    Raises
    ------
    Misconfigured
        *engine* cannot put it to sleep at both levels.
    """
    levels = (Level.ASLEEP_1, Level.ASLEEP_2)
    if set(engine.sleep_levels(placement)) != set(levels):
        raise Misconfigured("vLLM puts no model to sleep here: VLLM_CHANNEL must be host, SWITCH_MAX_ASLEEP above 0.")
    card = next(gpu for gpu in reader.read().gpus if gpu.index == placement.gpus[0])

    def free() -> tuple[int, int]:
        machine = reader.read()
        gpu = next(gpu for gpu in machine.gpus if gpu.index == card.index)
        return gpu.free_bytes or 0, machine.ram_available_bytes

    empty, _ = free()
    start_s = engine.ensure_ready(placement, timeout_s=_START_S).seconds
    engine.ensure_stopped(placement.model_id, timeout_s=_START_S)
    restart_s = engine.ensure_ready(placement, timeout_s=_START_S).seconds
    tell(f"started in {start_s:.2f} s, with the host ready in {restart_s:.2f} s")
    said = verify(engine, placement, timeout_s=_START_S)
    sleeps, wakes, canaries, same = dict[Level, float](), dict[Level, float](), list[float](), True
    freed, kept, host = dict[Level, int](), 0, 0
    for level in levels:
        rows: list[tuple[float, float]] = []
        for run in range(1, runs + 1):
            awake, ram = free()
            began = time.monotonic()
            engine.ensure_asleep(placement.model_id, level, timeout_s=_START_S)
            sleep_s = time.monotonic() - began
            asleep, ram_asleep = free()
            wake_s = engine.ensure_ready(placement, timeout_s=_START_S).seconds
            began = time.monotonic()
            same &= differs(said, verify(engine, placement, timeout_s=_START_S, before=said)) is None
            canaries.append(time.monotonic() - began)
            rows.append((sleep_s, wake_s))
            freed[level], kept = asleep - awake, empty - asleep
            host = max(host, ram - ram_asleep)
            tell(f"{level}, run {run}: asleep in {sleep_s:.2f} s, awake in {wake_s:.2f} s, {freed[level]:,} bytes free")
        sleeps[level], wakes[level] = (statistics.median(column) for column in zip(*rows, strict=True))
    engine.ensure_stopped(placement.model_id, timeout_s=_START_S)
    speed, weights = bandwidth(), placement.memory.weights
    wake_1_s = wakes[Level.ASLEEP_1]
    return LevelCosts(
        card=card.name,
        weights_bytes=weights,
        start_s=round(start_s, 3),
        restart_s=round(restart_s, 3),
        sleep_1_s=round(sleeps[Level.ASLEEP_1], 3),
        wake_1_s=round(wake_1_s, 3),
        freed_1_bytes=freed[Level.ASLEEP_1],
        sleep_2_s=round(sleeps[Level.ASLEEP_2], 3),
        wake_2_s=round(wakes[Level.ASLEEP_2], 3),
        freed_2_bytes=freed[Level.ASLEEP_2],
        kept_bytes=kept,
        host_bytes=host,
        canary_s=round(statistics.median(canaries), 3),
        same_tokens=same,
        host_to_device=round(speed),
        bus_share=round(weights / speed / wake_1_s, 3) if wake_1_s else None,
    )


def measure_bandwidth(python: Path, card: int) -> float:
    """
    Bytes a second from pinned memory to *card*, measured by torch in vLLM's *python*.

    Raises
    ------
    EngineMissing
        torch has no card there.
    LoadFailed
        It ended otherwise; the message has its last words.
    """
    env = engine_environment(os.environ, gpus=[card])  # torch finds its libraries as an engine does
    done = subprocess.run(
        [python, bandwidth_main.__file__], env=env, capture_output=True, text=True, timeout=_START_S, check=False
    )
    if done.returncode:
        kind = EngineMissing if bandwidth_main.NO_CARD in done.stderr else LoadFailed
        raise kind(f"The bandwidth to card {card} was not measured: {done.stderr[-500:]}")
    return float(done.stdout.splitlines()[-1])
