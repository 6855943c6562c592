"""
The first thing a stranger runs: the demo, from a folder without anything.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.fakes.hub import Hub
from tests.waiting import eventually
from worker.demo.tiny_models import make_tiny_gguf

ROOT = Path(__file__).parents[2]


def test_the_demo_answers_every_job_and_leaves_nothing_running(tmp_path: Path) -> None:
    """Exit code 0, the table, a switch between the two models, the status; then every process it started is gone."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", "demo", "--data", str(tmp_path / "demo")],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "170", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "24 of 24 jobs have their answer." in done.stdout
    assert "their text means nothing" in done.stdout
    assert "summarise-gettysburg" in done.stdout
    assert "tiny-small -> tiny-large" in done.stdout
    assert re.search(r"tiny-(small|large) ready", done.stdout)
    assert "Flower http://127.0.0.1:" in done.stdout
    left = [p for p in psutil.process_iter() if str(tmp_path) in _command(p)]
    assert not left


def test_where_the_hub_answers_the_demo_fetches_real_models(tmp_path: Path) -> None:
    """It says which and how large, asks nothing, and the second time fetches nothing. (The files here are tiny.)"""
    small = make_tiny_gguf(tmp_path / "s.gguf", hidden=64, layers=24, context=4096).read_bytes()
    large = make_tiny_gguf(tmp_path / "l.gguf", hidden=64, layers=28, context=4096).read_bytes()
    repository = "/Qwen/Qwen2.5-{0}-Instruct-GGUF/resolve/main/qwen2.5-{1}-instruct-q4_k_m.gguf"
    files = {"/": b"", repository.format("0.5B", "0.5b"): small, repository.format("1.5B", "1.5b"): large}
    jobs = tmp_path / "jobs.jsonl"
    body = '{"body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "model": "%s"}}\n'
    jobs.write_text(body % "qwen2.5-0.5b" + body % "qwen2.5-1.5b")
    with Hub(files) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "COLUMNS": "170"}
        env.pop("HF_HUB_OFFLINE", None)
        command = [sys.executable, "-m", "worker", "demo", "--data", str(tmp_path / "demo"), "--jobs", str(jobs)]
        for _ in range(2):
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "Real models from the hub: Qwen/Qwen2.5-0.5B-Instruct-GGUF/" in done.stdout
            assert "(491 MB)" in done.stdout
    assert sum(line.startswith("GET /Qwen") for line in hub.asked) == 2


def test_the_demo_says_which_jobs_have_no_answer(tmp_path: Path) -> None:
    """A job that is refused makes the exit code 1 and stands in the table with its error."""
    jobs = tmp_path / "jobs.jsonl"
    good = '{"custom_id": "good", "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}}'
    bad = '{"custom_id": "bad", "body": {"messages": [{"role": "user", "content": "Hi"}], "model": "nobody"}}'
    jobs.write_text(f"{good}\n{bad}\n")
    done = subprocess.run(
        [sys.executable, "-m", "worker", "demo", "--data", str(tmp_path / "demo"), "--jobs", str(jobs)],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "90", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 jobs have their answer." in done.stdout
    assert "UnknownModel" in done.stdout


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_demo_that_is_told_to_stop_leaves_nothing_running(tmp_path: Path, ending: signal.Signals) -> None:
    """By `kill`, by the closed terminal, by Ctrl-C; in the middle, with its programs and an engine running."""
    with (tmp_path / "out").open("wb") as out:
        demo = psutil.Popen(
            [sys.executable, "-m", "worker", "demo", "--data", str(tmp_path / "demo")],
            cwd=ROOT,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")},
            stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def engine_runs() -> bool:
        return any("llamacpp_main.py" in _command(process) for process in demo.children(recursive=True))

    eventually(engine_runs, within_s=60)
    started = demo.children(recursive=True)
    demo.send_signal(ending)
    assert demo.wait(60) == 1
    assert [_command(process) for process in started if process.is_running()] == []
    said = (tmp_path / "out").read_text()
    assert "Everything is stopped." in said
    assert "Traceback" not in said


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
