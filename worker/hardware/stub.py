"""
Reads the cards from a setting, for machines without one: the real host, with cards that are only said to be there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.errors import BadSetting
from worker.hardware.gpu import Gpu, Machine
from worker.hardware.host import machine_with

_GIB = 2**30


def parse_cards(text: str) -> tuple[float, ...]:
    """
    Read WORKER_STUB_GPUS: the cards' sizes in GiB, comma separated; empty means no card.

    Raises
    ------
    BadSetting
        Something in it is no size.
    """
    return tuple(_size(part.strip(), text) for part in text.split(",")) if text.strip() else ()


def _size(part: str, text: str) -> float:
    try:
        size = float(part)
    except ValueError:
        size = math.nan
    if not 0 < size <= 1024:  # noqa: PLR2004 - also catches nan; a card of a TiB is a typing error
        raise BadSetting(
            f"WORKER_STUB_GPUS={text!r}: {part!r} is no size of a card. Write GiB, comma separated, "
            "each above 0 and at most 1024, for example 24,24."
        )
    return size


class StubReader:
    """Cards of these sizes in GiB, idle and empty, beside the machine's real memory and cores."""

    def __init__(self, cards_gib: Sequence[float]) -> None:
        self._gpus = tuple(_card(index, gib) for index, gib in enumerate(cards_gib))

    def read(self) -> Machine:
        """Read the host as it is now; the cards never change."""
        return machine_with(self._gpus, source="stub")


def _card(index: int, gib: float) -> Gpu:
    total = int(gib * _GIB)
    return Gpu(
        index=index, name=f"stub {gib:g} GiB", total_bytes=total, uuid=f"stub-{index}", used_bytes=0, free_bytes=total
    )


class NoGpuReader:
    """A machine whose models run on the CPU."""

    def read(self) -> Machine:
        """Read the host as it is now."""
        return machine_with((), source="none")
