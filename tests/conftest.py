"""
What every ring of tests shares: a Redis of its own on a free port; tests marked `gpu` skip without a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest
from hypothesis import HealthCheck, settings

from common.redis_client import RedisClient, connect
from worker.embedded_redis import EmbeddedRedis
from worker.hardware.nvml import NvmlReader

# How long a machine takes is not what a property is about.
settings.register_profile("shiftworker", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shiftworker")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a card where NVML shows none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _why_no_card()) is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_no_card() -> str | None:
    try:
        return None if NvmlReader().read().gpus else "NVML shows no card"
    except pynvml.NVMLError as error:
        return f"no NVML: {error}"


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    """One server for all tests that do not kill it."""
    server = EmbeddedRedis(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(shared_redis: EmbeddedRedis) -> str:
    """An empty Redis."""
    client = connect(shared_redis.url)
    client.flushall()
    client.close()
    return shared_redis.url


@pytest.fixture
def redis_client(redis_url: str) -> Iterator[RedisClient]:
    """A client of the empty Redis."""
    client = connect(redis_url)
    yield client
    client.close()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    """A server that the test may kill and start again."""
    server = EmbeddedRedis(tmp_path / "redis")
    server.start()
    yield server
    server.stop()
