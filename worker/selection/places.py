"""
Which groups of cards may a model be put on, and how many bytes are to spare there?
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Gpu, Machine
from worker.selection.overrides import Overrides

_GIB = 2**30

# The estimate is not exact, and other programs (a desktop) come and go: this much of a card stays out of every plan.
_CARD_RESERVE_BYTES = _GIB // 2
_CARD_RESERVE_SHARE = 0.02
# The worker, Redis and the system need memory of their own.
_RAM_RESERVE_BYTES = _GIB
_RAM_RESERVE_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a model is not placed, with the arithmetic where it is about memory."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a model may run: on these cards (none = the host), within so many bytes on each."""

    gpus: tuple[Gpu, ...]
    budget: int

    def __str__(self) -> str:
        """The place in words, for refusals."""
        if not self.gpus:
            return f"the host has {gib(self.budget)} to spare"
        if len(self.gpus) == 1:
            return f"the largest has {gib(self.budget)} to spare"
        return f"the {len(self.gpus)} equal cards have {gib(self.budget)} to spare on each"


def host_place(machine: Machine) -> Place:
    """The memory of the host that models may take."""
    reserve = max(_RAM_RESERVE_BYTES, int(_RAM_RESERVE_SHARE * machine.ram_total_bytes))
    return Place(gpus=(), budget=max(0, machine.ram_available_bytes - reserve))


def card_places(spec: ModelSpec, gpus: Sequence[Gpu], overrides: Overrides) -> list[Place] | Refusal:
    """Every group of cards to try, the preferred first: one, then the fewest; a share the operator set is obeyed."""
    wanted = overrides.tensor_parallel_size if spec.engine is EngineKind.VLLM else 1
    groups = [group for group in _groups(gpus, spec) if wanted in (None, len(group))]
    if not groups:
        heads = spec.architecture.heads if spec.architecture else 0
        return Refusal(
            reason=f"VLLM_TENSOR_PARALLEL_SIZE={wanted} needs as many equal cards, and a number that divides its "
            f"{heads or 'unknown number of'} heads; this machine has "
            f"{', '.join(f'{gpu.name} ({gib(gpu.total_bytes)})' for gpu in gpus)}"
        )
    share = overrides.gpu_memory_utilization if spec.engine is EngineKind.VLLM else 0.0
    if not share:
        return [Place(gpus=group, budget=min(map(to_spare, group))) for group in groups]
    # vLLM refuses to start unless the whole share is free.
    fitting = [group for group in groups if all(share * gpu.total_bytes <= free_bytes(gpu) for gpu in group)]
    if not fitting:
        card = groups[0][0]
        return Refusal(
            reason=f"VLLM_GPU_MEMORY_UTILIZATION={share:g} asks for {gib(share * card.total_bytes)} of card "
            f"{card.index}, which has {gib(free_bytes(card))} free"
        )
    return [Place(gpus=group, budget=int(share * min(gpu.total_bytes for gpu in group))) for group in fitting]


def free_bytes(gpu: Gpu) -> int:
    """What is free; all of it, if the driver does not say."""
    return gpu.total_bytes if gpu.free_bytes is None else gpu.free_bytes


def to_spare(gpu: Gpu) -> int:
    """Bytes that plans may use of a card."""
    return max(0, free_bytes(gpu) - max(_CARD_RESERVE_BYTES, int(_CARD_RESERVE_SHARE * gpu.total_bytes)))


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / _GIB:.1f} GiB"


def _groups(gpus: Sequence[Gpu], spec: ModelSpec) -> Iterator[tuple[Gpu, ...]]:
    """The card with the most to spare, then 2, 4, 8... equal ones over which the heads can be divided."""
    roomy = sorted(gpus, key=lambda gpu: (-to_spare(gpu), gpu.index))
    yield (roomy[0],)
    kinds: dict[tuple[str, int], list[Gpu]] = {}
    for gpu in roomy:
        kinds.setdefault((gpu.name, gpu.total_bytes), []).append(gpu)
    size = 2
    while size <= len(gpus):
        for equal in kinds.values():
            if len(equal) >= size and _divisible(spec, size):
                yield tuple(sorted(equal[:size], key=lambda gpu: gpu.index))
        size *= 2


def _divisible(spec: ModelSpec, cards: int) -> bool:
    """Can vLLM split its layers over so many cards? Every card takes as many heads, and KV heads or copies of them."""
    if spec.architecture is None or not spec.architecture.heads or spec.architecture.heads % cards:
        return False
    kept = {getattr(block.cache, "kv_heads", cards) for block in spec.architecture.blocks}
    return all(heads % cards == 0 or cards % heads == 0 for heads in kept)
