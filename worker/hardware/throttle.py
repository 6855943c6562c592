"""
Why a card runs below its clocks: the driver's bits as short names.
"""

from __future__ import annotations

# NVML's nvmlClocksEventReasons; nvidia-smi prints the same mask. Idle is no throttling and has no name here.
_NAMES = {
    0x02: "application_clocks",
    0x04: "power_cap",
    0x08: "hardware_slowdown",
    0x10: "sync_boost",
    0x20: "software_thermal",
    0x40: "hardware_thermal",
    0x80: "power_brake",
    0x100: "display_clocks",
}


def throttle_names(mask: int) -> tuple[str, ...]:
    """Name every bit of *mask* that slows the card down; bits we do not know are left out."""
    return tuple(name for bit, name in _NAMES.items() if mask & bit)
