"""
The arithmetic of `shiftworker bench levels`, on a stand-in whose figures are known.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import EngineMissing, LoadFailed, Misconfigured
from tests.factories import GIB, make_gpu, make_machine, make_placement, make_spec
from worker.bench.levels import bench_levels, measure_bandwidth, place_on_card
from worker.catalog.spec import EngineKind
from worker.engines.base import EngineState
from worker.engines.stub import StubEngine
from worker.hardware.gpu import Machine
from worker.memory.estimate import MemoryEstimate
from worker.state.residency import Level

PLACEMENT = make_placement(
    "m", spec=make_spec("m", engine=EngineKind.STUB), gpus=(0,), memory=MemoryEstimate(weights=8 * GIB, kv_cache=0)
)


class Card:
    """24 GiB; a model takes 11 of them awake, 1 asleep, and at level 1 9 of the host."""

    def __init__(self, engine: StubEngine) -> None:
        self.engine = engine

    def read(self) -> Machine:
        state = self.engine.state("m")
        lighter = state is EngineState.ASLEEP and self.engine._models["m"].level is Level.ASLEEP_1
        used = {EngineState.READY: 11, EngineState.ASLEEP: 1}.get(state, 0)
        host = make_machine(24, ram_gib=64, ram_available_gib=64 - 9 * lighter)
        return replace(host, gpus=(make_gpu(24, free_gib=24 - used),))


def test_each_figure_is_what_the_card_and_the_clock_say() -> None:
    """8 GiB of weights at 80 GiB/s take half of a wake of 0.2 s."""
    engine = StubEngine(load_s=0.3, sleep_s=0.1, wake_s={Level.ASLEEP_1: 0.2, Level.ASLEEP_2: 0.05})
    found = bench_levels(PLACEMENT, engine, Card(engine), runs=1, bandwidth=lambda: 80.0 * GIB, tell=lambda _line: None)

    assert (found.start_s, found.restart_s, found.wake_1_s, found.wake_2_s) == (0.3, 0.3, 0.2, 0.05)
    assert found.sleep_1_s >= 0.1
    assert (found.freed_1_bytes, found.freed_2_bytes, found.kept_bytes) == (10 * GIB, 10 * GIB, GIB)
    assert (found.host_bytes, found.weights_bytes, found.same_tokens) == (9 * GIB, 8 * GIB, True)
    assert found.bus_share == 0.5
    assert engine.state("m") is EngineState.STOPPED


def test_without_a_card_or_without_sleep_it_says_what_to_do(tmp_path: object) -> None:
    """Nothing is measured, and nothing invented."""
    engine = StubEngine()
    with pytest.raises(Misconfigured, match="SWITCH_MAX_ASLEEP"):
        bench_levels(PLACEMENT, engine, Card(engine), runs=1, bandwidth=lambda: 1.0, tell=lambda _line: None)

    class NoCard:
        def read(self) -> Machine:
            return make_machine()

    with pytest.raises(Misconfigured, match="no card"):
        place_on_card(tmp_path, NoCard(), hidden=64, layers=1)  # type: ignore[arg-type]


def _python(folder: Path, does: str) -> Path:
    """A program that stands in for vLLM's Python."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def test_the_bandwidth_is_measured_in_an_engines_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On that card alone, with the libraries that the operator names, and without our secrets."""
    monkeypatch.setenv("LD_LIBRARY_PATH", "/cuda/lib")
    monkeypatch.setenv("REDIS_URL", "redis://:secret@host")
    seen = tmp_path / "seen"

    assert measure_bandwidth(_python(tmp_path, f"env > {seen}; echo vLLM says; echo 5.5e10"), 3) == 5.5e10

    lines = seen.read_text().splitlines()
    assert {"LD_LIBRARY_PATH=/cuda/lib", "CUDA_VISIBLE_DEVICES=3", "CUDA_DEVICE_ORDER=PCI_BUS_ID"} <= {*lines}
    assert any(line.startswith("PATH=") for line in lines)
    assert "secret" not in seen.read_text()


@pytest.mark.parametrize(("said", "error"), [("torch sees no card", EngineMissing), ("out of memory", LoadFailed)])
def test_a_bandwidth_that_is_not_measured_says_why(tmp_path: Path, said: str, error: type[Exception]) -> None:
    """Its last words are in the message, and there is no figure."""
    with pytest.raises(error, match=said):
        measure_bandwidth(_python(tmp_path, f"echo '{said}' >&2; exit 1"), 0)
