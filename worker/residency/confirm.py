"""
Has the memory of an engine that ended, or fell asleep, come back? Pure: what the cards must show, and what they lack.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from worker.hardware.gpu import Machine

_GIB = 2**30
_NOISE_BYTES = 256 * 2**20  # by which free memory changes from look to look although no program came or went
_NOISE_SHARE = 0.05  # of what was held: the driver keeps a little of it for the next process


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a loaded model was seen to hold."""

    pids: tuple[int, ...] = ()  # its process tree
    taken: Mapping[int, int] = field(default_factory=dict)  # card -> bytes by which its free memory went down


@dataclass(frozen=True, kw_only=True)
class Owed:
    """What must be seen once an engine has ended."""

    model_id: str
    pids: tuple[int, ...] = ()  # none of them holds anything
    free: Mapping[int, int] = field(default_factory=dict)  # card -> bytes that are free at least


def shifted(held: Held, before: Machine, after: Machine, cards: Collection[int]) -> Held:
    """Say what is held of *cards* after what happened between two looks: a load, a wake, falling asleep."""
    was, now = _free(before, cards), _free(after, cards)
    changes = {card: held.taken.get(card, 0) + was[card] - now[card] for card in was.keys() & now.keys()}
    return Held(pids=held.pids, taken={card: max(0, size) for card, size in changes.items()})


def owed_after_stop(model_id: str, held: Held, now: Machine, cards: Collection[int]) -> Owed:
    """
    Say what must be seen once a model, which is about to be stopped, has ended.

    1. What is free, and
    2. what the driver counts for its processes; where it does not say (most containers), what its load took.
    """
    counted = {
        gpu.index: sum(size for pid, size in gpu.processes.items() if pid in held.pids)
        for gpu in now.gpus
        if gpu.index in cards
    }
    expected = counted if any(counted.values()) else held.taken
    least = {
        card: free + size - _noise(size) for card, free in _free(now, cards).items() if (size := expected.get(card, 0))
    }
    return Owed(model_id=model_id, pids=held.pids, free=least)


def owed_after_failure(model_id: str, before: Machine, cards: Collection[int]) -> Owed:
    """Say what must be seen after a failed load, or wake, that began when the cards were as *before*."""
    return Owed(model_id=model_id, free={card: free - _NOISE_BYTES for card, free in _free(before, cards).items()})


def owed_after_sleep(model_id: str, before: Machine, cards: Collection[int], freed: int) -> Owed:
    """Say what must be seen when a model has fallen asleep that was awake *before*, and gives back *freed* bytes."""
    least = {card: free + freed - _noise(freed) for card, free in _free(before, cards).items()}
    return Owed(model_id=model_id, free=least)


def confirm_freed(owed: Owed, now: Machine) -> tuple[str, ...]:
    """List what has not come back yet; empty = everything, as far as the driver says."""
    lacks: list[str] = []
    for gpu in now.gpus:
        holding = sorted(pid for pid in owed.pids if gpu.processes.get(pid))
        least = owed.free.get(gpu.index)
        if holding:
            size = sum(gpu.processes[pid] for pid in holding)
            lacks.append(
                f"process {', '.join(map(str, holding))} still holds {size / _GIB:.1f} GiB of card {gpu.index}"
            )
        elif least is not None and gpu.free_bytes is not None and gpu.free_bytes < least:
            lacks.append(
                f"card {gpu.index} has {gpu.free_bytes / _GIB:.1f} GiB free, {least / _GIB:.1f} GiB were expected"
            )
    return tuple(lacks)


def _noise(size: int) -> int:
    return max(_NOISE_BYTES, int(size * _NOISE_SHARE))


def _free(machine: Machine, cards: Collection[int]) -> dict[int, int]:
    return {gpu.index: gpu.free_bytes for gpu in machine.gpus if gpu.index in cards and gpu.free_bytes is not None}
