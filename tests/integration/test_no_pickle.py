"""
JSON only: a pickle that would write a file, put through every door, writes none.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Exchange
from kombu.exceptions import DecodeError

from common import JobClient, keys
from common.celery_app import create_app, create_producer_app
from common.redis_client import connect
from common.settings import Settings
from tests.e2e.nodes import ProgramNode
from worker.embedded_redis import EmbeddedRedis

BODY = {"messages": [{"role": "user", "content": "Hi"}], "model": "qwen3-0.6b"}
PICKLE = {"content_type": "application/x-python-serialize", "content_encoding": "binary"}
SETTINGS = {
    "WORKER_STUB_ENGINE": "1",
    "WORKER_HARDWARE": "cpu",
    "MODELS_ONLY": "qwen3-0.6b",
    "WORKER_STUB_LOAD_S": "0.1",
}


class Loaded:
    """Unpickled, it makes the file *path*."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.fixture
def hit(tmp_path: Path) -> Path:
    """The file that a pickle would make; and it would."""
    found = tmp_path / "hit"
    pickle.loads(pickle.dumps(Loaded(found)))
    assert found.exists()
    found.unlink()
    return found


@pytest.fixture
def box(own_redis: EmbeddedRedis, tmp_path: Path) -> Iterator[list[ProgramNode]]:
    """A router and a worker."""
    env = {**SETTINGS, "REDIS_URL": own_redis.url, "WORKER_NAME": "box", "LOG_FORMAT": "json"}
    nodes = [
        ProgramNode("router", tmp_path, env, " ready."),
        ProgramNode("worker", tmp_path, env, '"outcome": "ready"'),
    ]
    for node in nodes:
        node.ready()
    yield nodes
    for node in nodes:
        node.teardown()


def test_no_queue_and_no_broadcast_unpickles(box: list[ProgramNode], own_redis: EmbeddedRedis, hit: Path) -> None:
    """The queues of the router, of a model and of the switches, remote control, and the events of others."""
    headers = {"id": "loaded", "task": keys.SUBMIT_TASK, "lang": "py"}
    loaded = pickle.dumps(Loaded(hit))
    with Connection(own_redis.url) as connection:
        producer = connection.Producer()
        for queue in (keys.SUBMIT_QUEUE, keys.model_queue("qwen3-0.6b"), keys.control_queue("box")):
            producer.publish(loaded, routing_key=queue, exchange="", headers=headers, **PICKLE)
        producer.publish(loaded, exchange=Exchange("celery.pidbox", type="fanout"), **PICKLE)
        producer.publish(loaded, exchange=Exchange("celeryev", type="topic"), routing_key="worker.online", **PICKLE)
    with closing(JobClient(own_redis.url)) as client:
        assert client.wait(client.submit(BODY), timeout=30).answer, "they are up, and have come by all that was before"
    assert [node.status for node in box] == ["running", "running"]
    assert not hit.exists()


@pytest.mark.parametrize("build", [create_app, create_producer_app])
def test_no_app_unpickles_a_result(build: Any, redis_url: str, hit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write to Redis can write a result; reading it runs nothing."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    app: Celery = build(Settings.from_env())
    assert app.conf.accept_content == ["json"]
    with closing(connect(redis_url)) as redis:
        redis.set(f"{keys.CELERY_RESULT_PREFIX}a", pickle.dumps({"status": "SUCCESS", "result": Loaded(hit)}))
    with pytest.raises(DecodeError):
        app.AsyncResult("a").get(timeout=2)
    assert not hit.exists()
