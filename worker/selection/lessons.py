"""
What earlier loads taught: the estimate of a placement, corrected by what the engines measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from worker.catalog.spec import EngineKind
from worker.memory.learn import find_measured, learned
from worker.memory.measured import LoadKey, Measurement
from worker.selection.placement import Placement
from worker.selection.places import Place


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """The measurements of earlier loads, and what the engines here are called in them."""

    measurements: Mapping[LoadKey, Measurement] = field(default_factory=dict)
    engines: Mapping[EngineKind, str] = field(default_factory=dict)

    def apply(self, placement: Placement, place: Place) -> Placement:
        """Give *placement* with what was measured instead of what was computed; as it is, if nothing was."""
        if not self.measurements:
            return placement
        device = place.gpus[0].name if place.gpus else "cpu"
        key = placement.load_key(engine=self.engines.get(placement.spec.engine, ""), device=device)
        measured = find_measured(self.measurements, key)
        return replace(placement, memory=learned(placement.memory, measured, on_card=bool(place.gpus)))


NOTHING = Lessons()
