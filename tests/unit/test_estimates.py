"""
`shiftworker estimate`: every way to name a model, one at a time and in a batch; what cannot be judged says so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from common.errors import BadSetting, ModelMissing
from common.settings import Settings
from worker.catalog.safetensors_header import read_safetensors_folder
from worker.catalog.toml_file import load_catalogue
from worker.demo.tiny_hf import make_tiny_hf
from worker.demo.tiny_models import make_tiny_gguf
from worker.estimates import answer_lines, answer_named
from worker.memory.case import Answer

# As ../config.json of meta-llama/Llama-3.1-8B-Instruct has it, only what matters.
LLAMA: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "intermediate_size": 14336, "tie_word_embeddings": False,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


def named(model: object, **options: Any) -> Answer:
    return answer_named({"model": str(model), **options}, Settings.from_env())


def batch(*cases: dict[str, Any] | str) -> list[tuple[Answer, tuple[str, ...]]]:
    lines = [case if isinstance(case, str) else json.dumps(case) for case in cases]
    return list(answer_lines(lines, Settings.from_env()))


# --- One model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", list(load_catalogue()), ids=lambda spec: spec.id)
def test_every_model_of_the_catalogue_is_answered(spec: Any) -> None:
    """
    With every figure and a reason; for either engine its own.
    """
    answer = named(spec.id, gpu_memory_gib=24)

    assert answer.engine == spec.engine
    assert None not in answer.model_dump(exclude={"host_bytes", "n_gpu_layers"}).values()
    assert answer.reason


def test_a_folder_with_weights_is_answered_from_their_headers(tmp_path: Path) -> None:
    """
    The sources say so, and the bytes are the tensors' own plus vLLM's rope table.
    """
    folder = make_tiny_hf(tmp_path / "tiny")
    answer = named(folder, gpu_memory_gib=8, max_model_len=128)
    tensors = sum(tensor.nbytes for tensor in read_safetensors_folder(folder))
    config = json.loads((folder / "config.json").read_text())
    rope_table = config["max_position_embeddings"] * config["head_dim"] * 2

    assert answer.weights_bytes == pytest.approx(tensors + rope_table, rel=0.01)
    assert answer.sources["weights"] == str(folder)
    assert answer.fits is True


def test_a_folder_and_a_file_of_config_alone_agree(tmp_path: Path) -> None:
    """
    Weights there or not, the config says enough.
    """
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    folder, file = named(tmp_path, gpu_memory_gib=24), named(tmp_path / "config.json", gpu_memory_gib=24)

    assert folder.weights_bytes == file.weights_bytes
    assert folder.weights_bytes == pytest.approx(14.9889 * 2**30, rel=1e-4)  # vLLM's log of this model


def test_a_gguf_file_is_answered_from_its_header(tmp_path: Path) -> None:
    """
    All of it on the card, or as many layers as asked; the rest in RAM.
    """
    file = tmp_path / "tiny.gguf"
    make_tiny_gguf(file, hidden=64, layers=4, seed=1, context=512)
    whole, half, none = (named(file, n_gpu_layers=layers) for layers in (-1, 2, 0))

    assert (whole.engine, whole.n_gpu_layers) == ("llamacpp", 5)
    assert whole.weights_bytes is not None
    assert half.weights_bytes is not None
    assert whole.weights_bytes > half.weights_bytes > 0 == none.weights_bytes
    assert whole.sources["weights"].startswith("the file's header")


def test_a_card_that_is_too_small_gets_the_layers_it_holds() -> None:
    """
    The answer says how many, and what all of them would need.
    """
    answer = named("qwen2.5-7b", gpu_memory_gib=3, max_model_len=2048)

    assert answer.fits is True
    assert answer.n_gpu_layers is not None
    assert 0 < answer.n_gpu_layers < 29
    assert "of 29 layers on the card it fits" in answer.reason


def test_a_catalogue_model_can_be_quantised_on_the_fly() -> None:
    """
    FP8 halves what is not an embedding; files that are packed already stay as they are.
    """
    plain, packed = (named("llama-3.1-8b", quantization=method).weights_bytes for method in (None, "fp8"))
    awq, still = (named("llama-3.1-8b-awq", quantization=method).weights_bytes for method in (None, "fp8"))

    assert plain is not None
    assert packed is not None
    assert 0.5 < packed / plain < 0.6
    assert awq == still


@pytest.mark.parametrize("name", ["nope", "no/such/model/at-all", "/nowhere.gguf"])
def test_a_model_that_is_nowhere_is_an_error(name: str) -> None:
    """
    It says where was looked.
    """
    with pytest.raises(ModelMissing, match="no catalogue entry"):
        named(name)


@pytest.mark.parametrize("content", ["", "{", "[" * 9000])
def test_a_config_that_is_no_json_is_an_error(tmp_path: Path, content: str) -> None:
    """
    It names the file.
    """
    (tmp_path / "config.json").write_text(content)

    with pytest.raises(ModelMissing, match=r"config\.json cannot be read"):
        named(tmp_path / "config.json")


@pytest.mark.parametrize("content", ["{}", '{"num_hidden_layers": -1}', '{"model_type": "llama", "hidden_size": 1e99}'])
def test_a_config_without_the_facts_says_what_is_unknown(tmp_path: Path, content: str) -> None:
    """
    Never a number with a straight face.
    """
    (tmp_path / "config.json").write_text(content)
    answer = named(tmp_path / "config.json")

    assert answer.weights_bytes is None
    assert "unknown" in answer.reason


def test_a_flag_that_makes_no_sense_is_an_error() -> None:
    """
    It names the flag.
    """
    with pytest.raises(BadSetting, match="gpu_memory_gib"):
        named("qwen3-8b", gpu_memory_gib=-1)


# --- A batch --------------------------------------------------------------------------------------------


def test_a_batch_is_answered_in_order_whatever_a_line_holds() -> None:
    """
    Lines that are no case get nulls and a reason; what means nothing is named.
    """
    answers = batch(
        {"model": "a", "config": LLAMA, "kv_pool_gib": 58.11, "max_model_len": 8192, "colour": "red"},
        "no json",
        "[1]",
        "",
        {"model": "b", "tensor_parallel_size": 0},
        {"model": "Unheard-of-8x7B"},
    )
    first, *others = [answer for answer, _ in answers]

    assert next(unknown for _, unknown in answers) == ("colour",)
    assert first.kv_tokens == pytest.approx(476016, rel=1e-4)  # vLLM's log for that pool
    assert first.max_concurrency == pytest.approx(58.11, rel=1e-3)
    assert [other.model for other in others] == [None, None, "b", "Unheard-of-8x7B"]
    assert all(other.weights_bytes is None and other.reason for other in others)


def test_nulls_are_the_engines_defaults() -> None:
    """
    A line that spells every key, most of them null, is the line without them.
    """
    keys = ("dtype", "quantization", "max_num_seqs", "tensor_parallel_size", "vllm_version", "gpu", "n_gpu_layers")
    poor = {"model": "a", "config": LLAMA, "gpu_memory_gib": 24}

    assert batch(poor)[0][0] == batch({**poor, **dict.fromkeys(keys)})[0][0]


def test_a_catalogue_id_needs_no_config() -> None:
    """
    In a batch too.
    """
    (answer, _), *_ = batch({"model": "qwen3-8b", "gpu": "NVIDIA H100 80GB HBM3", "gpu_memory_utilization": 0.9})

    assert answer.fits is True


def test_a_cache_is_answered_where_the_weights_are_not_known() -> None:
    """
    llama.cpp's log of a Mistral 7B names its KV heads and not its hidden size: 4,000 MiB at 32,000 tokens.
    """
    heads = {"n_layer": 32, "n_head": 32, "n_head_kv": 8, "n_embd_head_k": 128, "n_embd_head_v": 128, "n_vocab": 32000}
    (answer, _), *_ = batch({"model": "Mistral", "engine": "llamacpp", "config": heads, "max_model_len": 32000})

    assert (answer.kv_pool_bytes, answer.weights_bytes) == (4000 * 2**20, None)
    assert "hidden_size" in answer.reason
