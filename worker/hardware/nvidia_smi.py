"""
Reads the cards from the program nvidia-smi, for machines where NVML's library is not found.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable

from worker.hardware.gpu import Gpu, Machine
from worker.hardware.host import machine_with
from worker.hardware.throttle import throttle_names

_MIB = 2**20
_TIMEOUT_S = 10  # a card without persistence mode takes a few seconds to wake up

# In the order of the columns. One unknown field fails the whole query, so those that old drivers lack stand
# last and are asked for separately.
_FIELDS = (
    "index", "uuid", "name", "memory.total", "memory.used", "memory.free", "utilization.gpu", "temperature.gpu",
    "power.draw", "enforced.power.limit", "clocks.sm",
)  # fmt: skip
_NEWER_FIELDS = ("clocks_throttle_reasons.active", "compute_cap")


def query(fields: tuple[str, ...]) -> str:
    """
    Run nvidia-smi and give back what it prints.

    Raises
    ------
    OSError, subprocess.SubprocessError
        There is no such program, it failed, or it did not end in ten seconds.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout


def parse(text: str) -> tuple[Gpu, ...]:
    """
    Read the lines of `query`; a card that does not say its index or its memory is left out.

    Whatever stands in brackets ("[N/A]", "[Not Supported]", "[Unknown Error]") is unknown.
    """
    rows = csv.reader(text.splitlines(), skipinitialspace=True)
    cards = (_card(dict(zip((*_FIELDS, *_NEWER_FIELDS), row, strict=False))) for row in rows)
    return tuple(card for card in cards if card is not None)


def _card(row: dict[str, str]) -> Gpu | None:
    index, total = _number(row.get("index")), _number(row.get("memory.total"))
    if index is None or not total:
        return None
    utilization = _number(row.get("utilization.gpu"))
    clock = _number(row.get("clocks.sm"))
    return Gpu(
        index=int(index),
        name=_known(row.get("name")) or "unknown card",
        total_bytes=int(total) * _MIB,
        uuid=_known(row.get("uuid")),
        used_bytes=_mib(row.get("memory.used")),
        free_bytes=_mib(row.get("memory.free")),
        utilization=None if utilization is None else utilization / 100,
        temperature_c=_number(row.get("temperature.gpu")),
        power_w=_number(row.get("power.draw")),
        power_limit_w=_number(row.get("enforced.power.limit")),
        sm_clock_mhz=None if clock is None else int(clock),
        throttle_reasons=throttle_names(int(_known(row.get("clocks_throttle_reasons.active")) or "0", 16)),
        compute_capability=_capability(row.get("compute_cap")),
    )


def _known(value: str | None) -> str | None:
    value = (value or "").strip()
    return None if not value or value.startswith("[") or value == "N/A" else value


def _number(value: str | None) -> float | None:
    known = _known(value)
    try:
        return None if known is None else float(known)
    except ValueError:
        return None


def _mib(value: str | None) -> int | None:
    number = _number(value)
    return None if number is None else int(number) * _MIB


def _capability(value: str | None) -> tuple[int, int] | None:
    major, dot, minor = (_known(value) or "").partition(".")
    return (int(major), int(minor)) if dot else None


class NvidiaSmiReader:
    """
    Reads every card that nvidia-smi lists, one run of it per reading.

    Raises
    ------
    OSError, subprocess.SubprocessError
        On opening: nvidia-smi is not there or does not answer.
    """

    def __init__(self, ask: Callable[[tuple[str, ...]], str] = query) -> None:
        self._ask = ask
        self._fields: tuple[str, ...] = (*_FIELDS, *_NEWER_FIELDS)
        try:
            ask(self._fields)
        except subprocess.CalledProcessError:
            self._fields = _FIELDS
            ask(self._fields)

    def read(self) -> Machine:
        """Read the machine as it is now; no cards while nvidia-smi does not answer."""
        try:
            gpus = parse(self._ask(self._fields))
        except (OSError, subprocess.SubprocessError):
            gpus = ()
        return machine_with(gpus, source="nvidia-smi")
