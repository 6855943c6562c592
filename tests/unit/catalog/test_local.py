"""
What a model's own files say, and what is said when they are not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from common.errors import BadCatalogue, ModelMissing
from tests.factories import make_spec
from worker.catalog.catalogue import Catalogue
from worker.catalog.hf_config import read_config
from worker.catalog.local import read_all_facts, read_facts, spec_from_path
from worker.catalog.spec import EngineKind

CONFIG: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "vocab_size": 1000,
    "max_position_embeddings": 2048,
}


def folder(tmp_path: Path, config: dict[str, Any], **weights: int) -> Path:
    """A model's folder; each of *weights* is a file with one tensor of so many bytes."""
    here = tmp_path / "My model"
    here.mkdir()
    (here / "config.json").write_text(json.dumps(config))
    for name, size in weights.items():
        save(here / f"{name}.safetensors", {f"{name}.weight": ("BF16", size // 2)})
    return here


def save(path: Path, tensors: dict[str, tuple[str, int]]) -> None:
    """A safetensors file of zeros: of each tensor its type and how many numbers."""
    header, end = {}, 0
    for name, (dtype, count) in tensors.items():
        start, end = end, end + count * {"BF16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": [count], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


def gguf_file(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    writer.add_token_list(["a", "b", "c"])
    writer.add_tensor("token_embd.weight", np.zeros((3, 64), dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_folder_is_a_vllm_model(tmp_path: Path) -> None:
    """
    Facts from config.json, bytes from the shards; the id is the folder's name made fit for a queue.
    """
    spec = spec_from_path(str(folder(tmp_path, CONFIG, a=100, b=28)))

    assert (spec.id, spec.engine, spec.max_model_len) == ("My-model", EngineKind.VLLM, 2048)
    assert (spec.weights_bytes, spec.loaded_bytes) == (128, 128)
    assert spec.architecture == read_config(CONFIG, name="My model")
    assert spec.complexity_up_to == 1.0


def test_the_index_says_which_shards_count(tmp_path: Path) -> None:
    """
    A repository may hold the same weights a second time; only the shards of the index are loaded.
    """
    here = folder(tmp_path, CONFIG, a=100, consolidated=100)
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": "a.safetensors"}}))

    assert spec_from_path(str(here)).weights_bytes == 100


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ({**CONFIG, "quantization_config": {"quant_method": "awq"}}, "quantization", "awq"),
        ({"text_config": CONFIG}, "max_model_len", 2048),  # models with vision
        (CONFIG, "weights_bytes", None),  # no weights on disk
    ],
)
def test_configs_differ(tmp_path: Path, config: dict[str, Any], field: str, value: object) -> None:
    """
    Each family writes its facts its own way; what is not there stays unknown.
    """
    assert getattr(spec_from_path(str(folder(tmp_path, config))), field) == value


def test_what_an_engine_does_not_load_is_not_counted(tmp_path: Path) -> None:
    """
    A head that is tied to the embeddings and is in the file all the same, a draft's layer; 32 bit is cast to 16.
    """
    here = folder(tmp_path, {**CONFIG, "tie_word_embeddings": True})
    names = ("model.layers.3.mlp.x", "lm_head.weight", "mtp.fc.weight", "model.layers.4.mlp.x")
    save(here / "model.safetensors", {**dict.fromkeys(names, ("BF16", 50)), "model.norm.weight": ("F32", 50)})
    spec = spec_from_path(str(here))

    assert (spec.weights_bytes, spec.loaded_bytes) == (600, 200)


def test_a_gguf_file_is_a_llama_cpp_model(tmp_path: Path) -> None:
    """
    Facts and bytes from its header.
    """
    file = gguf_file(tmp_path / "tiny.gguf")
    spec = spec_from_path(str(file))

    assert (spec.id, spec.engine, spec.path, spec.max_model_len) == ("tiny", EngineKind.LLAMACPP, file, 512)
    assert spec.header is not None
    assert spec.header.metadata["llama.attention.head_count_kv"] == 2
    assert spec.weights_bytes == 3 * 64 * 2


@pytest.mark.parametrize("name", ["/nowhere/model", "model.gguf", "a/b/c", "no such thing"])
def test_nothing_there_says_where_it_looked(tmp_path: Path, name: str) -> None:
    """
    Neither a file nor anything the hub could know.
    """
    with pytest.raises(ModelMissing, match=r"Model .*: no catalogue entry, no folder or file /"):
        spec_from_path(name, base_dir=tmp_path)


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    """
    The message says what a model's folder holds.
    """
    with pytest.raises(ModelMissing, match=r"has no config\.json"):
        spec_from_path(str(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("x.gguf", b"not a model"), ("x.gguf", b"")])
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    """
    A download that stopped half way is fetched again, not guessed at.
    """
    (tmp_path / name).write_bytes(content)

    with pytest.raises(ModelMissing, match=r"x\.gguf cannot be read as GGUF: .* Fetch the file again"):
        spec_from_path(str(tmp_path / name))


def test_a_length_is_not_invented(tmp_path: Path) -> None:
    """
    Files that do not say it need an entry that does.
    """
    config = {key: value for key, value in CONFIG.items() if key != "max_position_embeddings"}

    with pytest.raises(BadCatalogue, match=r"do not say how many tokens .* MODELS_FILE"):
        spec_from_path(str(folder(tmp_path, config)))


def test_files_know_how_large_they_are_and_the_entry_how_it_is_used(tmp_path: Path) -> None:
    """
    Bytes and architecture are the files' own; the length that the entry gives stays.
    """
    spec = make_spec("x", repo=None, file=None, path=gguf_file(tmp_path / "x.gguf"), max_model_len=256)
    found = read_facts(spec)

    assert (found.weights_bytes, found.max_model_len, found.quantization) == (3 * 64 * 2, 256, "Q4_K_M")
    assert found.header is not None


def test_missing_files_are_a_reason_and_no_end(tmp_path: Path) -> None:
    """
    One model whose files are gone leaves the others as they are.
    """
    gone = make_spec("gone", repo=None, file=None, path=tmp_path / "gone.gguf")
    catalogue, missing = read_all_facts(Catalogue(models=(gone, make_spec("hub"))))

    assert catalogue.ids == ("gone", "hub")
    assert list(missing) == ["gone"]
    assert str(tmp_path / "gone.gguf") in missing["gone"]
