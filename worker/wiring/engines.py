"""
Which engines are here, and how are they built from the settings?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from common.errors import EngineMissing
from common.settings import Settings, WorkerSettings
from worker.catalog.download import resolve_files
from worker.catalog.spec import EngineKind
from worker.engines.base import Engine
from worker.engines.llamacpp_server import LlamaCppEngine, find_server
from worker.engines.llamacpp_server import find_version as find_llamacpp_version
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.engines.vllm_server import VllmServerEngine, find_python, find_version
from worker.memory.measured import engine_name
from worker.state.residency import Level


def build_engines(settings: Settings, kinds: set[EngineKind], run_dir: Path) -> dict[EngineKind, Engine]:
    """Build the engines of these *kinds*, each with its sockets and logs in *run_dir*."""
    build: dict[EngineKind, Callable[[], Engine]] = {
        EngineKind.VLLM: lambda: _vllm(settings, run_dir),
        EngineKind.LLAMACPP: lambda: LlamaCppEngine(
            run_dir=run_dir, files_of=resolve_files, server=find_server(settings.llamacpp)
        ),
        EngineKind.STUB: lambda: _stub(settings.worker),
    }
    return {kind: build[kind]() for kind in kinds}


def why_not_here(settings: Settings) -> dict[EngineKind, str | None]:
    """Say of each kind of engine why it is not here; None = it is."""
    if settings.worker.stub_engine:
        return {EngineKind.STUB: None}

    def why_not(find: Callable[[], object]) -> str | None:
        try:
            find()
        except EngineMissing as error:
            return error.message
        return None

    return {
        EngineKind.VLLM: why_not(lambda: find_python(settings.vllm)),
        EngineKind.LLAMACPP: why_not(lambda: find_server(settings.llamacpp)),
    }


def engine_names(settings: Settings) -> Mapping[EngineKind, str]:
    """Name each engine with the version that is here, as measurements are kept by."""

    def llamacpp_version() -> str | None:
        try:
            return find_llamacpp_version(find_server(settings.llamacpp))
        except EngineMissing:
            return None

    versions = {EngineKind.VLLM: vllm_version(settings), EngineKind.LLAMACPP: llamacpp_version()}
    return {kind: engine_name(kind, versions.get(kind)) for kind in EngineKind}


def most_asleep(settings: Settings) -> int:
    """How many models of vLLM may sleep; its own server puts none to sleep (see `may_sleep`)."""
    return settings.switch.max_asleep if settings.vllm.channel == "host" else 0


def vllm_version(settings: Settings) -> str | None:
    """The version of vLLM that would run here; None = there is none, or it does not say."""
    try:
        return find_version(find_python(settings.vllm))
    except EngineMissing:
        return None


def _vllm(settings: Settings, run_dir: Path) -> Engine:
    python, media = find_python(settings.vllm), settings.egress.media_domains
    server = VllmServerEngine(run_dir=run_dir, files_of=resolve_files, python=python, media_domains=media)
    if settings.vllm.channel == "server":
        return server
    return VllmHostEngine(
        run_dir=run_dir,
        files_of=resolve_files,
        python=python,
        several_cards=server,
        media_domains=media,
        sleeps=most_asleep(settings) > 0,
    )


def _stub(worker: WorkerSettings) -> Engine:
    wake_s = worker.stub_wake_s
    levels = () if wake_s is None else (Level.ASLEEP_1, Level.ASLEEP_2)
    return StubEngine(load_s=worker.stub_load_s, run_s=worker.stub_run_s, wake_s=dict.fromkeys(levels, wake_s or 0.0))
