"""
Values for tests: valid by default, one keyword from the case.
"""

from __future__ import annotations

from typing import Any

from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Gpu, Machine
from worker.memory.estimate import MemoryEstimate
from worker.selection.placement import Placement

GIB = 2**30


def make_gpu(gib: float = 24, *, free_gib: float | None = None, **changes: Any) -> Gpu:
    """A card of *gib* GiB, all of it free unless *free_gib* says otherwise."""
    total = int(gib * GIB)
    free = total if free_gib is None else int(free_gib * GIB)
    facts: dict[str, Any] = {
        "index": 0, "name": f"Card {gib:g} GiB", "total_bytes": total, "free_bytes": free, "used_bytes": total - free,
    }  # fmt: skip
    return Gpu(**{**facts, **changes})


def make_machine(*cards_gib: float, ram_gib: float = 64, ram_available_gib: float | None = None) -> Machine:
    """A machine with these cards; without any, a CPU machine."""
    available = ram_gib if ram_available_gib is None else ram_available_gib
    return Machine(
        source="stub" if cards_gib else "none",
        gpus=tuple(make_gpu(gib, index=index) for index, gib in enumerate(cards_gib)),
        ram_total_bytes=int(ram_gib * GIB),
        ram_available_bytes=int(available * GIB),
        cpu_count=8,
    )


def make_spec(model_id: str = "small", **changes: Any) -> ModelSpec:
    """A small llama.cpp model whose facts are all known."""
    facts: dict[str, Any] = {
        "id": model_id, "engine": EngineKind.LLAMACPP, "tier": 1, "complexity_up_to": 0.3, "max_model_len": 32768,
        "repo": f"example/{model_id}", "file": f"{model_id}.gguf", "weights_bytes": GIB,
        "layers": 24, "kv_heads": 2, "head_dim": 64, "vocab_size": 151936,
    }  # fmt: skip
    return ModelSpec(**{**facts, **changes})


def make_placement(model_id: str = "small", **changes: Any) -> Placement:
    """A model placed on the CPU with 2,048 tokens; *changes* are fields of Placement."""
    facts: dict[str, Any] = {
        "spec": make_spec(model_id),
        "memory": MemoryEstimate(weights=GIB, kv_cache=GIB // 4, overhead=GIB // 4),
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "kv_cache_bytes": GIB // 4,
    }
    return Placement(**{**facts, **changes})
