"""
What a card and a machine are. Whatever the driver does not say stays None; nothing is invented.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

Source = Literal["nvml", "nvidia-smi", "none", "stub"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One card as it is now."""

    index: int  # PCI order, as NVML counts; CUDA_VISIBLE_DEVICES uses it with CUDA_DEVICE_ORDER=PCI_BUS_ID
    name: str
    total_bytes: int
    uuid: str | None = None
    used_bytes: int | None = None  # by every process on the card, ours and others'
    free_bytes: int | None = None
    utilization: float | None = None  # 0 to 1, over the driver's last sampling period
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] = ()
    compute_capability: tuple[int, int] | None = None
    processes: Mapping[int, int] = field(default_factory=dict)  # pid -> bytes


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Everything a placement may use: the cards, the host's memory, the cores."""

    source: Source  # who read the cards
    gpus: tuple[Gpu, ...]
    ram_total_bytes: int
    ram_available_bytes: int
    cpu_count: int

    @property
    def kind(self) -> Literal["gpu", "cpu"]:
        """Where models run here."""
        return "gpu" if self.gpus else "cpu"


class MachineReader(Protocol):
    """Looks at the machine; called again and again, so cheap, and never touches CUDA."""

    def read(self) -> Machine:
        """
        Read the machine as it is now.

        A card that stops answering is left out; a reader never raises once it was opened.
        """
        ...
