"""
No model can be loaded: jobs that may leave are answered by the cloud endpoint, every other one stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from common.redis_client import connect
from common.schemas import JobState
from tests.e2e.conftest import Box
from tests.e2e.nodes import ProgramNode, RedisNode
from tests.fakes.cloud_server import CloudServer
from tests.fakes.endpoint import ANSWER, Endpoint
from tests.waiting import eventually


@pytest.fixture
def broken_models(tiny_models: Path, tmp_path: Path) -> Path:
    """Two models whose files are cut off: chosen at boot by their headers, and never ready."""
    folder = shutil.copytree(tiny_models, tmp_path / "models")
    for path in folder.glob("*.gguf"):
        with path.open("r+b") as file:
            file.truncate(file.seek(0, 2) // 2)
    return folder


@pytest.fixture
def server(tiny_models: Path, tmp_path: Path) -> Iterator[CloudServer]:
    """A real endpoint with a key: llama.cpp's server."""
    made = CloudServer(tmp_path, model=tiny_models / "small.gguf", context=4096)
    made.start()
    yield made
    made.kill()


@pytest.fixture
def recorder() -> Iterator[Endpoint]:
    """An endpoint that notes every word it is sent."""
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def node_env(request: pytest.FixtureRequest, node_env: dict[str, str], broken_models: Path) -> dict[str, str]:
    """The endpoint is the one that the test asks for."""
    there = request.getfixturevalue("server" if "server" in request.fixturenames else "recorder")
    return {
        **node_env,
        "MODELS_FILE": str(broken_models / "models.toml"),
        "SWITCH_ATTEMPTS": "1",
        "CLOUD_URL": there.url,
        "CLOUD_API_KEY": CloudServer.key,
        "CLOUD_MODEL": "its-own-name",
        "LOG_LEVEL": "DEBUG",
    }


@pytest.fixture
def worker_container(
    default_redis_broker: RedisNode, node_env: dict[str, str], tmp_path: Path
) -> Iterator[ProgramNode]:
    """A worker whose first switch fails, and that goes on."""
    env = {**node_env, "REDIS_URL": default_redis_broker.server.url}
    node = ProgramNode("worker", tmp_path, env, '"outcome": "failed"')
    yield node
    node.teardown()


def test_jobs_are_answered_elsewhere_and_say_so(server: CloudServer, box: Box) -> None:
    """Whole, streamed or not; the ledger has the model that was meant, the one that answered, and why."""
    jobs = [box.send(privacy_required=False, max_tokens=4) for _ in range(12)]  # more than are there at once
    streamed = box.client.submit(
        {"messages": [{"role": "user", "content": "Hi"}], "privacy_required": False, "stream": True, "max_tokens": 4}
    )

    for job in jobs:
        answer = job.get(timeout=90)
        assert answer["choices"][0]["message"]["content"]
        ledger = answer["ledger"]
        assert (ledger["cloud"], ledger["attempt"]) == ("its-own-name", 1)
        assert ledger["model"] in {"small", "large"}
        assert f"its-own-name stands in for {ledger['model']}, which cannot be made ready" in ledger["why"]
        assert ledger["completion_tokens"]
    outcome = box.client.wait(streamed, timeout=30)
    assert outcome.state is JobState.ANSWERED
    assert outcome.ledger.cloud == "its-own-name"

    assert CloudServer.key not in box.worker.logs() + box.router.logs()
    assert CloudServer.key not in everything_in_redis(box)


def test_a_job_that_requires_privacy_never_reaches_the_endpoint(recorder: Endpoint, box: Box) -> None:
    """Even though nothing else could answer it, and others around it are answered there. Silence means privacy."""
    private = [box.send("my SECRET", privacy_required=True), box.send("my SECRET")]
    public = box.send("no matter", privacy_required=False)
    private += [box.send("my SECRET", model=model, deadline=None) for model in ("small", "large", "auto")]

    assert public.get(timeout=90)["choices"][0]["message"]["content"] == "yes"
    later = box.send("no matter either", privacy_required=False)
    assert later.get(timeout=30)["ledger"]["cloud"] == "its-own-name"

    assert {box.client.status(job.id).state for job in private} == {JobState.ROUTED}
    assert len(recorder.bodies) == 2
    assert "SECRET" not in "".join(recorder.bodies)


def test_what_the_endpoint_refuses_waits_for_its_model(recorder: Endpoint, box: Box) -> None:
    """A local engine may take the very body; the endpoint is asked once."""
    recorder.says(400, '{"error": {"message": "we do not know top_k"}}')
    job = box.send("hello", privacy_required=False, top_k=3)

    eventually(lambda: box.events("jobs.stays_here"), within_s=60, what="the job comes back")
    [event] = box.events("jobs.stays_here")
    assert "we do not know top_k" in event["reason"]
    recorder.says(200, ANSWER)
    other = box.send("no matter", privacy_required=False)
    other.get(timeout=30)
    assert box.client.status(job.id).state is JobState.ROUTED
    assert len(recorder.bodies) == 2


def test_a_job_that_met_a_busy_endpoint_leaves_again_when_it_has_rested(recorder: Endpoint, box: Box) -> None:
    """It comes home meanwhile: its model might be back first. No fault of it is counted."""
    recorder.says(429, '{"error": {"message": "slow down"}}', Retry_After="3")
    job = box.send(privacy_required=False)
    eventually(lambda: recorder.bodies, within_s=60, what="the job is there")
    recorder.says(200, ANSWER)

    ledger = job.get(timeout=60)["ledger"]
    assert (ledger["cloud"], ledger["attempt"]) == ("its-own-name", 2)
    assert len(recorder.bodies) == 2
    [rests] = box.events("engines.cloud_rests")
    assert (rests["seconds"], "slow down" in rests["reason"]) == (3.0, True)
    assert box.events("routing.back_from_cloud")
    assert not box.events("jobs.fault")


def everything_in_redis(box: Box) -> str:
    """Every key and every value, as text."""
    client = connect(box.url)
    read: dict[str, Callable[[str], object]] = {
        "string": client.get,
        "hash": client.hgetall,
        "list": lambda name: client.lrange(name, 0, -1),
        "set": client.smembers,
        "zset": lambda name: client.zrange(name, 0, -1),
        "stream": client.xrange,
        "none": lambda name: name,  # it went in between
    }
    found = [f"{name}: {read[client.type(name)](name)}" for name in client.scan_iter(count=1000)]
    assert len(found) > 10
    return "\n".join(found)
