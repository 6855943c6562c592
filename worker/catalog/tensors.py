"""
What the header of a model file says: its tensors, and in GGUF its metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Scalar = str | int | float | bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Tensor:
    """One tensor as it is stored."""

    name: str
    dtype: str  # as the format calls it: "BF16", "F8_E4M3"; in GGUF "Q4_K"
    shape: tuple[int, ...]  # outermost first, in both formats; packed weights count their packed elements
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What a GGUF file, or all the shards of one, says about itself."""

    metadata: Mapping[str, Scalar | tuple[Scalar, ...]]
    lengths: Mapping[str, int]  # what is too long to keep: elements of an array (the tokens), bytes of a text
    tensors: tuple[Tensor, ...]
    file_bytes: int  # what is there
    data_bytes: int  # what the header claims for the tensors, with the gaps between them
    complete: bool  # is the file as long as its header claims?
