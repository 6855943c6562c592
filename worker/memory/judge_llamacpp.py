"""
What does one GGUF model take on one kind of card? The answer of `shiftworker estimate` for llama.cpp.
"""

from __future__ import annotations

from worker.catalog.architecture import State
from worker.memory.case import Answer, Case
from worker.memory.constants import GIB, card_bytes
from worker.memory.estimate import Unknown
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp, kept_bytes
from worker.memory.gguf import GgufModel
from worker.memory.offload import offload_layers

_DEFAULT_LENGTH = 4096  # tokens, where neither the case nor the model says one


def judge_llamacpp(case: Case, model: GgufModel, *, source: str) -> Answer:
    """
    Answer *case* for llama.cpp; *source* says where the weights' bytes are from.

    Without n_gpu_layers all layers are on the card; where the card's memory is given and is too small, as many as
    fit. The KV "pool" is what llama.cpp sets aside: max_model_len tokens for each of max_num_seqs slots (one).
    """
    total = int(case.gpu_memory_gib * GIB) if case.gpu_memory_gib else card_bytes(case.gpu)
    budget = None if total is None else int(total * (case.gpu_memory_utilization or 1))
    options = LlamaCppOptions(
        max_model_len=case.max_model_len or model.context_length or _DEFAULT_LENGTH,
        slots=case.max_num_seqs or 1,
        ubatch=case.max_num_batched_tokens or 512,
        key_type=_kv_type(case.kv_cache_dtype),
        value_type=_kv_type(case.kv_cache_dtype),
    )
    answer = Answer(model=case.model, engine="llamacpp", max_model_len=options.max_model_len, reason="")
    wanted = model.layers + 1 if case.n_gpu_layers in {None, -1} else case.n_gpu_layers
    estimate = estimate_llamacpp(model, options, n_gpu_layers=wanted)
    if isinstance(estimate, Unknown):
        return _part_of_it(answer, case, model, options, missing=estimate.missing, source=source)
    fits = None if budget is None else estimate.card <= budget
    reason = _reason(estimate, budget)
    if budget is not None and fits is False and case.n_gpu_layers is None:
        fewer = offload_layers(model, options, card_bytes=budget)
        if isinstance(fewer, LlamaCppEstimate) and fewer.n_gpu_layers:
            estimate, fits = fewer, True
            reason = f"{reason}; with {fewer.n_gpu_layers} of {model.layers + 1} layers on the card it fits"
    return answer.model_copy(
        update={**_figures(case, model, options, estimate), "fits": fits, "reason": reason}
    ).model_copy(update={"sources": _sources(source)})


def _part_of_it(
    answer: Answer, case: Case, model: GgufModel, options: LlamaCppOptions, *, missing: tuple[str, ...], source: str
) -> Answer:
    """What can be said although something is unknown: the weights without the cache, or the cache without them."""
    known: dict[str, object] = {}
    if model.weights is not None and (case.n_gpu_layers is None or not 0 <= case.n_gpu_layers <= model.layers):
        known["weights_bytes"] = sum(model.weights.layers) + model.weights.output
    if model.caches and not model.unknown_cache and (per_token := _kv_per_token(model, options)):
        kept = [cache for layer in model.caches for cache in layer if not isinstance(cache, State)]
        known |= {
            "kv_bytes_per_token": per_token,
            "kv_pool_bytes": sum(kept_bytes(cache, options) for cache in kept),
            "kv_tokens": options.max_model_len * options.slots,
        }
    reason = f"unknown: {', '.join(missing)}"
    return answer.model_copy(update={**known, "reason": reason, "sources": _sources(source)})


def _figures(case: Case, model: GgufModel, options: LlamaCppOptions, estimate: LlamaCppEstimate) -> dict[str, object]:
    """Lay the estimate out as the answer's fields."""
    per_token = _kv_per_token(model, options)
    pool, tokens = estimate.kv_card + estimate.kv_host, options.max_model_len * options.slots
    if case.kv_pool_gib is not None:
        pool = int(case.kv_pool_gib * GIB)
        tokens = pool // per_token if per_token else 0
    return {
        "weights_bytes": estimate.weights_card,
        "kv_bytes_per_token": per_token,
        "activation_bytes": estimate.compute_card,
        "cuda_graph_bytes": 0,
        "non_torch_bytes": estimate.state_card,
        "cuda_context_bytes": estimate.cuda_context,
        "host_bytes": estimate.host,
        "n_gpu_layers": estimate.n_gpu_layers,
        "kv_pool_bytes": pool,
        "kv_tokens": tokens,
        "max_concurrency": tokens / options.max_model_len,
    }


def _kv_type(kv_cache_dtype: str | None) -> str:
    """Name the type of keys and values as ggml does; vLLM's words for the same are understood."""
    name = (kv_cache_dtype or "auto").lower()
    return {"auto": "F16", "float16": "F16", "bfloat16": "BF16", "fp8": "Q8_0", "float32": "F32"}.get(
        name, name.upper()
    )


def _kv_per_token(model: GgufModel, options: LlamaCppOptions) -> int:
    """Bytes of one token in the layers that keep all of them."""
    whole = [
        cache for layer in model.caches for cache in layer if not isinstance(cache, State) and cache.window is None
    ]
    cells = -(-options.max_model_len // 256) * 256 * options.slots
    return sum(kept_bytes(cache, options) for cache in whole) // cells


def _reason(estimate: LlamaCppEstimate, budget: int | None) -> str:
    parts = (
        (estimate.weights_card, "weights"),
        (estimate.kv_card, "KV"),
        (estimate.state_card, "state"),
        (estimate.compute_card, "compute"),
        (estimate.cuda_context, "CUDA context"),
    )
    terms = " + ".join(f"{size / GIB:.2f} {name}" for size, name in parts if size)
    has = "" if budget is None else f"; the card has {budget / GIB:.2f} GiB"
    return f"{terms or '0'} = {estimate.card / GIB:.2f} GiB on the card{has}"


def _sources(source: str) -> dict[str, str]:
    return {
        "weights": source,
        "kv_cache": "llama.cpp src/llama-kv-cache.cpp",
        "activation": "llama.cpp's graph: logits, attention, MLP of one batch (worker/memory/estimate_llamacpp.py)",
        "cuda_graphs": "llama.cpp counts none",
        "non_torch": "states of recurrent layers, src/llama-memory-recurrent.cpp",
        "cuda_context": "nvidia-smi beside the sum of the buffers (ollama#6160)",
    }
