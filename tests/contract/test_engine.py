"""
What every engine promises, shown on each: the stub, llama.cpp, vLLM and an endpoint elsewhere, all but the first real.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psutil
import pytest

from common.errors import EngineDied, EngineNotReady, EngineTimeout, InvalidRequest, PromptTooLong
from tests.engine_kits import (
    LENGTH,
    SLOTS,
    START_S,
    Kit,
    llamacpp_kit,
    remote_kit,
    stub_kit,
    vllm_host_kit,
    vllm_server_kit,
)
from tests.waiting import eventually
from worker.catalog.spec import EngineKind
from worker.engines.assemble import complete, join
from worker.engines.base import Call, Completion, EngineState, JobStopped, StopSignal

KITS = [
    pytest.param(stub_kit, id="stub"),
    pytest.param(remote_kit, id="remote"),
    pytest.param(llamacpp_kit, id="llamacpp"),
    pytest.param(vllm_server_kit, id="vllm-server", marks=pytest.mark.vllm),
    pytest.param(vllm_host_kit, id="vllm-host", marks=pytest.mark.vllm),
]


@pytest.fixture(scope="module", params=KITS)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    """One engine for all tests of this page: vLLM takes half a minute to start."""
    made: Kit = request.param(tmp_path_factory.mktemp("engine"))
    yield made
    made.engine.close()
    made.end()


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
    """
    Requests under way fail at once, the model is dead and not merely stopped, and can be had again.

    What came of a stream is not taken for the whole answer.
    """
    kit.ready()
    speaking = threading.Event()
    requests = [pool.submit(kit.ask_long) for _ in range(SLOTS - 1)]
    stream = pool.submit(kit.ask_long, None, lambda _chunk: speaking.set())
    assert speaking.wait(20)
    busy(kit, stream, *requests)

    kit.kill()

    for request in requests:
        with pytest.raises(EngineDied):
            request.result(timeout=3)
    with pytest.raises(EngineDied):
        stream.result(timeout=10)
    assert kit.engine.state(kit.model_id) is EngineState.DEAD
    with pytest.raises(EngineNotReady):
        kit.ask()
    kit.ready()
    assert kit.engine.state(kit.model_id) is EngineState.READY
    assert kit.ask().completion_tokens


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


def test_stopping_ends_running_requests_and_every_process(kit: Kit, pool: ThreadPoolExecutor) -> None:
    """
    After it returns no process is left, and the model is stopped, not dead. Once more does nothing.

    Last on this page, for a start takes long.
    """
    pids = kit.engine.ensure_ready(kit.placement, timeout_s=START_S).pids
    request = pool.submit(kit.ask_long)
    busy(kit, request)

    kit.engine.ensure_stopped(kit.model_id, timeout_s=20)

    assert [pid for pid in pids if psutil.pid_exists(pid)] == []
    assert kit.engine.state(kit.model_id) is EngineState.STOPPED
    with pytest.raises((EngineDied, EngineNotReady)):
        request.result(timeout=3)
    kit.engine.ensure_stopped(kit.model_id, timeout_s=20)
