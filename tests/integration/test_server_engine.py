"""
One process tree per model, asked for a state: shown with a small real engine and its misbehaviours.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from common.errors import (
    EngineDied,
    EngineFailed,
    EngineTimeout,
    InvalidRequest,
    LoadFailed,
    ModelMissing,
    OutOfMemory,
    ShiftworkerError,
)
from tests.factories import make_placement
from tests.waiting import eventually
from worker.catalog.spec import EngineKind, ModelSpec
from worker.engines.base import Call, Completion, EngineState, JobStopped, StopSignal
from worker.engines.process import MARKER, Launch
from worker.engines.server_engine import ServerEngine
from worker.selection.placement import Placement

FAKE = Path(__file__).parents[1] / "fakes" / "fake_engine.py"


class FakeEngine(ServerEngine):
    """A `ServerEngine` over fake_engine.py, with its flags."""

    kind: ClassVar[EngineKind] = EngineKind.STUB

    def __init__(self, run_dir: Path, flags: Sequence[str]) -> None:
        super().__init__(run_dir=run_dir, files_of=lambda spec: spec.source)
        self._flags = flags

    def launch(self, placement: Placement, files: Path | str, socket: Path) -> Launch:
        """Start the fake."""
        return Launch(command=[sys.executable, str(FAKE), "--uds", str(socket), *self._flags], env=os.environ)


Make = Callable[..., FakeEngine]
DONE = "data: [DONE]\n\n"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Make engines in a folder of the test; no process with that folder's engines may be left after it."""
    made: list[FakeEngine] = []

    def make_engine(*flags: str) -> FakeEngine:
        made.append(FakeEngine(tmp_path / "run", flags))
        return made[-1]

    yield make_engine
    for engine in made:
        engine.close()
    assert processes_below(tmp_path) == []


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def processes_below(folder: Path) -> list[int]:
    """Every process whose command line names *folder*: the guards and the fakes."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if any(str(folder) in part for part in process.info["cmdline"] or ())
    ]


def ask(engine: FakeEngine, *, timeout_s: float = 20, stop: StopSignal | None = None, **body: Any) -> Completion:
    return engine.generate("small", Call(path="/v1/x", body=body, timeout_s=timeout_s), stop or StopSignal())


def test_the_states_of_a_model_from_start_to_stop(make: Make, pool: ThreadPoolExecutor) -> None:
    """Stopped, starting, ready, stopped; each is seen from another thread while it lasts."""
    engine = make("--load-seconds", "0.3")
    assert engine.state("small") is EngineState.STOPPED

    loading = pool.submit(engine.ensure_ready, make_placement(), timeout_s=20)
    eventually(lambda: engine.state("small") is EngineState.STARTING)
    loaded = loading.result()

    assert engine.state("small") is EngineState.READY
    assert loaded.seconds >= 0.3
    assert len(loaded.pids) == 2
    engine.ensure_stopped("small", timeout_s=10)
    assert engine.state("small") is EngineState.STOPPED


def test_asked_from_many_threads_at_once_it_starts_once(make: Make, pool: ThreadPoolExecutor) -> None:
    """Everybody gets the same processes."""
    engine = make("--load-seconds", "0.2")

    loaded = list(pool.map(lambda _: engine.ensure_ready(make_placement(), timeout_s=20), range(8)))

    assert len({found.pids for found in loaded}) == 1


def test_two_models_run_side_by_side_and_stop_apart(make: Make) -> None:
    """Stopping one leaves the other as it is."""
    engine = make()
    for name in ("small", "large"):
        engine.ensure_ready(make_placement(name), timeout_s=20)

    engine.ensure_stopped("large", timeout_s=10)

    assert engine.state("large") is EngineState.STOPPED
    assert ask(engine).response["choices"]


def test_a_load_that_hangs_ends_at_its_deadline_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    """Also when the engine ignores SIGTERM and has a child that left the session."""
    engine = make("--hang-on-load", "--ignore-sigterm", "--spawn-child")

    with pytest.raises(LoadFailed, match=r"small did not become ready within 0\.5 s"):
        engine.ensure_ready(make_placement(), timeout_s=0.5)

    assert engine.state("small") is EngineState.STOPPED
    assert processes_below(tmp_path) == []


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--out-of-memory", r"exit code 1\).*CUDA out of memory"),
        ("--killed-on-load", r"exit code 137\).*perhaps by the"),
    ],
)
def test_a_load_without_enough_memory_says_so(make: Make, flag: str, says: str) -> None:
    """By a class of its own, so that a smaller plan may be tried; the kernel's kill counts as "perhaps"."""
    with pytest.raises(OutOfMemory, match=says):
        make(flag).ensure_ready(make_placement(), timeout_s=20)


def test_another_failure_is_no_want_of_memory(make: Make) -> None:
    """A smaller plan would not help."""
    with pytest.raises(LoadFailed, match="the weights are not here") as failure:
        make("--die-on-load").ensure_ready(make_placement(), timeout_s=20)

    assert not isinstance(failure.value, OutOfMemory)


def test_a_load_that_hangs_can_be_stopped(make: Make, pool: ThreadPoolExecutor) -> None:
    """Who asks for stopped need not wait for the load's deadline."""
    engine = make("--hang-on-load")
    loading = pool.submit(engine.ensure_ready, make_placement(), timeout_s=250)
    eventually(lambda: engine.state("small") is EngineState.STARTING)

    engine.ensure_stopped("small", timeout_s=10)

    with pytest.raises(LoadFailed, match="stopped while it was loading"):
        loading.result()


def test_missing_files_start_nothing(tmp_path: Path) -> None:
    """The catalogue's error comes through, and no folder is left behind."""

    def files_of(spec: ModelSpec) -> Path:
        raise ModelMissing("not there")

    engine = FakeEngine(tmp_path / "run", ())
    engine._files_of = files_of

    with pytest.raises(ModelMissing):
        engine.ensure_ready(make_placement(), timeout_s=20)

    assert engine.state("small") is EngineState.STOPPED
    assert list((tmp_path / "run").iterdir()) == []
    engine.close()


@pytest.mark.parametrize("flag", ["--wrong-answer", "--fail"])
def test_nonsense_and_http_500_of_a_living_engine_are_its_failure(make: Make, flag: str) -> None:
    """Not its death: it stays ready, and the job may be tried again."""
    engine = make(flag)
    engine.ensure_ready(make_placement(), timeout_s=20)

    with pytest.raises(EngineFailed):
        ask(engine)

    assert engine.state("small") is EngineState.READY


def test_a_request_that_kills_the_engine_learns_of_its_death(make: Make) -> None:
    """The state is dead from that moment on, so that no further job is sent there."""
    engine = make("--spawn-child")
    engine.ensure_ready(make_placement(), timeout_s=20)

    with pytest.raises(EngineDied, match=r"small\.log"):
        ask(engine, die=True)

    assert engine.state("small") is EngineState.DEAD


def test_an_idle_engine_that_dies_is_dead(make: Make) -> None:
    """Nobody need ask it anything for that."""
    engine = make()
    pids = engine.ensure_ready(make_placement(), timeout_s=20).pids

    psutil.Process(pids[-1]).kill()

    eventually(lambda: engine.state("small") is EngineState.DEAD, within_s=2)


@pytest.mark.parametrize("reason", ["cancelled", "time limit", "handback"])
def test_a_request_under_way_is_stopped_from_another_thread(
    make: Make, pool: ThreadPoolExecutor, tmp_path: Path, reason: str
) -> None:
    """It ends with the reason, though the engine never answers."""
    engine, stop, arrived = make(), StopSignal(), tmp_path / "arrived"
    engine.ensure_ready(make_placement(), timeout_s=20)
    request = pool.submit(ask, engine, stop=stop, hold=str(arrived))
    eventually(arrived.exists)

    stop.stop(reason)

    with pytest.raises(JobStopped, match=reason):
        request.result(timeout=1)


def test_a_request_that_is_never_answered_times_out(make: Make, tmp_path: Path) -> None:
    """The engine is not blamed for it: it stays ready."""
    engine = make()
    engine.ensure_ready(make_placement(), timeout_s=20)

    with pytest.raises(EngineTimeout, match=r"0\.2 s"):
        ask(engine, timeout_s=0.2, hold=str(tmp_path / "arrived"))

    assert engine.state("small") is EngineState.READY


def says(text: str, **choice: Any) -> str:
    """An event as vLLM and llama.cpp write it."""
    choices = [{"index": 0, "delta": {"content": text}, **choice}]
    return f"data: {json.dumps({'choices': choices}, ensure_ascii=False)}\n\n"


def stream(engine: FakeEngine, *events: str, stop: StopSignal | None = None) -> tuple[list[Any], Completion]:
    """Ask for a stream of these events; gives the chunks, and the whole."""
    chunks: list[Any] = []
    call = Call(path="/v1/x", body={"events": events}, timeout_s=20, on_chunk=chunks.append)
    return chunks, engine.generate("small", call, stop or StopSignal())


def test_a_stream_is_read_event_by_event(make: Make) -> None:
    """However it is cut on its way, whatever line ends JSON may hold, and with the comments that keep it alive."""
    engine = make()
    engine.ensure_ready(make_placement(), timeout_s=20)
    texts = ["Once", " \u2028 upon \x85", " \U0001f600 a \\n time"]
    end = 'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\r\n\r\n'

    chunks, done = stream(engine, ": ping\n\n", *map(says, texts), says("", finish_reason="stop"), end, DONE)

    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks[:3]] == texts
    assert len(chunks) == 5
    assert done.response["choices"][0]["message"]["content"] == "".join(texts)
    assert (done.prompt_tokens, done.completion_tokens) == (3, 4)


@pytest.mark.parametrize(
    ("events", "error", "words"),
    [
        ([says("Once")], EngineFailed, "ended in the middle of the answer"),
        ([], EngineFailed, "ended in the middle"),
        ([says("Once", finish_reason="abort"), DONE], EngineFailed, "ended in the middle of its answer"),
        ([says("Once"), 'data: {"error": {"message": "out of luck", "code": 500}}\n\n', DONE], EngineFailed, "luck"),
        ([says("Once"), "data: nonsense\n\n", DONE], EngineFailed, "nonsense"),
        (['data: {"error": {"message": "not so", "code": 400}}\n\n', DONE], InvalidRequest, "not so"),
    ],
    ids=["cut off", "empty", "aborted", "an error", "no JSON", "a refusal"],
)
def test_a_part_of_a_stream_is_no_answer(
    make: Make, monkeypatch: pytest.MonkeyPatch, events: list[str], error: type[ShiftworkerError], words: str
) -> None:
    """The engine lives on, and the job may be tried again, unless it is at fault itself."""
    monkeypatch.setattr("worker.engines.server_engine.STREAM_DEATH_NOTICE_S", 0.1)
    engine = make()
    engine.ensure_ready(make_placement(), timeout_s=20)

    with pytest.raises(error, match=words):
        stream(engine, ": ping\n\n", *events)

    assert engine.state("small") is EngineState.READY
    assert ask(engine).response["choices"]


def test_an_engine_that_dies_in_mid_stream_is_dead(make: Make, pool: ThreadPoolExecutor) -> None:
    """By kill -9, with a half of the answer here."""
    engine, speaking = make(), threading.Event()
    pids = engine.ensure_ready(make_placement(), timeout_s=20).pids
    body = {"events": [says("Once"), "hold"]}
    call = Call(path="/v1/x", body=body, timeout_s=20, on_chunk=lambda _chunk: speaking.set())
    request = pool.submit(engine.generate, "small", call, StopSignal())
    assert speaking.wait(10)

    psutil.Process(pids[-1]).kill()

    with pytest.raises(EngineDied, match=r"small\.log"):
        request.result(timeout=5)
    assert engine.state("small") is EngineState.DEAD


def test_a_stream_that_stands_still_is_stopped_from_another_thread(make: Make, pool: ThreadPoolExecutor) -> None:
    """The engine never says another word."""
    engine, stop, speaking = make(), StopSignal(), threading.Event()
    engine.ensure_ready(make_placement(), timeout_s=20)
    body = {"events": [says("Once"), "hold"]}
    call = Call(path="/v1/x", body=body, timeout_s=20, on_chunk=lambda _chunk: speaking.set())
    request = pool.submit(engine.generate, "small", call, stop)
    assert speaking.wait(10)

    stop.stop("cancelled")

    with pytest.raises(JobStopped, match="cancelled"):
        request.result(timeout=1)


def test_streams_take_no_connection_that_others_wait_for(make: Make, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Eight streams that stand still occupy a connection each; whoever comes next gets a free one at once."""
    engine, stop, began = make(), StopSignal(), threading.Semaphore(0)
    engine.ensure_ready(make_placement(), timeout_s=20)
    body = {"events": [says("Once"), "hold"]}
    call = Call(path="/v1/x", body=body, timeout_s=60, on_chunk=lambda _chunk: began.release())
    streams = [pool.submit(engine.generate, "small", call, stop) for _ in range(8)]
    for _ in streams:
        assert began.acquire(timeout=10)

    for _ in range(20):
        assert ask(engine, timeout_s=5).response["choices"]

    stop.stop("handback")
    for request in streams:
        with pytest.raises(JobStopped):
            request.result(timeout=5)


def test_closing_ends_running_requests_and_every_process(make: Make, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """The last call leaves nothing."""
    engine, arrived = make(), tmp_path / "arrived"
    engine.ensure_ready(make_placement(), timeout_s=20)
    request = pool.submit(ask, engine, hold=str(arrived))
    eventually(arrived.exists)

    engine.close()

    with pytest.raises(EngineDied):
        request.result(timeout=3)
    assert processes_below(tmp_path) == []


def test_every_process_of_an_engine_carries_its_marker(make: Make) -> None:
    """The marker is how a process that lost its parent is found; it differs from start to start."""
    engine = make("--spawn-child")
    pids = engine.ensure_ready(make_placement(), timeout_s=20).pids

    markers = {psutil.Process(pid).environ()[MARKER] for pid in pids}

    assert len(pids) == 3
    assert len(markers) == 1
