"""
A worker whose models sleep instead of ending: what an operator sees of it. Its card and its engine are stand-ins.
"""

from __future__ import annotations

import pytest

from tests.e2e.conftest import Box
from tests.waiting import eventually


@pytest.fixture
def node_env(node_env: dict[str, str]) -> dict[str, str]:
    """One card, one seat, and a stand-in that takes a second to start and a tenth of it to wake."""
    return {
        **node_env,
        "WORKER_STUB_ENGINE": "true",
        "WORKER_STUB_LOAD_S": "1",
        "WORKER_STUB_WAKE_S": "0.1",
        "WORKER_HARDWARE": "stub",
        "WORKER_STUB_GPUS": "24",
        "SWITCH_MIN_TURN_S": "0.1",
    }


def test_the_second_turn_of_a_model_is_a_wake(box: Box) -> None:
    """It is faster, it is recorded as what it is, and both levels stand in the status."""
    for model in ("large", "small", "large", "small"):
        assert box.send(model=model).get(timeout=60)["ledger"]["model"] == model

    def levels() -> dict[str, str]:
        [worker] = box.client.hardware()
        return {resident.model: resident.level for resident in worker.residents}

    eventually(lambda: levels() == {"small": "ready", "large": "asleep_1"}, within_s=10, what="large sleeps")
    switches = [
        (e["to_model"], e["from_level"], e["stages"]["loading"] < 0.9) for e in box.events("residency.switched")
    ]
    assert switches == [
        ("large", "cold", False), ("small", "cold", False), ("large", "asleep_1", True), ("small", "asleep_1", True),
    ]  # fmt: skip
    [worker] = box.client.hardware()
    kinds = {(time.from_model, time.to_model, time.level) for time in worker.switch_times}
    assert ("large", "small", "asleep_1") in kinds
