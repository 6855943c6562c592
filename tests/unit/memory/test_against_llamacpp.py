"""
The estimate beside llama.cpp itself: what it logs when it loads models of random shapes on the CPU.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from worker.catalog.gguf_header import read_gguf_file
from worker.memory.estimate_llamacpp import LlamaCppEstimate, LlamaCppOptions, estimate_llamacpp
from worker.memory.gguf_measure import measure_gguf

MIB = 2**20
HIDDEN, INNER, VOCABULARY, HEADS, HEAD = 512, 1536, 32000, 8, 64

# Loads a model as the engine does, prints what llama.cpp logs, and ends.
LOADER = """
import json, os, sys
import xllamacpp
told = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = told["path"], told["cells"], told["slots"]
params.n_ubatch, params.kv_unified, params.fit_params, params.verbosity = told["ubatch"], told["unified"], False, 5
params.warmup, params.cache_ram_mib = False, 0
flash = "ENABLED" if told["flash_attention"] else "DISABLED"
params.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, "LLAMA_FLASH_ATTN_TYPE_" + flash)
params.cache_type_k = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + told["key_type"])
params.cache_type_v = getattr(xllamacpp.ggml_type, "GGML_TYPE_" + told["value_type"])
server = xllamacpp.Server(params)
print("loaded", flush=True)
os._exit(0)
"""


def write_model(path: Path, kind: str, *, layers: int, kv_heads: int, window: int | None = None) -> None:
    """A model of zeros with the tensors that *kind* needs; its head is its embedding."""
    writer = gguf.GGUFWriter(path, kind)
    facts = {
        "block_count": layers, "context_length": 2**17, "embedding_length": HIDDEN, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": kv_heads, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "rope.dimension_count": HEAD,
    }  # fmt: skip
    for key, value in {**facts, **({} if window is None else {"attention.sliding_window": window})}.items():
        writer.add_uint32(f"{kind}.{key}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{number}" for number in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (VOCABULARY - 259)])

    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, HIDDEN), "output_norm": (HIDDEN,)}
    query, kept = (HEADS * HEAD, HIDDEN), (kv_heads * HEAD, HIDDEN)
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (HIDDEN,), "attn_q": query, "attn_k": kept, "attn_v": kept, "attn_output": query[::-1],
        "ffn_norm": (HIDDEN,), "ffn_up": (INNER, HIDDEN), "ffn_gate": (INNER, HIDDEN), "ffn_down": (HIDDEN, INNER),
    }  # fmt: skip
    if kind == "gemma3":
        layer |= {"attn_q_norm": (HEAD,), "attn_k_norm": (HEAD,)}
        layer |= {"post_attention_norm": (HIDDEN,), "post_ffw_norm": (HIDDEN,)}
    for number in range(layers):
        shapes |= {f"blk.{number}.{name}": shape for name, shape in layer.items()}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32 if len(shape) == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logged(path: Path, options: LlamaCppOptions) -> dict[str, float]:
    """Load the model in a process of its own; MiB of each kind of buffer."""
    told = {
        "path": str(path), "cells": options.max_model_len * options.slots, "slots": options.slots,
        "ubatch": options.ubatch, "unified": options.unified, "flash_attention": options.flash_attention,
        "key_type": options.key_type, "value_type": options.value_type,
    }  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", LOADER, json.dumps(told)], capture_output=True, text=True, timeout=120, check=False
    )
    text = run.stdout + run.stderr
    assert "loaded" in run.stdout, text[-2000:]
    kinds = {"weights": "model", "kv": "KV", "compute": "compute", "answers": "output"}
    return {
        name: sum(float(size) for size in re.findall(rf" {word} buffer size = +([\d.]+) MiB", text))
        for name, word in kinds.items()
    }


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"kind": "llama", "layers": 4, "kv_heads": 2}, {"max_model_len": 4096}),
        ({"kind": "llama", "layers": 4, "kv_heads": 2}, {"max_model_len": 4000, "slots": 3}),
        ({"kind": "llama", "layers": 4, "kv_heads": 2}, {"max_model_len": 1000, "slots": 4, "unified": True}),
        ({"kind": "llama", "layers": 2, "kv_heads": 2}, {"max_model_len": 16384, "flash_attention": False}),
        ({"kind": "llama", "layers": 2, "kv_heads": 2}, {"max_model_len": 65536}),
        (
            {"kind": "llama", "layers": 3, "kv_heads": 8},
            {"max_model_len": 300, "key_type": "Q8_0", "value_type": "Q4_0"},
        ),
        ({"kind": "gemma3", "layers": 7, "kv_heads": 2, "window": 512}, {"max_model_len": 8192, "ubatch": 128}),
        (
            {"kind": "gemma3", "layers": 7, "kv_heads": 2, "window": 1000},
            {"max_model_len": 8192, "slots": 2, "unified": True},
        ),
    ],
)  # fmt: skip
def test_llama_cpp_sets_aside_what_was_estimated(tmp_path: Path, model: dict[str, Any], told: dict[str, Any]) -> None:
    """
    Weights and cache to the last digit that it prints, what it computes in within 0.5 MiB and 2 %.
    """
    write_model(path := tmp_path / "m.gguf", **model)
    options = LlamaCppOptions(**told, old_reserve=False)

    found = logged(path, options)
    expected = estimate_llamacpp(measure_gguf(read_gguf_file(path)), options, n_gpu_layers=None)

    assert isinstance(expected, LlamaCppEstimate)
    assert found["weights"] == pytest.approx(expected.weights_host / MIB, abs=0.006)
    assert found["kv"] == pytest.approx(expected.kv_host / MIB, abs=0.006)
    assert found["compute"] + found["answers"] == pytest.approx(expected.compute_host / MIB, rel=0.02, abs=0.5)
