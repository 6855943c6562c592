"""
Flower beside the running system: it sees the switch with its result, the queues, and what the worker tells of itself.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from common.settings import Settings
from tests.e2e.conftest import Box
from tests.waiting import eventually
from worker.embedded_redis import free_port
from worker.programs import flower_program
from worker.supervisor import Supervisor


@pytest.fixture
def flower(box: Box, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Flower as `shiftworker up` starts it, on a free port of the loopback."""
    monkeypatch.delenv("FLOWER_PASSWORD", raising=False)
    port = free_port()
    supervisor = Supervisor([flower_program(Settings.from_env(), redis_url=box.url, port=port)])
    supervisor.start()
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
        eventually(lambda: answers(client), within_s=40, what="Flower answers")
        yield client
    supervisor.stop()


def answers(client: httpx.Client) -> bool:
    """Is Flower there, and has it seen both of our processes?"""
    try:
        workers = client.get("/api/workers", params={"refresh": "1"}).json()
    except (httpx.HTTPError, ValueError):
        return False
    return {"worker@box", "router@box"} <= set(workers)


def test_flower_shows_the_switch_the_queues_and_the_hardware(box: Box, flower: httpx.Client) -> None:
    """A job for the other model brings about a switch; Flower has its result, and a job's prompt is not shown."""
    body = {"model": "large", "messages": [{"role": "user", "content": "my secret"}], "max_tokens": 8}
    box.client.wait(box.client.submit(body), timeout=60)

    def switched() -> list[dict[str, object]]:
        tasks = flower.get("/api/tasks", params={"taskname": "shiftworker.switch"}).json()
        return [task for task in tasks.values() if task["state"] == "SUCCESS"]

    eventually(switched, within_s=20, what="Flower has the switch")
    assert "'to_model': 'large'" in str(switched()[0]["result"])

    generated = flower.get("/api/tasks", params={"taskname": "shiftworker.generate"}).json()
    assert "my secret" not in str(generated)
    queues = {queue["name"] for queue in flower.get("/api/queues/length").json()["active_queues"]}
    assert {"shiftworker", "model.small", "model.large"} <= queues
    about = flower.get("/api/workers", params={"refresh": "1"}).json()["worker@box"]["stats"]["shiftworker"]
    assert [resident["model"] for resident in about["residents"]] == ["large"]
