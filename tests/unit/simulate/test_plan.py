"""
The command `shiftworker plan`: figures as JSON, turns where asked for, errors in a sentence.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common.bounds import Bounds
from common.errors import BadSetting
from worker.cli import app
from worker.simulate.plan import plan_file
from worker.simulate.policies import PolicyName, policy_named

COSTS = "load_s = 10\nwake_s = 2\nprefill_tokens_per_s = 1000\ndecode_tokens_per_s = 100\nmax_num_seqs = 1\n"


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Twenty jobs of 1.1 s for two models, in turn, and what these cost."""
    trace, costs = tmp_path / "trace.jsonl", tmp_path / "costs.toml"
    trace.write_text(
        "\n".join(
            json.dumps({"id": str(n), "arrival_s": n, "model": "ab"[n % 2], "prompt_tokens": 100, "output_tokens": 100})
            for n in range(20)
        )
    )
    costs.write_text(f"[a]\n{COSTS}\n[b]\n{COSTS}")
    return trace, costs


def plan(files: tuple[Path, Path], *options: str) -> str:
    found = CliRunner().invoke(app, ["plan", str(files[0]), "--costs", str(files[1]), *options])
    assert found.exit_code == 0, found.output
    return found.stdout


def test_the_figures_are_one_json_object(files: tuple[Path, Path]) -> None:
    """All of them, for every policy; the turns only where they are asked for."""
    for policy in PolicyName:
        found = json.loads(plan(files, "--policy", policy, "--json"))
        assert {
            "makespan_s", "switches", "mean_wait_s", "p50_wait_s", "p95_wait_s", "max_wait_s", "bound_violations",
            "deadline_misses",
        } <= set(found)  # fmt: skip
        assert "turns" not in found
        turns = json.loads(plan(files, "--policy", policy, "--json", "--turns"))["turns"]
        assert len(turns) == found["switches"]
        assert sum(turn["jobs"] for turn in turns) == 20


def test_people_see_figures_and_turns(files: tuple[Path, Path]) -> None:
    """Each turn with its reason."""
    assert "p95_wait_s" in plan(files)
    assert "worker2" in plan(files, "--turns", "--workers", "2")


def test_the_bound_is_an_option(files: tuple[Path, Path]) -> None:
    """Under a bound of a second, jobs are late."""
    assert json.loads(plan(files, "--json", "--max-wait", "1"))["bound_violations"] > 0
    assert json.loads(plan(files, "--json", "--max-wait", "0"))["bound_violations"] > 0
    assert json.loads(plan(files, "--json"))["bound_violations"] == 0


def test_tenants_and_classes_have_the_bounds_that_the_workers_know(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SWITCH_MAX_WAITS: a second for one tenant is broken by its jobs, and one for another by none."""
    monkeypatch.setenv("SWITCH_MAX_WAITS", "default=1")
    assert json.loads(plan(files, "--json"))["bound_violations"] > 0
    monkeypatch.setenv("SWITCH_MAX_WAITS", "acme=1,*:9=1")
    assert json.loads(plan(files, "--json"))["bound_violations"] == 0


def test_an_unknown_policy_is_refused() -> None:
    """With those there are."""
    with pytest.raises(BadSetting, match="shiftworker, fifo, collate, round-robin"):
        policy_named("lifo")


def test_the_plan_keeps_its_runs_apart(files: tuple[Path, Path]) -> None:
    """The same file twice gives the same plan."""
    bounds = Bounds(usual_s=600.0)
    options = {"policy": PolicyName.SHIFTWORKER, "workers": 2, "bounds": bounds, "min_turn_s": 30.0}
    assert plan_file(*files, **options) == plan_file(*files, **options)  # type: ignore[arg-type]
