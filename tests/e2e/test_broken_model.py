"""
A model that breaks while jobs wait for it: those that any model may answer are answered by another one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common.schemas import JobState
from tests.e2e.conftest import Box

HARD = "Prove step by step that this algorithm is correct."


@pytest.fixture
def own_models(tiny_models: Path, tmp_path: Path) -> Path:
    """Models that this test may break."""
    return shutil.copytree(tiny_models, tmp_path / "models")


@pytest.fixture
def node_env(node_env: dict[str, str], own_models: Path) -> dict[str, str]:
    """One attempt, and left alone for so long that it is not tried again here."""
    return {
        **node_env,
        "MODELS_FILE": str(own_models / "models.toml"),
        "SWITCH_ATTEMPTS": "1",
        "SWITCH_MIN_TURN_S": "1",
    }


def test_jobs_for_any_model_are_answered_by_the_next_one(box: Box, own_models: Path) -> None:
    """The file is cut off; the cascade goes on, the router sends elsewhere, and a job by name waits."""
    small = box.send(model="small")
    assert small.get(timeout=60)["ledger"]["model"] == "small"
    with (own_models / "large.gguf").open("r+b") as file:
        file.truncate(file.seek(0, 2) // 2)

    hard = [box.send(HARD, task_type="complex_reasoning") for _ in range(3)]
    named = box.send(model="large")

    ledgers = [job.get(timeout=60)["ledger"] for job in hard]
    assert {ledger["model"] for ledger in ledgers} == {"small"}
    assert {ledger["attempt"] for ledger in ledgers} == {1}
    assert min(ledger["complexity"] for ledger in ledgers) > 0.45  # they were meant for the large one
    assert box.events("routing.routed_again")
    [recovering] = box.events("residency.recovering")
    assert (recovering["rung"], recovering["model_id"]) == ("next model of the cascade", "small")
    assert box.client.status(named.id).state is JobState.ROUTED
    assert box.send("after").get(timeout=60)["ledger"]["model"] == "small"
