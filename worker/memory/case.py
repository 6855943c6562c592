"""
What does one model take on one kind of card? The question and the answer of `shiftworker estimate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from worker.catalog.architecture import Architecture
from worker.catalog.hf_config import read_config
from worker.memory.constants import GIB, card_bytes, constants_for, is_large, server_defaults
from worker.memory.estimate_vllm import VllmEstimate, VllmLoad, estimate_vllm
from worker.memory.weigh import correct_weights

_ANY_LENGTH = 8192  # tokens, where nobody says any
_Count = Annotated[int, Field(gt=0, le=2**31)]
_Gib = Annotated[float, Field(gt=0, le=2**20)]


class Case(BaseModel):
    """One question; null is unknown, or the engine's default."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str | None = None
    engine: Literal["vllm", "llamacpp"] | None = None  # None = as the model is, else vLLM
    config: dict[str, Any] | None = None
    vllm_version: str | None = None
    quantization: str | None = None
    dtype: str | None = None
    kv_cache_dtype: str | None = None
    tensor_parallel_size: _Count | None = None
    pipeline_parallel_size: _Count | None = None
    max_model_len: _Count | None = None
    max_num_seqs: _Count | None = None
    max_num_batched_tokens: _Count | None = None
    enforce_eager: bool | None = None
    gpu: str | None = None
    gpu_memory_gib: _Gib | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_pool_gib: _Gib | None = None
    n_gpu_layers: Annotated[int, Field(ge=-1, le=10_000)] | None = None

    @field_validator("engine", mode="before")
    @classmethod
    def _either_engine_of_vllm(cls, value: object) -> object:
        """Take vLLM's own names of its old and its new engine, as its logs have them."""
        return "vllm" if value in {"V0", "V1"} else value


class Answer(BaseModel):
    """Bytes on each card; null where nobody can tell, and then `reason` says why."""

    model: str | None
    engine: str
    weights_bytes: int | None = None
    kv_bytes_per_token: int | None = None  # of the layers that keep every token
    activation_bytes: int | None = None
    cuda_graph_bytes: int | None = None
    non_torch_bytes: int | None = None
    cuda_context_bytes: int | None = None  # outside vLLM's budget
    host_bytes: int | None = None  # RAM that llama.cpp takes beside the card
    n_gpu_layers: int | None = None  # of llama.cpp: layers on the card, the output counted as one
    kv_pool_bytes: int | None = None
    kv_tokens: int | None = None
    max_concurrency: float | None = None  # requests of max_model_len tokens
    max_model_len: int | None = None
    fits: bool | None = None
    reason: str
    sources: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Files:
    """What the headers of a model's own files say; None where they are not here."""

    weights_bytes: int | None = None
    source: str = "the files' headers"


def read_case(data: Mapping[str, Any]) -> tuple[Case | None, str, tuple[str, ...]]:
    """Read *data* as a case: the case or None, what is wrong with it, and the keys that mean nothing here."""
    unknown = tuple(key for key in data if key not in Case.model_fields)
    try:
        return Case.model_validate(data), "", unknown
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        key = ".".join(str(step) for step in found["loc"])
        return None, f"{key}: {found['msg']} (it is {str(found['input'])[:60]!r})", unknown


def judge_vllm(case: Case, *, architecture: Architecture | None = None, files: Files | None = None) -> Answer:
    """
    Answer *case* for vLLM; *architecture* is used instead of `case.config` if it is given.

    The card's bytes come from gpu_memory_gib, else from the card's name; without either there is no pool.
    """
    built = architecture or read_config(case.config or {}, name=case.model, quantization=case.quantization)
    total = int(case.gpu_memory_gib * GIB) if case.gpu_memory_gib else card_bytes(case.gpu)
    load = _load(case, built, total)
    estimate = estimate_vllm(built, load)
    weights = None if estimate.weights is None else estimate.weights.total
    if files is not None and files.weights_bytes is not None:
        cards = load.tensor_parallel_size * load.pipeline_parallel_size
        weights = correct_weights(weights, built, in_files=files.weights_bytes, cards=cards)

    share = case.gpu_memory_utilization or constants_for(case.vllm_version).utilization
    pool = int(case.kv_pool_gib * GIB) if case.kv_pool_gib else None
    sized = bool(built.hidden_size and built.vocab_size)
    if pool is None and total is not None and weights is not None and sized and built.layers:
        pool = int(total * share) - weights - estimate.reserved
    held = _Held.of(estimate, pool, load.max_model_len)
    answer = Answer(
        model=case.model,
        engine="vllm",
        weights_bytes=weights,
        kv_bytes_per_token=estimate.kv_per_token,
        activation_bytes=estimate.activation if sized else None,
        cuda_graph_bytes=estimate.cuda_graphs if built.layers else None,
        non_torch_bytes=estimate.non_torch,
        cuda_context_bytes=estimate.cuda_context,
        kv_pool_bytes=None if pool is None else max(0, pool),
        kv_tokens=held.tokens,
        max_concurrency=held.concurrency,
        max_model_len=load.max_model_len,
        fits=held.fits,
        reason="",
        sources=_sources(built, case, files, total),
    )
    budget = "" if total is None else f"{_gib(total)} x {share:g}"
    return answer.model_copy(update={"reason": _reason(answer, case, built, estimate, budget=budget, pool=pool)})


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a pool holds."""

    tokens: int | None = None
    concurrency: float | None = None
    fits: bool | None = None

    @classmethod
    def of(cls, estimate: VllmEstimate, pool: int | None, length: int) -> _Held:
        """Say it as the engine of this version does."""
        cache = estimate.cache
        if pool is None:
            return cls()
        if pool <= 0:
            return cls(tokens=0, concurrency=0.0, fits=False)
        if cache is None:
            return cls()
        concurrency = cache.concurrency(pool)
        by_length = estimate.tokens_from_concurrency or cache.groups == 1
        tokens = int(concurrency * length) if by_length else cache.tokens(pool)
        return cls(tokens=tokens, concurrency=round(concurrency, 4), fits=concurrency >= 1)


def _load(case: Case, architecture: Architecture, total: int | None) -> VllmLoad:
    length = case.max_model_len or architecture.max_position_embeddings or _ANY_LENGTH
    defaults = server_defaults(total, case.gpu)
    batched = case.max_num_batched_tokens
    if batched is None:
        # The old engine profiled with whole prompts.
        batched = length if constants_for(case.vllm_version).whole_prompts else defaults.max_num_batched_tokens
    return VllmLoad(
        max_model_len=length,
        max_num_seqs=case.max_num_seqs or defaults.max_num_seqs,
        max_num_batched_tokens=batched,
        tensor_parallel_size=case.tensor_parallel_size or 1,
        pipeline_parallel_size=case.pipeline_parallel_size or 1,
        dtype=case.dtype,
        kv_cache_dtype=case.kv_cache_dtype or "auto",
        enforce_eager=bool(case.enforce_eager),
        version=case.vllm_version,
        large_card=is_large(total, case.gpu),
    )


def _reason(
    answer: Answer, case: Case, built: Architecture, estimate: VllmEstimate, *, budget: str, pool: int | None
) -> str:
    """Show the arithmetic, or say what is missing for it; then what was assumed."""
    parts: list[str] = []
    unsized = [name for name in ("hidden_size", "vocab_size") if not getattr(built, name)]
    if answer.weights_bytes is None:
        parts.append(f"unknown: {', '.join((*built.unknown_weights, *estimate.unknown))}")
    elif estimate.kv_per_token is None:
        parts.append(f"what its layers keep is unknown: {', '.join((*built.unknown_cache, *estimate.unknown))}")
    elif pool is None and budget:
        parts.append(f"what it computes in is unknown: {', '.join(unsized)}")
    elif pool is None:
        parts.append("the card's memory is not known: give gpu_memory_gib")
    if pool is not None and answer.weights_bytes is not None and budget:
        parts.append(
            f"{budget} - {_gib(answer.weights_bytes)} weights - {_gib(estimate.reserved)} activation, graphs and CUDA "
            f"leaves {_gib(pool)} for KV"
        )
    if estimate.cache is not None:
        parts.append(f"one request of {answer.max_model_len} tokens takes {_gib(estimate.cache.request_bytes)}")
    assumed = list(built.assumed)
    if case.max_model_len is None and built.max_position_embeddings is None:
        assumed.append(f"a length of {_ANY_LENGTH} tokens")
    if assumed:
        parts.append(f"assumed: {', '.join(assumed)}")
    return "; ".join(parts) or "computed"


def _sources(architecture: Architecture, case: Case, files: Files | None, total: int | None) -> dict[str, str]:
    config = "config.json" if architecture.kind else "the given facts"
    guessed = next((note for note in architecture.assumed if note.startswith("a guess")), None)
    version = case.vllm_version or "the newest"
    return {
        "weights": files.source if files and files.weights_bytes else guessed or f"{config}, matrix by matrix",
        "kv_cache": f"{config}; vLLM v1/core/kv_cache_utils.py",
        "activation": f"constants of vLLM {version} (worker/memory/constants.py)",
        "cuda_graphs": "measured with 8 to 80 layers (worker/memory/constants.py)",
        "non_torch": f"constants of vLLM {version} (worker/memory/constants.py)",
        "kv_pool": "as measured" if case.kv_pool_gib else "what the share of the card leaves",
        "card": "as given" if case.gpu_memory_gib else "its name" if total else "unknown",
    }


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB"
