"""
What the router reads of the fleet: offers, and who of those that made them is still alive.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from common.schemas import HardwareStatus, Offer, OfferedModel, WorkerState, utc_now
from worker.telemetry.redis_status import RedisStatus
from worker.wiring.router_process import _offered


def test_the_offer_of_a_worker_that_is_gone_takes_no_job_from_a_living_one(redis_client: Any) -> None:
    """Offers stay for ever, statuses run out: until the living worker says goodbye, its models come first."""
    status = RedisStatus(redis_client, ttl_s=60, stream_length=10)
    for worker, days_old in (("gone", 30), ("here", 31)):
        model = OfferedModel(id=f"{worker}-model", tier=1, complexity_up_to=1, max_model_len=2048)
        status.offer(Offer(worker=worker, models=(model,), at=utc_now() - timedelta(days=days_old)))

    def first() -> list[str]:
        return [model.id for model in _offered(redis_client) if not model.away]

    assert first() == ["gone-model", "here-model"]
    status.publish(
        HardwareStatus(
            worker="here", at=utc_now(), state=WorkerState.IDLE, source="none", gpus=(), ram_total_bytes=1,
            ram_available_bytes=1, stage=None, switching_to=None, residents=(), backlog={}, switches=(), alerts=(),
        )
    )  # fmt: skip
    assert first() == ["here-model"]
    status.goodbye("here")
    assert first() == ["gone-model", "here-model"]
