"""
What smaller way is there to load a model for which memory ran out? Pure: plans in the order of least harm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from worker.catalog.architecture import Cache, KeysAndValues, Latent, State
from worker.catalog.spec import EngineKind
from worker.hardware.gpu import Gpu, Machine
from worker.memory.constants import server_defaults
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.estimate_vllm import VllmEstimate, VllmLoad, estimate_vllm
from worker.memory.gguf import GgufModel
from worker.memory.offload import offload_layers
from worker.selection.fit_llamacpp import gguf_model, placement_of
from worker.selection.fit_vllm import SHORTEST
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, host_place, to_spare

MOST_PLANS = 3

_FP8 = "fp8"
_FP8_CAPABILITY = (8, 9)  # Ada: older cards cannot compute with it, and vLLM's kernels for their cache do not compile
_Q8 = "q8_0"
_Q8_BLOCK = 32  # numbers; a head must be a multiple of it (llama.cpp, src/llama-context.cpp)

_Step = Callable[[Placement], Placement | None]


def shrink(placement: Placement, machine: Machine) -> tuple[Placement, ...]:
    """
    Give at most three smaller plans for *placement* on *machine* as it is now; () if there is none.

    Each takes less than the one before, and keeps what that one gave up already:

    1. Half as many requests at once, and for vLLM a smaller KV pool: what is lacking, or half of it if nobody knows
       what is. It holds one request of the full length.
    2. A KV cache of 8 bits: FP8 on cards that can, q8_0 in llama.cpp.
    3. A shorter context: the longest of its halves, down to 2,048 tokens, that fits.
    4. For llama.cpp fewer layers on the card: as many as fit.

    Where all four are to be had, 2 and 3 are one plan: the last one, the surest, must be among the three.
    """
    cards = tuple(gpu for gpu in machine.gpus if gpu.index in placement.gpus)
    if not placement.kv_cache_bytes or len(cards) < len(placement.gpus):
        return ()  # forced, so nobody knows what it takes; or a card is gone
    host = host_place(machine)
    place = Place(gpus=cards, budget=min(map(to_spare, cards), default=host.budget))
    if placement.spec.engine is EngineKind.VLLM:
        steps = _vllm_steps(placement, place)
    elif placement.spec.engine is EngineKind.LLAMACPP:
        steps = _llamacpp_steps(placement, place, host)
    else:
        steps = ()
    plans: list[Placement] = []
    for step in steps:
        before = plans[-1] if plans else placement
        smaller = step(before)
        if smaller is not None and smaller.memory.total < before.memory.total:
            plans.append(smaller)
    return tuple(plans if len(plans) <= MOST_PLANS else (plans[0], *plans[1 - MOST_PLANS :]))


def what_changed(full: Placement, smaller: Placement) -> str:
    """Say in words what *smaller* gives up."""
    changes = (
        (full.max_model_len, smaller.max_model_len, "{1:,} instead of {0:,} tokens"),
        (full.max_num_seqs, smaller.max_num_seqs, "{1} instead of {0} requests at once"),
        (full.kv_cache_dtype, smaller.kv_cache_dtype, "a KV cache in {1}"),
        (full.kv_cache_bytes >> 20, smaller.kv_cache_bytes >> 20, "{1:,} instead of {0:,} MiB of KV cache"),
        (full.n_gpu_layers, smaller.n_gpu_layers, "{1} layers on the card"),
    )
    return ", ".join(words.format(before, after) for before, after, words in changes if before != after)


def _shorter_lengths(length: int) -> Iterator[int]:
    while length // 2 >= SHORTEST:
        length //= 2
        yield length


def _longest_that_fits(before: Placement, place: Place, resize: Callable[[int], Placement | None]) -> Placement | None:
    """(3) The longest of the shorter lengths that takes less than *before* and fits; the shortest if none fits."""
    most = min(place.budget, before.memory.total - 1)
    smaller = None
    for length in _shorter_lengths(before.max_model_len):
        smaller = resize(length)
        if smaller is None or smaller.memory.total <= most:
            break
    return smaller


# --- vLLM ------------------------------------------------------------------------------------------------


def _vllm_steps(placement: Placement, place: Place) -> tuple[_Step, ...]:
    architecture = placement.spec.architecture
    if architecture is None or architecture.unknown_cache:
        return ()

    def estimated(plan: Placement) -> VllmEstimate:
        return estimate_vllm(architecture, _load(plan))

    def resized(before: Placement, after: Placement) -> Placement | None:
        return _resized(before, after, estimated(before), estimated(after), place)

    def fewer(plan: Placement) -> Placement | None:
        return resized(plan, replace(plan, max_num_seqs=max(1, plan.max_num_seqs // 2)))

    def fp8(plan: Placement) -> Placement | None:
        if plan.kv_cache_dtype is not None or not _knows_fp8(place.gpus):
            return None
        return resized(plan, replace(plan, kv_cache_dtype=_FP8))

    def shorter(plan: Placement) -> Placement | None:
        return _longest_that_fits(plan, place, lambda length: resized(plan, replace(plan, max_model_len=length)))

    return fewer, fp8, shorter


def _load(plan: Placement) -> VllmLoad:
    return VllmLoad(
        max_model_len=plan.max_model_len,
        max_num_seqs=plan.max_num_seqs,
        max_num_batched_tokens=plan.max_num_batched_tokens or server_defaults().max_num_batched_tokens,
        tensor_parallel_size=plan.tensor_parallel_size,
        kv_cache_dtype=plan.kv_cache_dtype or "auto",
        enforce_eager=not plan.gpus,
    )


def _resized(
    before: Placement, after: Placement, was: VllmEstimate, will: VllmEstimate, place: Place
) -> Placement | None:
    """
    Size the pool of *after*, and take from its memory what the two estimates differ by.

    The difference and not the new estimate: what was measured of the other terms stays.
    """
    if will.cache is None:
        return None
    memory = replace(
        before.memory,
        activation=max(0, before.memory.activation - was.activation + will.activation),
        cuda_graphs=max(0, before.memory.cuda_graphs - was.cuda_graphs + will.cuda_graphs),
    )
    room = place.budget - memory.total + memory.kv_cache
    lacking = before.memory.total > place.budget
    wanted = min(before.kv_cache_bytes, room) if lacking else before.kv_cache_bytes // 2
    pool = max(will.cache.smallest_pool, wanted)
    memory = replace(memory, kv_cache=pool)
    share = before.gpu_memory_utilization
    if share is not None:
        share *= (memory.total - memory.cuda_context) / (before.memory.total - before.memory.cuda_context)
    return replace(after, memory=memory, kv_cache_bytes=pool, gpu_memory_utilization=share)


def _knows_fp8(cards: tuple[Gpu, ...]) -> bool:
    return bool(cards) and all((gpu.compute_capability or (0, 0)) >= _FP8_CAPABILITY for gpu in cards)


# --- llama.cpp -------------------------------------------------------------------------------------------


def _llamacpp_steps(placement: Placement, place: Place, host: Place) -> tuple[_Step, ...]:
    model = gguf_model(placement.spec)

    def resized(plan: Placement) -> Placement | None:
        layers = model.layers + 1 if plan.n_gpu_layers < 0 else plan.n_gpu_layers
        estimate = estimate_llamacpp(model, _options(plan), n_gpu_layers=layers if plan.gpus else None)
        return _ordered(plan, place, estimate) if isinstance(estimate, LlamaCppEstimate) else None

    def fewer(plan: Placement) -> Placement | None:
        return resized(replace(plan, max_num_seqs=max(1, plan.max_num_seqs // 2)))

    def q8(plan: Placement) -> Placement | None:
        can = plan.kv_cache_dtype is None and _knows_q8(model)
        return resized(replace(plan, kv_cache_dtype=_Q8)) if can else None

    def shorter(plan: Placement) -> Placement | None:
        return _longest_that_fits(plan, place, lambda length: resized(replace(plan, max_model_len=length)))

    def fewer_layers(plan: Placement) -> Placement | None:
        if not plan.gpus:
            return None
        most = min(place.budget, plan.memory.total * 3 // 4)
        estimate = offload_layers(model, _options(plan), card_bytes=most, host_bytes=host.budget)
        if not isinstance(estimate, LlamaCppEstimate) or not estimate.n_gpu_layers:
            return None
        return _ordered(plan, place, estimate)

    return fewer, q8, shorter, fewer_layers


def _options(plan: Placement) -> LlamaCppOptions:
    kept_as = plan.kv_cache_dtype or "F16"
    return LlamaCppOptions(
        max_model_len=plan.max_model_len, slots=plan.max_num_seqs, key_type=kept_as, value_type=kept_as
    )


def _ordered(plan: Placement, place: Place, estimate: LlamaCppEstimate) -> Placement:
    """Give *plan* the memory and the layers of *estimate*."""
    overrides = Overrides(llamacpp_parallel=plan.max_num_seqs)
    order = placement_of(plan.spec, overrides, place, estimate, length=plan.max_model_len)
    return replace(plan, memory=order.memory, kv_cache_bytes=order.kv_cache_bytes, n_gpu_layers=order.n_gpu_layers)


def _knows_q8(model: GgufModel) -> bool:
    widths = {width for layer in model.caches for cache in layer for width in _row_widths(cache)}
    return all(width % _Q8_BLOCK == 0 for width in widths)


def _row_widths(cache: Cache) -> tuple[int, ...]:
    match cache:
        case KeysAndValues():
            return cache.head_dim, cache.v_head_dim
        case Latent():
            return (cache.width,)
        case State():
            return ()
