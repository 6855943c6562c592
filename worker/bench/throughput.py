"""
How many jobs a second go through the whole path, beside what vLLM's own `LLM.generate` does with the same prompts?
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import keys
from common.client import JobClient
from common.errors import EngineFailed, LoadFailed
from common.redis_client import connect
from common.schemas import JobRequest, WorkerState
from common.settings import Settings
from worker.bench import generate_main
from worker.bench.place import place_written
from worker.demo.tiny_hf import make_tiny_hf
from worker.embedded_redis import EmbeddedRedis, free_port
from worker.engines.environment import engine_environment
from worker.engines.vllm_server import find_python
from worker.hardware.detect import open_reader
from worker.programs import programs
from worker.selection.overrides import Overrides
from worker.supervisor import Supervisor

_MODEL = "bench-tiny"
_LENGTH = 512  # tokens
_READY_S = 300.0
_ENDED_S = 1800.0
_LOOK_S = 0.02
_LOOKED_AT = 100  # outcomes at once
_WARMING = 8  # prompts before the clock starts, as in generate_main
_CPU_POOL_BYTES = 2**28
_TRIED_PROMPTS = 200  # enough to tell which form of the baseline is the fastest
_TRIALS = 2  # of each form, in turns


@dataclass(frozen=True, kw_only=True)
class Load:
    """The same work for both sides."""

    prompts: int
    tokens: int
    max_num_seqs: int

    def texts(self) -> list[str]:
        """Prompts that no prefix cache can join, because they differ from the first word."""
        return [f"{number} hello world foo bar baz hello world foo" for number in range(self.prompts)]


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Jobs a second, medians of the runs."""

    queue_jobs_per_s: float  # from the first submit until the last outcome is stored
    engine_jobs_per_s: float  # the fastest form of LLM.generate
    one_at_a_time_jobs_per_s: float  # each job waits for the outcome of the one before
    baseline: str  # which form that is
    runs: int


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to run the baseline."""

    in_process: bool
    threads: int | None  # of OpenMP; None = as torch likes

    def __str__(self) -> str:
        threads = "" if self.threads is None else f", OMP_NUM_THREADS={self.threads}"
        return f"{'in process' if self.in_process else 'default'}{threads}"

    def environment(self) -> dict[str, str]:
        """What vLLM's process needs to know of it."""
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if self.in_process else "1", **threads}


def list_forms(*, gpus: Sequence[int], cores: int) -> list[Form]:
    """The forms to try; on a card the cores do not compute."""
    threads: list[int | None] = [None] if gpus else [*sorted({1, max(1, cores - 1), cores})]
    return [Form(in_process=how, threads=n) for how in (True, False) for n in threads]


def llm_arguments(model: Path, load: Load, *, gpus: Sequence[int]) -> dict[str, Any]:
    """
    What the baseline's `LLM` is made with.

    On a card that is vLLM's defaults, so it compiles, captures graphs and takes what memory there is, as our engine
    does there; without one it computes eagerly, also as ours, with a pool that the load does not fill.
    """
    on_cpu = {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_POOL_BYTES}
    return {
        "model": str(model),
        "max_model_len": _LENGTH,
        "max_num_seqs": load.max_num_seqs,
        "disable_log_stats": True,  # as in our engine
        **({} if gpus else on_cpu),
    }


def bench_throughput(
    settings: Settings, folder: Path, load: Load, *, runs: int, tell: Callable[[str], None]
) -> Throughput:
    """Measure the whole path and the engine alone, each with the machine to itself."""
    model = make_tiny_hf(folder / _MODEL, context=_LENGTH)
    python = find_python(settings.vllm)
    machine = open_reader(settings.worker).reader.read()
    overrides = Overrides(max_model_len=_LENGTH, max_num_seqs=load.max_num_seqs)
    gpus = place_written(model, machine, overrides).gpus  # where the worker will run it too

    def queue(load: Load) -> tuple[float, float]:
        with _system(settings, folder, model, load) as (client, redis_url):
            _through_the_queue(client, redis_url, replace(load, prompts=_WARMING))  # as the baseline does
            return _through_the_queue(client, redis_url, load), _one_at_a_time(client, _few(load))

    return measure_in_turns(
        load,
        list_forms(gpus=gpus, cores=os.cpu_count() or 1),
        generate=lambda load, form: run_baseline(python, model, load, form, gpus=gpus),
        queue=queue,
        runs=runs,
        tell=tell,
    )


def measure_in_turns(
    load: Load,
    forms: Sequence[Form],
    *,
    generate: Callable[[Load, Form], float],
    queue: Callable[[Load], tuple[float, float]],
    runs: int,
    tell: Callable[[str], None],
) -> Throughput:
    """
    Find the baseline's fastest form with a part of *load*, then measure both sides with all of it, in turns.

    *generate* gives jobs a second of the engine alone, *queue* those of the whole path: together, and one at a time.
    """
    few = _few(load)
    # The best of its trials counts: a neighbour of the machine must not cost the baseline its fastest form.
    trials = [(form, generate(few, form)) for _ in range(_TRIALS) for form in forms]
    speeds = {form: max(speed for tried, speed in trials if tried == form) for form in forms}
    for form, speed in speeds.items():
        tell(f"baseline, {form}: {speed:.1f} jobs/s with {few.prompts} prompts, the best of {_TRIALS}")
    best = max(speeds, key=lambda form: speeds[form])

    ours, theirs, singly = list[float](), list[float](), list[float]()
    for run in range(1, runs + 1):
        theirs.append(generate(load, best))
        together, one_by_one = queue(load)
        ours.append(together)
        singly.append(one_by_one)
        tell(f"run {run}: queue {together:.1f} jobs/s, engine {theirs[-1]:.1f}, one at a time {one_by_one:.1f}")
    return Throughput(
        queue_jobs_per_s=round(statistics.median(ours), 2),
        engine_jobs_per_s=round(statistics.median(theirs), 2),
        one_at_a_time_jobs_per_s=round(statistics.median(singly), 2),
        baseline=str(best),
        runs=runs,
    )


def _few(load: Load) -> Load:
    return replace(load, prompts=min(load.prompts, _TRIED_PROMPTS))


# --- The engine alone --------------------------------------------------------------------------------------


def run_baseline(python: Path, model: Path, load: Load, form: Form, *, gpus: Sequence[int]) -> float:
    """
    Jobs a second of LLM.generate in vLLM's *python*, without its start.

    Raises
    ------
    EngineFailed
        It ended without a figure; the message has its last words.
    """
    env = {
        **engine_environment(os.environ, gpus=gpus),
        **form.environment(),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    order = {"llm": llm_arguments(model, load, gpus=gpus), "prompts": load.texts(), "tokens": load.tokens}
    done = subprocess.run(
        [str(python), generate_main.__file__], input=json.dumps(order), env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    # vLLM prints to the same stream, also after its work.
    answers = [line for line in done.stdout.splitlines() if line.startswith(generate_main.ANSWER)]
    if done.returncode != 0 or not answers:
        raise EngineFailed(f"LLM.generate ended with {done.returncode}: {done.stderr[-500:]}")
    return float(answers[-1].removeprefix(generate_main.ANSWER))


# --- The whole path ----------------------------------------------------------------------------------------


@contextmanager
def _system(settings: Settings, folder: Path, model: Path, load: Load) -> Iterator[tuple[JobClient, str]]:
    """Redis, router and worker with the model ready."""
    folder = Path(tempfile.mkdtemp(prefix="run", dir=folder))
    redis = EmbeddedRedis(folder / "redis")
    started = [
        replace(program, env={**program.env, **_environment(model, load)})
        for program in programs(settings, redis_url=redis.url, flower_port=free_port())
        if program.name in {"router", "worker"}
    ]
    supervisor = Supervisor(started, log_dir=folder)
    client = JobClient(redis.url)
    try:
        redis.start()
        supervisor.start()
        _wait_until_ready(client)
        yield client, redis.url
    finally:
        client.close()
        supervisor.stop()
        redis.stop()


def _environment(model: Path, load: Load) -> Mapping[str, str]:
    return {
        "VLLM_MODEL": str(model),
        "VLLM_MAX_MODEL_LEN": str(_LENGTH),
        "VLLM_MAX_NUM_SEQS": str(load.max_num_seqs),
        "LOG_LEVEL": "WARNING",
    }


def _wait_until_ready(client: JobClient) -> None:
    deadline = time.monotonic() + _READY_S
    while not any(worker.residents and worker.state is WorkerState.IDLE for worker in client.hardware()):
        if time.monotonic() >= deadline:
            raise LoadFailed(f"The model was not ready within {_READY_S:.0f} s.")
        time.sleep(_LOOK_S)


def _through_the_queue(client: JobClient, redis_url: str, load: Load) -> float:
    """Jobs a second from the first submit until the last outcome is stored."""
    requests = [_request(text, load) for text in load.texts()]
    began = time.monotonic()
    ids = client.submit_many(requests)
    _wait_for_all(redis_url, ids)
    seconds = time.monotonic() - began
    _check(client, ids)
    return len(ids) / seconds


def _one_at_a_time(client: JobClient, load: Load) -> float:
    texts = load.texts()[: max(1, load.prompts // 10)]
    began = time.monotonic()
    for text in texts:
        client.wait(client.submit(_request(text, load)), timeout=_READY_S)
    return len(texts) / (time.monotonic() - began)


def _request(text: str, load: Load) -> JobRequest:
    return JobRequest.parse(
        {"model": _MODEL, "prompt": text, "max_tokens": load.tokens, "temperature": 0, "ignore_eos": True}
    )


def _wait_for_all(redis_url: str, ids: list[str]) -> None:
    """Wait for the outcomes with one small command at each look: the waiting must not take the engine's core."""
    redis = connect(redis_url)
    missing = [keys.outcome(job_id) for job_id in ids]
    deadline = time.monotonic() + _ENDED_S
    while missing:
        some = missing[-_LOOKED_AT:]
        if redis.exists(*some) == len(some):
            del missing[-_LOOKED_AT:]
        elif time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        else:
            raise EngineFailed(f"{len(missing)} of {len(ids)} jobs have no outcome after {_ENDED_S:.0f} s.")


def _check(client: JobClient, ids: list[str]) -> None:
    failed = [outcome for job_id in ids if (outcome := client.wait(job_id, timeout=1)).error is not None]
    if failed:
        raise EngineFailed(f"{len(failed)} of {len(ids)} jobs failed, the first with: {failed[0].error}")
