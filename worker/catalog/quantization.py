"""
How a checkpoint's weights are packed, and which of them are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Quantization:
    """
    One scheme, as quantization_config gives it.

    `bits` of a weight; for each `group` of weights (None = a whole output row) a scale of `scale_bytes`, and with
    `zero_points` one more weight's bits. `only` and `ignored` are names of modules: exact, parts of a name, or
    regular expressions after "re:".
    """

    method: str
    bits: int
    group: int | None = None
    scale_bytes: int = 2
    zero_points: bool = False
    block: tuple[int, int] | None = None  # FP8 with a scale for each block of the matrix
    pad_to: tuple[int, int] | None = None  # inputs and outputs of experts are rounded up to these (mxfp4 kernels)
    row_order: bool = False  # GPTQ keeps two indices for each input
    only: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lm_head: bool = False
    kv_cache_bits: int | None = None  # the checkpoint brings scales for the KV cache

    def packs(self, name: str) -> bool:
        """Is the module of this full name packed?"""
        if self.only and not any(part in name for part in self.only):
            return False
        if name in self._exact or name.rpartition("layers.")[2] in self._tails:
            return False
        return self._pattern is None or self._pattern.search(name) is None

    def bytes_of(self, inputs: int, outputs: int) -> int:
        """Bytes of one packed matrix with its scales and zero points."""
        weights = -(-inputs * outputs * self.bits // 8)
        if self.block is not None:
            return weights + self.scale_bytes * -(-inputs // self.block[0]) * -(-outputs // self.block[1])
        groups = 1 if self.group is None else -(-inputs // self.group)
        zeros = -(-groups * outputs * self.bits // 8) if self.zero_points else 0
        order = 8 * inputs if self.row_order else 0
        return weights + groups * outputs * self.scale_bytes + zeros + order

    @cached_property
    def by_layer(self) -> bool:
        """Do some of the ignored names say the number of a layer?"""
        return bool(self._tails) or any("layers" in name for name in self.ignored if name.startswith("re:"))

    @cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(self.ignored)

    @cached_property
    def _tails(self) -> frozenset[str]:
        return frozenset(name.rpartition("layers.")[2] for name in self.ignored if re.search(r"layers\.\d+\.", name))

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """The names that are patterns or parts of a name, as one expression."""
        parts = [
            _expression(name) if name.startswith("re:") else rf"(?:^|\.){re.escape(name)}(?:\.|$)"
            for name in self.ignored
            if name.rpartition("layers.")[2] not in self._tails
        ]
        return re.compile("|".join(parts)) if parts else None


def _expression(name: str) -> str:
    """A regular expression of the checkpoint, or the text itself if it is none."""
    try:
        re.compile(expression := name.removeprefix("re:"))
    except re.error:
        return re.escape(name)
    return f"(?:{expression})"
