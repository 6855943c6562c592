"""
Which models share a small card, so that a switch between them costs nothing? `seat_together` plans them jointly.
"""

from __future__ import annotations

from collections.abc import Sequence

from worker.catalog.spec import EngineKind
from worker.hardware.gpu import Machine
from worker.memory.share import Share, Wish, share_card
from worker.selection.fit_llamacpp import LONGEST, gguf_model, llamacpp_options, placement_of
from worker.selection.fit_vllm import SHORTEST
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement
from worker.selection.places import card_places, host_place


def seat_together(
    placements: Sequence[Placement], starting: Placement | None, machine: Machine, overrides: Overrides
) -> dict[str, Placement]:
    """
    Plan the starting model and its nearest neighbours for one card together; empty if there is nothing to plan.

    *placements* are those that the router may choose, the strongest first. Only with room for several residents
    (SWITCH_MAX_RESIDENTS), and only llama.cpp: it takes a model whose layers are partly in RAM. The starting
    model has the first choice, then the next stronger ones, for they gain most from a card, then weaker ones.
    """
    if overrides.residents < 2 or starting is None or not _on_card(starting):  # noqa: PLR2004 - two are together
        return {}
    peers = [placement for placement in placements if _on_card(placement)]
    stronger = [p for p in reversed(peers) if p.spec.tier > starting.spec.tier]
    weaker = [p for p in peers if p.spec.tier < starting.spec.tier]
    together = [starting, *stronger, *weaker][: overrides.residents]
    places = card_places(starting.spec, machine.gpus, overrides)
    if len(together) < 2 or not isinstance(places, list):  # noqa: PLR2004 - two are together
        return {}
    wishes = [
        Wish(
            model_id=placement.model_id,
            model=gguf_model(placement.spec),
            options=llamacpp_options(overrides, min(placement.spec.max_model_len, overrides.max_model_len or LONGEST)),
            shortest_len=min(overrides.max_model_len or SHORTEST, placement.spec.max_model_len),
        )
        for placement in together
    ]
    shares = share_card(wishes, card_bytes=places[0].budget, host_bytes=host_place(machine).budget)
    specs = {placement.model_id: placement.spec for placement in together}
    return {
        share.model_id: placement_of(
            specs[share.model_id], overrides, places[0], share.estimate, length=share.max_model_len
        )
        for share in shares
        if isinstance(share, Share) and share.estimate.n_gpu_layers
    }


def _on_card(placement: Placement) -> bool:
    return placement.spec.engine is EngineKind.LLAMACPP and bool(placement.gpus) and placement.n_gpu_layers != 0
