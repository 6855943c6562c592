"""
What does a load teach? The next estimate of the same model: what was measured takes the place of what was computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from worker.memory.estimate import MemoryEstimate
from worker.memory.measured import LoadKey, Measured, Measurement

_GIB = 2**30
# Estimates of weights are seldom off by a tenth. A figure that is off by more than this was read wrongly, or belongs
# to other files under the same name.
_BELIEVED = 2.0
_BELIEVED_MARGIN_BYTES = _GIB  # a small model in a large process: Python, torch and CUDA's libraries


def find_measured(measurements: Mapping[LoadKey, Measurement], key: LoadKey) -> Measured | None:
    """
    Find what is known of a load like *key*.

    1. The very same load?                  All of its figures.
    2. Another one of the same weights?     The newest's figures that depend neither on the length nor, if that is
                                            another one, on how much the engine works on at once.
    3. Neither                              None.
    """
    # (1) The same.
    if (same := measurements.get(key)) is not None:
        return same.measured

    # (2) Another length.
    alike = [found for found in measurements.values() if found.key.same_weights(key)]
    if not alike:
        return None
    newest = max(alike, key=lambda found: (found.key.same_batches(key), found.at))
    known = newest.measured
    if newest.key.same_batches(key):
        return replace(known, kv_pool=None, kv_tokens=None, total=None)
    return Measured(weights=known.weights, non_torch=known.non_torch)


def learned(
    estimate: MemoryEstimate, measured: Measured | None, *, on_card: bool, kv_tokens: int | None = None
) -> MemoryEstimate:
    """
    Correct *estimate* by what was *measured*; what nobody measured stays, and so does what `doubts` speaks against.

    1. KV cache           Measured bytes per token, if *estimate* holds the cache of so many *kv_tokens*; None: its
                          cache is a pool whose size is decided already.
    2. The other terms    On a card as the engine says them. On a host untouched pages count nowhere, so no term.
    3. The total          What a load took beyond all terms is overhead too. It is read before the first job and may
                          grow with a larger batch, so it raises an estimate and never lowers one.
    """
    if measured is None:
        return estimate
    believed = replace(measured, **dict.fromkeys(_unbelievable(estimate, measured)))

    # (1) KV cache.
    per_token = believed.kv_bytes_per_token
    kv_cache = estimate.kv_cache if per_token is None or kv_tokens is None else math.ceil(per_token * kv_tokens)
    found = replace(estimate, kv_cache=kv_cache)

    # (2) The terms.
    if on_card:
        terms = ("weights", "activation", "cuda_graphs", "non_torch")
        said = {name: value for name in terms if (value := getattr(believed, name)) is not None}
        found = replace(found, **said)

    # (3) The total.
    if believed.total is None:
        return found
    pool = found.kv_cache if believed.kv_pool is None else believed.kv_pool
    beyond = max(0, believed.total - found.weights - pool - found.overhead)
    if on_card:
        return replace(found, activation=found.activation + beyond)
    return replace(found, non_torch=found.non_torch + beyond)


def doubts(estimate: MemoryEstimate, measured: Measured) -> tuple[str, ...]:
    """Say which figures are not believed beside *estimate*, and why; empty = all are."""
    return tuple(_unbelievable(estimate, measured).values())


def _unbelievable(estimate: MemoryEstimate, measured: Measured) -> dict[str, str]:
    """Field of `Measured` -> why it is not believed."""
    found: dict[str, str] = {}
    if measured.weights is not None and estimate.weights:
        share = measured.weights / estimate.weights
        if not 1 / _BELIEVED <= share <= _BELIEVED:
            found["weights"] = (
                f"weights of {measured.weights:,} bytes were read, {share:.2f} times the {estimate.weights:,} computed"
            )
    if measured.total is not None and measured.total > _BELIEVED * estimate.total + _BELIEVED_MARGIN_BYTES:
        found["total"] = f"{measured.total:,} bytes were counted in all, where {estimate.total:,} were computed"
    return found
