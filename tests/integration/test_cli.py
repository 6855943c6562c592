"""
The command line without a running system: what it reads, what it refuses, how it says so.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import InvalidRequest
from worker.cli import read_requests

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


def test_models_says_why_each_one_is_left_out() -> None:
    """Without network and files nothing can be served, and every model has its reason."""
    done = shiftworker("models", "--json", HF_HOME="/nonexistent", WORKER_HARDWARE="cpu")
    found = json.loads(done.stdout)
    assert found["models"] == []
    assert len(found["left_out"]) >= 10
    assert all(found["left_out"].values())


def test_the_help_lists_every_command() -> None:
    """`shiftworker --help` is the map of the command line."""
    listed = shiftworker("--help").stdout
    for command in ("up", "worker", "router", "models", "status", "switch", "submit", "cancel", "demo", "health"):
        assert command in listed
