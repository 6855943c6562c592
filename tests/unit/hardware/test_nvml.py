"""
NVML in good and bad health: a stand-in for its bindings fails where real drivers do.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from worker.hardware.nvml import NvmlReader


def fake_nvml(cards: int = 1, *, failing: str = "", lost: int | None = None) -> SimpleNamespace:
    """NVML's bindings with so many H200s; the call *failing* has no answer, the card *lost* fell off the bus."""

    def handle(index: int) -> int:
        if index == lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return index

    def not_supported(*_: Any) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    processes = [SimpleNamespace(pid=7, usedGpuMemory=10**9), SimpleNamespace(pid=8, usedGpuMemory=None)]
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetCount": lambda: cards,
        "nvmlDeviceGetHandleByIndex": handle,
        "nvmlDeviceGetName": lambda _: b"NVIDIA H200",
        "nvmlDeviceGetUUID": lambda card: f"GPU-{card}",
        "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=150 * 10**9, used=10**9, free=149 * 10**9),
        "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=50, memory=10),
        "nvmlDeviceGetTemperature": lambda _, __: 40,
        "nvmlDeviceGetPowerUsage": lambda _: 120_500,
        "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
        "nvmlDeviceGetClockInfo": lambda _, __: 1980,
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 0x01 | 0x04 | 0x40,
        "nvmlDeviceGetCudaComputeCapability": lambda _: (9, 0),
        "nvmlDeviceGetComputeRunningProcesses": lambda _: processes,
    }
    if failing:
        answers[failing] = not_supported
    return SimpleNamespace(NVMLError=pynvml.NVMLError, NVML_TEMPERATURE_GPU=0, NVML_CLOCK_SM=1, **answers)


def test_a_card_is_read_in_our_units() -> None:
    """
    Milliwatts become watts, percents shares, throttle bits names; a process that hides its memory is left out.
    """
    (gpu,) = NvmlReader(fake_nvml()).read().gpus

    assert (gpu.name, gpu.uuid) == ("NVIDIA H200", "GPU-0")
    assert (gpu.power_w, gpu.power_limit_w, gpu.utilization) == (120.5, 700.0, 0.5)
    assert gpu.throttle_reasons == ("power_cap", "hardware_thermal")
    assert gpu.processes == {7: 10**9}


@pytest.mark.parametrize(
    ("call", "field", "unknown"),
    [
        ("nvmlDeviceGetUtilizationRates", "utilization", None),
        ("nvmlDeviceGetTemperature", "temperature_c", None),
        ("nvmlDeviceGetPowerUsage", "power_w", None),
        ("nvmlDeviceGetEnforcedPowerLimit", "power_limit_w", None),
        ("nvmlDeviceGetClockInfo", "sm_clock_mhz", None),
        ("nvmlDeviceGetCurrentClocksThrottleReasons", "throttle_reasons", ()),
        ("nvmlDeviceGetCudaComputeCapability", "compute_capability", None),
        ("nvmlDeviceGetComputeRunningProcesses", "processes", {}),
    ],
)
def test_what_a_card_does_not_support_is_unknown(call: str, field: str, unknown: object) -> None:
    """
    One question without an answer leaves every other one answered.
    """
    (gpu,) = NvmlReader(fake_nvml(failing=call)).read().gpus

    assert getattr(gpu, field) == unknown
    assert gpu.total_bytes == 150 * 10**9


def test_a_card_lost_in_the_middle_leaves_the_others() -> None:
    """
    The second of three cards fell off the bus; the other two keep their indices.
    """
    machine = NvmlReader(fake_nvml(cards=3, lost=1)).read()

    assert [gpu.index for gpu in machine.gpus] == [0, 2]


@pytest.mark.parametrize("call", ["nvmlDeviceGetCount", "nvmlDeviceGetMemoryInfo"])
def test_without_count_or_memory_there_are_no_cards(call: str) -> None:
    """
    The driver is gone, or the card shares the host's memory: nothing to place on, and nothing raised.
    """
    assert NvmlReader(fake_nvml(failing=call)).read().gpus == ()
