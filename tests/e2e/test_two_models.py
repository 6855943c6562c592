"""
Two models that fit side by side: both ready, each with its own queue, served at once.
"""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Box


@pytest.fixture
def node_env(node_env: dict[str, str]) -> dict[str, str]:
    """Both tiny models are far smaller than any host."""
    return {**node_env, "SWITCH_MAX_RESIDENTS": "2"}


def test_both_are_ready_and_no_job_waits_for_a_switch(box: Box) -> None:
    """The second one is loaded as soon as a job wants it, though the first is at work; then nothing is switched."""
    long = [box.send(model="small", max_tokens=400) for _ in range(4)]
    assert box.send(model="large").get(timeout=60)["ledger"]["model"] == "large"

    mixed = [box.send(model=model) for model in ("small", "large") * 10]
    assert [job.get(timeout=60)["ledger"]["model"] for job in mixed] == ["small", "large"] * 10
    for job in long:
        job.get(timeout=120)

    switched = box.events("residency.switched")
    assert sorted(event["to_model"] for event in switched) == ["large", "small"]
    assert any("fits beside" in event["reason"] for event in switched)
