"""
Which known models can this machine serve, how is each placed, and why is the rest left out?
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from common.errors import BadSetting, DoesNotFit, EngineMissing, ModelMissing
from worker.catalog.catalogue import Catalogue
from worker.catalog.spec import EngineKind, ModelSpec
from worker.hardware.gpu import Machine
from worker.selection.lessons import NOTHING, Lessons
from worker.selection.overrides import Overrides
from worker.selection.place import force_model, place_model
from worker.selection.placement import Placement
from worker.selection.places import Refusal
from worker.selection.seat import seat_together


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A model that this machine does not serve, and why."""

    model_id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Everything this machine serves, the strongest first, and what it starts with."""

    placements: tuple[Placement, ...]
    left_out: tuple[LeftOut, ...]
    starting: Placement | None
    reason: str  # why it starts with that one

    def placement(self, model_id: str) -> Placement | None:
        """How *model_id* runs here; None if it does not."""
        return next((found for found in self.placements if found.model_id == model_id), None)


def choose_models(
    machine: Machine,
    catalogue: Catalogue,
    *,
    engines: Mapping[EngineKind, str | None],
    overrides: Overrides | None = None,
    missing: Mapping[str, str] | None = None,
    lessons: Lessons = NOTHING,
) -> Choice:
    """
    Place every model of *catalogue* that this machine can serve.

    *engines* says of each engine why it is not available, None if it is; *missing* why a model's files are
    not there; *lessons* what earlier loads measured. The questions, asked of each model in order:

    1. Did the operator name another model, or a list without it? Leave it out.
    2. Are its files there, and its engine?                       Leave it out if not.
    3. Does it fit?                                               `place_model` decides, or says why not.

    And of those that fit:

    4. May the router choose it? Of every tier only the best: trusted with the hardest jobs, then with the most
       of it on the cards, then the largest; beside it the best that embeds. The others answer jobs that name them.
    5. Which one starts? On cards the best of the highest tier that is wholly on them: with layers in RAM it answers
       several times slower. On a CPU the smallest: there time to load and to answer grows with the weights, and a
       job that needs a larger model brings about the switch itself.
    6. Which are ready together? With several residents allowed, `seat_together` plans them for one card.

    Raises
    ------
    DoesNotFit
        `overrides.model` does not fit, and is not forced; the message shows the arithmetic.
    ModelMissing, EngineMissing
        `overrides.model` is in no catalogue, or its files or its engine are not there.
    BadSetting
        `overrides.only` names a model that is in no catalogue.
    """
    overrides, missing = overrides or Overrides(), missing or {}
    if overrides.model is not None:
        return _only_asked(
            _asked(catalogue, overrides.model), machine, engines, overrides, missing=missing, lessons=lessons
        )
    _check_only(catalogue, overrides.only)

    placements: list[Placement] = []
    left_out: list[LeftOut] = []
    for spec in catalogue:
        answer = _place(spec, machine, engines, overrides, missing=missing, lessons=lessons)
        if isinstance(answer, Refusal):
            left_out.append(LeftOut(model_id=spec.id, reason=answer.reason))
        else:
            placements.append(answer)

    placements.sort(key=_strength, reverse=True)
    offered = _one_auto_per_tier(placements)
    starting, reason = _start(offered, machine)
    seated = seat_together([p for p in offered if p.auto and not _embeds(p)], starting, machine, overrides)
    if starting is not None and len(seated) > 1:
        offered = tuple(seated.get(placement.model_id, placement) for placement in offered)
        starting = seated.get(starting.model_id, starting)
        reason += f", together with {', '.join(name for name in seated if name != starting.model_id)}"
    return Choice(placements=offered, left_out=tuple(left_out), starting=starting, reason=reason)


def _place(
    spec: ModelSpec,
    machine: Machine,
    engines: Mapping[EngineKind, str | None],
    overrides: Overrides,
    *,
    missing: Mapping[str, str],
    lessons: Lessons,
) -> Placement | Refusal:
    # (1) Not wanted.
    if overrides.only and spec.id not in overrides.only:
        return Refusal(reason="not in MODELS_ONLY")
    # (2) Not there.
    if spec.id in missing:
        return Refusal(reason=missing[spec.id])
    if (why := engines.get(spec.engine, f"no {spec.engine} engine in this worker")) is not None:
        return Refusal(reason=why)
    # (3) Fits, or not.
    return place_model(spec, machine, overrides, lessons)


def _asked(catalogue: Catalogue, model: str | ModelSpec) -> ModelSpec:
    spec = catalogue.find(model) if isinstance(model, str) else model
    if spec is None:
        raise ModelMissing(f"VLLM_MODEL={model} is in no catalogue; known are {', '.join(catalogue.ids)}.")
    return spec


def _only_asked(
    spec: ModelSpec,
    machine: Machine,
    engines: Mapping[EngineKind, str | None],
    overrides: Overrides,
    *,
    missing: Mapping[str, str],
    lessons: Lessons,
) -> Choice:
    """The one model that VLLM_MODEL names, or the error that says why it cannot be."""
    if spec.id in missing:
        raise ModelMissing(f"VLLM_MODEL={spec.id}: {missing[spec.id]}")
    if (why := engines.get(spec.engine, f"no {spec.engine} engine in this worker")) is not None:
        raise EngineMissing(f"VLLM_MODEL={spec.id} needs {spec.engine}: {why}")
    answer = place_model(spec, machine, overrides, lessons, asked=True)
    reason = "VLLM_MODEL names it"
    if isinstance(answer, Refusal):
        if not overrides.force:
            raise DoesNotFit(
                f"VLLM_MODEL={spec.id}: {answer.reason}. Choose a smaller model or a shorter VLLM_MAX_MODEL_LEN, "
                "or set VLLM_FORCE=true to try it all the same."
            )
        reason = f"VLLM_FORCE, although: {answer.reason}"
        answer = force_model(spec, machine, overrides)
    return Choice(placements=(answer,), left_out=(), starting=answer, reason=reason)


def _check_only(catalogue: Catalogue, only: tuple[str, ...]) -> None:
    unknown = [name for name in only if name not in catalogue.ids]
    if unknown:
        raise BadSetting(
            f"MODELS_ONLY names {', '.join(unknown)}, which no catalogue has; known are {', '.join(catalogue.ids)}."
        )


def _strength(placement: Placement) -> tuple[int, float, float, int, str]:
    spec = placement.spec
    return spec.tier, spec.complexity_up_to, _share_on_cards(placement), placement.memory.weights, spec.id


def _share_on_cards(placement: Placement) -> float:
    """1 for a model that is wholly on its cards, 0 for one that is not on any."""
    if not placement.gpus:
        return 0.0
    memory = placement.memory
    return memory.total / (memory.total + memory.host) if placement.n_gpu_layers > 0 else 1.0


def _one_auto_per_tier(strongest_first: list[Placement]) -> tuple[Placement, ...]:
    """(4) Leave to the router the first of each tier, and of those that embed; the others keep their place."""
    best: dict[tuple[int, bool], str] = {}
    for placement in strongest_first:
        best.setdefault((placement.spec.tier, _embeds(placement)), placement.model_id)
    chosen = set(best.values())
    return tuple(replace(placement, auto=placement.model_id in chosen) for placement in strongest_first)


def _embeds(placement: Placement) -> bool:
    """It has no text to answer with, so no job that asks for text may meet it."""
    return placement.spec.capabilities <= {"embedding"}


def _start(strongest_first: tuple[Placement, ...], machine: Machine) -> tuple[Placement | None, str]:
    """(5) Choose what is loaded first, and say why."""
    offered = [placement for placement in strongest_first if placement.auto and not _embeds(placement)]
    if not offered:
        return None, "no model of the catalogue can run here"
    if machine.kind == "cpu":
        return offered[-1], "the smallest: on a CPU it is ready and answers soonest"
    whole = [placement for placement in offered if _share_on_cards(placement) == 1]
    if not whole:
        return offered[0], "the strongest that fits, no model wholly on this machine's cards"
    return whole[0], "the strongest that fits wholly on this machine's cards"
