"""
What a model's own files say, and what is said when they are not there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest

from common.errors import BadCatalogue, ModelMissing
from tests.factories import make_spec
from worker.catalog.catalogue import Catalogue
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
    here = tmp_path / "My model"
    here.mkdir()
    (here / "config.json").write_text(json.dumps(config))
    for name, size in weights.items():
        (here / f"{name}.safetensors").write_bytes(bytes(size))
    return here


def gguf_file(path: Path, *, kv_heads: int | list[int] | None = 2) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(4)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_head_count(8)
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    writer.add_token_list(["a", "b", "c"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_folder_is_a_vllm_model(tmp_path: Path) -> None:
    """
    Facts from config.json, bytes from the shards; the id is the folder's name made fit for a queue.
    """
    spec = spec_from_path(str(folder(tmp_path, CONFIG, a=100, b=28)))

    assert (spec.id, spec.engine, spec.max_model_len) == ("My-model", EngineKind.VLLM, 2048)
    assert (spec.weights_bytes, spec.layers, spec.kv_heads, spec.head_dim, spec.vocab_size) == (128, 4, 2, 32, 1000)
    assert spec.complexity_up_to == 1.0


def test_the_index_says_which_shards_count(tmp_path: Path) -> None:
    """
    A repository may hold the same weights a second time; only the shards of the index are loaded.
    """
    here = folder(tmp_path, CONFIG, a=100, consolidated=100)
    (here / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))

    assert spec_from_path(str(here)).weights_bytes == 100


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        ({"text_config": CONFIG}, "layers", 4),  # models with vision
        ({**CONFIG, "head_dim": 128}, "head_dim", 128),  # Qwen3: not hidden / heads
        ({**CONFIG, "num_key_value_heads": None}, "kv_heads", 8),  # no grouping: as many as heads
        ({**CONFIG, "kv_lora_rank": 512}, "kv_heads", None),  # MLA: unknown to this estimate
        ({**CONFIG, "quantization_config": {"quant_method": "awq"}}, "quantization", "awq"),
        (CONFIG, "weights_bytes", None),  # no weights on disk
    ],
)
def test_configs_differ(tmp_path: Path, config: dict[str, Any], field: str, value: object) -> None:
    """
    Each family writes its facts its own way; what is not there stays unknown.
    """
    assert getattr(spec_from_path(str(folder(tmp_path, config))), field) == value


@pytest.mark.parametrize(("written", "read"), [(2, 2), ([1, 4, 2, 1], 4), (None, 8)])
def test_a_gguf_file_is_a_llama_cpp_model(tmp_path: Path, written: int | list[int] | None, read: int) -> None:
    """
    Facts from the header; KV heads given for each layer count by the largest, not given they are the heads.
    """
    file = gguf_file(tmp_path / "tiny.gguf", kv_heads=written)
    spec = spec_from_path(str(file))

    assert (spec.id, spec.engine, spec.path, spec.max_model_len) == ("tiny", EngineKind.LLAMACPP, file, 512)
    assert (spec.layers, spec.kv_heads, spec.head_dim, spec.vocab_size) == (4, read, 8, 3)
    assert spec.weights_bytes == file.stat().st_size


def test_every_shard_of_a_gguf_counts(tmp_path: Path) -> None:
    """
    The first shard has the header, all of them have weights.
    """
    first = gguf_file(tmp_path / "m-00001-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(bytes(1000))

    assert spec_from_path(str(first)).weights_bytes == first.stat().st_size + 1000


@pytest.mark.parametrize("name", ["/nowhere/model", "model.gguf", "a/b/c", "no such thing"])
def test_nothing_there_says_where_it_looked(tmp_path: Path, name: str) -> None:
    """
    Neither a file nor anything the hub could know.
    """
    with pytest.raises(ModelMissing, match=r"VLLM_MODEL=.*: no catalogue entry, no folder or file /"):
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


def test_the_catalogue_wins_over_the_files(tmp_path: Path) -> None:
    """
    Only what the entry leaves out is read from the files.
    """
    spec = make_spec("x", repo=None, file=None, path=gguf_file(tmp_path / "x.gguf"), layers=99, kv_heads=None)
    found = read_facts(spec)

    assert (found.layers, found.kv_heads, found.max_model_len) == (99, 2, spec.max_model_len)


def test_missing_files_are_a_reason_and_no_end(tmp_path: Path) -> None:
    """
    One model whose files are gone leaves the others as they are.
    """
    gone = make_spec("gone", repo=None, file=None, path=tmp_path / "gone.gguf")
    catalogue, missing = read_all_facts(Catalogue(models=(gone, make_spec("hub"))))

    assert catalogue.ids == ("gone", "hub")
    assert list(missing) == ["gone"]
    assert str(tmp_path / "gone.gguf") in missing["gone"]
