"""
How many bytes does a placed model take? The terms that every engine's estimate ends in.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes on each card, or of the host where there is none; `host` is what a model on a card takes of RAM."""

    weights: int
    kv_cache: int
    activation: int = 0  # scratch memory of a forward pass; llama.cpp's compute buffer
    cuda_graphs: int = 0
    non_torch: int = 0  # CUDA and NCCL, within what vLLM counts; a process of its own on a CPU
    cuda_context: int = 0  # outside what any engine counts
    host: int = 0

    @property
    def overhead(self) -> int:
        """Everything but weights and KV cache."""
        return self.activation + self.cuda_graphs + self.non_torch + self.cuda_context

    @property
    def total(self) -> int:
        """Everything the model takes there while it is ready."""
        return self.weights + self.kv_cache + self.overhead


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """There is no estimate, because these facts of the model are not known."""

    missing: tuple[str, ...]
