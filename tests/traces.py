"""
Made-up traces: seeds in, jobs and costs out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from worker.simulate.costs import ModelCosts
from worker.simulate.policies import PolicyName, make_policy
from worker.simulate.report import Report, summarize_run
from worker.simulate.run import Run, simulate
from worker.simulate.trace import TracedJob

MAX_WAIT_S = 600.0
MIN_TURN_S = 30.0


@dataclass(frozen=True, kw_only=True)
class World:
    """A trace and what its models cost."""

    jobs: list[TracedJob]
    costs: dict[str, ModelCosts]

    def run(
        self, policy: PolicyName = PolicyName.SHIFTWORKER, *, max_wait_s: float = MAX_WAIT_S, workers: int = 1
    ) -> Run:
        decide = make_policy(policy, self.costs, max_wait_s=max_wait_s, min_turn_s=MIN_TURN_S)
        return simulate(
            self.jobs, self.costs, decide, workers=workers, max_wait_s=max_wait_s,
            line=policy is PolicyName.FIFO, overtaking=policy is PolicyName.SHIFTWORKER,
        )  # fmt: skip

    def report(self, policy: PolicyName = PolicyName.SHIFTWORKER, *, max_wait_s: float = MAX_WAIT_S) -> Report:
        return summarize_run(self.run(policy, max_wait_s=max_wait_s), self.costs, max_wait_s=max_wait_s)


def make_costs(
    *, load_s: float = 10.0, wake_s: float = 2.0, job_s: float = 1.0, at_once: int = 1, read_share: float = 0.0
) -> ModelCosts:
    """A model whose job of 100 prompt and 100 output tokens takes *job_s*, *read_share* of it for the prompt."""
    read_s, write_s = max(read_share * job_s, 1e-9), max((1 - read_share) * job_s, 1e-9)
    return ModelCosts(
        load_s=load_s, wake_s=wake_s, prefill_tokens_per_s=100 / read_s, decode_tokens_per_s=100 / write_s,
        max_num_seqs=at_once,
    )  # fmt: skip


def make_job(number: int, model: str, arrival_s: float = 0.0, *, size: float = 1.0, **changes: object) -> TracedJob:
    """A job that takes *size* times the usual time of its model."""
    tokens = max(1, round(100 * size))
    job = TracedJob(
        id=str(number), arrival_s=arrival_s, model=model, prompt_tokens=tokens, output_tokens=tokens,
    )  # fmt: skip
    return job._replace(**changes)


KINDS = ("steady", "bursts", "bursts of one model", "at once")


def make_world(
    seed: int, kind: str, *, load: float | None = None, count: int | None = None, lasts_s: float | None = None
) -> World:
    """
    3-6 models with loads of 2-90 s, wakes of 0.5-10 s, jobs of 0.1-20 s, 1-64 at once.

    *load* is the share of the time that the jobs take with all places taken, switches apart; 0.7-0.95 unless given.
    There are 20-1,600 jobs, or *count*, or as many as come in about *lasts_s*.
    """
    dice = random.Random(f"{seed} {kind}")
    load = load or dice.uniform(0.7, 0.95)
    count = count or int(10 ** dice.uniform(1.3, 3.2))
    usual_s, at_once = 10 ** dice.uniform(-1, 1.3), dice.choice((1, 1, 4, 16, 64))
    load_s = 10 ** dice.uniform(0.3, 1.95)
    wake_s = min(load_s, 10 ** dice.uniform(-0.3, 1))
    models = [f"m{n}" for n in range(dice.randint(3, 6))]
    job_s = {model: min(20.0, usual_s * dice.uniform(0.5, 2)) for model in models}
    costs = {
        model: make_costs(
            load_s=load_s * dice.uniform(0.5, 1), wake_s=wake_s * dice.uniform(0.5, 1), job_s=job_s[model],
            at_once=at_once, read_share=dice.uniform(0.02, 0.3) / at_once,
        )
        for model in models
    }  # fmt: skip
    weights = [dice.expovariate(1) + 0.02 for _ in models]
    spread = dice.choice((0.0, 0.7, 1.0))
    rate = load * sum(weights) / sum(w * job_s[m] / at_once for m, w in zip(models, weights, strict=True))

    count = count if lasts_s is None else int(rate * lasts_s)

    jobs: list[TracedJob] = []
    at, left, model = 0.0, 0, models[0]
    for number in range(count):
        if kind == "steady":
            at += dice.expovariate(rate)
        elif kind.startswith("bursts") and not left:
            left = 1 + int(dice.expovariate(1 / 20))
            at += dice.expovariate(1) * left / rate
            model = dice.choices(models, weights)[0]
        left -= 1
        if kind.startswith("bursts"):
            at += dice.expovariate(20 * rate)
        if kind != "bursts of one model":
            model = dice.choices(models, weights)[0]
        size = 1 + spread * (dice.expovariate(1) - 1)
        jobs.append(make_job(number, model, at, size=size))
    return World(jobs=jobs, costs=costs)


def make_starvation(seed: int, *, load: float = 1.0, minutes: int = 90) -> World:
    """Steady traffic that keeps one model busy all the time, and a few jobs for another one in the first third."""
    dice = random.Random(seed)
    job_s, at_once = dice.choice((0.5, 1.0, 3.0)), dice.choice((1, 1, 4))
    costs = {
        model: make_costs(load_s=dice.uniform(2, 60), wake_s=dice.uniform(0.5, 10), job_s=job_s, at_once=at_once)
        for model in ("busy", "rare")
    }
    lasts_s = 60 * minutes
    jobs: list[TracedJob] = []
    while (at := len(jobs) * job_s / at_once / load) < lasts_s:
        jobs.append(make_job(len(jobs), "busy", at))
    jobs += [make_job(len(jobs) + n, "rare", dice.uniform(60, 0.28 * lasts_s)) for n in range(6)]
    return World(jobs=sorted(jobs, key=lambda job: job.arrival_s), costs=costs)


def make_mixed(seed: int, *, count: int = 15_000) -> World:
    """
    5 models, first loads of 10-60 s, wakes of 1-10 s, jobs of 0.3-3 s, 1-16 at once; busy for 0.7-0.9 of the time.

    Each job is of one of three classes and twenty tenants; three of ten have a deadline in 1-20 minutes.
    """
    dice = random.Random(f"mixed {seed}")
    at_once = dice.choice((1, 4, 8, 16))
    job_s = {f"m{n}": dice.uniform(0.3, 3) for n in range(5)}
    costs = {
        model: make_costs(
            load_s=dice.uniform(10, 60), wake_s=dice.uniform(1, 10), job_s=takes_s, at_once=at_once,
            read_share=0.1 / at_once,
        )
        for model, takes_s in job_s.items()
    }  # fmt: skip
    weights = [dice.expovariate(1) + 0.02 for _ in job_s]
    work_s = sum(weight * takes_s / at_once for weight, takes_s in zip(weights, job_s.values(), strict=True))
    rate = dice.uniform(0.7, 0.9) * sum(weights) / work_s
    jobs: list[TracedJob] = []
    at = 0.0
    for number in range(count):
        at += dice.expovariate(rate)
        (model,) = dice.choices([*job_s], weights)
        changes = {
            "priority": dice.choice((0, 3, 9)), "tenant": f"t{dice.randrange(20)}",
            "deadline_s": at + dice.uniform(60, 1200) if dice.random() < 0.3 else None,
        }  # fmt: skip
        jobs.append(make_job(number, model, at, size=1 + 0.7 * (dice.expovariate(1) - 1), **changes))
    return World(jobs=jobs, costs=costs)
