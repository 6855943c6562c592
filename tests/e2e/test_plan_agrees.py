"""
The simulator tells what the real system does: one trace, run by both, with the stand-in engine's times.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import mean

import pytest

from common.schemas import utc_now
from tests.e2e.conftest import Box
from tests.e2e.stub_models import stub_env
from worker.simulate.costs import ModelCosts
from worker.simulate.policies import shiftworker
from worker.simulate.report import Report, summarize_run
from worker.simulate.run import Start, simulate
from worker.simulate.trace import TracedJob

MODELS = ("red", "green", "blue")
LOAD_S, RUN_S, AT_ONCE = 5.0, 1.6, 4
MAX_WAIT_S, MIN_TURN_S = 30.0, 2.0
# A model is ready when a first prompt has been answered, so that belongs to the load.
COSTS = ModelCosts(
    load_s=LOAD_S + RUN_S,
    wake_s=LOAD_S + RUN_S,
    prefill_tokens_per_s=1e9,
    decode_tokens_per_s=1 / RUN_S,
    max_num_seqs=AT_ONCE,
)


@pytest.fixture
def node_env(node_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Three models on the stand-in engine, one ready at a time, with a short bound on the waiting."""
    return node_env | stub_env(
        tmp_path,
        MODELS,
        load_s=LOAD_S,
        run_s=RUN_S,
        WORKER_CONCURRENCY=AT_ONCE,
        SWITCH_MIN_TURN_S=MIN_TURN_S,
        SWITCH_MAX_WAIT_S=MAX_WAIT_S,
    )


def make_trace(seed: int, *, bursts: int) -> list[TracedJob]:
    """Bursts of up to twenty jobs, most of one model, for two thirds of what the places can do, switches apart."""
    dice = random.Random(seed)
    jobs: list[TracedJob] = []
    at = 0.0
    for _ in range(bursts):
        model, size = dice.choice(MODELS), dice.randint(5, 20)
        for _ in range(size):
            at += dice.expovariate(10)
            jobs.append(TracedJob(str(len(jobs)), at, dice.choice((model, model, *MODELS)), 1, 1))
        at += 1.5 * size * RUN_S / AT_ONCE
    return jobs


def run_for_real(box: Box, jobs: list[TracedJob]) -> tuple[float, list[float]]:
    """Send each job at its moment; returns the makespan and all waits, in seconds."""
    first, began = utc_now(), time.monotonic()
    sent = []
    for job in jobs:
        time.sleep(max(0.0, began + job.arrival_s - time.monotonic()))
        sent.append(box.client.submit({"messages": [{"role": "user", "content": job.id}], "model": job.model}))
    ledgers = [box.client.wait(job_id, 120).ledger for job_id in sent]
    ended = max(ledger.finished_at for ledger in ledgers if ledger.finished_at)
    return (ended - first).total_seconds(), [ledger.waited_s or 0.0 for ledger in ledgers]


def plan(jobs: list[TracedJob], *, ready: str) -> Report:
    """Run it on virtual time, by a worker that has had each model once."""
    costs = dict.fromkeys(MODELS, COSTS)
    run = simulate(
        jobs, costs, shiftworker(costs, max_wait_s=MAX_WAIT_S, min_turn_s=MIN_TURN_S), max_wait_s=MAX_WAIT_S,
        starts=[Start(ready=ready, since_s=-60.0, started=frozenset(MODELS))],
    )  # fmt: skip
    return summarize_run(run, costs, max_wait_s=MAX_WAIT_S)


def test_the_real_system_does_what_the_plan_says(box: Box) -> None:
    """
    Makespan, switches and mean wait within a tenth, on a trace of 46 s in which the bound has its say.

    Before, a turn of each model has passed, so that paces and switch times are known.
    """
    for model in (*MODELS, MODELS[0]):
        box.client.wait(box.client.submit({"messages": [{"role": "user", "content": "Hi"}], "model": model}), 60)
    jobs = make_trace(48, bursts=4)
    before = len(box.events("residency.switched"))
    makespan_s, waits = run_for_real(box, jobs)
    switches = [event for event in box.events("residency.switched")[before:] if event["outcome"] == "ready"]
    planned = plan(jobs, ready=MODELS[0])

    shown = f"planned {planned}; real {makespan_s:.1f} s, {mean(waits):.2f} s, {len(switches)}"
    assert makespan_s == pytest.approx(planned.makespan_s, rel=0.1), shown
    assert mean(waits) == pytest.approx(planned.mean_wait_s, rel=0.1), shown
    assert len(switches) == pytest.approx(planned.switches, rel=0.1), shown
