"""
The policies a trace can be run with: the worker's own decision, and three plain ones to hold beside it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum
from typing import Any

from common.errors import BadSetting
from worker.scheduling.pick import Knowledge, Turn, pick_turn
from worker.simulate.costs import ModelCosts
from worker.simulate.run import Policy, Sight
from worker.state.backlog import Backlog
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident


class PolicyName(StrEnum):
    """What `shiftworker plan --policy` takes."""

    SHIFTWORKER = "shiftworker"
    FIFO = "fifo"
    COLLATE = "collate"
    ROUND_ROBIN = "round-robin"


def policy_named(name: str) -> PolicyName:
    """
    Find a policy by its name.

    Raises
    ------
    BadSetting
        There is none of that name; the message has those there are.
    """
    try:
        return PolicyName(name)
    except ValueError:
        raise BadSetting(f"--policy {name!r} is not known. Give one of {', '.join(PolicyName)}.") from None


def make_policy(name: PolicyName, costs: Mapping[str, ModelCosts], *, max_wait_s: float, min_turn_s: float) -> Policy:
    """Build the policy called *name*; the bound and the shortest turn are ours alone."""
    plain: Mapping[PolicyName, Policy] = {
        PolicyName.FIFO: follow_the_line,
        PolicyName.COLLATE: collate,
        PolicyName.ROUND_ROBIN: go_round,
    }
    return plain.get(name) or shiftworker(costs, max_wait_s=max_wait_s, min_turn_s=min_turn_s)


def shiftworker(costs: Mapping[str, ModelCosts], *, max_wait_s: float, min_turn_s: float) -> Policy:
    """Build the worker's own decision: `pick_turn`, given what a worker sees."""
    models = sorted(costs)
    alone = Knowledge(paces={model: pace_of(cost) for model, cost in costs.items()})

    def decide(sight: Sight) -> Turn:
        machine = sight.machine
        mine = models if machine.serves is None else [model for model in models if model in machine.serves]
        resident = machine.ready and Resident(
            model_id=machine.ready, level=Level.READY, bytes=0, since=machine.since, in_flight=machine.running
        )
        served = Counter(model for other in sight.others if (model := other.target or other.ready))
        return pick_turn(
            Backlog(by_model={model: queue.read(sight.now) for model, queue in sight.queues.items() if queue}),
            Residency(
                capacity=0,
                max_residents=1,
                residents=(resident,) if resident else (),
                switch_s=machine.switch_s,
            ),
            mine,
            now=sight.now,
            max_wait_s=max_wait_s,
            min_turn_s=min_turn_s,
            known=replace(alone, elsewhere=served) if served else alone,
        )

    return decide


def pace_of(cost: ModelCosts) -> Pace:
    """Say the rates of a model as a worker would have measured them."""
    return Pace(
        prefill_tokens_per_s=cost.prefill_tokens_per_s,
        decode_tokens_per_s=cost.decode_tokens_per_s,
        at_once=cost.max_num_seqs,
    )


def follow_the_line(sight: Sight) -> Turn:
    """FIFO: the model of the job that came first, whatever is ready."""
    return _first(sight, lambda model: sight.queues[model].oldest, "its job came first")


def collate(sight: Sight) -> Turn:
    """Plain collation: stay while the ready model has jobs, then the model of the job that waits longest."""
    if (ready := sight.machine.ready) and sight.queues[ready]:
        return Turn(model_id=ready, reason="it has jobs")
    return _first(sight, lambda model: (sight.arrival_s(sight.queues[model].oldest), model), "its job waits longest")


def go_round(sight: Sight) -> Turn:
    """Round-robin: the next model, by name, that has jobs, until it has none."""
    ready = sight.machine.ready or ""
    if ready and sight.queues[ready]:
        return Turn(model_id=ready, reason="it has jobs")
    return _first(sight, lambda model: (model <= ready, model), "it is next")


def _first(sight: Sight, key: Callable[[str], Any], reason: str) -> Turn:
    waiting = [model for model, queue in sight.queues.items() if queue]
    return Turn(model_id=min(waiting, key=key, default=None), reason=reason)
