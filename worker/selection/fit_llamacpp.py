"""
How does a GGUF model run in llama.cpp here: how long a context, and how many of its layers on the card?
"""

from __future__ import annotations

from functools import lru_cache

from worker.catalog.spec import ModelSpec
from worker.memory.estimate import MemoryEstimate, Unknown
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf import GgufModel
from worker.memory.gguf_measure import measure_gguf
from worker.memory.gguf_predict import predict_gguf
from worker.memory.offload import offload_layers
from worker.selection.fit_vllm import cannot_tell, lengths
from worker.selection.lessons import NOTHING, Lessons
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, Refusal, gib

LONGEST = 16384  # tokens; llama.cpp sets a context aside for every slot
_USUAL_MIX = "Q4_K_M"


def fit_llamacpp(
    spec: ModelSpec, overrides: Overrides, place: Place, lessons: Lessons = NOTHING
) -> Placement | Refusal:
    """
    Fit the whole model into *place*, a card or the host, with the longest context; or say why it does not fit.

    *lessons* of earlier loads take the place of what is computed.
    """
    model = gguf_model(spec)
    placement = None
    for length in lengths(spec, overrides, longest=LONGEST):
        options = llamacpp_options(overrides, length)
        estimate = estimate_llamacpp(model, options, n_gpu_layers=model.layers + 1 if place.gpus else None)
        if isinstance(estimate, Unknown):
            return cannot_tell(estimate.missing)
        placement = lessons.apply(placement_of(spec, overrides, place, estimate, length=length), place)
        if placement.memory.total <= place.budget:
            return placement
    assert placement is not None  # noqa: S101 - there is always a length
    return Refusal(reason=_arithmetic(placement, place))


def split_llamacpp(
    spec: ModelSpec, overrides: Overrides, card: Place, host: Place, refusal: Refusal
) -> Placement | Refusal:
    """As many layers as fit on the card, the others on the host; with n_gpu_layers set, exactly so many."""
    model = gguf_model(spec)
    wanted = overrides.n_gpu_layers or 0
    tried = lengths(spec, overrides, longest=LONGEST)
    for length in tried if wanted else tried[-1:]:
        estimate = _split(model, llamacpp_options(overrides, length), card, host, wanted)
        if estimate is not None:
            return placement_of(spec, overrides, card, estimate, length=length)
    if wanted:
        return Refusal(
            reason=f"LLAMACPP_N_GPU_LAYERS={wanted} of its {model.layers} layers do not fit, or the others not into "
            f"RAM: {card}, {host}"
        )
    on_host = fit_llamacpp(spec, overrides, host)
    return on_host if isinstance(on_host, Placement) else refusal


def _split(
    model: GgufModel, options: LlamaCppOptions, card: Place, host: Place, wanted: int
) -> LlamaCppEstimate | None:
    """The estimate with *wanted* layers on the card, or 0 = as many as fit; None if it does not fit."""
    if not wanted:
        found = offload_layers(model, options, card_bytes=card.budget, host_bytes=host.budget)
        return found if isinstance(found, LlamaCppEstimate) and found.n_gpu_layers else None
    estimate = estimate_llamacpp(model, options, n_gpu_layers=wanted)
    if isinstance(estimate, Unknown) or estimate.card > card.budget or estimate.host > host.budget:
        return None
    return estimate


def gguf_model(spec: ModelSpec) -> GgufModel:
    """What the model is made of: from its header where the file is here, else by llama.cpp's recipe for its mix."""
    if spec.header is not None:
        return measure_gguf(spec.header)
    return _predicted(spec) if spec.architecture is not None else _NOTHING


# An architecture is a value, and the prediction takes a millisecond for each of a catalogue's entries.
@lru_cache(maxsize=256)
def _predicted(spec: ModelSpec) -> GgufModel:
    assert spec.architecture is not None  # noqa: S101 - the caller asked
    return predict_gguf(spec.architecture, spec.quantization or _USUAL_MIX, weights_bytes=spec.weights_bytes)


_NOTHING = GgufModel(
    kind="", weights=None, caches=(), hidden_size=0, vocab_size=0, heads=0, query_width=0, feed_forward=0,
    unknown=("its config, or its file",),
)  # fmt: skip


def llamacpp_options(overrides: Overrides, length: int) -> LlamaCppOptions:
    """Say what llama.cpp is told for a context of *length* tokens in every slot."""
    return LlamaCppOptions(max_model_len=length, slots=overrides.llamacpp_parallel)


def placement_of(
    spec: ModelSpec, overrides: Overrides, place: Place, estimate: LlamaCppEstimate, *, length: int
) -> Placement:
    """Turn an estimate into the order to the engine."""
    layers = estimate.n_gpu_layers or 0
    memory = _memory(estimate, on_card=bool(place.gpus))
    return Placement(
        spec=spec,
        memory=memory,
        max_model_len=length,
        max_num_seqs=overrides.llamacpp_parallel,
        kv_cache_bytes=memory.kv_cache,
        gpus=tuple(gpu.index for gpu in place.gpus),
        n_gpu_layers=-1 if layers > gguf_model(spec).layers else layers,
        quantization=spec.quantization,
    )


def _memory(estimate: LlamaCppEstimate, *, on_card: bool) -> MemoryEstimate:
    if not on_card:
        return MemoryEstimate(
            weights=estimate.weights_host,
            kv_cache=estimate.kv_host + estimate.state_host,
            activation=estimate.compute_host,
        )
    return MemoryEstimate(
        weights=estimate.weights_card,
        kv_cache=estimate.kv_card + estimate.state_card,
        activation=estimate.compute_card,
        cuda_context=estimate.cuda_context,
        host=estimate.host,
    )


def _arithmetic(placement: Placement, place: Place) -> str:
    memory = placement.memory
    return (
        f"needs {gib(memory.weights)} weights + {gib(memory.kv_cache)} KV at {placement.max_model_len} tokens in each "
        f"of {placement.max_num_seqs} slots + {gib(memory.overhead)} overhead = {gib(memory.total)} "
        f"{'on one card' if place.gpus else 'in RAM'}; {place}"
    )
