"""
The whole system through pytest-celery: Redis, a router and a worker with two tiny llama.cpp models.

The nodes are plain processes; TEST_NODES=docker runs the same tests on containers of our own image, where a
Docker engine runs (not tried by those who wrote it: they had none).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from pytest_celery import (
    CELERY_REDIS_BACKEND,
    CELERY_REDIS_BROKER,
    CeleryTestSetup,
    CeleryTestWorker,
    CeleryWorkerCluster,
)

from common.client import JobClient
from tests.catalogues import write_catalogue
from tests.e2e.nodes import ProgramNode, RedisNode
from worker.demo.tiny_models import make_tiny_gguf

DOCKER = os.environ.get("TEST_NODES", "process") == "docker"
LEASE_S = 3  # what a killed worker held comes back after one to two of these

if DOCKER:
    from tests.e2e.containers import *  # noqa: F403 - fixtures are found by name

    collect_ignore = ["test_cloud.py", "test_deaths.py", "test_vllm.py"]  # they look into the processes, or bring some


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of random weights and a catalogue that names only them."""
    folder = tmp_path_factory.mktemp("models")
    make_tiny_gguf(folder / "small.gguf", hidden=64, layers=2, seed=1)
    make_tiny_gguf(folder / "large.gguf", hidden=256, layers=8, seed=2)
    llamacpp = {"engine": "llamacpp", "max_model_len": 4096}
    write_catalogue(
        folder,
        {"id": "small", "aliases": ["small-latest"], "path": "small.gguf", "complexity_up_to": 0.45, **llamacpp},
        {"id": "large", "aliases": ["large-latest"], "path": "large.gguf", "tier": 2, **llamacpp},
    )
    return folder


@pytest.fixture
def node_env(tiny_models: Path) -> dict[str, str]:
    """What router and worker are set to; a test may override this fixture."""
    return {
        "MODELS_FILE": str(tiny_models / "models.toml"),
        "WORKER_NAME": "box",
        "WORKER_CONCURRENCY": "8",
        "LLAMACPP_PARALLEL": "4",
        "DELIVERY_LEASE_S": str(LEASE_S),
        "JOB_MAX_WORKER_DEATHS": "100",
        "JOB_MAX_DEATHS": "100",  # kills at random may meet a job alone twice; who is to blame is tests/chaos' question
        "STATUS_INTERVAL_S": "0.5",
        "LOG_FORMAT": "json",
    }


@pytest.fixture(params=[CELERY_REDIS_BROKER])
def celery_broker(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Redis only: RabbitMQ as the broker is a later matter."""
    node = request.getfixturevalue(request.param)
    yield node
    node.teardown()


@pytest.fixture(params=[CELERY_REDIS_BACKEND])
def celery_backend(request: pytest.FixtureRequest) -> Any:
    """The same server as the broker, which ends it."""
    return request.getfixturevalue(request.param)


if not DOCKER:

    @pytest.fixture
    def default_redis_broker(tmp_path: Path) -> Iterator[RedisNode]:
        node = RedisNode(tmp_path / "redis")
        yield node
        node.teardown()

    @pytest.fixture
    def default_redis_backend(default_redis_broker: RedisNode) -> RedisNode:
        return default_redis_broker

    @pytest.fixture
    def router_container(
        default_redis_broker: RedisNode, node_env: dict[str, str], tmp_path: Path
    ) -> Iterator[ProgramNode]:
        node = ProgramNode("router", tmp_path, {**node_env, "REDIS_URL": default_redis_broker.server.url}, " ready.")
        yield node
        node.teardown()

    @pytest.fixture
    def worker_container(
        default_redis_broker: RedisNode, node_env: dict[str, str], tmp_path: Path
    ) -> Iterator[ProgramNode]:
        env = {**node_env, "REDIS_URL": default_redis_broker.server.url}
        node = ProgramNode("worker", tmp_path, env, '"outcome": "ready"')
        yield node
        node.teardown()


@pytest.fixture
def celery_worker_cluster(
    worker_container: Any, router_container: Any, celery_setup_app: Celery
) -> Iterator[CeleryWorkerCluster]:
    """Our two kinds of Celery worker; the first is the one that tests call `setup.worker`."""
    nodes = (CeleryTestWorker(worker_container, celery_setup_app), CeleryTestWorker(router_container, celery_setup_app))
    yield CeleryWorkerCluster(*nodes)
    for node in nodes:
        node.teardown()


@pytest.fixture
def box(celery_setup: CeleryTestSetup) -> Iterator[Box]:
    """The running system as a producer and an operator see it."""
    for node in celery_setup.worker_cluster:
        node.ready()
    client = JobClient(celery_setup.broker.config()["host_url"])
    yield Box(celery_setup, client)
    client.close()


class Box:
    """A stock Celery app, a JobClient, and the nodes to kill."""

    def __init__(self, setup: CeleryTestSetup, client: JobClient) -> None:
        self.setup = setup
        self.client = client

    @property
    def url(self) -> str:
        return self.setup.broker.config()["host_url"]

    @property
    def worker(self) -> Any:
        return self.setup.worker_cluster[0]

    @property
    def router(self) -> Any:
        return self.setup.worker_cluster[1]

    def send(self, text: str = "Hello", **fields: Any) -> Any:
        """Send a job by the task's name from an app that knows nothing of ours; gives its AsyncResult."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0, **fields}
        return self.setup.app.send_task("shiftworker.submit", args=[body], queue="shiftworker")

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the worker logged under this event's name."""
        lines = (line for line in self.worker.logs().splitlines() if f'"event": "{name}"' in line)
        return [json.loads(line) for line in lines]


@pytest.fixture
def run_cli(box: Box) -> Callable[..., Any]:
    """Run `shiftworker` beside the running system."""
    import subprocess
    import sys

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "worker", *arguments],
            env={**os.environ, "REDIS_URL": box.url, "LOG_FORMAT": "json", "COLUMNS": "200", **env},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    return run
