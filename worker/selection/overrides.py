"""
What the operator has decided already: the settings that bind the choice at boot.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.catalog.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """None, 0 or empty leaves a matter to the choice."""

    model: str | ModelSpec | None = None  # VLLM_MODEL: a catalogue name, or an entry made from a path
    only: tuple[str, ...] = ()  # MODELS_ONLY: ids
    force: bool = False  # VLLM_FORCE: load `model` even if it cannot fit
    quantization: str | None = None
    max_model_len: int | None = None  # tokens
    gpu_memory_utilization: float = 0.0  # share of the card
    tensor_parallel_size: int | None = None  # cards
    max_num_seqs: int = 64  # requests at once in vLLM
    llamacpp_parallel: int = 8  # requests at once in llama.cpp
    vllm_version: str | None = None  # of the engine that is here; None = the newest known
    residents: int = 1  # models that may be ready side by side
    asleep: int = 0  # models that may sleep beside those in vLLM
    n_gpu_layers: int | None = None  # for llama.cpp; -1 = all, 0 = none
