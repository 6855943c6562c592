"""
The engine host with real vLLM: what goes when something is killed, and what hangs is found.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from common.errors import EngineDied
from tests.factories import make_placement, make_spec
from tests.vllm_here import vllm_python
from tests.waiting import eventually
from worker.catalog.spec import EngineKind, ModelSpec
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.base import Call, Completion, EngineState, StopSignal
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.selection.placement import Placement

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
START_S = 200  # the host's imports, on a busy machine
LOAD_S = 60
CONTEXT = 32768


def make_engine(folder: Path) -> VllmHostEngine:
    return VllmHostEngine(run_dir=folder, files_of=files_of, python=vllm_python(), several_cards=StubEngine())


def files_of(spec: ModelSpec) -> Path:
    assert spec.path is not None
    return spec.path


def make_model(folder: Path, name: str, *, seed: int = 0) -> Placement:
    path = make_tiny_hf(folder / name, context=CONTEXT, seed=seed)
    spec = make_spec(name, engine=EngineKind.VLLM, path=path, repo=None, file=None)
    return make_placement(name, spec=spec, max_model_len=CONTEXT)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmHostEngine]:
    """One host for all tests of this page."""
    made = make_engine(tmp_path_factory.mktemp("host"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Placement, Placement]:
    """Two models."""
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder, "one"), make_model(folder, "two", seed=1)


def ask(engine: VllmHostEngine, model_id: str, *, tokens: int = 4) -> Completion:
    body = {"model": model_id, "prompt": "hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return engine.generate(model_id, Call(path="/v1/completions", body=body, timeout_s=60), StopSignal())


def test_two_models_stand_side_by_side_and_stop_one_by_one(
    engine: VllmHostEngine, models: tuple[Placement, Placement]
) -> None:
    """Each has a process, a log and an answer of its own; what is left of one that stopped is nothing."""
    one, two = models
    first = engine.ensure_ready(one, timeout_s=START_S)
    second = engine.ensure_ready(two, timeout_s=LOAD_S)

    said = {model.model_id: ask(engine, model.model_id).response["choices"][0]["text"] for model in models}
    engine.ensure_stopped("one", timeout_s=10)

    assert set(first.pids).isdisjoint(second.pids)
    assert said["one"] != said["two"]
    assert not any(psutil.pid_exists(pid) for pid in first.pids)
    assert ask(engine, "two").response["choices"][0]["text"] == said["two"]


def test_a_fork_takes_less_memory_than_the_host_and_itself_apart(
    engine: VllmHostEngine, models: tuple[Placement, Placement]
) -> None:
    """Most of what vLLM imports is there once, and counted once: with the host."""
    loaded = engine.ensure_ready(models[0], timeout_s=START_S)
    spare = engine.standby_bytes()

    assert loaded.rss_bytes is not None
    resident = sum(psutil.Process(pid).memory_info().rss for pid in loaded.pids)
    assert spare > 100 * 2**20
    assert loaded.rss_bytes < resident


def test_a_host_that_has_touched_cuda_forks_nothing(tmp_path: Path) -> None:
    """The driver's file is open in it: it says what to set, and ends before it takes an order."""
    socket = tmp_path / "socket"
    with (tmp_path / "nvidia-uvm").open("w") as device:
        ended = subprocess.run(
            [vllm_python(), "-m", "worker.engines.vllm_host_main", str(socket)],
            cwd=ROOT, pass_fds=[device.fileno()], capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip

    assert ended.returncode == 1
    assert "importing vLLM has touched CUDA" in ended.stderr
    assert "VLLM_CHANNEL=server" in ended.stderr
    assert not socket.exists()


@pytest.mark.parametrize("part", [0, -1], ids=["application", "core"])
def test_an_engine_that_hangs_is_found_and_replaced(
    engine: VllmHostEngine, models: tuple[Placement, Placement], part: int
) -> None:
    """Its processes are there, so the state says ready; asked for readiness, both must answer."""
    loaded = engine.ensure_ready(models[0], timeout_s=START_S)
    os.kill(loaded.pids[part], signal.SIGSTOP)

    again = engine.ensure_ready(models[0], timeout_s=30)

    assert not any(psutil.pid_exists(pid) for pid in loaded.pids)
    assert again.pids != loaded.pids
    assert ask(engine, "one").completion_tokens == 4


@pytest.mark.parametrize("part", [0, -1], ids=["application", "core"])
def test_neither_half_of_an_engine_outlives_the_other(
    engine: VllmHostEngine, models: tuple[Placement, Placement], part: int
) -> None:
    """Whichever is killed: the job under way fails at once, as the engine's death, and both are gone."""
    loaded = engine.ensure_ready(models[0], timeout_s=START_S)
    processes = [psutil.Process(pid) for pid in loaded.pids]
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, engine, "one", tokens=CONTEXT - 100)
        eventually(lambda: any(each.cpu_percent(interval=0.1) > 20 for each in processes), within_s=20)

        processes[part].kill()

        with pytest.raises(EngineDied):
            job.result(timeout=5)
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive


def test_a_load_that_is_told_to_stop_ends_at_once(engine: VllmHostEngine, models: tuple[Placement, Placement]) -> None:
    """The one who waits for the load learns of it, and no process is left."""
    engine.ensure_ready(models[0], timeout_s=START_S)
    engine.ensure_stopped("two", timeout_s=10)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(engine.ensure_ready, models[1], timeout_s=LOAD_S)
        eventually(lambda: engine.state("two") is EngineState.STARTING, within_s=10)

        engine.ensure_stopped("two", timeout_s=10)

        assert "was stopped while it was loading" in str(load.exception(timeout=10))
    assert engine.state("two") is EngineState.STOPPED


def test_an_embedding_model_gives_vectors(engine: VllmHostEngine, models: tuple[Placement, Placement]) -> None:
    """The same application, started for pooling."""
    spec = replace(models[1].spec, id="vectors", capabilities=frozenset({"embedding"}))
    engine.ensure_ready(replace(models[1], spec=spec), timeout_s=LOAD_S)
    body = {"model": "vectors", "input": ["hello", "world"]}

    done = engine.generate("vectors", Call(path="/v1/embeddings", body=body, timeout_s=30), StopSignal())
    engine.ensure_stopped("vectors", timeout_s=10)

    vectors = [entry["embedding"] for entry in done.response["data"]]
    assert len(vectors) == 2
    assert vectors[0] != vectors[1]
    assert [sum(x * x for x in vector) for vector in vectors] == pytest.approx([1.0, 1.0], rel=1e-3)


def test_engines_die_with_the_host_and_a_new_host_comes(
    engine: VllmHostEngine, models: tuple[Placement, Placement]
) -> None:
    """Jobs under way fail at once, nothing is left of either, and the model can be had again."""
    loaded = engine.ensure_ready(models[0], timeout_s=START_S)
    host = psutil.Process(loaded.pids[0]).parent()
    assert host is not None
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask, engine, "one", tokens=CONTEXT - 100)
        busy = [psutil.Process(pid) for pid in loaded.pids]
        eventually(lambda: any(each.cpu_percent(interval=0.1) > 20 for each in busy), within_s=20)

        host.kill()

        with pytest.raises(EngineDied):
            job.result(timeout=5)
    eventually(lambda: not any(psutil.pid_exists(pid) for pid in (host.pid, *loaded.pids)), within_s=10)
    assert engine.state("one") is EngineState.DEAD
    engine.ensure_ready(models[0], timeout_s=START_S)
    assert ask(engine, "one").completion_tokens == 4


OWNER = """
import signal, sys
from pathlib import Path
from tests.integration.test_vllm_host import make_engine, make_model
folder = Path(sys.argv[1])
print(*make_engine(folder / "run").ensure_ready(make_model(folder, "one"), timeout_s=200).pids, flush=True)
signal.pause()
"""


def test_nothing_outlives_a_worker_that_is_killed(tmp_path: Path) -> None:
    """Whatever ended the owner, the guard of the host ends the host and its engines."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    pids = [int(pid) for pid in owner.stdout.readline().split()]
    family = [psutil.Process(pids[0]), *psutil.Process(pids[0]).parents()]
    below = family[: [process.pid for process in family].index(owner.pid)]

    owner.kill()
    owner.wait()
    owner.stdout.close()

    eventually(lambda: not any(process.is_running() for process in below), within_s=10)
    assert len(below) == 3  # the engine, the host, the guard
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["one.log", "vllm-host.log"]
