"""
On a machine with a CUDA card: two models under load side by side for half an hour, and now and then a third one.

Not run where it was written: there was no card. VLLM_PYTHON names the Python that has vLLM's CUDA build;
GPU_TEST_S sets another time than 1,800 seconds.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import EngineNotReady
from tests.gpu.switching import CardBox
from worker.engines.base import Call, StopSignal

LASTS_S = float(os.environ.get("GPU_TEST_S", "1800"))
THIRD_EVERY_S = 300
THREADS = 16  # for each model

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(LASTS_S + 3000)]


@pytest.fixture
def box(tmp_path: Path) -> Iterator[CardBox]:
    """Three models, of which two may be ready."""
    with tempfile.TemporaryDirectory(prefix="sw-") as run_dir:
        made = CardBox(Path(run_dir), tmp_path, {"one": 8, "two": 12, "three": 16}, max_residents=2)
        yield made
        made.switcher.close()


def test_two_models_serve_side_by_side_without_running_out_of_memory(box: CardBox) -> None:
    """No request fails, no model is quarantined or smaller than planned, and the card's memory does not creep away."""
    box.switch("one")
    box.switch("two")
    assert box.board.read().ready_models == ("one", "two")
    ends, answered = threading.Event(), Counter[str]()

    def ask(model_id: str) -> None:
        body = {"model": model_id, "prompt": "hello " * 50, "max_tokens": 200, "ignore_eos": True, "temperature": 1}
        call = Call(path="/v1/completions", body=body, timeout_s=300)
        while not ends.is_set():
            try:
                with box.board.enter(model_id):
                    done = box.engine.generate(model_id, call, StopSignal())
            except EngineNotReady:
                ends.wait(0.2)  # it leaves, or sleeps
            else:
                assert done.completion_tokens == 200
                answered[model_id] += 1

    with ThreadPoolExecutor(2 * THREADS) as pool:
        asking = [pool.submit(ask, name) for name in ("one", "two") for _ in range(THREADS)]
        began, free = time.monotonic(), box.free_bytes()
        try:
            while (left := began + LASTS_S - time.monotonic()) > 0:
                ends.wait(min(left, THIRD_EVERY_S))
                before = answered.copy()
                box.switch("three")
                for name in ("one", "two"):
                    box.switch(name)
                assert set(box.board.read().ready_models) >= {"two"}
                assert all(count > 0 for count in before.values())
        finally:
            ends.set()
        for future in asking:
            future.result(timeout=400)

    print(f"answered in {time.monotonic() - began:.0f} s: {dict(answered)}; free {free:,} -> {box.free_bytes():,}")
    residency = box.board.read()
    assert residency.quarantined == {}
    assert all(resident.smaller is None for resident in residency.residents)
    assert residency.unfreed == {}
