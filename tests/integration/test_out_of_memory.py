"""
Out of memory all the same, with the real vLLM: it refuses the plan, and the next smaller one serves.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from common.schemas import SwitchRecord
from tests.engine_kits import vllm_host
from tests.factories import make_placement, make_spec
from worker.catalog.local import read_facts
from worker.catalog.spec import EngineKind
from worker.demo.tiny_hf import make_tiny_hf
from worker.hardware.stub import NoGpuReader
from worker.memory.measured import Measured
from worker.residency.board import ResidencyBoard
from worker.residency.check import LoadLimits
from worker.residency.parts import SwitchLimits
from worker.residency.switcher import Switcher
from worker.selection.placement import Placement

MIB = 2**20
LENGTH = 32768  # tokens of 1 KiB: one request takes 32 MiB
POOL = 16 * MIB


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A folder with a short path: a socket's has 107 characters at most."""
    with tempfile.TemporaryDirectory(prefix="sw-") as folder:
        yield Path(folder)


@pytest.mark.vllm
def test_vllm_refuses_a_pool_too_small_for_its_length_and_the_shorter_plan_loads(tmp_path: Path, run_dir: Path) -> None:
    """Two starts, no third: the second answers, holds what the plan says, and the board knows its length."""
    spec = read_facts(
        make_spec("tiny", engine=EngineKind.VLLM, path=make_tiny_hf(tmp_path / "hf", context=LENGTH), repo=None)
    )
    placement = make_placement("tiny", spec=spec, max_model_len=LENGTH, max_num_seqs=4, kv_cache_bytes=POOL)
    placement = replace(placement, memory=replace(placement.memory, kv_cache=POOL))
    engine = vllm_host(run_dir)
    measured: list[tuple[Placement, Measured]] = []
    records: list[SwitchRecord] = []
    board = ResidencyBoard(capacity=64 * 2**30, max_residents=1)
    switcher = Switcher(
        board=board,
        placements={"tiny": placement},
        engines={EngineKind.VLLM: engine},
        machine=NoGpuReader(),
        limits=SwitchLimits(
            attempt_s=200, attempts=3, drain_s=1, quarantine_s=60,
            load=LoadLimits(max_temperature_c=85, max_power_share=1),
        ),
        fetch=lambda _: None,
        hand_back=lambda _: None,
        record=records.append,
        measured=lambda plan, took: measured.append((plan, took)),
    )  # fmt: skip
    try:
        record = switcher.switch("tiny")
    finally:
        switcher.close()

    assert (record.outcome, record.attempts) == ("ready", 2), record.reason
    assert "KV cache is needed, which is larger than the available KV cache memory" in record.reason
    assert "smaller than planned: 8,192 instead of 32,768 tokens" in record.reason
    ((plan, took),) = measured
    assert (plan.max_model_len, plan.kv_cache_bytes) == (8192, 8 * MIB + 128 * 1024)
    assert took.kv_tokens == 8192 + 128
    assert took.total is not None
    assert records == [record]
