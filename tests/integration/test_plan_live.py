"""
`shiftworker plan --live` on a real Redis: what waits there, planned.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from common import keys
from common.backlog import PLACE_HEADER, RedisBacklog
from common.redis_client import RedisClient
from worker.cli import app

COSTS = "load_s = 10\nwake_s = 2\nprefill_tokens_per_s = 1e6\ndecode_tokens_per_s = 100\nmax_num_seqs = 1\n"


def test_what_waits_is_planned(
    redis_client: RedisClient, redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten jobs of 1 s for each of two models, nothing loaded: two loads of 10 s."""
    for number in range(20):
        queue = keys.model_queue("ab"[number % 2])
        place = {"queued_at": 1_000_000.0, "prompt_tokens": 1, "output_tokens": 100}
        message = {
            "body": "",
            "headers": {"id": str(number), PLACE_HEADER: place},
            "properties": {
                "delivery_tag": str(number),
                "delivery_info": {"exchange": "", "routing_key": queue},
                "priority": 3,
            },
        }
        RedisBacklog(redis_client).put(queue, message, json.dumps(message), now=1_000_000.0)
    costs = tmp_path / "costs.toml"
    costs.write_text(f"[a]\n{COSTS}\n[b]\n{COSTS}")
    monkeypatch.setenv("REDIS_URL", redis_url)

    found = CliRunner().invoke(app, ["plan", "--live", "--costs", str(costs), "--json"])
    assert found.exit_code == 0, found.output
    planned = json.loads(found.stdout)
    assert planned["switches"] == 2
    assert planned["finish_s"] == pytest.approx(40, abs=0.1)
    assert {model: row["jobs"] for model, row in planned["models"].items()} == {"a": 10, "b": 10}
