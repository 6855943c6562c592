"""
vLLM asleep and awake again, as far as a machine without a card can show it.

On the CPU vLLM gives no memory back, but it goes through every step: its scheduler pauses, its weights are read
again, its caches are reset. What a card does is shown by tests/gpu.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import EngineNotReady
from tests.factories import make_placement, make_spec
from tests.integration.test_vllm_host import LOAD_S, START_S, files_of
from tests.vllm_here import vllm_python
from worker.catalog.spec import EngineKind
from worker.demo.tiny_hf import make_tiny_hf
from worker.engines.base import Call, EngineState, StopSignal
from worker.engines.stub import StubEngine
from worker.engines.vllm_host import VllmHostEngine
from worker.residency.verify import Said, differs, verify
from worker.selection.placement import Placement
from worker.state.residency import Level

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmHostEngine]:
    """One host for all tests of this page."""
    folder = tmp_path_factory.mktemp("host")
    made = VllmHostEngine(run_dir=folder, files_of=files_of, python=vllm_python(), several_cards=StubEngine())
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Placement:
    """A tiny model, whose chat template has the time in it, as others have the day."""
    path = make_tiny_hf(tmp_path_factory.mktemp("models") / "one", context=2048)
    config = path / "tokenizer_config.json"
    read = json.loads(config.read_text())
    dated = "{{ strftime_now('%H:%M:%S.%f') }}" + read["chat_template"]
    config.write_text(json.dumps({**read, "chat_template": dated}))
    return make_placement("one", spec=make_spec("one", engine=EngineKind.VLLM, path=path, repo=None, file=None))


def said(engine: VllmHostEngine, model: Placement, before: Said | None = None) -> Said:
    return verify(engine, model, timeout_s=60, before=before)


@pytest.mark.parametrize("level", [Level.ASLEEP_1, Level.ASLEEP_2])
def test_awake_it_answers_with_the_same_tokens(engine: VllmHostEngine, model: Placement, level: Level) -> None:
    """From either level, in the same process; asleep it takes no request. A chat's prompt is another by then."""
    loaded = engine.ensure_ready(model, timeout_s=START_S)
    before = said(engine, model)

    engine.ensure_asleep("one", level, timeout_s=LOAD_S)
    engine.ensure_asleep("one", level, timeout_s=LOAD_S)
    assert engine.state("one") is EngineState.ASLEEP
    with pytest.raises(EngineNotReady):
        engine.generate("one", Call(path="/v1/completions", body={}, timeout_s=1), StopSignal())
    woken = engine.ensure_ready(model, timeout_s=LOAD_S)

    assert (woken.level, woken.pids) == (level, loaded.pids)
    assert engine.state("one") is EngineState.READY
    assert before.prompt
    assert before.prompt != said(engine, model).prompt
    assert isinstance(before.answer[0], int)
    assert differs(before, said(engine, model, before)) is None


def test_the_first_start_is_cold_and_the_next_is_from_the_spare(engine: VllmHostEngine, model: Placement) -> None:
    """The host has vLLM imported by then, and its memory is counted."""
    engine.ensure_ready(model, timeout_s=START_S)
    engine.ensure_stopped("one", timeout_s=10)

    assert engine.standby is Level.SPARE
    assert engine.standby_bytes() > 100 * 2**20
    assert engine.ensure_ready(model, timeout_s=LOAD_S).level is Level.SPARE


def test_a_sleeper_of_another_plan_is_not_woken(engine: VllmHostEngine, model: Placement) -> None:
    """It would have another length: it is ended, and started as asked."""
    before = engine.ensure_ready(model, timeout_s=START_S)
    engine.ensure_asleep("one", Level.ASLEEP_1, timeout_s=LOAD_S)
    other = make_placement("one", spec=model.spec, max_model_len=1024)

    assert engine.ensure_ready(other, timeout_s=LOAD_S).pids != before.pids


ORDER = """
import asyncio, json
from unittest.mock import create_autospec
from vllm.v1.engine.async_llm import AsyncLLM
from worker.engines import vllm_sleep

async def main():
    said = {}
    for level in (1, 2):
        engine = create_autospec(AsyncLLM, instance=True)
        await vllm_sleep.fall_asleep(engine, level)
        await vllm_sleep.wake(engine, level)
        said[level] = [[name, *map(str, args)] for name, args, _ in engine.mock_calls if "__" not in name]
    print(json.dumps(said))

asyncio.run(main())
"""


def test_the_order_of_the_calls_is_the_one_that_keeps_the_weights_right() -> None:
    """Names and parameters are those of vLLM's classes: one that is renamed fails here, not on a card."""
    done = subprocess.run(
        [vllm_python(), "-c", ORDER], cwd=ROOT, capture_output=True, text=True, timeout=START_S, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]

    said = json.loads(done.stdout.splitlines()[-1])
    assert said["1"] == [["sleep", "1"], ["wake_up"], ["reset_prefix_cache"]]
    assert said["2"] == [
        ["sleep", "2"],
        ["wake_up", "['weights']"],
        ["collective_rpc", "reload_weights"],
        ["wake_up", "['kv_cache']"],
        ["reset_prefix_cache"],
    ]
