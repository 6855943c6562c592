"""
Values for tests: valid by default, one keyword from the case.
"""

from __future__ import annotations

from typing import Any

from worker.catalog.architecture import Architecture
from worker.catalog.hf_config import read_config
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


def make_architecture(**changes: Any) -> Architecture:
    """A decoder of 24 layers, as its config.json would say it; *changes* are keys of the config."""
    config: dict[str, Any] = {
        "model_type": "llama", "num_hidden_layers": 24, "hidden_size": 896, "num_attention_heads": 8,
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 4864, "vocab_size": 151936,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    }  # fmt: skip
    return read_config({**config, **changes})


def make_spec(model_id: str = "small", *, config: dict[str, Any] | None = None, **changes: Any) -> ModelSpec:
    """A small llama.cpp model whose facts are all known; *config* changes its config.json."""
    facts: dict[str, Any] = {
        "id": model_id, "engine": EngineKind.LLAMACPP, "tier": 1, "complexity_up_to": 0.3, "max_model_len": 32768,
        "repo": f"example/{model_id}", "file": f"{model_id}.gguf", "weights_bytes": GIB, "quantization": "Q4_K_M",
        "architecture": make_architecture(**(config or {})),
    }  # fmt: skip
    if changes.get("engine") is EngineKind.VLLM:
        facts |= {"file": None, "quantization": None}
    return ModelSpec(**{**facts, **changes})


def make_placement(model_id: str = "small", **changes: Any) -> Placement:
    """A model placed on the CPU with 2,048 tokens; *changes* are fields of Placement."""
    facts: dict[str, Any] = {
        "spec": make_spec(model_id),
        "memory": MemoryEstimate(weights=GIB, kv_cache=GIB // 4, activation=GIB // 4),
        "max_model_len": 2048,
        "max_num_seqs": 8,
        "kv_cache_bytes": GIB // 4,
    }
    return Placement(**{**facts, **changes})
