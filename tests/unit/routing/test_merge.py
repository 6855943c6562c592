"""
Several workers' offers become one list of models.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import permutations
from typing import Any

import pytest

from common.schemas import JobRequest, Offer, OfferedModel
from worker.routing.merge import merge_offers
from worker.routing.route import route_job
from worker.routing.score import Complexity


def model(model_id: str, **changes: Any) -> OfferedModel:
    return OfferedModel(**{"id": model_id, "tier": 1, "complexity_up_to": 0.5, "max_model_len": 2048, **changes})


def offer(worker: str, minute: int, *models: OfferedModel) -> Offer:
    return Offer(worker=worker, models=models, at=datetime(2026, 11, 21, 12, minute, tzinfo=UTC))


@pytest.mark.parametrize("alive", ["abc", ""])
def test_each_model_is_offered_once_whatever_the_order(alive: str) -> None:
    """
    The newest offer of a model counts, with the greatest length any worker gives it; sorted by id. Workers that are
    all away count as those that are all there: their jobs wait.
    """
    offers = [
        offer("a", 1, model("small", max_model_len=8192, tier=1), model("large")),
        offer("b", 2, model("small", max_model_len=4096, tier=2)),
        offer("c", 3, model("middle")),
    ]

    for order in permutations(offers):
        merged = merge_offers(order, alive=set(alive))
        assert merged == (model("large"), model("middle"), model("small", max_model_len=8192, tier=2))


def test_no_offers_are_no_models() -> None:
    """
    Before the first worker there is nothing to choose from.
    """
    assert merge_offers([], alive={"a"}) == ()


def test_a_worker_that_is_away_says_nothing_of_a_model_that_a_living_one_offers() -> None:
    """
    Not even with a newer offer: its length may be more than the living one can hold.
    """
    offers = [offer("gone", 9, model("small", max_model_len=8192, tier=2)), offer("here", 1, model("small"))]

    assert merge_offers(offers, alive={"here"}) == (model("small"),)


def test_auto_and_aliases_go_to_the_living_and_a_name_is_still_obeyed() -> None:
    """
    A model that only an absent worker offers can be named, and no job gets there in another way.
    """
    gone = offer("gone", 9, model("small-old", aliases=("Small", "old"), capabilities=("chat",)))
    here = offer("here", 1, model("small-new", aliases=("small",), tier=3, capabilities=("chat",)))
    models = merge_offers([gone, here], alive={"here"})
    easy = Complexity(value=0.1, signals=())

    def routed(name: str) -> str:
        body = {"messages": [{"role": "user", "content": "Hi"}], "model": name}
        return route_job(JobRequest.parse(body), easy, models).model

    chosen = {name: routed(name) for name in ("auto", "small", "old", "small-old")}
    assert chosen == {"auto": "small-new", "small": "small-new", "old": "small-old", "small-old": "small-old"}


def test_what_only_an_absent_worker_can_do_waits_for_it() -> None:
    """
    A worker that restarts must not make the router refuse what it alone can take.
    """
    gone = offer("gone", 9, model("eyes", capabilities=("chat", "vision"), max_model_len=9000))
    here = offer("here", 1, model("plain", capabilities=("chat",)))
    models = merge_offers([gone, here], alive={"here"})
    picture = [{"type": "image_url", "image_url": {"url": "data:,"}}]

    def routed(content: Any) -> str:
        request = JobRequest.parse({"messages": [{"role": "user", "content": content}]})
        return route_job(request, Complexity(value=0.1, signals=()), models).model

    assert routed("Hi") == "plain"
    assert routed(picture) == "eyes"
    assert routed("word " * 3000) == "eyes"


@pytest.mark.parametrize(("here", "there", "away"), [(True, True, True), (True, False, False), (False, False, False)])
def test_a_model_is_away_only_if_it_is_with_every_worker(here: bool, there: bool, away: bool) -> None:  # noqa: FBT001 - parameters
    """
    It failed to load on one of them; whichever told its offer last.
    """
    for minutes in ((1, 2), (2, 1)):
        offers = [
            offer("a", minutes[0], model("large", away=here)),
            offer("b", minutes[1], model("large", away=there)),
        ]
        assert [found.away for found in merge_offers(offers, alive={"a", "b"})] == [away]
