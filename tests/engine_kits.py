"""
Each engine made for tests, with the means to disturb it: all but the stub are real.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from pydantic import SecretStr

from common.settings import LlamaCppSettings
from tests.factories import make_placement, make_spec
from tests.fakes.cloud_server import CloudServer
from tests.vllm_here import cuda_python, on_card, vllm_python
from worker.catalog.spec import EngineKind, ModelSpec
from worker.demo.tiny_hf import make_tiny_hf
from worker.demo.tiny_models import make_tiny_gguf
from worker.engines.base import Call, Completion, Engine, OnChunk, StopSignal
from worker.engines.llamacpp_server import LlamaCppEngine, find_server
from worker.engines.remote import RemoteEngine
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.engines.vllm_server import VllmServerEngine
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


def llamacpp_kit(folder: Path) -> Kit:
    spec = make_spec("tiny-gguf", path=make_tiny_gguf(folder / "tiny.gguf", context=LENGTH), repo=None, file=None)
    engine = LlamaCppEngine(run_dir=folder / "run", files_of=files_of, server=find_server(LlamaCppSettings()))
    return server_kit(engine, spec)


def vllm_server(folder: Path) -> Engine:
    return VllmServerEngine(run_dir=folder / "run", files_of=files_of, python=vllm_python())


def vllm_server_kit(folder: Path) -> Kit:
    return server_kit(vllm_server(folder), tiny_hf(folder))


def vllm_host(folder: Path) -> Engine:
    """On one card or the CPU; what needs several is the server's, and no test's here."""
    return VllmHostEngine(run_dir=folder / "run", files_of=files_of, python=vllm_python(), several_cards=StubEngine())


def vllm_host_kit(folder: Path) -> Kit:
    return server_kit(vllm_host(folder), tiny_hf(folder), guards=0)


def vllm_card_kit(folder: Path) -> Kit:
    """As `vllm_host_kit`, on a card, with the vLLM that VLLM_PYTHON names."""
    engine = VllmHostEngine(
        run_dir=folder / "run", files_of=files_of, python=cuda_python(), several_cards=StubEngine(), sleeps=True
    )
    spec = tiny_hf(folder)
    return server_kit(engine, spec, guards=0, placement=on_card(spec, max_model_len=LENGTH))


def tiny_hf(folder: Path, *, context: int = LENGTH) -> ModelSpec:
    model = make_tiny_hf(folder / "tiny-hf", context=context)
    return make_spec("tiny-hf", engine=EngineKind.VLLM, path=model, repo=None, file=None)


def files_of(spec: ModelSpec) -> Path:
    assert spec.path is not None
    return spec.path
