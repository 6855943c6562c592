"""
Three workers on one broker: they share the models out, and take over from one that dies.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.schemas import JobState
from tests.e2e.conftest import Box
from tests.e2e.nodes import ProgramNode
from tests.e2e.stub_models import stub_env
from tests.waiting import eventually

MODELS = ("red", "green", "blue")
LEASE_S = 3.0

Join = Callable[[str], ProgramNode]


@pytest.fixture
def node_env(node_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Three models on the stand-in engine: 1 s to load, 0.1 s a job, two at once; one is ready at a time."""
    return node_env | stub_env(
        tmp_path, MODELS, load_s=1, run_s=0.1, WORKER_CONCURRENCY=2, SWITCH_MIN_TURN_S=1, STATUS_TTL_S=LEASE_S
    )


@pytest.fixture
def join(box: Box, node_env: dict[str, str], tmp_path: Path) -> Iterator[Join]:
    """Start one more worker of this name."""
    nodes: list[ProgramNode] = []

    def start(name: str) -> ProgramNode:
        folder = tmp_path / name
        folder.mkdir()
        env = {**node_env, "WORKER_NAME": name, "REDIS_URL": box.url}
        nodes.append(ProgramNode("worker", folder, env, '"outcome": "ready"'))
        return nodes[-1]

    yield start
    for node in nodes:
        node.teardown()


def send(box: Box, counts: dict[str, int]) -> list[str]:
    """Send so many jobs for each model, mixed; returns their ids."""
    wanted = [model for n in range(max(counts.values())) for model in counts if n < counts[model]]
    return [
        box.client.submit({"messages": [{"role": "user", "content": f"{n}"}], "model": model})
        for n, model in enumerate(wanted)
    ]


def ready(box: Box) -> dict[str, str]:
    """Worker -> the model that is ready there."""
    return {
        found.worker: resident.model
        for found in box.client.hardware()
        for resident in found.residents
        if resident.level == "ready"
    }


def switches(*nodes: ProgramNode) -> list[tuple[str, str]]:
    """From and to of each switch that became ready, over all workers."""
    lines = (line for node in nodes for line in node.logs().splitlines() if '"event": "residency.switched"' in line)
    found = [json.loads(line) for line in lines]
    return [(event["from_model"], event["to_model"]) for event in found if event["outcome"] == "ready"]


def test_models_are_shared_out_a_dead_worker_is_replaced_and_a_new_one_is_used(box: Box, join: Join) -> None:
    """
    Each of three workers takes one of three models, with no switch beyond those. One is killed: within its lease
    another one takes its model's turn. One joins: it gets a share. Every job is answered once.
    """
    two, three = join("two"), join("three")
    nodes = [box.worker.container, two, three]
    two.ready()
    three.ready()
    began = switches(*nodes)
    assert [to for _, to in began] == [began[0][1]] * 3  # all start with the same model

    # Shared out: two of the three leave for the models that nobody serves.
    jobs = send(box, dict.fromkeys(MODELS, 60))
    eventually(lambda: sorted(ready(box).values()) == sorted(MODELS), within_s=30, what="each model is ready somewhere")
    for job in jobs:
        box.client.wait(job, 120)
    ledgers = [box.client.result(job).ledger for job in jobs]
    assert len(switches(*nodes)) - len(began) <= 3, switches(*nodes)
    assert Counter(ledger.model for ledger in ledgers) == dict.fromkeys(MODELS, 60)
    assert {ledger.worker for ledger in ledgers} == {"box", "two", "three"}

    # Killed: what it served is served by another within the lease, the switch, and a look.
    eventually(lambda: "two" in ready(box), within_s=10, what="the switch that was under way")
    victim = ready(box)["two"]
    jobs = send(box, dict.fromkeys(MODELS, 40))
    eventually(lambda: box.client.status(jobs[-1]).state is not JobState.UNKNOWN, within_s=10)
    two.kill()
    died_at = time.monotonic()
    eventually(lambda: "two" not in ready(box), within_s=LEASE_S + 1, what="its death is noticed")
    eventually(lambda: victim in ready(box).values(), within_s=30, what=f"{victim} is ready on another worker")
    taken_over_s = time.monotonic() - died_at
    for job in jobs:
        box.client.wait(job, 120)
    assert {box.client.result(job).ledger.worker for job in jobs[-10:]} <= {"box", "three"}
    assert taken_over_s < 20

    # Joined: with more than two can do soon, the third gets a share.
    jobs = send(box, dict.fromkeys(MODELS, 150))
    four = join("four")
    four.ready()
    for job in jobs:
        box.client.wait(job, 120)
    workers = Counter(box.client.result(job).ledger.worker for job in jobs)
    assert workers["four"] > 30, workers


def test_one_job_for_each_model_moves_nobody_without_need(box: Box, join: Join) -> None:
    """Two workers serve two models; single jobs for both, again and again, bring no further switch."""
    join("two").ready()
    for job in send(box, {"red": 20, "green": 20}):
        box.client.wait(job, 60)
    eventually(lambda: sorted(ready(box).values()) == ["green", "red"], within_s=30, what="both are ready")
    before = {found.worker: found.switches for found in box.client.hardware()}
    for _ in range(10):
        for job in send(box, {"red": 1, "green": 1}):
            box.client.wait(job, 60)
    assert {found.worker: found.switches for found in box.client.hardware()} == before
