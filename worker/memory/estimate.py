"""
How many bytes does a model need? A first honest estimate: each term named, `total` derived.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes per card (or of the host, where there is no card)."""

    weights: int
    kv_cache: int
    overhead: int  # activation, CUDA graphs, CUDA context and what is outside the allocator

    @property
    def total(self) -> int:
        """Everything the model takes while it is ready."""
        return self.weights + self.kv_cache + self.overhead
