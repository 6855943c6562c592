"""
The e2e nodes as containers of our own image: TEST_NODES=docker, where a Docker engine runs.

Not run where it was written: there was no Docker engine. That it imports and its fixtures resolve is tested.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pytest_celery import CeleryTestContainer, RedisContainer
from pytest_docker_tools import build, container, fxtr

from worker.embedded_redis import free_port

ROOT = Path(__file__).parents[2]
START_S = 120  # building the image is not counted


class RouterContainer(CeleryTestContainer):
    """Ready when its Celery worker is."""

    ready_prompt = " ready."


class WorkerContainer(CeleryTestContainer):
    """Ready when its first model is."""

    ready_prompt = '"outcome": "ready"'


@pytest.fixture
def default_redis_broker_image() -> str:
    """The image of compose.yml."""
    return "redis:8-alpine"


@pytest.fixture
def default_redis_broker_command() -> list[str]:
    """With an append-only file: tests kill it and start it again."""
    return RedisContainer.command("--appendonly", "yes")


@pytest.fixture
def default_redis_broker_ports() -> dict[str, int]:
    """One port for all its starts; one of Docker's choice would change with each."""
    return {"6379/tcp": free_port()}


@pytest.fixture
def default_redis_backend(default_redis_broker: RedisContainer) -> RedisContainer:
    """The same server as the broker."""
    return default_redis_broker


@pytest.fixture
def our_env(node_env: dict[str, str], default_redis_broker: RedisContainer) -> dict[str, str]:
    """What router and worker are set to."""
    return {**node_env, "REDIS_URL": default_redis_broker.celeryconfig["url"]}


@pytest.fixture
def our_volumes(tiny_models: Path) -> dict[str, dict[str, str]]:
    """The models, under the path that they have here: the environment names it."""
    return {str(tiny_models): {"bind": str(tiny_models), "mode": "ro"}}


our_image = build(path=str(ROOT), target="cpu", tag="shiftworker:cpu")

_OURS: dict[str, Any] = {
    "image": "{our_image.id}",
    "environment": fxtr("our_env"),
    "volumes": fxtr("our_volumes"),
    "network": "{default_pytest_celery_network.name}",
    "user": f"{os.getuid()}:{os.getgid()}",  # pytest's folders are for their owner alone
    "timeout": START_S,
}
router_container = container(command=["router"], wrapper_class=RouterContainer, **_OURS)
worker_container = container(command=["worker"], wrapper_class=WorkerContainer, **_OURS)
