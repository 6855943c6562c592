"""
What a worker offers the routers: its placements, each with the length that is in force.
"""

from __future__ import annotations

from dataclasses import replace

from tests.factories import make_placement
from worker.state.residency import Level, Quarantine, Residency, Resident
from worker.world import offered

PLACEMENT = make_placement("small", max_model_len=8192)
NOTHING = Residency(capacity=9, max_residents=1)
RESIDENT = Resident(model_id="small", level=Level.READY, bytes=1, since=0.0)


def test_a_model_is_offered_with_the_length_it_was_loaded_with() -> None:
    """No job may come that it cannot take; as soon as it is loaded as planned, or gone, the whole length is back."""
    shorter = replace(RESIDENT, max_model_len=2048)
    lengths = [
        offered(PLACEMENT, replace(NOTHING, residents=residents), now=0).max_model_len
        for residents in ((), (shorter,), (RESIDENT,), (replace(shorter, model_id="other"),))
    ]

    assert lengths == [8192, 2048, 8192, 8192]


def test_a_model_that_failed_to_load_is_away_for_a_while() -> None:
    """Jobs for any model go elsewhere; it comes back when its quarantine ends."""
    broken = replace(NOTHING, quarantined={"small": Quarantine(until=100, failures=1, reason="")})

    assert [offered(PLACEMENT, broken, now=now).away for now in (99, 100)] == [True, False]
    assert not offered(make_placement("other"), broken, now=99).away
