"""
The command line without a running system: what it reads, what it refuses, how it says so.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from common import keys
from common.backlog import RedisBacklog
from common.errors import InvalidRequest
from common.redis_client import RedisClient
from tests.catalogues import write_catalogue
from worker.cli.jobs import read_requests
from worker.demo.tiny_models import make_tiny_gguf

BODY = {"messages": [{"role": "user", "content": "Hi"}]}


def shiftworker(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "worker", *arguments],
        env={**os.environ, "LOG_FORMAT": "json", "HF_HUB_OFFLINE": "1", **env},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_a_prompt_a_body_and_a_file_of_either_form_are_read(tmp_path: Path) -> None:
    """Words are a prompt, braces a body; a line's name is its custom_id, else its place."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(f"{json.dumps({'custom_id': 'one', 'body': BODY})}\n\n{json.dumps(BODY)}\n")
    assert [(name, request.text) for name, request in read_requests("Hello there", "")] == [
        ("the prompt", "Hello there")
    ]
    assert [request.text for _, request in read_requests(json.dumps(BODY), "")] == ["Hi"]
    assert [name for name, _ in read_requests(str(file), "")] == ["one", f"{file}, line 3"]
    assert {request.model for _, request in read_requests(str(file), "large")} == {"large"}


@pytest.mark.parametrize(
    ("text", "says"),
    [("{broken", "line 1 is not JSON"), ("[1]", "line 1: .*not an object"), ('{"body": {}}', "line 1: .*messages")],
)
def test_a_broken_line_is_named(tmp_path: Path, text: str, says: str) -> None:
    """The message says which line of which file, and what to write there."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidRequest, match=says):
        list(read_requests(str(file), ""))


def test_a_file_that_is_not_there_is_named() -> None:
    """No traceback for a typo."""
    with pytest.raises(InvalidRequest, match=r"nowhere\.jsonl cannot be read"):
        list(read_requests("nowhere.jsonl", ""))


@pytest.mark.parametrize(
    ("command", "env", "code", "says"),
    [
        ("status", {"REDIS_URL": "redis://:hush@127.0.0.1:1/0"}, 69, "No Redis answers at redis://:...@127.0.0.1:1/0"),
        ("worker", {"SWITCH_ATTEMPTS": "many"}, 78, "SWITCH_ATTEMPTS='many': Input should be a valid integer"),
        ("worker", {"WORKER_HARDWARE": "tpu"}, 78, "'auto', 'cpu' or 'stub'"),
        ("worker", {"MODELS_FILE": "/nowhere.toml"}, 78, "/nowhere.toml"),
        ("worker", {"VLLM_MODEL": "/no/such/model"}, 78, "/no/such/model"),
        ("models", {"MODELS_ONLY": "gpt-17"}, 78, "gpt-17"),
        ("estimate", {}, 78, "needs a MODEL, or --batch"),
        ("router", {"ROUTING_RULES_FILE": "/nowhere.toml"}, 78, "/nowhere.toml"),
    ],
)
def test_what_the_operator_must_change_is_said_in_one_sentence(
    command: str, env: dict[str, str], code: int, says: str
) -> None:
    """A clear message with the place and the way out, an exit code for supervisors, never a traceback."""
    done = shiftworker(command, **env)
    assert (done.returncode, says in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr


def test_status_counts_what_waits_for_nobody(redis_url: str, redis_client: Any) -> None:
    """Every priority's list counts: jobs that wait for the router, and those of models that nobody serves."""
    for name, count in zip(keys.lists_of(keys.SUBMIT_QUEUE), (1, 2, 0, 4), strict=True):
        if count:
            redis_client.rpush(name, *["message"] * count)
    gone = keys.model_queue("gone")
    for number in range(4):
        delivery = {"delivery_tag": str(number), "delivery_info": {"exchange": "", "routing_key": gone}}
        RedisBacklog(redis_client).put(gone, {"properties": delivery}, "message", now=0.0)
    redis_client.set(keys.backlog_order(keys.model_queue("none")), "x")
    redis_client.zadd(keys.DEAD, {"one": 1, "two": 2})

    found = json.loads(shiftworker("status", "--json", REDIS_URL=redis_url).stdout)
    assert found == {"workers": [], "away": [], "unserved": {"gone": 4}, "waiting_for_router": 7, "set_aside": 2}
    said = shiftworker("status", REDIS_URL=redis_url).stdout
    assert "No worker that is alive serves gone: 4 jobs wait" in said
    assert "7 jobs wait for the router" in said
    assert "2 jobs are set aside; `shiftworker dead list` says why" in said


def test_models_says_why_each_one_is_left_out() -> None:
    """Without network and files nothing can be served, and every model has its reason."""
    done = shiftworker("models", "--json", HF_HOME="/nonexistent", WORKER_HARDWARE="cpu")
    found = json.loads(done.stdout)
    assert found["models"] == []
    assert len(found["left_out"]) >= 10
    assert all(found["left_out"].values())


def test_the_doctor_says_what_is_here_and_what_would_be_chosen(redis_url: str, tmp_path: Path) -> None:
    """A card, a catalogue of local models, Redis: each is a finding, with the choice and its reason."""
    make_tiny_gguf(tmp_path / "tiny.gguf", hidden=64, layers=2, seed=1, context=512)
    tiny = {"id": "tiny", "engine": "llamacpp", "max_model_len": 512, "path": "tiny.gguf"}
    env = {**write_catalogue(tmp_path, tiny), "WORKER_HARDWARE": "stub", "WORKER_STUB_GPUS": "24"}
    done = shiftworker("doctor", "--json", REDIS_URL=redis_url, **env)
    found = json.loads(done.stdout)

    assert done.returncode == 0, done.stderr
    assert (found["healthy"], found["starting"], found["served"]) == (True, "tiny", ["tiny"])
    assert {finding["what"] for finding in found["findings"]} >= {"Redis", "card 0", "RAM", "llamacpp", "choice"}
    assert "card 0" in shiftworker("doctor", REDIS_URL=redis_url, **env).stdout


def test_the_doctor_finds_what_is_missing() -> None:
    """No Redis, no model: an exit code for scripts, and every finding says what to do."""
    done = shiftworker(
        "doctor", "--json", HF_HOME="/nonexistent", WORKER_HARDWARE="cpu", REDIS_URL="redis://127.0.0.1:1/0"
    )
    found = json.loads(done.stdout)
    bad = {finding["what"]: finding["detail"] for finding in found["findings"] if finding["good"] is False}

    assert (done.returncode, found["healthy"]) == (69, False)
    assert set(bad) == {"Redis", "choice"}
    assert "No Redis answers" in bad["Redis"]


def test_an_estimate_is_one_object_or_a_line_for_each_case(tmp_path: Path) -> None:
    """Keys that mean nothing are named once, on stderr; a case that cannot be judged is no error."""
    cases = [{"model": "qwen3-8b", "gpu_memory_gib": 24, "colour": 1}, {"model": "8x7B", "colour": 2}]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, cases)))
    one = shiftworker("estimate", "qwen3-8b", "--gpu-memory-gib", "24", "--json")
    many = shiftworker("estimate", "--batch", str(tmp_path / "cases.jsonl"))
    first, second = map(json.loads, many.stdout.splitlines())

    assert json.loads(one.stdout) == first
    assert (second["weights_bytes"], second["fits"]) == (None, None)
    assert (many.returncode, many.stderr.count("colour")) == (0, 1)
    assert "It does not fit" in shiftworker("estimate", "qwen3-8b", "--gpu-memory-gib", "6").stdout


@pytest.mark.parametrize("ending", [signal.SIGHUP, signal.SIGTERM])
def test_up_ends_with_its_terminal_and_leaves_nothing_running(tmp_path: Path, ending: signal.Signals) -> None:
    """Its programs have sessions of their own: a hang-up reaches only `up`, which stops them. One to a folder."""
    data = str(tmp_path / "data")
    with up(data) as first:
        started = first.children(recursive=True)
        second = shiftworker("up", "--data", data, REDIS_URL="")
        assert (second.returncode, "belongs to a Redis that runs already" in second.stderr) == (78, True)
        first.send_signal(ending)
        assert first.wait(60) == 0
    assert len(started) >= 4
    assert [process for process in started if process.is_running()] == []


@contextmanager
def up(data: str) -> Iterator[psutil.Popen]:
    """Run `shiftworker up` on a stub engine until all its programs are started."""
    with psutil.Popen(
        [sys.executable, "-m", "worker", "up", "--data", data],
        env={**os.environ, "REDIS_URL": "", "WORKER_STUB_ENGINE": "true", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        try:
            assert any("Ctrl-C stops everything" in line for line in process.stdout)
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def test_the_help_lists_every_command() -> None:
    """`shiftworker --help` is the map of the command line."""
    listed = shiftworker("--help").stdout
    for command in ("up", "worker", "router", "models", "status", "switch", "submit", "cancel", "demo", "health"):
        assert command in listed


def test_a_file_of_which_a_job_is_refused_sends_nothing(
    tmp_path: Path, redis_url: str, redis_client: RedisClient
) -> None:
    """Else the jobs before it would run, and nobody would know their ids."""
    file = tmp_path / "jobs.jsonl"
    file.write_text(f"{json.dumps(BODY)}\n{json.dumps({**BODY, 'n': 9})}\n")
    found = shiftworker("submit", "--no-wait", str(file), REDIS_URL=redis_url, LIMIT_ANSWERS="8")
    assert found.returncode != 0
    assert "LIMIT_ANSWERS" in found.stderr
    assert sum(redis_client.llen(name) for name in keys.lists_of(keys.SUBMIT_QUEUE)) == 0
