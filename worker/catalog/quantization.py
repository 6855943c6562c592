"""
How a checkpoint's weights are packed, and which of them are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache


@dataclass(frozen=True)
class Quantization:
    """
    One scheme, as quantization_config gives it, and `others` for modules that it does not take.

    `bits` of a weight; for each `group` of weights (None = a whole output row) a scale of `scale_bytes`, and with
    `zero_points` one more weight's bits. `only` and `ignored` are names of modules: whole, parts of a name, or
    regular expressions after "re:".
    """

    method: str
    bits: int
    group: int | None = None
    scale_bytes: int = 2
    zero_points: bool = False
    block: tuple[int, int] | None = None  # FP8 with a scale for each block of the matrix: inputs x outputs
    pad_to: tuple[int, int] | None = None  # inputs and outputs of experts are rounded up to these (mxfp4 kernels)
    row_order: bool = False  # GPTQ keeps two indices for each input
    only: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    lm_head: bool = False
    kv_cache_bits: int | None = None  # the checkpoint brings scales for the KV cache
    others: tuple[Quantization, ...] = ()

    def scheme_of(self, name: str) -> Quantization | None:
        """The scheme that packs the module of this full name ("model.layers.0.mlp.up_proj"); None leaves it as is."""
        names = _spellings(name)
        if self.left_out.matches(names):
            return None
        return next((one for one in (*self.others, self) if not one.only or one.taken.matches(names)), None)

    def parts_of(self, inputs: int, outputs: int) -> tuple[int, int, int, int]:
        """Bytes of one packed matrix: its weights, scales, zero points and row order, a tensor each."""
        weights = -(-inputs * outputs * self.bits // 8)
        if self.block is not None:
            return weights, self.scale_bytes * -(-inputs // self.block[0]) * -(-outputs // self.block[1]), 0, 0
        groups = 1 if self.group is None else -(-inputs // self.group)
        zeros = -(-groups * outputs * self.bits // 8) if self.zero_points else 0
        return weights, groups * outputs * self.scale_bytes, zeros, 8 * inputs if self.row_order else 0

    @cached_property
    def left_out(self) -> Names:
        """The modules that stay as they are."""
        return Names(self.ignored)

    @cached_property
    def taken(self) -> Names:
        """The modules that it packs; none stands for all."""
        return Names(self.only)

    @cached_property
    def by_layer(self) -> bool:
        """Do some of the names say the number of a layer?"""
        return any(names.by_layer for one in (self, *self.others) for names in (one.left_out, one.taken))


@dataclass(frozen=True)
class Names:
    """Names of modules as checkpoints list them; thousands of them where each expert has its line."""

    listed: tuple[str, ...]

    def matches(self, names: tuple[str, ...]) -> bool:
        """Is one of *names*, the spellings of one module, listed?"""
        if not self._whole.isdisjoint(names):
            return True
        if self._pattern is not None and self._pattern.search("\n".join(names)) is not None:
            return True
        return bool(self._tails) and not self._tails.isdisjoint(_places(names))

    @cached_property
    def by_layer(self) -> bool:
        """Does a name say the number of a layer?"""
        return any(re.search(r"layers.*\d", name) for name in self.listed)

    @cached_property
    def _whole(self) -> frozenset[str]:
        return frozenset(self.listed)

    @cached_property
    def _tails(self) -> frozenset[str]:
        """What follows "layers.": models that see have other words before it in the engine than in the files."""
        return frozenset(_tail(name) for name in self.listed if re.search(r"^[^:*]*layers\.\d+(\.[\w.]*)?$", name))

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        """The names that are patterns or parts of a name, as one expression; spellings stand on lines of their own."""
        parts = [
            _expression(name) if name.startswith("re:") else rf"(?:^|\.){re.escape(name)}(?:\.|$)"
            for name in self.listed
            if _tail(name) not in self._tails
        ]
        return re.compile("|".join(parts), re.MULTILINE) if parts else None


@lru_cache(maxsize=2**15)
def _tail(name: str) -> str:
    """Turn "model.layers.3.mlp.experts.17.up_proj" into "3.mlp.experts.up_proj": vLLM joins a layer's experts."""
    return re.sub(r"experts\.\d+\.", "experts.", name.rpartition("layers.")[2])


@lru_cache(maxsize=2**15)
def _places(names: tuple[str, ...]) -> frozenset[str]:
    """The tails of *names* and all that they are inside of: a list may name all of "3.self_attn" at once."""
    parts = [_tail(name).split(".") for name in names]
    return frozenset(".".join(part[:length]) for part in parts for length in range(1, len(part) + 1))


def _expression(name: str) -> str:
    """A regular expression of the checkpoint, from the start of a name; or the text itself if it is none."""
    try:
        re.compile(expression := name.removeprefix("re:"))
    except re.error:
        return re.escape(name)
    return rf"^(?:{expression})"


# One module, many names: the words before the layers, and what families call the parts of a layer.
_PLACES = ("model.layers.", "model.language_model.layers.", "language_model.model.layers.", "backbone.layers.")
_SYNONYMS = (
    ("mlp.shared_expert.", "mlp.shared_experts."), ("mlp.experts.", "block_sparse_moe.experts."),
    ("mlp.", "feed_forward."), ("mlp.", "mixer."), ("self_attn.", "mixer."), ("mixer.", "mamba."),
    ("self_attn.q_proj", "self_attn.qkv_proj"), ("self_attn.k_proj", "self_attn.qkv_proj"),
    ("self_attn.v_proj", "self_attn.qkv_proj"), ("mlp.up_proj", "mlp.gate_up_proj"),
    ("mlp.gate_proj", "mlp.gate_up_proj"), ("in_proj_qkv", "in_proj_qkvz"), ("in_proj_z", "in_proj_qkvz"),
)  # fmt: skip


@lru_cache(maxsize=2**15)
def _spellings(name: str) -> tuple[str, ...]:
    first, _, tail = name.partition("layers.")
    tails = [tail, *(tail.replace(ours, theirs) for ours, theirs in _SYNONYMS if ours in tail)]
    return tuple(place + tail for tail in tails for place in _PLACES) if first and tail else (name,)
