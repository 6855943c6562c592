"""
How many layers of a GGUF model fit on the card? The rest stays on the host.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from worker.memory.estimate import Unknown
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf import GgufModel

_GIB = 2**30
_HOST_TERMS = ("weights_host", "kv_host", "state_host", "compute_host")


@dataclass(frozen=True, kw_only=True)
class TooLarge:
    """It does not fit, and this term is the largest where there is too little."""

    term: str  # a field of LlamaCppEstimate
    reason: str


def offload_layers(
    model: GgufModel, options: LlamaCppOptions, *, card_bytes: int, host_bytes: int | None = None
) -> LlamaCppEstimate | TooLarge | Unknown:
    """
    Put as many layers on the card as *card_bytes* hold; `n_gpu_layers` of the answer says how many.

    All of them are layers + 1; None is none, for a card that holds no layer is not worth its context. What stays
    must fit into *host_bytes* (None = not asked): the host's bytes shrink as the card's grow, so where the largest
    number does not fit there, none does.
    """
    # The step to all of them may need less than the one before: no layer is copied for a batch any more.
    whole = estimate_llamacpp(model, options, n_gpu_layers=model.layers + 1)
    if isinstance(whole, Unknown):
        return whole
    found = whole
    if whole.card > card_bytes:
        fitting = bisect_right(range(model.layers + 1), card_bytes, key=lambda n: _known(model, options, n).card) - 1
        found = _known(model, options, fitting if fitting > 0 else None)
    if host_bytes is not None and found.host > host_bytes:
        return too_large(found, card_bytes=card_bytes, host_bytes=host_bytes)
    return found


def too_large(estimate: LlamaCppEstimate, *, card_bytes: int, host_bytes: int) -> TooLarge:
    """Say by how much the host is too small for what the card does not hold, and which term is the largest there."""
    term = max(_HOST_TERMS, key=lambda name: int(getattr(estimate, name)))
    return TooLarge(
        term=term,
        reason=f"needs {_gib(estimate.host)} of RAM, where {_gib(host_bytes)} are left, with "
        f"{estimate.n_gpu_layers or 'no'} layers in {_gib(card_bytes)} of the card; "
        f"the largest term is {term}, {_gib(getattr(estimate, term))}",
    )


def _known(model: GgufModel, options: LlamaCppOptions, n_gpu_layers: int | None) -> LlamaCppEstimate:
    """The estimate of a model of which nothing is unknown."""
    estimate = estimate_llamacpp(model, options, n_gpu_layers=n_gpu_layers)
    assert isinstance(estimate, LlamaCppEstimate)  # noqa: S101 - what is unknown does not depend on the layers
    return estimate


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
