"""
Who can read this machine's cards? NVML, then nvidia-smi, then nobody: a CPU machine.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass

import pynvml

from common.settings import WorkerSettings
from worker.hardware.gpu import MachineReader
from worker.hardware.nvidia_smi import NvidiaSmiReader
from worker.hardware.nvml import NvmlReader
from worker.hardware.stub import NoGpuReader, StubReader, parse_cards


@dataclass(frozen=True, kw_only=True)
class Detected:
    """The reader to use, and why each one before it was passed over."""

    reader: MachineReader
    passed_over: tuple[str, ...] = ()


def open_reader(
    settings: WorkerSettings,
    *,
    open_nvml: Callable[[], MachineReader] = NvmlReader,
    open_nvidia_smi: Callable[[], MachineReader] = NvidiaSmiReader,
) -> Detected:
    """
    Open the first reader that shows a card; without one, the machine is a CPU machine.

    WORKER_HARDWARE=cpu looks for no card, and stub takes the cards from WORKER_STUB_GPUS.

    Raises
    ------
    BadSetting
        WORKER_STUB_GPUS holds something that is no size.
    """
    if settings.hardware == "cpu":
        return Detected(reader=NoGpuReader(), passed_over=("WORKER_HARDWARE=cpu: cards were not looked for",))
    if settings.hardware == "stub":
        return Detected(reader=StubReader(parse_cards(settings.stub_gpus)))

    passed_over: list[str] = []
    for name, opening in (("NVML", open_nvml), ("nvidia-smi", open_nvidia_smi)):
        try:
            reader = opening()
        except (pynvml.NVMLError, OSError, subprocess.SubprocessError) as error:
            passed_over.append(f"{name}: {error}")
            continue
        if reader.read().gpus:
            return Detected(reader=reader, passed_over=tuple(passed_over))
        passed_over.append(f"{name}: it answers, but shows no card with memory of its own")
    return Detected(reader=NoGpuReader(), passed_over=tuple(passed_over))
