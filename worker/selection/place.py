"""
Where on this machine does one model run, and with how much memory? `place_model` answers, or says why nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Gpu, Machine
from worker.memory.estimate import MemoryEstimate, Unknown, estimate_memory, kv_bytes_per_token, longest_that_fits
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement

_GIB = 2**30

# A new process takes its CUDA context before vLLM compares free memory with what it was promised, and the
# estimate is not exact: this much of a card stays out of every plan.
_CARD_RESERVE_BYTES = _GIB // 2
_CARD_RESERVE_SHARE = 0.02
# The worker, Redis and the system need memory of their own.
_RAM_RESERVE_BYTES = _GIB
_RAM_RESERVE_SHARE = 0.1

_SHORTEST = 2048  # tokens; a model that holds less is not worth its place
# A longer context is offered only if somebody asks (VLLM_MAX_MODEL_LEN): it takes memory from other requests.
_LONGEST = {EngineKind.VLLM: 32768, EngineKind.LLAMACPP: 16384}  # llama.cpp sets it aside for every slot
_TYPICAL_JOB_TOKENS = 2048  # prompt and answer; what vLLM's shared pool is sized by
_CPU_POOL_BYTES = _GIB  # vLLM takes 4 s at each start to allocate a pool of 1 GiB on the CPU


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a model is not placed, with the arithmetic where it is about memory."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One way to run the model: on these cards (none = the host), within so many bytes on each."""

    gpus: tuple[Gpu, ...]
    budget: int

    @property
    def place(self) -> str:
        """The place in words, for refusals."""
        if not self.gpus:
            return f"the host has {_gib(self.budget)} to spare"
        if len(self.gpus) == 1:
            return f"the largest has {_gib(self.budget)} to spare"
        return f"the {len(self.gpus)} equal cards have {_gib(self.budget)} to spare on each"


def place_model(spec: ModelSpec, machine: Machine, overrides: Overrides, *, asked: bool = False) -> Placement | Refusal:
    """
    Decide where *spec* runs; *asked* says that the operator named this very model.

    The questions, in order:

    1. Is it a stub?                       It needs nothing.
    2. Is the length asked of it too long? Refuse.
    3. Does it run on a card here?         vLLM does; llama.cpp unless n_gpu_layers is 0. On a machine without
                                           cards vLLM runs only if asked for or if its files are local: it is
                                           slow there, and not a surprise for the operator to meet.
    4. Does it fit on one card?            The one with the most free memory. One is preferred to several.
    5. vLLM: on several equal cards?       A power of two of them that divides the KV heads; the fewest.
    6. llama.cpp: some layers of it?       As many as fit, at the shortest length; the host takes the others,
                                           or all of them.
    7. Otherwise                           Refuse, with the arithmetic of the most roomy attempt.

    The length is the longest of the usual maximum and its halves down to 2,048 tokens that fits. vLLM's pool
    holds one request of that length, and where there is room `max_num_seqs` of 2,048 tokens. An
    n_gpu_layers or gpu_memory_utilization of the operator is obeyed, or the model is refused.
    """
    # (1) A stub.
    if spec.engine is EngineKind.STUB:
        nothing = MemoryEstimate(weights=0, kv_cache=0, overhead=0)
        length = min(spec.max_model_len, overrides.max_model_len or spec.max_model_len)
        return _placement(spec, overrides, nothing, gpus=(), max_model_len=length)

    # (2) Too long.
    if asked and (overrides.max_model_len or 0) > spec.max_model_len:
        return Refusal(
            reason=f"VLLM_MAX_MODEL_LEN={overrides.max_model_len} is more than the {spec.max_model_len} tokens "
            "it was made for"
        )

    # (3) No card for it.
    if not machine.gpus and spec.engine is EngineKind.VLLM and not (asked or spec.path is not None):
        return Refusal(reason="this machine has no card, and vLLM on the CPU is only used if VLLM_MODEL asks for it")
    host = _Plan(gpus=(), budget=_ram_to_spare(machine))
    if not machine.gpus or (spec.engine is EngineKind.LLAMACPP and overrides.n_gpu_layers == 0):
        return _fit(spec, overrides, host)

    # (4) One card, (5) several; but not if the operator wants only some layers there.
    plans = _card_plans(spec, machine.gpus, overrides)
    if isinstance(plans, Refusal):
        return plans
    refusal = Refusal(reason="no card of this machine can be used")
    for plan in plans if _layers_wanted(spec, overrides) is None else ():
        answer = _fit(spec, overrides, plan)
        if isinstance(answer, Placement):
            return answer
        refusal = answer

    # (6) Some layers.
    if spec.engine is EngineKind.LLAMACPP and overrides.n_gpu_layers != -1:
        return _split(spec, overrides, plans[0], host, refusal)

    # (7) Nowhere.
    return refusal


def force_model(spec: ModelSpec, machine: Machine, overrides: Overrides) -> Placement:
    """
    Place *spec* although it does not fit, or nobody knows whether it does: the operator has asked for that.

    It is given all there is; `kv_cache_bytes` 0 leaves the division to the engine.
    """
    count = overrides.tensor_parallel_size or 1
    gpus = tuple(sorted(machine.gpus, key=_to_spare, reverse=True)[:count])
    everything = min(map(_to_spare, gpus), default=_ram_to_spare(machine))
    length = overrides.max_model_len or min(spec.max_model_len, _LONGEST.get(spec.engine, spec.max_model_len))
    placement = _placement(
        spec,
        overrides,
        MemoryEstimate(weights=everything, kv_cache=0, overhead=0),
        gpus=gpus,
        max_model_len=length,
        n_gpu_layers=overrides.n_gpu_layers if overrides.n_gpu_layers is not None else -1,
    )
    share = overrides.gpu_memory_utilization or placement.gpu_memory_utilization
    return replace(placement, gpu_memory_utilization=share if gpus else None)


# --- The places there are ------------------------------------------------------------------------------


def _card_plans(spec: ModelSpec, gpus: Sequence[Gpu], overrides: Overrides) -> list[_Plan] | Refusal:
    """Every group of cards to try, the preferred first."""
    wanted = overrides.tensor_parallel_size if spec.engine is EngineKind.VLLM else 1
    groups = [group for group in _groups(gpus, spec) if wanted in (None, len(group))]
    if not groups:
        return Refusal(
            reason=f"VLLM_TENSOR_PARALLEL_SIZE={wanted} needs as many equal cards, and a number that divides its "
            f"{spec.kv_heads or 'unknown number of'} KV heads; this machine has "
            f"{', '.join(f'{gpu.name} ({_gib(gpu.total_bytes)})' for gpu in gpus)}"
        )
    share = overrides.gpu_memory_utilization if spec.engine is EngineKind.VLLM else 0.0
    if not share:
        return [_Plan(gpus=group, budget=min(map(_to_spare, group))) for group in groups]
    # vLLM refuses to start unless the whole share is free.
    fitting = [group for group in groups if all(share * gpu.total_bytes <= _free(gpu) for gpu in group)]
    if not fitting:
        card = groups[0][0]
        return Refusal(
            reason=f"VLLM_GPU_MEMORY_UTILIZATION={share:g} asks for {_gib(share * card.total_bytes)} of card "
            f"{card.index}, which has {_gib(_free(card))} free"
        )
    return [_Plan(gpus=group, budget=int(share * min(gpu.total_bytes for gpu in group))) for group in fitting]


def _groups(gpus: Sequence[Gpu], spec: ModelSpec) -> Iterator[tuple[Gpu, ...]]:
    """The card with the most to spare, then 2, 4, 8... equal cards that divide the KV heads."""
    roomy = sorted(gpus, key=lambda gpu: (-_to_spare(gpu), gpu.index))
    yield (roomy[0],)
    kinds: dict[tuple[str, int], list[Gpu]] = {}
    for gpu in roomy:
        kinds.setdefault((gpu.name, gpu.total_bytes), []).append(gpu)
    size = 2
    while size <= len(gpus):
        for equal in kinds.values():
            if len(equal) >= size and spec.kv_heads is not None and spec.kv_heads % size == 0:
                yield tuple(sorted(equal[:size], key=lambda gpu: gpu.index))
        size *= 2


def _free(gpu: Gpu) -> int:
    return gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes


def _to_spare(gpu: Gpu) -> int:
    return max(0, _free(gpu) - max(_CARD_RESERVE_BYTES, int(_CARD_RESERVE_SHARE * gpu.total_bytes)))


def _ram_to_spare(machine: Machine) -> int:
    reserve = max(_RAM_RESERVE_BYTES, int(_RAM_RESERVE_SHARE * machine.ram_total_bytes))
    return max(0, machine.ram_available_bytes - reserve)


# --- Fitting into one of them --------------------------------------------------------------------------


def _fit(spec: ModelSpec, overrides: Overrides, plan: _Plan) -> Placement | Refusal:
    """The whole model within *plan*, with the longest context that fits."""
    seqs, quantization = _seqs(spec, overrides), _quantization(spec, overrides)
    cards, on_card = max(1, len(plan.gpus)), bool(plan.gpus)
    fits_up_to = longest_that_fits(
        spec,
        plan.budget,
        max_num_seqs=seqs,
        tensor_parallel_size=cards,
        on_card=on_card,
        quantization=quantization,
    )
    if isinstance(fits_up_to, Unknown):
        return _cannot_tell(fits_up_to)
    lengths = _lengths(spec, overrides)
    length = next((length for length in lengths if length <= fits_up_to), None)
    memory = estimate_memory(
        spec,
        max_model_len=length or lengths[-1],
        max_num_seqs=seqs,
        tensor_parallel_size=cards,
        on_card=on_card,
        quantization=quantization,
    )
    if isinstance(memory, Unknown):
        return _cannot_tell(memory)
    if length is None:
        return Refusal(reason=_arithmetic(spec, memory, lengths[-1], seqs, plan))
    if spec.engine is EngineKind.VLLM:
        memory = _grow_pool(spec, overrides, memory, length, plan)
    return _placement(
        spec, overrides, memory, gpus=plan.gpus, max_model_len=length, n_gpu_layers=-1 if plan.gpus else 0
    )


def _split(spec: ModelSpec, overrides: Overrides, card: _Plan, host: _Plan, refusal: Refusal) -> Placement | Refusal:
    """As many layers as fit on the card, the others on the host; with n_gpu_layers set, exactly so many."""
    if spec.layers is None:
        return refusal
    seqs, wanted = _seqs(spec, overrides), _layers_wanted(spec, overrides)
    lengths = _lengths(spec, overrides)
    # A longer context would push layers off the card, and each of them slows every token down.
    ways = [(wanted, length) for length in lengths] if wanted else [(n, lengths[-1]) for n in range(spec.layers, 0, -1)]
    for layers, length in ways:
        whole = estimate_memory(spec, max_model_len=length, max_num_seqs=seqs, on_card=False)
        part = estimate_memory(spec, max_model_len=length, max_num_seqs=seqs, gpu_layers=layers)
        if isinstance(whole, Unknown) or isinstance(part, Unknown):
            return refusal
        left_to_host = whole.weights + whole.kv_cache - part.weights - part.kv_cache
        if part.total <= card.budget and left_to_host <= host.budget:
            return _placement(spec, overrides, part, gpus=card.gpus, max_model_len=length, n_gpu_layers=layers)
    if wanted:
        return Refusal(
            reason=f"LLAMACPP_N_GPU_LAYERS={wanted} of its {spec.layers} layers do not fit, or the others not into "
            f"RAM: {card.place}, {host.place}"
        )
    on_host = _fit(spec, overrides, host)
    return on_host if isinstance(on_host, Placement) else refusal


def _layers_wanted(spec: ModelSpec, overrides: Overrides) -> int | None:
    """How many of the layers, fewer than all, the operator wants on the card; None if that is left to us."""
    wanted = overrides.n_gpu_layers or 0
    return wanted if spec.engine is EngineKind.LLAMACPP and 0 < wanted <= (spec.layers or 0) else None


def _grow_pool(
    spec: ModelSpec, overrides: Overrides, memory: MemoryEstimate, length: int, plan: _Plan
) -> MemoryEstimate:
    """Widen vLLM's KV pool for requests side by side; to the whole share if the operator has set one."""
    room = plan.budget - memory.weights - memory.overhead
    if overrides.gpu_memory_utilization and plan.gpus:
        return replace(memory, kv_cache=room)
    per_token = (kv_bytes_per_token(spec) or 0) // max(1, len(plan.gpus))
    useful = per_token * min(length, _TYPICAL_JOB_TOKENS) * overrides.max_num_seqs
    if not plan.gpus:
        useful = min(useful, _CPU_POOL_BYTES)
    return replace(memory, kv_cache=max(memory.kv_cache, min(room, useful)))


def _lengths(spec: ModelSpec, overrides: Overrides) -> tuple[int, ...]:
    """The context lengths to try, the longest first; only one if the operator has said which."""
    if overrides.max_model_len is not None:
        return (min(overrides.max_model_len, spec.max_model_len),)
    lengths = [min(spec.max_model_len, _LONGEST[spec.engine])]
    while lengths[-1] // 2 >= _SHORTEST:
        lengths.append(lengths[-1] // 2)
    return tuple(lengths)


def _seqs(spec: ModelSpec, overrides: Overrides) -> int:
    return overrides.llamacpp_parallel if spec.engine is EngineKind.LLAMACPP else overrides.max_num_seqs


def _quantization(spec: ModelSpec, overrides: Overrides) -> str | None:
    """Say what the engine is told; without VLLM_MODEL, files that are quantised already stay as they are."""
    if spec.engine is EngineKind.VLLM and (overrides.model is not None or spec.quantization is None):
        return overrides.quantization or spec.quantization
    return spec.quantization


def _placement(
    spec: ModelSpec,
    overrides: Overrides,
    memory: MemoryEstimate,
    *,
    gpus: tuple[Gpu, ...],
    max_model_len: int,
    n_gpu_layers: int = 0,
) -> Placement:
    share = None
    if gpus and spec.engine is EngineKind.VLLM:
        share = overrides.gpu_memory_utilization or memory.total / min(gpu.total_bytes for gpu in gpus)
    return Placement(
        spec=spec,
        memory=memory,
        max_model_len=max_model_len,
        max_num_seqs=_seqs(spec, overrides),
        kv_cache_bytes=memory.kv_cache,
        gpus=tuple(gpu.index for gpu in gpus),
        gpu_memory_utilization=share,
        n_gpu_layers=n_gpu_layers if spec.engine is EngineKind.LLAMACPP else 0,
        quantization=_quantization(spec, overrides),
    )


# --- Saying why not ------------------------------------------------------------------------------------


def _cannot_tell(unknown: Unknown) -> Refusal:
    return Refusal(
        reason=f"nobody can tell whether it fits: {', '.join(unknown.missing)} unknown. Write them into its "
        "catalogue entry"
    )


def _arithmetic(spec: ModelSpec, memory: MemoryEstimate, length: int, seqs: int, plan: _Plan) -> str:
    slots = f" in each of {seqs} slots" if spec.engine is EngineKind.LLAMACPP else ""
    where = {0: "in RAM", 1: "on one card"}.get(len(plan.gpus), "on each card")
    return (
        f"needs {_gib(memory.weights)} weights + {_gib(memory.kv_cache)} KV at {length} tokens{slots} "
        f"+ {_gib(memory.overhead)} overhead = {_gib(memory.total)} {where}; {plan.place}"
    )


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f} GiB"
