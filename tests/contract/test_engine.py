"""
What every engine promises, shown on each: the stub, llama.cpp, vLLM and an endpoint elsewhere, all but the first real.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import SecretStr

from common.errors import (
    EngineDied,
    EngineFailed,
    EngineNotReady,
    EngineTimeout,
    InvalidRequest,
    LoadFailed,
    PromptTooLong,
)
from common.settings import LlamaCppSettings
from tests.factories import make_placement, make_spec
from tests.fakes.cloud_server import CloudServer
from tests.vllm_here import cuda_python, on_card, vllm_python
from tests.waiting import eventually
from worker.catalog.local import read_facts
from worker.catalog.spec import EngineKind, ModelSpec
from worker.demo.tiny_hf import make_tiny_hf
from worker.demo.tiny_models import make_tiny_gguf
from worker.engines.assemble import complete, join
from worker.engines.base import Call, Completion, Engine, EngineState, JobStopped, OnChunk, StopSignal
from worker.engines.llamacpp_server import LlamaCppEngine, find_server
from worker.engines.remote import RemoteEngine
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.engines.vllm_server import VllmServerEngine
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.selection.fit_llamacpp import gguf_model
from worker.selection.placement import Placement
from worker.state.residency import Level

LENGTH = 32768  # tokens; long enough that a request runs for a minute on a tiny model, however quick the machine
SLOTS = 4
START_S = 200  # vLLM imports for 30 s on two quiet cores, and longer on busy ones


@dataclass(frozen=True, kw_only=True)
class Kit:
    """One engine under test, and how to disturb it."""

    engine: Engine
    placement: Placement
    kill: Callable[[], object]  # as `kill -9` of the process that computes
    working: Callable[[], bool]  # is it busy with a request?
    revive: Callable[[], object] = lambda: None  # start what `kill` ended, where that is not the engine's to do
    end: Callable[[], object] = lambda: None  # end what `revive` started

    @property
    def model_id(self) -> str:
        """The model under test."""
        return self.placement.model_id

    def ready(self) -> None:
        """Have the model ready, whatever the test before left."""
        self.revive()
        self.engine.ensure_ready(self.placement, timeout_s=START_S)

    def asleep(self, level: Level | None = None) -> None:
        """Have the model fall asleep, at its first level if none is named."""
        level = level or self.engine.sleep_levels(self.placement)[0]
        self.engine.ensure_asleep(self.model_id, level, timeout_s=START_S)

    def ask(
        self,
        content: str = "hello",
        *,
        tokens: int = 8,
        timeout_s: float = 60,
        stop: StopSignal | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Completion:
        """A chat of exactly *tokens* tokens, where the engine can promise that."""
        body = {
            "model": self.model_id,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        return self.post(body, timeout_s=timeout_s, stop=stop, on_chunk=on_chunk)

    def ask_long(self, stop: StopSignal | None = None, on_chunk: OnChunk | None = None) -> Completion:
        """A chat that runs for many seconds on a real engine."""
        return self.ask(tokens=LENGTH - 100, stop=stop, on_chunk=on_chunk)

    def post(
        self,
        body: dict[str, Any],
        *,
        timeout_s: float = 60,
        stop: StopSignal | None = None,
        on_chunk: OnChunk | None = None,
    ) -> Completion:
        """Send *body* as it is; streamed, if somebody listens."""
        if on_chunk is not None:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        call = Call(path="/v1/chat/completions", body=body, timeout_s=timeout_s, on_chunk=on_chunk)
        return self.engine.generate(self.model_id, call, stop or StopSignal())


def stub_kit(_: Path) -> Kit:
    engine = StubEngine(load_s=0.01, run_s=0.5, sleep_s=0.01, wake_s={Level.ASLEEP_1: 0.01, Level.ASLEEP_2: 0.02})
    spec = make_spec("stub", engine=EngineKind.STUB)
    placement = make_placement("stub", spec=spec, max_model_len=LENGTH, gpus=(0,))
    return Kit(
        engine=engine,
        placement=placement,
        kill=lambda: engine.die("stub"),
        working=lambda: engine.in_flight("stub") > 0,
    )


def server_kit(engine: Engine, spec: ModelSpec, *, guards: int = 1, placement: Placement | None = None) -> Kit:
    placement = placement or make_placement(
        spec.id, spec=spec, max_model_len=LENGTH, max_num_seqs=SLOTS, kv_cache_bytes=256 * 2**20
    )

    def workers() -> list[psutil.Process]:
        """The engine's processes without a guard of its own; the last ones compute."""
        loaded = engine.ensure_ready(placement, timeout_s=START_S)
        return [psutil.Process(pid) for pid in loaded.pids[guards:]]

    def working() -> bool:
        return any(process.cpu_percent(interval=0.1) > 20 for process in workers())

    def kill() -> None:
        workers()[-1].kill()

    return Kit(engine=engine, placement=placement, kill=kill, working=working)


def llamacpp_kit(folder: Path) -> Kit:
    spec = make_spec("tiny-gguf", path=make_tiny_gguf(folder / "tiny.gguf", context=LENGTH), repo=None, file=None)
    engine = LlamaCppEngine(run_dir=folder / "run", files_of=files_of, server=find_server(LlamaCppSettings()))
    return server_kit(engine, spec)


def tiny_hf(folder: Path, *, context: int = LENGTH) -> ModelSpec:
    model = make_tiny_hf(folder / "tiny-hf", context=context)
    return make_spec("tiny-hf", engine=EngineKind.VLLM, path=model, repo=None, file=None)


def vllm_server(folder: Path) -> Engine:
    return VllmServerEngine(run_dir=folder / "run", files_of=files_of, python=vllm_python())


def vllm_host(folder: Path) -> Engine:
    """On one card or the CPU; what needs several is the server's, and no test's here."""
    return VllmHostEngine(run_dir=folder / "run", files_of=files_of, python=vllm_python(), several_cards=StubEngine())


def vllm_server_kit(folder: Path) -> Kit:
    return server_kit(vllm_server(folder), tiny_hf(folder))


def vllm_host_kit(folder: Path) -> Kit:
    return server_kit(vllm_host(folder), tiny_hf(folder), guards=0)


def vllm_card_kit(folder: Path) -> Kit:
    """As `vllm_host_kit`, on a card, with the vLLM that VLLM_PYTHON names."""
    engine = VllmHostEngine(
        run_dir=folder / "run", files_of=files_of, python=cuda_python(), several_cards=StubEngine(), sleeps=True
    )
    spec = tiny_hf(folder)
    return server_kit(engine, spec, guards=0, placement=on_card(spec, max_model_len=LENGTH))


def remote_kit(folder: Path) -> Kit:
    """What an OpenAI-compatible endpoint is, with a key: llama.cpp's server, on TCP, in a process that is not ours."""
    model = make_tiny_gguf(folder / "tiny.gguf", context=LENGTH)
    there = CloudServer(folder, model=model, context=LENGTH, slots=SLOTS)
    engine = RemoteEngine(url=there.url, api_key=SecretStr(there.key), model="its-own-name")

    return Kit(
        engine=engine,
        placement=make_placement("any-model", max_model_len=LENGTH),
        kill=there.kill,
        working=there.working,
        revive=there.start,
        end=there.kill,
    )


def files_of(spec: ModelSpec) -> Path:
    assert spec.path is not None
    return spec.path


KITS = [
    pytest.param(stub_kit, id="stub"),
    pytest.param(remote_kit, id="remote"),
    pytest.param(llamacpp_kit, id="llamacpp"),
    pytest.param(vllm_server_kit, id="vllm-server", marks=pytest.mark.vllm),
    pytest.param(vllm_host_kit, id="vllm-host", marks=pytest.mark.vllm),
]


SLEEPERS = [pytest.param(stub_kit, id="stub"), pytest.param(vllm_card_kit, id="vllm-card", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=KITS)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """One engine for all tests of this page: vLLM takes half a minute to start."""
    made: Kit = request.param(tmp_path_factory.mktemp("engine"))
    yield made
    made.engine.close()
    made.end()


@pytest.fixture(scope="module", params=SLEEPERS)
def sleeper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """One engine that can put its model to sleep, for all tests of sleep."""
    made: Kit = request.param(tmp_path_factory.mktemp("engine"))
    yield made
    made.engine.close()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """Threads to call from, as the worker's."""
    with ThreadPoolExecutor(32) as threads:
        yield threads


def busy(kit: Kit, *requests: Future[Completion]) -> None:
    """Wait until the engine works, and be sure that no request has ended before that."""
    eventually(kit.working, within_s=20, what="the engine works")
    assert [request.result() for request in requests if request.done()] == []


def test_a_model_that_was_never_started_is_stopped(kit: Kit) -> None:
    """Nothing is invented about it, and a job for it may come again later."""
    assert kit.engine.state("never") is EngineState.STOPPED

    with pytest.raises(EngineNotReady):
        kit.engine.generate("never", Call(path="/v1/chat/completions", body={}, timeout_s=1), StopSignal())


def test_a_ready_model_answers_a_chat(kit: Kit) -> None:
    """The answer has OpenAI's shape, and what was measured stands beside it."""
    kit.ready()

    done = kit.ask(tokens=8)

    assert kit.engine.state(kit.model_id) is EngineState.READY
    assert isinstance(done.response["choices"][0]["message"]["content"], str)
    assert done.prompt_tokens
    assert done.completion_tokens
    assert 0 < done.completion_tokens <= 8
    assert done.run_s > 0


def test_ready_twice_starts_once(kit: Kit) -> None:
    """Found ready, nothing is done: the same processes, no time spent."""
    first = kit.engine.ensure_ready(kit.placement, timeout_s=START_S)

    again = kit.engine.ensure_ready(kit.placement, timeout_s=START_S)

    assert again.pids == first.pids
    assert again.seconds == 0


def test_a_load_says_what_memory_it_took(kit: Kit) -> None:
    """What the processes hold, if any; vLLM itself, how many tokens of 1 KiB (2 layers, 4 heads of 32) its pool has."""
    loaded = kit.engine.ensure_ready(kit.placement, timeout_s=START_S)

    if not loaded.pids:
        assert loaded.rss_bytes is None
        return
    assert loaded.rss_bytes is not None
    resident = sum(psutil.Process(pid).memory_info().rss for pid in loaded.pids)
    forks = len(loaded.pids)  # of one host, say: what is the host's is resident in each of them, and no engine's
    assert resident / (1 + forks) < loaded.rss_bytes <= resident + 64 * 2**20
    if kit.engine.kind is EngineKind.VLLM:
        assert loaded.measured.kv_tokens == kit.placement.kv_cache_bytes // 1024


def test_no_engine_says_that_it_could_sleep_without_a_card(kit: Kit) -> None:
    """Known before anything is asked of it."""
    assert kit.engine.sleep_levels(replace(kit.placement, gpus=())) == ()


def test_asleep_and_awake_again_it_answers_the_same(sleeper: Kit) -> None:
    """At each of its levels, in the same processes; asleep it takes no request, and asked again it sleeps on."""
    levels = sleeper.engine.sleep_levels(sleeper.placement)
    assert levels
    for level in levels:
        sleeper.ready()
        before, loaded = sleeper.ask(), sleeper.engine.ensure_ready(sleeper.placement, timeout_s=START_S)
        sleeper.asleep(level)
        sleeper.asleep(level)
        assert sleeper.engine.state(sleeper.model_id) is EngineState.ASLEEP
        with pytest.raises(EngineNotReady):
            sleeper.ask()

        woken = sleeper.engine.ensure_ready(sleeper.placement, timeout_s=START_S)
        assert (woken.level, woken.pids) == (level, loaded.pids)
        assert sleeper.ask().response["choices"] == before.response["choices"]


def test_a_sleeper_of_another_plan_is_started_anew(sleeper: Kit) -> None:
    """It would have the wrong length."""
    sleeper.ready()
    sleeper.asleep()
    other = replace(sleeper.placement, max_model_len=LENGTH // 2)

    assert not sleeper.engine.ensure_ready(other, timeout_s=START_S).level.asleep
    sleeper.engine.ensure_stopped(sleeper.model_id, timeout_s=20)


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_sleeper_that_has_ended_does_not_wake(sleeper: Kit, how: str) -> None:
    """Its next start is one from its files."""
    sleeper.ready()
    sleeper.asleep()
    if how == "killed":
        sleeper.kill()
    else:
        sleeper.engine.ensure_stopped(sleeper.model_id, timeout_s=20)
    gone = EngineState.DEAD if how == "killed" else EngineState.STOPPED
    eventually(lambda: sleeper.engine.state(sleeper.model_id) is gone, within_s=10, what="the sleeper has ended")

    assert not sleeper.engine.ensure_ready(sleeper.placement, timeout_s=START_S).level.asleep


def test_what_is_not_ready_does_not_fall_asleep(sleeper: Kit) -> None:
    """A stopped model is no sleeper."""
    sleeper.engine.ensure_stopped(sleeper.model_id, timeout_s=20)

    with pytest.raises(EngineFailed):
        sleeper.asleep()
    assert sleeper.engine.state(sleeper.model_id) is EngineState.STOPPED


@pytest.mark.parametrize(
    "body",
    [{"messages": "no"}, {}, {"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"}],
    ids=["messages are text", "empty", "max_tokens is text"],
)
def test_a_wrong_body_is_refused_and_the_engine_goes_on(kit: Kit, body: dict[str, Any]) -> None:
    """The job is at fault, not the engine."""
    kit.ready()

    with pytest.raises(InvalidRequest):
        kit.post({"model": kit.model_id, **body})

    assert kit.ask().completion_tokens


def test_a_prompt_longer_than_the_model_is_refused_and_the_engine_goes_on(kit: Kit) -> None:
    """Known by its own class, so that a producer can tell it from other faults."""
    kit.ready()

    with pytest.raises(PromptTooLong, match=str(LENGTH)):
        kit.ask("word " * (LENGTH + 100))

    assert kit.ask().completion_tokens


def test_many_requests_at_once_are_all_answered(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """More than the engine works on at once: the others wait inside it."""
    kit.ready()

    done = list(pool.map(lambda i: kit.ask(f"number {i}"), range(64)))

    assert all(completion.completion_tokens for completion in done)


def test_a_request_that_takes_too_long_is_given_up(kit: Kit) -> None:
    """The job's time limit is kept even if the engine would answer some day, and the engine stops working on it."""
    kit.ready()

    with pytest.raises(EngineTimeout):
        kit.ask(tokens=LENGTH - 100, timeout_s=0.2)
    eventually(lambda: not kit.working(), within_s=1, what="the engine does nothing")


def test_stopped_requests_end_within_a_second_and_free_the_engine(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """All of the engine's places are taken for long; once these jobs are stopped, nobody works on them any more."""
    kit.ready()
    stops = [StopSignal() for _ in range(SLOTS)]
    requests = [pool.submit(kit.ask_long, stop) for stop in stops]
    busy(kit, *requests)
    began = time.monotonic()

    for stop in stops:
        stop.stop("cancelled")

    for request in requests:
        with pytest.raises(JobStopped, match="cancelled"):
            request.result(timeout=1)
    assert time.monotonic() - began < 1
    eventually(lambda: not kit.working(), within_s=2, what="the engine does nothing")
    assert kit.ask(timeout_s=3).completion_tokens


def test_a_stop_before_the_request_sends_nothing(kit: Kit) -> None:
    """A job that is cancelled while it waits for a thread does not reach the engine's answer."""
    kit.ready()
    stop = StopSignal()
    stop.stop("time limit")

    with pytest.raises(JobStopped, match="time limit"):
        kit.ask_long(stop)


def test_kill_9_in_mid_request_is_noticed_and_the_engine_starts_again(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """Requests under way fail at once, the model is dead and not merely stopped, and can be had again."""
    kit.ready()
    requests = [pool.submit(kit.ask_long) for _ in range(SLOTS)]
    busy(kit, *requests)

    kit.kill()

    for request in requests:
        with pytest.raises(EngineDied):
            request.result(timeout=3)
    assert kit.engine.state(kit.model_id) is EngineState.DEAD
    with pytest.raises(EngineNotReady):
        kit.ask()
    kit.ready()
    assert kit.engine.state(kit.model_id) is EngineState.READY
    assert kit.ask().completion_tokens


def test_stopping_ends_running_requests_and_every_process(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """After it returns no process is left, and the model is stopped, not dead. Once more does nothing."""
    pids = kit.engine.ensure_ready(kit.placement, timeout_s=START_S).pids
    request = pool.submit(kit.ask_long)
    busy(kit, request)

    kit.engine.ensure_stopped(kit.model_id, timeout_s=20)

    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert kit.engine.state(kit.model_id) is EngineState.STOPPED
    with pytest.raises((EngineDied, EngineNotReady)):
        request.result(timeout=3)
    kit.engine.ensure_stopped(kit.model_id, timeout_s=20)


def test_the_chunks_of_a_stream_are_the_whole_answer(kit: Kit) -> None:
    """They come in several pieces; joined they are what `generate` gives, which is what it gives without a stream."""
    kit.ready()
    chunks: list[Mapping[str, Any]] = []

    streamed = kit.ask(tokens=32, on_chunk=chunks.append)
    plain = kit.ask(tokens=32)

    whole: dict[str, Any] = {}
    for chunk in chunks:
        join(whole, chunk)
    assert len(chunks) >= 4  # a word, another, the end, the usage
    assert complete(whole) == streamed.response
    assert streamed.response["choices"][0]["message"]["content"] == plain.response["choices"][0]["message"]["content"]
    assert streamed.response["choices"][0]["finish_reason"] == plain.response["choices"][0]["finish_reason"]
    assert streamed.response["object"] == "chat.completion"
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (plain.prompt_tokens, plain.completion_tokens)


def test_a_stop_in_mid_stream_ends_it_at_once(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """The first chunks are there long before the answer is whole; the place is free for the next."""
    kit.ready()
    stop, speaking = StopSignal(), threading.Event()
    request = pool.submit(kit.ask_long, stop, lambda _chunk: speaking.set())
    assert speaking.wait(20)

    stop.stop("cancelled")

    with pytest.raises(JobStopped, match="cancelled"):
        request.result(timeout=1)
    assert kit.ask(timeout_s=3).completion_tokens


def test_kill_9_in_mid_stream_is_noticed(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """What came is not taken for the whole answer."""
    kit.ready()
    speaking = threading.Event()
    request = pool.submit(kit.ask_long, None, lambda _chunk: speaking.set())
    assert speaking.wait(20)

    kit.kill()

    with pytest.raises(EngineDied):
        request.result(timeout=10)
    kit.ready()


def test_a_wrong_body_is_refused_before_its_stream_begins(kit: Kit) -> None:
    """By the same error as without a stream, and no chunk came."""
    kit.ready()
    chunks: list[Mapping[str, Any]] = []

    with pytest.raises(InvalidRequest):
        kit.post({"model": kit.model_id, "messages": "no"}, on_chunk=chunks.append)
    with pytest.raises(PromptTooLong, match=str(LENGTH)):
        kit.ask("word " * (LENGTH + 100), on_chunk=chunks.append)

    assert chunks == []


def test_streams_and_others_run_beside_each_other(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """Hundreds, mixed, none of which suffers from what another did to its connection."""
    kit.ready()

    done = pool.map(lambda i: kit.ask(tokens=2, on_chunk=(lambda _chunk: None) if i % 2 else None), range(400))

    assert all(completion.completion_tokens for completion in done)


def test_a_broken_gguf_file_fails_to_load_with_the_reason(tmp_path: Path) -> None:
    """llama.cpp's own words reach the operator, and nothing keeps running."""
    whole = make_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "broken.gguf").write_bytes(whole[: len(whole) // 2])
    spec = make_spec("broken", path=tmp_path / "broken.gguf", repo=None, file=None)
    engine = LlamaCppEngine(run_dir=tmp_path / "run", files_of=files_of, server=find_server(LlamaCppSettings()))

    with pytest.raises(LoadFailed, match=r"broken ended while it was loading.*corrupted or incomplete.*broken\.log"):
        engine.ensure_ready(make_placement("broken", spec=spec), timeout_s=30)

    assert engine.state("broken") is EngineState.STOPPED
    engine.close()


def test_a_cache_of_8_bits_is_about_half_as_large(tmp_path: Path) -> None:
    """What a smaller plan counts on: llama.cpp's q8_0 takes 34 bytes for 32 numbers, where f16 takes 64."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", head_dim=32, context=LENGTH)
    spec = make_spec("tiny", path=path, repo=None, file=None)
    engine = LlamaCppEngine(run_dir=tmp_path / "run", files_of=files_of, server=find_server(LlamaCppSettings()))

    def resident(kv_cache_dtype: str | None) -> int:
        placement = make_placement(
            "tiny", spec=spec, max_model_len=LENGTH, max_num_seqs=SLOTS, kv_cache_dtype=kv_cache_dtype
        )
        loaded = engine.ensure_ready(placement, timeout_s=30)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        call = Call(path="/v1/chat/completions", body=body, timeout_s=30)
        assert engine.generate("tiny", call, StopSignal()).completion_tokens
        engine.ensure_stopped("tiny", timeout_s=20)
        assert loaded.rss_bytes is not None
        return loaded.rss_bytes

    model = gguf_model(read_facts(spec))
    options = LlamaCppOptions(max_model_len=LENGTH, slots=SLOTS)
    in_16, in_8 = (
        estimate_llamacpp(model, replace(options, key_type=name, value_type=name), n_gpu_layers=None)
        for name in ("F16", "Q8_0")
    )
    assert isinstance(in_16, LlamaCppEstimate)
    assert isinstance(in_8, LlamaCppEstimate)
    saved = resident(None) - resident("q8_0")
    engine.close()
    assert saved == pytest.approx(in_16.kv_host - in_8.kv_host, rel=0.1)


@pytest.mark.vllm
@pytest.mark.parametrize("make", [vllm_server, vllm_host], ids=["server", "host"])
def test_a_length_beyond_the_model_fails_to_load_with_the_reason(
    tmp_path: Path, make: Callable[[Path], Engine]
) -> None:
    """The words of vLLM itself reach the operator, and not the generic line that ends its log."""
    engine, spec = make(tmp_path), tiny_hf(tmp_path, context=2048)

    with pytest.raises(LoadFailed, match=r"User-specified max_model_len \(100000\) is greater than"):
        engine.ensure_ready(make_placement("short", spec=spec, max_model_len=100_000), timeout_s=START_S)

    assert engine.state(spec.id) is EngineState.STOPPED
    engine.close()
