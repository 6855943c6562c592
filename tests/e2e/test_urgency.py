"""
A turn that is cut short in the real system: for a more urgent class, and for a deadline that binds; then it goes on.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from common.schemas import Ledger, utc_now
from tests.e2e.conftest import Box
from tests.e2e.stub_models import stub_env
from tests.waiting import eventually

MODELS = ("busy", "other")
JOBS = 400  # twenty seconds of work, and more


@pytest.fixture
def node_env(node_env: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """Two models on the stand-in engine, one ready at a time: 0.2 s to load, 0.2 s a job, four at once."""
    return node_env | stub_env(tmp_path, MODELS, load_s=0.2, run_s=0.2, WORKER_CONCURRENCY=4, SWITCH_MIN_TURN_S=0.5)


class Work:
    """Jobs for the busy model, one of the other in their midst, and what became of them."""

    def __init__(self, box: Box, **busy: Any) -> None:
        self._box = box
        for model in ("other", "busy"):  # until the times of both are known
            self._wait(self._send(16, model))
        self._before = {name: len(box.events(name)) for name in ("scheduling.turn", "residency.switched")}
        self._busy = self._send(JOBS, "busy", **busy)
        eventually(lambda: box.client.result(self._busy[15]), within_s=30, what="the busy model is at work")

    def one_more(self, **other: Any) -> Ledger:
        """Send a job for the other model; returns what is written of it once it was answered."""
        return self._wait(self._send(1, "other", **other))[0]

    def ends(self) -> list[datetime]:
        """When each job of the busy model was answered, after its first attempt."""
        ledgers = self._wait(self._busy)
        assert {ledger.attempt for ledger in ledgers} == {1}
        return sorted(ledger.finished_at for ledger in ledgers if ledger.finished_at)

    def turns(self) -> list[str]:
        """The models that were made ready since the jobs were sent."""
        return [event["to_model"] for event in self._since("residency.switched") if event["outcome"] == "ready"]

    def why(self) -> str:
        """Why the first of them was."""
        return str(self._since("scheduling.turn")[0]["reason"])

    def _since(self, event: str) -> list[dict[str, Any]]:
        return self._box.events(event)[self._before[event] :]

    def _send(self, count: int, model: str, **fields: Any) -> list[str]:
        body = {"messages": [{"role": "user", "content": "Hi"}], "model": model, **fields}
        return self._box.client.submit_many([body] * count)

    def _wait(self, job_ids: list[str]) -> list[Ledger]:
        return [self._box.client.wait(job_id, 90).ledger for job_id in job_ids]


def test_an_interactive_job_interrupts_a_batch_which_goes_on(box: Box) -> None:
    """Once the turn has paid for the switches; of the batch no job is lost, and none is begun twice."""
    work = Work(box, priority=9)
    urgent = work.one_more(priority=0)
    ends = work.ends()

    assert urgent.finished_at is not None
    assert ends[0] < urgent.finished_at < ends[-1] - timedelta(seconds=2)
    assert work.turns() == ["other", "busy"]
    assert "more urgent than any of busy" in work.why()


def test_a_deadline_that_binds_brings_its_model_in_time(box: Box) -> None:
    """Its job is answered before the deadline, at the last moment, amid work that would have gone on for longer."""
    work = Work(box)
    deadline = utc_now() + timedelta(seconds=10)
    pressed = work.one_more(deadline=deadline.isoformat())
    ends = work.ends()

    assert pressed.finished_at is not None
    assert deadline - timedelta(seconds=6) < pressed.finished_at <= deadline < ends[-1]
    assert work.turns() == ["other", "busy"]
    assert "a job should start within" in work.why()
