"""
On a machine with a CUDA card: what NVML says of it, and the predicted bytes of a load beside the measured ones.

Not run where it was written: there was no card. VLLM_PYTHON names the Python that has vLLM's CUDA build.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.settings import Settings
from tests.waiting import eventually
from worker.catalog.download import resolve_files
from worker.catalog.local import spec_from_path
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.base import Call, StopSignal
from worker.engines.measure import count_bytes
from worker.engines.vllm_server import VllmServerEngine, find_python
from worker.hardware.gpu import Gpu
from worker.hardware.nvml import NvmlReader
from worker.selection.overrides import Overrides
from worker.selection.place import place_model
from worker.selection.placement import Placement

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

START_S = 400  # vLLM imports, compiles and captures its graphs
MIB = 2**20


@pytest.fixture
def engine() -> Iterator[VllmServerEngine]:
    """The real vLLM, for the card."""
    if not os.environ.get("VLLM_PYTHON"):
        pytest.skip("set VLLM_PYTHON to the Python that has vLLM's CUDA build")
    python = find_python(Settings.from_env().vllm)
    with tempfile.TemporaryDirectory(prefix="sw-") as run_dir:  # short: a socket's path has 107 characters at most
        found = VllmServerEngine(run_dir=Path(run_dir), files_of=resolve_files, python=python)
        yield found
        found.close()


def test_nvml_reads_the_card() -> None:
    """Its identity, its memory and its capability; the temperature is one that a card can have."""
    machine = NvmlReader().read()

    assert machine.source == "nvml"
    for card in machine.gpus:
        assert card.name
        assert card.uuid
        assert card.compute_capability
        assert card.free_bytes is not None
        assert 0 < card.free_bytes <= card.total_bytes
        assert card.temperature_c is None or 0 < card.temperature_c < 120


def test_a_load_takes_about_what_was_predicted_and_gives_it_back(engine: VllmServerEngine, tmp_path: Path) -> None:
    """What NVML sees the card's used bytes grow by is at most twice the estimate; afterwards they are free again."""
    reader = NvmlReader()
    spec = spec_from_path(str(make_tiny_hf(tmp_path / "tiny-llama")))
    placement = place_model(spec, reader.read(), Overrides(max_model_len=1024, tensor_parallel_size=1), asked=True)
    assert isinstance(placement, Placement), placement

    def used() -> int:
        card: Gpu = next(card for card in reader.read().gpus if card.index == placement.gpus[0])
        assert card.used_bytes is not None
        return card.used_bytes

    before = used()
    loaded = engine.ensure_ready(placement, timeout_s=START_S)
    body = {"model": placement.model_id, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    done = engine.generate(placement.model_id, Call(path="/v1/chat/completions", body=body, timeout_s=60), StopSignal())
    measured, predicted = used() - before, placement.memory.total
    print(f"predicted {predicted / MIB:,.0f} MiB, measured {measured / MIB:,.0f} MiB; vLLM says {loaded.measured}")
    held = count_bytes(reader.read(), loaded.pids)

    assert loaded.measured.kv_pool is not None
    assert abs(loaded.measured.kv_pool - placement.kv_cache_bytes) < 16 * MIB
    assert loaded.measured.kv_tokens
    assert held is None or abs(held - measured) < 64 * MIB, "None: the driver hides from a container who holds what"
    assert done.completion_tokens
    assert measured > placement.memory.kv_cache, "it is not on the card"
    assert predicted >= 0.5 * measured
    engine.ensure_stopped(placement.model_id, timeout_s=60)
    eventually(lambda: used() < before + 64 * MIB, within_s=30, what="the card has its memory back")
