"""
Where on this machine does one model run, and with how much memory? `place_model` answers, or says why nowhere.
"""

from __future__ import annotations

from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Machine
from worker.memory.estimate import MemoryEstimate
from worker.selection.fit_llamacpp import fit_llamacpp, split_llamacpp
from worker.selection.fit_vllm import LONGEST as LONGEST_VLLM
from worker.selection.fit_vllm import fit_vllm
from worker.selection.lessons import NOTHING, Lessons
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import Place, Refusal, card_places, host_place, to_spare


def place_model(
    spec: ModelSpec, machine: Machine, overrides: Overrides, lessons: Lessons = NOTHING, *, asked: bool = False
) -> Placement | Refusal:
    """
    Decide where *spec* runs; *asked* says that the operator named this very model.

    The questions, in order:

    1. Is it a stub?                       It needs nothing, and stands on the first card, if there is one.
    2. Is the length asked of it too long? Refuse.
    3. Does it run on a card here?         vLLM does; llama.cpp unless n_gpu_layers is 0. On a machine without
                                           cards vLLM runs only if asked for or if its files are local: it is
                                           slow there, and not a surprise for the operator to meet.
    4. Does it fit on one card?            The one with the most free memory. One is preferred to several.
    5. vLLM: on several equal cards?       A power of two of them that divides its heads; the fewest.
    6. llama.cpp: some layers of it?       As many as fit, at the shortest length; the host takes the others,
                                           or all of them.
    7. Otherwise                           Refuse, with the arithmetic of the most roomy attempt.

    `fit_vllm` and `fit_llamacpp` say how, by the *lessons* of earlier loads where there are any; an n_gpu_layers or
    gpu_memory_utilization of the operator is obeyed, or the model is refused.
    """
    # (1) A stub.
    if spec.engine is EngineKind.STUB:
        length = min(spec.max_model_len, overrides.max_model_len or spec.max_model_len)
        return Placement(
            spec=spec,
            memory=MemoryEstimate(weights=0, kv_cache=0),
            max_model_len=length,
            max_num_seqs=overrides.max_num_seqs,
            kv_cache_bytes=0,
            gpus=tuple(gpu.index for gpu in machine.gpus[:1]),
        )

    # (2) Too long.
    if asked and (overrides.max_model_len or 0) > spec.max_model_len:
        return Refusal(
            reason=f"VLLM_MAX_MODEL_LEN={overrides.max_model_len} is more than the {spec.max_model_len} tokens "
            "it was made for"
        )

    # (3) No card for it.
    if not machine.gpus and spec.engine is EngineKind.VLLM and not (asked or spec.path is not None):
        return Refusal(reason="this machine has no card, and vLLM on the CPU is only used if VLLM_MODEL asks for it")
    fit = fit_llamacpp if spec.engine is EngineKind.LLAMACPP else fit_vllm
    host = host_place(machine)
    if not machine.gpus or (spec.engine is EngineKind.LLAMACPP and overrides.n_gpu_layers == 0):
        return fit(spec, overrides, host, lessons)

    # (4) One card, (5) several; but not if the operator wants only some layers there.
    places = card_places(spec, machine.gpus, overrides)
    if isinstance(places, Refusal):
        return places
    refusal = Refusal(reason="no card of this machine can be used")
    some_layers = spec.engine is EngineKind.LLAMACPP and (overrides.n_gpu_layers or 0) > 0
    for place in () if some_layers else places:
        answer = fit(spec, overrides, place, lessons)
        if isinstance(answer, Placement):
            return answer
        refusal = answer

    # (6) Some layers.
    if spec.engine is EngineKind.LLAMACPP and overrides.n_gpu_layers != -1:
        return split_llamacpp(spec, overrides, places[0], host, refusal)

    # (7) Nowhere.
    return refusal


def force_model(spec: ModelSpec, machine: Machine, overrides: Overrides) -> Placement:
    """
    Place *spec* although it does not fit, or nobody knows whether it does: the operator has asked for that.

    It is given all there is; `kv_cache_bytes` 0 leaves the division to the engine.
    """
    count = overrides.tensor_parallel_size or 1
    gpus = tuple(sorted(machine.gpus, key=to_spare, reverse=True)[:count])
    everything = Place(gpus=gpus, budget=min(map(to_spare, gpus), default=host_place(machine).budget))
    vllm = spec.engine is EngineKind.VLLM
    share = everything.budget / min(gpu.total_bytes for gpu in gpus) if gpus else 0.0
    layers = -1 if overrides.n_gpu_layers is None else overrides.n_gpu_layers
    return Placement(
        spec=spec,
        memory=MemoryEstimate(weights=everything.budget, kv_cache=0),
        max_model_len=overrides.max_model_len or min(spec.max_model_len, LONGEST_VLLM),
        max_num_seqs=overrides.max_num_seqs if vllm else overrides.llamacpp_parallel,
        kv_cache_bytes=0,
        gpus=tuple(gpu.index for gpu in gpus),
        gpu_memory_utilization=(overrides.gpu_memory_utilization or share) if gpus and vllm else None,
        n_gpu_layers=0 if vllm or not gpus else layers,
        quantization=(overrides.quantization or spec.quantization) if vllm else None,
    )
