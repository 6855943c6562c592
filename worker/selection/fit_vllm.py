"""
How does a model run in vLLM on these cards: how long a context, how many at once, how large a KV pool?
"""

from __future__ import annotations

import dataclasses

from worker.catalog.architecture import Architecture
from worker.catalog.hf_config import packed_as
from worker.catalog.spec import ModelSpec
from worker.memory.constants import CPU_PROCESS_BYTES, is_large, server_defaults
from worker.memory.estimate import MemoryEstimate
from worker.memory.estimate_vllm import VllmLoad, estimate_vllm
from worker.memory.weigh import correct_weights
from worker.selection.lessons import NOTHING, Lessons
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, Refusal, gib

SHORTEST = 2048  # tokens; a model that holds less is not worth its place
# A longer context is offered only if somebody asks (VLLM_MAX_MODEL_LEN): it takes memory from other requests.
LONGEST = 32768
_TYPICAL_JOB_TOKENS = 2048  # prompt and answer; what a shared pool is sized by where models share the card
_CPU_POOL_BYTES = 2**30  # vLLM takes 4 s at each start to allocate a pool of 1 GiB on the CPU


def fit_vllm(spec: ModelSpec, overrides: Overrides, place: Place, lessons: Lessons = NOTHING) -> Placement | Refusal:
    """
    Fit the whole model into *place*, or say with the arithmetic why it does not.

    1. The length is the longest of the usual maximum and its halves down to 2,048 tokens that fits; batches are as
       large as vLLM makes them on such a card, where that costs no length.
    2. The pool holds at least one request of that length. A model that has the card to itself gets all of the
       rest; models that share one get room for `max_num_seqs` typical jobs.

    A length or share that the operator set is obeyed, or the model is refused. *lessons* of earlier loads take the
    place of what is computed.
    """
    if spec.architecture is None:
        return cannot_tell(("config.json",))
    in_files = packed_as(spec.architecture, spec.quantization)
    architecture = packed_as(in_files, _quantization(spec, overrides))
    # The size of the download is the last resort: it may hold a second head, or a draft, that nothing loads.
    held = spec.loaded_bytes or (spec.weights_bytes if architecture.unknown_weights else None)
    unknown = (*(() if held else architecture.unknown_weights), *architecture.unknown_cache)
    if unknown:
        return cannot_tell(unknown)
    # (1) The longest that fits.
    placement = None
    for length in lengths(spec, overrides, longest=LONGEST):
        for batched in _batches(place):
            load = _load(overrides, place, length, batched)
            memory = _estimate(architecture, load, place, in_files=in_files, bytes_in_files=held)
            placement = lessons.apply(_placement(spec, overrides, place, load, memory), place)
            if placement.memory.total <= place.budget:
                return _with_pool(placement, overrides, place, _typical_pool(architecture, load))
    assert placement is not None  # noqa: S101 - there is always a length
    return Refusal(reason=_arithmetic(placement, place))


def lengths(spec: ModelSpec, overrides: Overrides, *, longest: int) -> tuple[int, ...]:
    """The context lengths to try, the longest first; only one if the operator has said which."""
    if overrides.max_model_len is not None:
        return (min(overrides.max_model_len, spec.max_model_len),)
    found = [min(spec.max_model_len, longest)]
    while found[-1] // 2 >= SHORTEST:
        found.append(found[-1] // 2)
    return tuple(found)


def cannot_tell(missing: tuple[str, ...]) -> Refusal:
    """Refuse, because these facts are not known."""
    return Refusal(
        reason=f"nobody can tell whether it fits: {', '.join(missing)} unknown. Write them into its catalogue entry"
    )


def _batches(place: Place) -> tuple[int, ...]:
    """Tokens in a batch to try: what vLLM takes on such cards, then what it takes anywhere."""
    usual = server_defaults().max_num_batched_tokens
    theirs = (server_defaults(gpu.total_bytes, gpu.name).max_num_batched_tokens for gpu in place.gpus)
    wished = min(theirs, default=usual)
    return (wished,) if wished == usual else (wished, usual)


def _load(overrides: Overrides, place: Place, length: int, batched: int) -> VllmLoad:
    return VllmLoad(
        max_model_len=length,
        max_num_seqs=overrides.max_num_seqs,
        max_num_batched_tokens=batched,
        tensor_parallel_size=max(1, len(place.gpus)),
        enforce_eager=not place.gpus,
        version=overrides.vllm_version,
        large_card=any(is_large(gpu.total_bytes, gpu.name) for gpu in place.gpus),
    )


def _estimate(
    architecture: Architecture, load: VllmLoad, place: Place, *, in_files: Architecture, bytes_in_files: int | None
) -> MemoryEstimate:
    """What it takes with a pool for one request."""
    estimate = estimate_vllm(architecture, load)
    weights = None if estimate.weights is None else estimate.weights.total
    if bytes_in_files is not None:
        weights = correct_weights(weights, in_files, in_files=bytes_in_files, cards=load.tensor_parallel_size)
    on_card = bool(place.gpus)
    return MemoryEstimate(
        weights=weights or 0,
        kv_cache=estimate.cache.smallest_pool if estimate.cache else 0,
        activation=estimate.activation,
        cuda_graphs=estimate.cuda_graphs,
        non_torch=estimate.non_torch if on_card else CPU_PROCESS_BYTES,
        cuda_context=estimate.cuda_context if on_card else 0,
    )


def _placement(
    spec: ModelSpec, overrides: Overrides, place: Place, load: VllmLoad, memory: MemoryEstimate
) -> Placement:
    return Placement(
        spec=spec,
        memory=memory,
        max_model_len=load.max_model_len,
        max_num_seqs=load.max_num_seqs,
        max_num_batched_tokens=load.max_num_batched_tokens,
        kv_cache_bytes=memory.kv_cache,
        gpus=tuple(gpu.index for gpu in place.gpus),
        quantization=_quantization(spec, overrides),
    )


def _with_pool(placement: Placement, overrides: Overrides, place: Place, typical: int) -> Placement:
    """(2) Give it its pool, and the share of the card that comes of it; *typical* holds as many jobs as it takes."""
    one = placement.memory.kv_cache
    room = place.budget - placement.memory.total + one
    useful = typical if place.gpus else min(typical, _CPU_POOL_BYTES)
    alone = place.gpus and (overrides.gpu_memory_utilization or overrides.residents == 1)
    # What a process keeps of the card while it sleeps; models are taken to be alike in that.
    keeps = placement.memory.cuda_context + placement.memory.non_torch + placement.memory.cuda_graphs
    all_of_it = room if overrides.gpu_memory_utilization else max(min(room, useful), room - overrides.asleep * keeps)
    memory = dataclasses.replace(placement.memory, kv_cache=all_of_it if alone else max(one, min(room, useful)))
    share = None
    if place.gpus:
        # The context exists before vLLM compares its share with what is free.
        inside = memory.total - memory.cuda_context
        share = overrides.gpu_memory_utilization or inside / min(gpu.total_bytes for gpu in place.gpus)
    return dataclasses.replace(placement, memory=memory, kv_cache_bytes=memory.kv_cache, gpu_memory_utilization=share)


def _typical_pool(architecture: Architecture, load: VllmLoad) -> int:
    """Bytes on each card for as many typical jobs as the engine works on at once."""
    typical = dataclasses.replace(load, max_model_len=min(load.max_model_len, _TYPICAL_JOB_TOKENS))
    shape = estimate_vllm(architecture, typical).cache
    return 0 if shape is None else shape.request_bytes * load.max_num_seqs


def _quantization(spec: ModelSpec, overrides: Overrides) -> str | None:
    """Say what the engine is told; without VLLM_MODEL, files that are quantised already stay as they are."""
    if overrides.model is not None or spec.quantization is None:
        return overrides.quantization or spec.quantization
    return spec.quantization


def _arithmetic(placement: Placement, place: Place) -> str:
    memory, where = placement.memory, {0: "in RAM", 1: "on one card"}.get(len(place.gpus), "on each card")
    return (
        f"needs {gib(memory.weights)} weights + {gib(memory.kv_cache)} KV at {placement.max_model_len} tokens "
        f"+ {gib(memory.overhead)} overhead = {gib(memory.total)} {where}; {place}"
    )
