"""
What loads took in truth, and what each of these figures holds for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from worker.hardware.gpu import Machine
from worker.memory.estimate import MemoryEstimate


@dataclass(frozen=True, kw_only=True)
class LoadKey:
    """One way to load one model: equal keys take equal memory."""

    model_id: str
    quantization: str | None
    engine: str  # with its version, as `engine_name` says it
    device: str  # the card's name, or "cpu"
    max_model_len: int  # tokens
    max_num_seqs: int
    tensor_parallel_size: int = 1
    n_gpu_layers: int | None = None  # for llama.cpp; -1 = all
    max_num_batched_tokens: int | None = None  # for vLLM
    kv_cache_dtype: str | None = None  # None = as the weights

    def same_weights(self, other: LoadKey) -> bool:
        """Do both put the same weights on each card, by the same program?"""
        return _weights_of(self) == _weights_of(other)

    def same_batches(self, other: LoadKey) -> bool:
        """Does the engine work on as much at once in both?"""
        return _batches_of(self) == _batches_of(other)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Bytes on the fullest of the cards, or of the host where there is none; None = nobody said."""

    weights: int | None = None
    kv_pool: int | None = None
    kv_tokens: int | None = None  # that the pool holds
    activation: int | None = None
    cuda_graphs: int | None = None
    non_torch: int | None = None
    total: int | None = None  # what the machine counts for the engine's processes when it is ready

    @property
    def kv_bytes_per_token(self) -> float | None:
        """Of a request of the length that it was loaded with."""
        return self.kv_pool / self.kv_tokens if self.kv_pool and self.kv_tokens else None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One load: what was predicted, and what came."""

    key: LoadKey
    predicted: MemoryEstimate
    measured: Measured
    at: datetime

    @property
    def error(self) -> float | None:
        """How far the predicted total is above (+) or below (-) the measured one; 0.1 is a tenth of it."""
        return self.predicted.total / self.measured.total - 1 if self.measured.total else None


def engine_name(kind: str, version: str | None) -> str:
    """Name an engine for a `LoadKey`."""
    return f"{kind} {version or 'of unknown version'}"


def device_name(machine: Machine, gpus: Sequence[int]) -> str:
    """Name the device of a model on these cards for a `LoadKey`."""
    return next((gpu.name for gpu in machine.gpus if gpu.index in gpus), "cpu")


def _weights_of(key: LoadKey) -> tuple[object, ...]:
    return key.model_id, key.quantization, key.engine, key.device, key.tensor_parallel_size, key.n_gpu_layers


def _batches_of(key: LoadKey) -> tuple[object, ...]:
    return key.max_num_seqs, key.max_num_batched_tokens, key.kv_cache_dtype
