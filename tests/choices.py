"""
What a machine is offered of the shipped catalogue, in few words, for tests.
"""

from __future__ import annotations

from worker.catalog.catalogue import Catalogue
from worker.catalog.spec import EngineKind
from worker.catalog.toml_file import load_catalogue
from worker.hardware.gpu import Machine
from worker.selection.choose import Choice, choose_models
from worker.selection.overrides import Overrides
from worker.selection.placement import Placement

BOTH: dict[EngineKind, str | None] = {EngineKind.VLLM: None, EngineKind.LLAMACPP: None}
SHIPPED = load_catalogue()


def choose(machine: Machine, overrides: Overrides | None = None, catalogue: Catalogue = SHIPPED) -> Choice:
    return choose_models(machine, catalogue, engines=BOTH, overrides=overrides)


def ids(choice: Choice) -> set[str]:
    return {placement.model_id for placement in choice.placements}


def only(choice: Choice) -> Placement:
    (placement,) = choice.placements
    return placement
