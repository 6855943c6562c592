"""
Reads the cards from NVML, the library under nvidia-smi, without touching CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pynvml

from worker.hardware.gpu import Gpu, Machine
from worker.hardware.host import machine_with
from worker.hardware.throttle import throttle_names


class NvmlReader:
    """
    Reads every card that NVML shows.

    Opened once; `library` stands in for pynvml in tests.

    Raises
    ------
    pynvml.NVMLError
        On opening: the driver or its library is not there.
    """

    def __init__(self, library: Any = pynvml) -> None:
        self._nvml = library
        library.nvmlInit()

    def read(self) -> Machine:
        """Read the machine as it is now; a card that stopped answering is left out."""
        return machine_with(tuple(self._cards()), source="nvml")

    def _cards(self) -> Iterator[Gpu]:
        for index in range(self._ask(self._nvml.nvmlDeviceGetCount) or 0):
            with contextlib.suppress(self._nvml.NVMLError):  # lost, fallen off the bus, or no memory of its own
                yield self._card(index)

    def _card(self, index: int) -> Gpu:
        """Read one card; only identity and memory are indispensable, the rest may be unknown."""
        nvml, ask = self._nvml, self._ask
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        rates = ask(nvml.nvmlDeviceGetUtilizationRates, handle)
        power = ask(nvml.nvmlDeviceGetPowerUsage, handle)
        limit = ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
        return Gpu(
            index=index,
            name=_text(nvml.nvmlDeviceGetName(handle)),
            total_bytes=memory.total,
            uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
            used_bytes=memory.used,
            free_bytes=memory.free,
            utilization=None if rates is None else rates.gpu / 100,
            temperature_c=ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            power_w=None if power is None else power / 1000,
            power_limit_w=None if limit is None else limit / 1000,
            sm_clock_mhz=ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            throttle_reasons=throttle_names(ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0),
            compute_capability=ask(nvml.nvmlDeviceGetCudaComputeCapability, handle),
            processes={
                process.pid: process.usedGpuMemory
                for process in ask(nvml.nvmlDeviceGetComputeRunningProcesses, handle) or ()
                if process.usedGpuMemory is not None  # hidden from a container, and under WSL
            },
        )

    def _ask(self, question: Callable[..., Any], *about: Any) -> Any:
        """Ask NVML; None where this card or driver has no answer."""
        try:
            return question(*about)
        except self._nvml.NVMLError:
            return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value  # older bindings give bytes
