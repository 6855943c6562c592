"""
Which models does the fleet offer? The offers of all workers as one.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.schemas import Offer, OfferedModel


def merge_offers(offers: Sequence[Offer]) -> tuple[OfferedModel, ...]:
    """
    Join *offers* into one list of models, in order of their ids.

    Of a model that several workers offer, the newest offer counts, with the greatest length that any of
    them gives it.
    """
    merged: dict[str, OfferedModel] = {}
    for offer in sorted(offers, key=lambda offer: (offer.at, offer.worker)):
        for model in offer.models:
            older = merged.get(model.id, model)
            merged[model.id] = model.model_copy(update={"max_model_len": max(model.max_model_len, older.max_model_len)})
    return tuple(merged[model_id] for model_id in sorted(merged))
