"""
The whole path on the real vLLM: chosen by VLLM_MODEL alone, answered, killed, answered again, gone with its worker.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from common.schemas import JobState
from tests.e2e.conftest import Box
from tests.vllm_here import vllm_python
from tests.waiting import eventually
from worker.demo.tiny_hf import make_tiny_hf

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(420)]

BUSY = 20  # percent of a core


@pytest.fixture(scope="module")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Hugging Face's tools write it, with a Llama of random weights."""
    return make_tiny_hf(tmp_path_factory.mktemp("hf") / "tiny-llama")


@pytest.fixture(params=["host", "server"])
def node_env(node_env: dict[str, str], tiny_hf: Path, request: pytest.FixtureRequest) -> dict[str, str]:
    """Nothing is said but the model's folder and its length; no catalogue entry knows it."""
    return {
        **node_env,
        "MODELS_FILE": "",
        "VLLM_MODEL": str(tiny_hf),
        "VLLM_MAX_MODEL_LEN": "1024",
        "VLLM_PYTHON": str(vllm_python()),
        "VLLM_CHANNEL": request.param,
    }


def holds_the_model(process: psutil.Process) -> bool:
    """That process has this title, by vLLM."""
    return "EngineCore" in " ".join(process.cmdline())


def test_jobs_run_on_vllm_and_survive_its_death(box: Box) -> None:
    """Chat, completion, a refused body, a prompt that is too long; a cancel, and kill -9 of vLLM's core in mid-job."""
    assert box.events("residency.switched")[0]["to_model"] == "tiny-llama"
    chat = box.send("Hello").get(timeout=60)
    assert chat["object"] == "chat.completion"
    assert chat["ledger"]["model"] == "tiny-llama"
    assert chat["ledger"]["completion_tokens"] == 8
    body = {"prompt": "Once", "max_tokens": 4, "temperature": 0}
    completion = box.setup.app.send_task("shiftworker.submit", args=[body], queue="shiftworker").get(timeout=60)
    assert completion["object"] == "text_completion"
    too_long = box.send("x" * 1500).get(timeout=60, propagate=False)
    assert type(too_long).__name__ == "PromptTooLong", too_long
    refused = box.send(temperature="warm").get(timeout=60, propagate=False)
    assert type(refused).__name__ == "InvalidRequest", refused

    tree = psutil.Process(box.worker.container.process.pid).children(recursive=True)
    core = next(process for process in tree if holds_the_model(process))
    long = box.send("Long", max_tokens=900, n=16, temperature=1, ignore_eos=True)
    eventually(lambda: core.cpu_percent(interval=0.1) > BUSY, within_s=30, what="vLLM works on it")
    assert box.client.cancel(long.id)
    cancelled_s = eventually(lambda: box.client.result(long.id), within_s=10, what="it has ended")
    eventually(lambda: core.cpu_percent(interval=0.1) < BUSY, within_s=1, what="vLLM works on nothing")
    assert box.client.status(long.id).state is JobState.CANCELLED
    assert cancelled_s < 1

    sent = [box.send(f"Long {n}", max_tokens=900, ignore_eos=True) for n in range(4)]
    eventually(lambda: any(box.client.status(job.id).state is JobState.RUNNING for job in sent), within_s=30)
    core.kill()
    results = [job.get(timeout=240) for job in sent]
    assert max(r["ledger"]["attempt"] for r in results) == 2

    tree = psutil.Process(box.worker.container.process.pid).children(recursive=True)
    assert len(tree) >= 3
    box.worker.kill()
    eventually(lambda: not any(p.is_running() for p in tree), within_s=20, what="vLLM's processes are gone")
