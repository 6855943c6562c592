"""
A job that kills its engine, or its worker, among many that do not: with real workers, a real Redis, and real deaths.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
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
FEW = 11
MAX_DEATHS = 2  # the defaults of JOB_MAX_DEATHS and JOB_MAX_WORKER_DEATHS, which are tested here
MAX_WORKER_DEATHS = 3


@pytest.fixture
def kills() -> str:
    """What dies of the prompt."""
    return "engine"


@pytest.fixture
def world(kills: str) -> Iterator[World]:
    """A router and a worker as they come, but that engines or workers die of one prompt."""
    with tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "poison").write_text(MARK)
        env = {
            "CHAOS_POISON": str(folder / "poison"),
            "CHAOS_POISON_KILLS": kills,
            "JOB_MAX_DEATHS": "",
            "JOB_MAX_WORKER_DEATHS": "",
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


@contextmanager
def restarted(world: World) -> Iterator[list[int]]:
    """Start the worker again whenever it has died, as compose does; gives what it died of, each time."""
    program, over, deaths = world.programs[Target.WORKER], threading.Event(), list[int]()

    def watch() -> None:
        while not over.wait(0.05):
            if (died := program.process.poll()) is not None:
                deaths.append(died)
                program.start()

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield deaths
        finally:
            over.set()
            watching.result()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", ["worker"])
def test_a_job_that_kills_its_worker_is_set_aside_and_the_innocents_are_answered(world: World) -> None:
    """Each time all its engines die with it; what it ran finds out in the same way who it was, a few deaths later."""
    with closing(JobClient(world.redis.url)) as client, restarted(world) as worker_deaths:
        innocents = [client.submit(body(f"Job {number}: Take 1 seconds")) for number in range(FEW)]
        poison = client.submit(body(f"Please, {MARK}", priority=0))

        with pytest.raises(PoisonJob, match="the worker died 3 times with this job alone in it"):
            client.wait(poison, timeout=240)
        answers = [client.wait(job_id, timeout=60) for job_id in innocents]
        assert [answer.state for answer in answers] == [JobState.ANSWERED] * FEW
        assert set(worker_deaths) == {-signal.SIGKILL}
        assert MAX_WORKER_DEATHS <= len(worker_deaths) <= 1 + math.ceil(math.log2(FEW + 1)) + MAX_WORKER_DEATHS

        assert [letter["job_id"] for letter in dead(world, "list")["dead"]] == [poison]
        letter = dead(world, "show", poison)
        assert [fault["kind"] for fault in letter["faults"]] == ["WorkerDied"] * len(worker_deaths)
        companies = [fault["company"] for fault in letter["faults"]]
        assert companies[1:] == sorted(companies[1:], reverse=True)
        assert companies[-MAX_WORKER_DEATHS:] == [1] * MAX_WORKER_DEATHS
        world.note(f"the worker died with {companies} jobs in it")

        (world.folder / "poison").unlink()
        assert dead(world, "retry", poison) == {"retried": [poison]}
        assert client.wait(poison, timeout=60).state is JobState.ANSWERED
