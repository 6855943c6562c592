"""
What will the waiting jobs take, by what was measured? The backlog and the workers as a simulation begins with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from common.schemas import SwitchStage
from worker.simulate.costs import ModelCosts
from worker.simulate.forecast import Traffic
from worker.simulate.run import Start
from worker.state.backlog import Backlog, Lane, Waiting
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

_TOKENS = 1000  # of a job's answer, where only its time is known: the unit does not matter
_LEFT = 0.1  # of its usual time, at least, of a job that has not ended yet
_AT_ONCE = 1e12  # tokens a second: takes no time


@dataclass(frozen=True, kw_only=True)
class Priced:
    """What waits, in tokens, and what they cost; models of which something is unknown are left out."""

    backlog: Backlog
    costs: Mapping[str, ModelCosts]
    usual_s: Mapping[str, float]  # that one job takes among others, by model


def price_backlog(backlog: Backlog, paces: Mapping[str, Pace], residency: Residency) -> Priced:
    """
    Say what each model's jobs and its next switch will cost.

    1. Is its pace unknown, or its switch,       It is left out: nobody knows.
       and it is not ready?
    2. Does such a model have jobs?              Only what is ready is foreseen: nobody knows what comes behind it.
    3. Are its tokens and rates known?           They are what its jobs cost: answers as long as those of late.
    4. Otherwise                                 All its jobs take the time of a usual one.
    """
    known = {
        model: pace
        for model, pace in paces.items()
        if (model in residency.switch_s or residency.ready(model)) and (pace.job_s or pace.prefill_tokens_per_s)
    }
    if any(waiting.count and model not in known for model, waiting in backlog.by_model.items()):
        known = {model: pace for model, pace in known.items() if residency.ready(model)}
    costs, by_model = {}, {}
    for model, pace in sorted(known.items()):
        waiting = backlog.by_model.get(model, Waiting(count=0, oldest_at=None))
        costs[model], lanes = _price(pace, waiting.by_class, residency.switch_s.get(model, 0.0))
        by_model[model] = replace(waiting, lanes=lanes)
    usual_s = {model: (pace.job_s or 0.0) * pace.at_once for model, pace in known.items()}
    return Priced(backlog=Backlog(by_model=by_model), costs=costs, usual_s=usual_s)


def _price(pace: Pace, lanes: Sequence[Lane], switch_s: float) -> tuple[ModelCosts, tuple[Lane, ...]]:
    """The costs of a model, and its lanes in the tokens that they are meant for."""
    prefill, decode = pace.prefill_tokens_per_s, pace.decode_tokens_per_s
    outputs = [pace.answers_tokens(lane) for lane in lanes]
    if prefill and decode and None not in outputs and all(lane.prompt_tokens is not None for lane in lanes):
        priced = [replace(lane, output_tokens=round(tokens or 0)) for lane, tokens in zip(lanes, outputs, strict=True)]
    else:
        one_s = max(1e-6, (pace.job_s or 0.0) * pace.at_once)
        prefill, decode = _AT_ONCE, _TOKENS / one_s
        priced = [replace(lane, prompt_tokens=0, output_tokens=_TOKENS * lane.count) for lane in lanes]
    costs = ModelCosts(
        load_s=switch_s,
        wake_s=switch_s,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        max_num_seqs=pace.at_once,
    )
    return costs, tuple(priced)


def expect_traffic(per_s: Mapping[str, float], priced: Priced) -> Mapping[str, Traffic]:
    """Say what will come for each model, by how many jobs a second come lately: usual ones."""
    return {
        model: Traffic(
            per_s=per_s[model], prompt_tokens=0, output_tokens=priced.usual_s[model] * cost.decode_tokens_per_s
        )
        for model, cost in priced.costs.items()
        if per_s.get(model)
    }


def see_workers(
    residency: Residency,
    others: Mapping[str, Sequence[str]],
    offered: Mapping[str, frozenset[str]],
    priced: Priced,
    *,
    now: float,
) -> tuple[Start, ...]:
    """
    Say how the workers are at *now* (Unix seconds): this one, and the *others* with the models they serve.

    Each of those takes turns of what it has *offered*; of one that has not, nobody knows, so of everything.
    Where models are ready side by side, each counts as a worker of its own.
    """
    ready = [r for r in residency.residents if r.level is Level.READY and r.model_id in priced.costs]
    here = [Start(at_s=now, ready=r.model_id, since_s=r.since, ends_s=_ends([r], priced, now=now)) for r in ready]
    switching = residency.switching
    ended = switching is not None and switching.stage in (SwitchStage.READY, SwitchStage.FAILED)
    if switching is not None and not ended and switching.to_model in priced.costs:
        coming = Start(at_s=now, target=switching.to_model)
        if switching.priced_since is not None:
            ends_at = switching.priced_since + priced.costs[switching.to_model].load_s
            coming = replace(coming, target_at_s=max(now, ends_at))
        elif switching.to_model not in residency.beside:
            coming = replace(coming, ends_s=_ends(residency.residents, priced, now=now))
        here = [coming, *(here if switching.to_model in residency.beside else ())]
    there = [
        Start(at_s=now, ready=model, serves=offered.get(worker))
        for worker, models in others.items()
        for model in tuple(found for found in models if found in priced.costs) or (None,)
    ]
    return (*(here or [Start(at_s=now)]), *there)


def _ends(residents: Sequence[Resident], priced: Priced, *, now: float) -> tuple[float, ...]:
    """When the jobs in flight will end, in that order: their usual time after they began, or shortly."""
    ends = []
    for resident in residents:
        usual_s = priced.usual_s.get(resident.model_id, 0.0)
        ends += [max(at + usual_s, now + _LEFT * usual_s) for at in resident.begun]
    return tuple(sorted(ends))
