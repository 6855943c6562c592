"""
Which models does the fleet offer? The offers of all workers as one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from common.schemas import Offer, OfferedModel


def merge_offers(offers: Sequence[Offer], *, alive: Collection[str]) -> tuple[OfferedModel, ...]:
    """
    Join *offers* into one list of models, in order of their ids; *alive* names the workers that are there now.

    1. Is any of these workers alive? Then its offer counts; what only absent workers offer is marked as away, and
                                      an alias that the living use is theirs alone.
    2. Are all of them away?          Then every offer counts: the jobs wait for whoever comes back.

    Of a model that several counted workers offer, the newest offer counts, with the greatest length that any of
    them gives it; it is away only if it is with each of them.
    """
    # (1) Some are alive.
    living = _newest(offer for offer in offers if offer.worker in alive)
    away = _newest(offer for offer in offers if offer.worker not in alive)
    if living:
        taken = {name.casefold() for model in living.values() for name in (model.id, *model.aliases)}
        away = {
            model.id: model.model_copy(
                update={"away": True, "aliases": tuple(name for name in model.aliases if name.casefold() not in taken)}
            )
            for model in away.values()
        }

    # (2) All are away.
    merged = {**away, **living}
    return tuple(merged[model_id] for model_id in sorted(merged))


def _newest(offers: Iterable[Offer]) -> dict[str, OfferedModel]:
    merged: dict[str, OfferedModel] = {}
    for offer in sorted(offers, key=lambda offer: (offer.at, offer.worker)):
        for model in offer.models:
            older = merged.get(model.id, model)
            longest = max(model.max_model_len, older.max_model_len)
            away = model.away and older.away
            merged[model.id] = model.model_copy(update={"max_model_len": longest, "away": away})
    return merged
