"""
`shiftworker plan --live` on a real Redis: what waits there, planned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common import keys
from common.backlog import PLACE_HEADER, RedisBacklog
from common.redis_client import RedisClient
from common.schemas import ModelPace, Offer, SwitchTime, utc_now
from worker.cli import app
from worker.telemetry.redis_paces import RedisPaces
from worker.telemetry.redis_switch_times import RedisSwitchTimes

COSTS = "load_s = 10\nwake_s = 2\nprefill_tokens_per_s = 1e6\ndecode_tokens_per_s = 100\nmax_num_seqs = 1\n"


@pytest.fixture
def box(redis_client: RedisClient, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> RedisClient:
    """Ten jobs of 100 tokens wait for each of two models."""
    monkeypatch.setenv("REDIS_URL", redis_url)
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
    return redis_client


def plan(*options: str) -> dict[str, Any]:
    found = CliRunner().invoke(app, ["plan", "--live", *options, "--json"])
    assert found.exit_code == 0, found.output
    planned: dict[str, Any] = json.loads(found.stdout)
    return planned


def test_what_waits_is_planned(box: RedisClient, tmp_path: Path) -> None:
    """Jobs of 1 s, nothing loaded: two loads of 10 s."""
    costs = tmp_path / "costs.toml"
    costs.write_text(f"[a]\n{COSTS}\n[b]\n{COSTS}")

    planned = plan("--costs", str(costs), "--turns")

    assert planned["switches"] == 2
    assert planned["finish_s"] == pytest.approx(40, abs=0.1)
    assert {model: row["jobs"] for model, row in planned["models"].items()} == {"a": 10, "b": 10}
    assert [(turn["model"], turn["jobs"]) for turn in planned["turns"]] == [("a", 10), ("b", 10)]


def test_what_the_workers_have_measured_is_enough(box: RedisClient) -> None:
    """Four jobs of 2 s at once, loads of 20 s; the worker that measured it is away."""
    now = utc_now()
    for model in "ab":
        RedisPaces(box).save(
            [
                ModelPace(
                    worker="w", model=model, count=9, at_once=4, in_flight=4, run_s=2, job_s=0.5, deviation_s=0, at=now
                )
            ]
        )
        RedisSwitchTimes(box, "w").save(
            SwitchTime(
                from_model=None, to_model=model, level="spare", mean_s=20, last_s=20, load_s=20, load_bytes=1, count=1,
                at=now,
            )
        )  # fmt: skip
    box.hset(keys.FLEET, "w", Offer(worker="w", models=(), at=now).model_dump_json())

    planned = plan()

    assert planned["switches"] == 2
    assert planned["finish_s"] == pytest.approx(2 * (20 + 6), abs=2)  # the last two of ten have places left beside them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--live"], "Jobs wait for a, and no worker has measured it yet"),
        (["--live", "--workers", "2"], "no --workers"),
        (["--live", "--policy", "fifo"], "no --policy"),
        (["--live", "trace.jsonl"], "one of the two"),
        (["trace.jsonl"], "A TRACE needs --costs"),
    ],
)
def test_what_cannot_be_planned_is_said(box: RedisClient, options: list[str], message: str) -> None:
    """On the terminal, in a line, with what to do."""
    found = CliRunner().invoke(app, ["plan", *options])

    assert found.exit_code != 0
    assert message in str(found.exception) + found.output
