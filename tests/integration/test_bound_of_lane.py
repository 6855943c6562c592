"""
A bound of a tenant and class goes all the way: from the settings through Redis into the decision.
"""

from __future__ import annotations

import pytest
from kombu import Queue

from common import keys
from common.backlog import PLACE_HEADER
from common.celery_app import create_app
from common.redis_client import RedisClient
from common.settings import Settings
from worker.scheduling.pick import Knowledge, Turn, pick_turn
from worker.scheduling.redis_queues import RedisQueues
from worker.state.pace import Pace
from worker.state.residency import Level, Residency, Resident

NOW = 1_000_000.0
MODELS = ["busy", "other"]


class Fleet:
    """A router that sends jobs, and a worker that reads what waits and decides; "busy" is ready since long."""

    def __init__(self, client: RedisClient, settings: Settings) -> None:
        self._app = create_app(settings, owner="router")
        self._settings = settings
        self._queues = RedisQueues(client, MODELS, bounds=settings.switch.bounds)

    def send(self, job_id: str, model: str, *, tenant: str = "zeta", priority: int = 3, age_s: float = 0.0) -> None:
        queue = keys.model_queue(model)
        place = {"queued_at": NOW - age_s, "tenant": tenant, "prompt_tokens": 1, "output_tokens": 1}
        with self._app.connection_for_write() as connection, connection.Producer() as producer:
            producer.publish(
                {}, exchange="", routing_key=queue, declare=[Queue(queue, routing_key=queue)], priority=priority,
                headers={"id": job_id, PLACE_HEADER: place},
            )  # fmt: skip

    def bounds(self, model: str) -> dict[tuple[str, int], float | None]:
        lanes = self._queues.backlog().by_model[model].lanes
        return {(lane.tenant, lane.priority): lane.max_wait_s for lane in lanes}

    def pick(self, now: float) -> Turn:
        busy = Resident(model_id="busy", level=Level.READY, bytes=1, since=NOW - 5000)
        residency = Residency(capacity=9, max_residents=1, residents=(busy,), switch_s=dict.fromkeys(MODELS, 2.0))
        return pick_turn(
            self._queues.backlog(), residency, MODELS, now=now, max_wait_s=self._settings.switch.max_wait_s,
            min_turn_s=30, known=Knowledge(paces={"other": Pace(job_s=1.0)}),
        )  # fmt: skip


@pytest.fixture
def fleet(redis_client: RedisClient, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Fleet:
    monkeypatch.setenv("REDIS_URL", redis_url)
    monkeypatch.setenv("SWITCH_MAX_WAITS", "acme=60,*:9=3600,acme:0=10.5")
    return Fleet(redis_client, Settings.from_env())


def test_each_lane_carries_the_bound_of_its_tenant_and_class(fleet: Fleet) -> None:
    """As the router's settings have it, for whoever reads the queue."""
    for number, (tenant, priority) in enumerate([("acme", 0), ("acme", 9), ("zeta", 3), ("zeta", 9)]):
        fleet.send(f"job {number}", "other", tenant=tenant, priority=priority)
    assert fleet.bounds("other") == {("acme", 0): 10.5, ("acme", 9): 60, ("zeta", 3): 600, ("zeta", 9): 3600}


@pytest.mark.parametrize(
    ("tenant", "priority", "bound_s"), [("acme", 3, 60), ("zeta", 3, 600), ("zeta", 9, 3600), ("acme", 9, 60)]
)
def test_a_model_gets_its_turn_before_a_job_s_own_bound(
    fleet: Fleet, tenant: str, priority: int, bound_s: float
) -> None:
    """Nobody knows when the model that is ready has done its work; a job of another one is due at its own bound."""
    for number in range(100):
        fleet.send(f"busy {number}", "busy", tenant=tenant, priority=priority)
    fleet.send("job", "other", tenant=tenant, priority=priority)

    assert fleet.pick(NOW + bound_s - 5).model_id == "busy"
    turn = fleet.pick(NOW + bound_s - 2)
    assert (turn.model_id, turn.reason) == (
        "other", f"a job has waited {bound_s - 2:.0f} s, the bound is {bound_s:.0f} s",
    )  # fmt: skip
