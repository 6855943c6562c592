"""
The first thing a stranger runs: the demo, from a folder without anything.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import psutil

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


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
