"""
What one engine's loads say and take: a broken file, a smaller cache, a length beyond the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import LoadFailed
from common.settings import LlamaCppSettings
from tests.engine_kits import LENGTH, SLOTS, START_S, files_of, tiny_hf, vllm_host, vllm_server
from tests.factories import make_placement, make_spec
from worker.catalog.local import read_facts
from worker.demo.tiny_models import make_tiny_gguf
from worker.engines.base import Call, Engine, EngineState, StopSignal
from worker.engines.llamacpp_server import LlamaCppEngine, find_server
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.selection.fit_llamacpp import gguf_model


def test_a_broken_gguf_file_fails_to_load_with_the_reason(tmp_path: Path) -> None:
    """llama.cpp's own words reach the operator, and nothing keeps running."""
    whole = make_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    (tmp_path / "broken.gguf").write_bytes(whole[: len(whole) // 2])
    spec = make_spec("broken", path=tmp_path / "broken.gguf", repo=None, file=None)
    engine = LlamaCppEngine(run_dir=tmp_path / "run", files_of=files_of, server=find_server(LlamaCppSettings()))

    with pytest.raises(LoadFailed, match=r"broken ended while it was loading.*corrupted or incomplete.*broken\.log"):
        engine.ensure_ready(make_placement("broken", spec=spec), timeout_s=30)

    assert engine.state("broken") is EngineState.STOPPED
    engine.close()


def test_a_cache_of_8_bits_is_about_half_as_large(tmp_path: Path) -> None:
    """What a smaller plan counts on: llama.cpp's q8_0 takes 34 bytes for 32 numbers, where f16 takes 64."""
    path = make_tiny_gguf(tmp_path / "tiny.gguf", head_dim=32, context=LENGTH)
    spec = make_spec("tiny", path=path, repo=None, file=None)
    engine = LlamaCppEngine(run_dir=tmp_path / "run", files_of=files_of, server=find_server(LlamaCppSettings()))

    def resident(kv_cache_dtype: str | None) -> int:
        placement = make_placement(
            "tiny", spec=spec, max_model_len=LENGTH, max_num_seqs=SLOTS, kv_cache_dtype=kv_cache_dtype
        )
        loaded = engine.ensure_ready(placement, timeout_s=30)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
        call = Call(path="/v1/chat/completions", body=body, timeout_s=30)
        assert engine.generate("tiny", call, StopSignal()).completion_tokens
        engine.ensure_stopped("tiny", timeout_s=20)
        assert loaded.rss_bytes is not None
        return loaded.rss_bytes

    model = gguf_model(read_facts(spec))
    options = LlamaCppOptions(max_model_len=LENGTH, slots=SLOTS)
    in_16, in_8 = (
        estimate_llamacpp(model, replace(options, key_type=name, value_type=name), n_gpu_layers=None)
        for name in ("F16", "Q8_0")
    )
    assert isinstance(in_16, LlamaCppEstimate)
    assert isinstance(in_8, LlamaCppEstimate)
    saved = resident(None) - resident("q8_0")
    engine.close()
    assert saved == pytest.approx(in_16.kv_host - in_8.kv_host, rel=0.1)


@pytest.mark.vllm
@pytest.mark.parametrize("make", [vllm_server, vllm_host], ids=["server", "host"])
def test_a_length_beyond_the_model_fails_to_load_with_the_reason(
    tmp_path: Path, make: Callable[[Path], Engine]
) -> None:
    """The words of vLLM itself reach the operator, and not the generic line that ends its log."""
    engine, spec = make(tmp_path), tiny_hf(tmp_path, context=2048)

    with pytest.raises(LoadFailed, match=r"User-specified max_model_len \(100000\) is greater than"):
        engine.ensure_ready(make_placement("short", spec=spec, max_model_len=100_000), timeout_s=START_S)

    assert engine.state(spec.id) is EngineState.STOPPED
    engine.close()
