"""
Forecasts take a small share of one core, however much there is to tell.
"""

from __future__ import annotations

import random

import pytest

from worker.telemetry.rest import AHEAD_S, SHARE, Rest


def test_a_forecast_is_paid_back_by_rest() -> None:
    """One of 0.09 s: the next is due after 3 s; with news, 0.2 s after it has ended."""
    rest = Rest().after(began=100.0, ended=100.5, cost_s=0.09, waits=True)
    assert (rest.due_at, rest.news_at) == (pytest.approx(103.0), pytest.approx(100.7))


@pytest.mark.parametrize(("waits", "due_at"), [(True, 101.01), (False, 105.01)])
def test_what_costs_next_to_nothing_is_made_again_after_a_while(*, waits: bool, due_at: float) -> None:
    """After a second, or five where nobody waits."""
    rest = Rest().after(began=100.0, ended=100.01, cost_s=0.01, waits=waits)
    assert rest.due_at == pytest.approx(due_at)


def test_news_draw_on_rest_to_come_and_then_they_wait() -> None:
    """Each forecast costs 6 s of rest: three in a row owe 18 s, more than 15."""
    rest, made = Rest(news_at=100.0), []
    for _ in range(5):
        made.append(rest.news_at)
        rest = rest.after(began=rest.news_at, ended=rest.news_at, cost_s=0.18, waits=True)
    assert made == pytest.approx([100.0, 100.2, 100.4, 103.0, 109.0])


@pytest.mark.parametrize("seed", range(20))
def test_they_never_take_more_than_their_share(seed: int) -> None:
    """Whatever they cost and whenever there are news: at most the share, what may be owed, and one forecast."""
    dice = random.Random(seed)
    rest, now, spent_s, dearest_s = Rest(), 0.0, 0.0, 0.0
    often = dice.random()
    while now < 1000.0:
        if now >= (rest.news_at if dice.random() < often else rest.due_at):
            cost_s = dice.expovariate(1 / 0.1)
            spent_s, dearest_s = spent_s + cost_s, max(dearest_s, cost_s)
            rest = rest.after(began=now, ended=now + cost_s, cost_s=cost_s, waits=dice.random() < 0.9)
            now += cost_s
        now += 0.2
        assert spent_s <= SHARE * (now + AHEAD_S) + dearest_s
