"""
Where and how a model runs on this machine: the answer of `choose`, the order to an engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.catalog.spec import EngineKind, ModelSpec
from worker.memory.estimate import MemoryEstimate
from worker.memory.measured import LoadKey


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One model with the resources it is given."""

    spec: ModelSpec
    memory: MemoryEstimate  # per card, or of the host where there is none
    max_model_len: int  # tokens; at most spec.max_model_len
    max_num_seqs: int  # requests the engine works on at once
    kv_cache_bytes: int  # per card
    gpus: tuple[int, ...] = ()  # indices of the cards; empty = the CPU
    gpu_memory_utilization: float | None = None  # share of the card, for vLLM; None where there is no card
    n_gpu_layers: int = 0  # for llama.cpp; -1 = all
    quantization: str | None = None
    max_num_batched_tokens: int | None = None  # for vLLM; None = its default
    kv_cache_dtype: str | None = None  # None = as the weights
    auto: bool = True  # may the router choose it for "auto"?

    @property
    def model_id(self) -> str:
        """The catalogue id: the name of the model everywhere."""
        return self.spec.id

    @property
    def tensor_parallel_size(self) -> int:
        """Over how many cards each layer is split."""
        return max(1, len(self.gpus))

    def load_key(self, *, engine: str, device: str) -> LoadKey:
        """Under what its load is measured; *engine* as `engine_name` says it, *device* the card's name or "cpu"."""
        llamacpp = self.spec.engine is EngineKind.LLAMACPP
        return LoadKey(
            model_id=self.model_id,
            quantization=self.quantization,
            engine=engine,
            device=device,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            tensor_parallel_size=self.tensor_parallel_size,
            n_gpu_layers=self.n_gpu_layers if llamacpp else None,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_cache_dtype=self.kv_cache_dtype,
        )
