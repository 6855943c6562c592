"""
A job that kills its engine, among many that do not: with a real worker, a real Redis, and engines that really die.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from common.client import JobClient
from common.errors import PoisonJob
from common.schemas import JobState
from tests.chaos.faults import Target
from tests.chaos.world import World, texts

MARK = "tell me the word that ends you"
INNOCENTS = 40
MAX_DEATHS = 2  # the default of JOB_MAX_DEATHS, which is tested here


@pytest.fixture
def world() -> Iterator[World]:
    """A router and a worker as they come, but that engines die of one prompt."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "poison").write_text(MARK)
        env = {
            "CHAOS_POISON": str(folder / "poison"),
            "JOB_MAX_DEATHS": "",
            "JOB_MAX_ATTEMPTS": "",
            "WORKER_CONCURRENCY": "",
        }
        made = World(folder, env=env, programs=(Target.ROUTER, Target.WORKER))
        try:
            made.start()
            yield made
        finally:
            made.close()


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": text}], **fields}


def deaths(world: World) -> int:
    logs = texts(world.folder.glob("*.log"))
    return sum("residency.engine_died" in line for line in logs)


def dead(world: World, *arguments: str) -> Any:
    """What `shiftworker dead` says."""
    done = subprocess.run(
        [sys.executable, "-m", "worker", "dead", *arguments, "--json"],
        env={**os.environ, "REDIS_URL": world.redis.url}, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.timeout(300)
def test_a_poison_job_is_set_aside_and_forty_innocents_are_answered(world: World) -> None:
    """Nobody else is blamed, the engine dies as often as it must to find the culprit, and a retry runs it again."""
    with closing(JobClient(world.redis.url)) as client:
        innocents = [client.submit(body(f"Job {number}")) for number in range(INNOCENTS // 2)]
        poison = client.submit(body(f"Please, {MARK}", stream=True))
        innocents += [client.submit(body(f"Job {number}")) for number in range(INNOCENTS // 2, INNOCENTS)]

        with pytest.raises(PoisonJob, match=f"`shiftworker dead retry {poison}` runs it again"):
            client.wait(poison, timeout=200)
        answers = [client.wait(job_id, timeout=60) for job_id in innocents]
        assert [answer.state for answer in answers] == [JobState.ANSWERED] * INNOCENTS
        assert 2 <= deaths(world) <= math.ceil(math.log2(INNOCENTS + 1)) + MAX_DEATHS
        assert [event.kind for event in client.stream(poison, timeout=5)][-1] == "end"

        [letter] = dead(world, "list")["dead"]
        assert letter == dead(world, "show", poison)
        assert (letter["job_id"], letter["model"], letter["error"]["kind"]) == (poison, "small", "PoisonJob")
        companies = [fault["company"] for fault in letter["faults"]]
        assert companies == sorted(companies, reverse=True)
        assert companies[-MAX_DEATHS:] == [1] * MAX_DEATHS
        assert len(companies) == deaths(world)

        (world.folder / "poison").unlink()  # what ailed the engine is mended
        assert dead(world, "retry", poison) == {"retried": [poison]}
        outcome = client.wait(poison, timeout=60)
        assert (outcome.state, outcome.ledger.attempt) == (JobState.ANSWERED, 1)
        assert client._app.AsyncResult(poison).get(timeout=5)["ledger"]["attempt"] == 1
        assert "".join(event.text for event in client.stream(poison, timeout=5)) == outcome.answer
        assert dead(world, "list") == {"dead": []}
        assert client.status(poison).faults == ()
