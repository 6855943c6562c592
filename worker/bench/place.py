"""
Where does a model that a bench has written run here?
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.errors import Misconfigured
from worker.catalog.local import spec_from_path
from worker.hardware.gpu import Machine
from worker.selection.overrides import Overrides
from worker.selection.place import place_model
from worker.selection.placement import Placement
from worker.selection.places import Refusal


def place_written(model: Path, machine: Machine, overrides: Overrides) -> Placement:
    """
    Place the model in the folder *model*, as if VLLM_MODEL named it.

    Raises
    ------
    Misconfigured
        It has no room here.
    """
    spec = spec_from_path(str(model))
    placement = place_model(spec, machine, replace(overrides, model=spec), asked=True)
    if isinstance(placement, Refusal):
        raise Misconfigured(f"{spec.id} has no place here: {placement.reason}")
    return placement
