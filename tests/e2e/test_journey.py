"""
The journey of a job, from a stock Celery producer through the real system and back.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TaskRevokedError

from common import keys
from common.backlog import RedisBacklog
from common.errors import DeadlineExceeded, InvalidRequest, JobCancelled, PromptTooLong, UnknownModel
from common.redis_client import connect
from common.schemas import JobState
from tests.e2e.conftest import Box
from tests.waiting import eventually
from worker.telemetry.redis_measured import RedisMeasurements

ROOT = Path(__file__).parents[2]


def test_a_job_sent_by_name_is_answered_under_its_own_id(box: Box) -> None:
    """One id from end to end: the producer's AsyncResult is OpenAI's response with the ledger beside it."""
    sent = box.send("Say something.", task_type="simple_extraction")
    result = sent.get(timeout=30)

    assert result["object"] == "chat.completion"
    assert result["choices"][0]["message"]["content"]
    assert result["usage"]["completion_tokens"] == 8
    ledger = result["ledger"]
    assert (ledger["model"], ledger["complexity"], ledger["attempt"]) == ("small", 0.1, 1)
    assert ledger["why"] == "complexity 0.1 is within small's 0.45"
    assert ledger["waited_s"] >= 0
    assert ledger["decode_s"] > 0

    outcome = box.client.result(sent.id)
    assert outcome is not None
    assert outcome.state is JobState.ANSWERED
    assert outcome.result() == result


def test_a_worker_holds_what_its_engine_works_on_and_a_few_more(box: Box) -> None:
    """Four places in the engine and one job behind them, whatever the number of threads (eight)."""

    def held() -> int:
        stats = box.setup.app.control.inspect(destination=["worker@box"]).stats() or {}
        return int(stats["worker@box"]["prefetch_count"]) if stats else 0

    eventually(lambda: held() == 5, within_s=20, what="the worker's prefetch count follows its engine")


def test_mixed_jobs_are_collated_by_model(box: Box) -> None:
    """Jobs of two models, interleaved: each runs on its own, and the model changes once, not for every job."""
    sent = [
        box.send(f"Job {n}", task_type="simple_extraction" if n % 2 else "edge_case_handling", max_tokens=24)
        for n in range(16)
    ]
    results = [job.get(timeout=60) for job in sent]
    assert [r["ledger"]["model"] for r in results] == ["large", "small"] * 8
    assert [r["model"] for r in results] == ["large", "small"] * 8
    switched = [(e["from_model"], e["to_model"], e["outcome"]) for e in box.events("residency.switched")]
    assert switched[0] == (None, "small", "ready")
    assert 1 <= len(switched[1:]) <= 3


def test_every_bad_job_gets_a_clear_failure_and_the_system_goes_on(box: Box) -> None:
    """Each refusal names what is wrong and what to do, by the error's own class; nothing is lost or stopped."""
    send = box.setup.app.send_task
    bad = {
        "no body": send("shiftworker.submit", queue="shiftworker"),
        "not an object": send("shiftworker.submit", args=["hello"], queue="shiftworker"),
        "two arguments": send("shiftworker.submit", args=[{}, {}], queue="shiftworker"),
        "no messages": send("shiftworker.submit", args=[{"model": "auto"}], queue="shiftworker"),
        "unknown model": box.send(model="gpt-17"),
        "too long": box.send("word " * 9000),
        "too long by a little": box.send("x" * 4200, task_type="simple_extraction"),
        "engine says no": box.send(temperature="warm"),
        "too late": box.send(deadline="2020-01-01T00:00:00Z"),
    }
    good = box.send("Still there?")
    expected = {
        "no body": ("InvalidRequest", "kwargs=body"),
        "not an object": ("InvalidRequest", "not an object"),
        "two arguments": ("InvalidRequest", "args=[body]"),
        "no messages": ("InvalidRequest", "exactly one of messages"),
        "unknown model": ("UnknownModel", "Offered: large, small"),
        "too long": ("PromptTooLong", "4,096"),
        "too long by a little": ("PromptTooLong", "4096"),
        "engine says no": ("InvalidRequest", "temperature"),
        "too late": ("DeadlineExceeded", "2020-01-01"),
    }
    for name, sent in bad.items():
        error = sent.get(timeout=30, propagate=False)
        kind, words = expected[name]
        assert (type(error).__name__, words in str(error)) == (kind, True), f"{name}: {error!r}"
        outcome = box.client.result(sent.id)
        assert outcome is not None, name
        assert outcome.error is not None
        assert outcome.error.kind == kind
    assert good.get(timeout=30)["choices"]


def test_the_client_raises_what_the_job_ended_with(box: Box) -> None:
    """JobClient.wait gives the outcome, or the error by its own class."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answered = box.client.wait(box.client.submit(body), timeout=30)
    assert answered.answer

    with pytest.raises(InvalidRequest):
        box.client.submit({"messages": []})
    with pytest.raises(UnknownModel):
        box.client.wait(box.client.submit({**body, "model": "nobody"}), timeout=30)
    with pytest.raises(PromptTooLong):
        box.client.wait(box.client.submit({**body, "messages": [{"role": "user", "content": "x " * 9000}]}), timeout=30)
    with pytest.raises(DeadlineExceeded):
        box.client.wait(
            box.client.submit({**body, "max_tokens": 3500, "model": "large", "deadline": time.time() + 1}), 30
        )


def test_a_model_is_named_by_id_or_alias_and_obeyed(box: Box) -> None:
    """An explicit name overrides the router's choice."""
    result = box.send("easy", task_type="simple_extraction", model="large-latest").get(timeout=30)
    assert result["ledger"]["model"] == "large"


def test_a_running_job_is_cancelled_in_the_engine(box: Box) -> None:
    """Cancel reaches the engine within a second or so, frees its place, and AsyncResult says REVOKED."""
    sent = box.send("long", model="small", max_tokens=3900, ignore_eos=True)
    eventually(lambda: box.client.status(sent.id).state is JobState.RUNNING)
    assert box.client.cancel(sent.id)
    with pytest.raises(JobCancelled):
        box.client.wait(sent.id, timeout=10)
    with pytest.raises(TaskRevokedError):
        sent.get(timeout=10)
    assert box.send("next", model="small").get(timeout=30)["choices"]


def test_a_waiting_job_that_is_cancelled_never_runs(box: Box) -> None:
    """It ends at once, and its place in the queue is free."""
    running = [box.send("long", model="small", max_tokens=400) for _ in range(8)]
    waiting = box.client.submit({"messages": [{"role": "user", "content": "Hi"}], "model": "large"})
    eventually(lambda: box.client.status(waiting).state is JobState.ROUTED)
    redis = connect(box.url)
    backlog, queue = RedisBacklog(redis), keys.model_queue("large")
    assert (box.client.status(waiting).ahead, backlog.count(queue)) == (0, 1)
    assert box.client.cancel(waiting)
    assert backlog.count(queue) == 0
    redis.close()
    assert box.client.result(waiting).state is JobState.CANCELLED
    assert box.setup.app.AsyncResult(waiting).state == "REVOKED"
    for job in running:
        job.get(timeout=60)
    assert box.client.status(waiting).attempts == 0
    assert box.setup.app.AsyncResult(waiting).state == "REVOKED"
    assert not box.client.cancel(waiting)


def test_jobs_sent_before_any_worker_has_spoken_wait_and_are_answered(
    default_redis_broker: Any, request: pytest.FixtureRequest
) -> None:
    """Producers may start first: the router keeps the job until it knows a model."""
    router = request.getfixturevalue("router_container")
    router.ready()
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    url = default_redis_broker.celeryconfig["host_url"]
    sent = Celery(broker=url, backend=url).send_task("shiftworker.submit", args=[body], queue="shiftworker")
    eventually(lambda: "routing.no_offers" in router.logs())
    worker = request.getfixturevalue("worker_container")
    assert worker.ready()
    assert sent.get(timeout=30)["choices"]


def test_the_switch_and_the_status_are_there_to_see(box: Box, run_cli: Any) -> None:
    """`shiftworker switch` runs the switch task; status shows machine, resident, stages and the switch."""
    switched = run_cli("switch", "large")
    assert switched.returncode == 0, switched.stderr
    assert "ready after" in switched.stdout

    status = json.loads(run_cli("status", "--json").stdout)
    [worker] = status["workers"]
    assert worker["version"] == 1
    assert worker["source"] == "none"
    assert worker["ram_total_bytes"] > 2**30
    assert [r["model"] for r in worker["residents"]] == ["large"]
    newest = worker["switches"][0]
    assert (newest["from_model"], newest["to_model"], newest["outcome"]) == ("small", "large", "ready")
    assert set(newest["stages"]) == {"draining", "unloading", "loading", "verifying"}
    assert "large" in run_cli("status").stdout
    assert run_cli("switch", "nobody").returncode != 0


def test_what_each_load_took_is_kept_for_the_fleet(box: Box, run_cli: Any) -> None:
    """The first model and the next: predicted beside the resident bytes of the engine's own processes."""
    assert run_cli("switch", "large").returncode == 0

    kept = RedisMeasurements(connect(box.url)).read().values()
    assert sorted(found.key.model_id for found in kept) == ["large", "small"]
    for found in kept:
        assert (found.key.device, found.key.max_num_seqs) == ("cpu", 4)
        assert found.key.engine.startswith("llamacpp ")
        assert found.measured.total is not None
        assert 10 * 2**20 < found.measured.total < 2**30
        assert found.predicted.total > 0


def test_the_command_line_sends_files_of_jobs(box: Box, run_cli: Any, tmp_path: Path) -> None:
    """A file in OpenAI's batch form is answered line by line; a broken line is named and nothing is sent."""
    lines = [
        {"custom_id": f"j{n}", "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}}
        for n in range(3)
    ]
    good = tmp_path / "good.jsonl"
    good.write_text("\n".join(json.dumps(line) for line in lines))
    done = run_cli("submit", str(good), "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["state"] for line in done.stdout.splitlines()] == ["answered"] * 3

    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(lines[0]) + "\n{broken\n")
    refused = run_cli("submit", str(bad))
    assert refused.returncode != 0
    assert "line 2 is not JSON" in refused.stderr


def test_a_producer_needs_neither_the_worker_nor_an_engine(box: Box) -> None:
    """The shipped examples run in processes of their own: one has only Celery, one only `common`."""
    for example in ("producer.py", "producer_client.py"):
        watch = (
            "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "loaded = {name.partition('.')[0] for name in sys.modules}; "
            "assert not loaded & {'worker', 'vllm', 'torch', 'xllamacpp'}, loaded"
        )
        done = subprocess.run(
            [sys.executable, "-c", watch, str(ROOT / "examples" / example)],
            env={"REDIS_URL": box.url, "PATH": "/usr/bin:/bin"},
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
