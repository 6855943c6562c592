"""
What `shiftworker bench` prints for programs: one JSON object, in the last line of what goes to stdout.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common import logs
from worker.bench import commands, switch, throughput
from worker.bench.switch import SwitchTimes
from worker.bench.throughput import Load, Throughput

SWITCHED = SwitchTimes(switch_s=2.5, second_switch_s=2.25, restart_s=50.0, runs=5)
DONE = Throughput(
    queue_jobs_per_s=240.0, engine_jobs_per_s=300.0, one_at_a_time_jobs_per_s=15.0, baseline="default", runs=3
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a card that has vLLM; the logs of the test's own process stay as they are."""
    python = tmp_path / "bin" / "python"
    (tmp_path / "lib" / "python3.12" / "site-packages" / "vllm-0.32.0.dist-info").mkdir(parents=True)
    python.parent.mkdir()
    python.touch()
    monkeypatch.setenv("VLLM_PYTHON", str(python))
    monkeypatch.setenv("WORKER_HARDWARE", "cpu")
    monkeypatch.setattr(logs, "configure", lambda *_given: None)


def test_a_switch_is_told_with_its_restart_and_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures are the last line, and the only one; people read theirs, and the ratio, on stderr."""
    asked = dict[str, object]()

    def bench(*_where: object, **given: Any) -> SwitchTimes:
        asked.update(given)
        given["ours"].close()  # as the bench itself does
        return SWITCHED

    monkeypatch.setattr(switch, "bench_switch", bench)
    found = CliRunner().invoke(commands.app, ["switch", "--runs", "5", "--json"])

    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == dataclasses.asdict(SWITCHED)
    assert {"switch_s", "restart_s"} <= {*json.loads(found.stdout.splitlines()[-1])}
    assert "switch_s / restart_s  0.050" in found.stderr
    assert asked["runs"] == 5
    assert asked["ours"] is not asked["theirs"]


def test_a_throughput_is_told_with_the_engines_and_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the load that was asked for."""
    asked = list[object]()

    def bench(_settings: object, _folder: Path, load: Load, **_given: object) -> Throughput:
        asked.append(load)
        return DONE

    monkeypatch.setattr(throughput, "bench_throughput", bench)
    found = CliRunner().invoke(commands.app, ["throughput", "--prompts", "50", "--max-num-seqs", "8", "--json"])

    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout) == dataclasses.asdict(DONE)
    assert {"queue_jobs_per_s", "engine_jobs_per_s"} <= {*json.loads(found.stdout.splitlines()[-1])}
    assert "queue_jobs_per_s / engine_jobs_per_s  0.800" in found.stderr
    assert asked == [Load(prompts=50, tokens=32, max_num_seqs=8)]


def test_without_json_nothing_goes_to_stdout(monkeypatch: pytest.MonkeyPatch) -> None:
    """People have stderr, and a pipe has nothing to stumble over."""
    monkeypatch.setattr(throughput, "bench_throughput", lambda *_where, **_given: DONE)

    assert CliRunner().invoke(commands.app, ["throughput"]).stdout == ""
