"""
Several workers' offers become one list of models.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import permutations
from typing import Any

from common.schemas import Offer, OfferedModel
from worker.routing.merge import merge_offers


def model(model_id: str, **changes: Any) -> OfferedModel:
    return OfferedModel(**{"id": model_id, "tier": 1, "complexity_up_to": 0.5, "max_model_len": 2048, **changes})


def offer(worker: str, minute: int, *models: OfferedModel) -> Offer:
    return Offer(worker=worker, models=models, at=datetime(2026, 11, 21, 12, minute, tzinfo=UTC))


def test_each_model_is_offered_once_whatever_the_order() -> None:
    """
    The newest offer of a model counts, with the greatest length any worker gives it; sorted by id.
    """
    offers = [
        offer("a", 1, model("small", max_model_len=8192, tier=1), model("large")),
        offer("b", 2, model("small", max_model_len=4096, tier=2)),
        offer("c", 3, model("middle")),
    ]

    for order in permutations(offers):
        assert merge_offers(order) == (model("large"), model("middle"), model("small", max_model_len=8192, tier=2))


def test_no_offers_are_no_models() -> None:
    """
    Before the first worker there is nothing to choose from.
    """
    assert merge_offers([]) == ()
