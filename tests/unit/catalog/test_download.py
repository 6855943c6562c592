"""
Fetching from a hub: a small real one on the loopback, so that the hub's own client is what is tested.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from common.errors import ModelMissing
from tests.factories import make_spec
from tests.fakes.hub import Hub
from worker.catalog.download import fetch_gguf, resolve_files, shard_names, weights_bytes
from worker.catalog.local import spec_from_path
from worker.catalog.spec import EngineKind

CONFIG = {
    "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 10,
    "max_position_embeddings": 128,
}  # fmt: skip
FILES = {
    "/org/m/resolve/main/m.gguf": b"weights" * 1000,
    "/org/m/resolve/main/s-00001-of-00002.gguf": b"first",
    "/org/m/resolve/main/s-00002-of-00002.gguf": b"second",
    "/org/v/resolve/main/config.json": json.dumps(CONFIG).encode(),
    "/api/models/org/v": json.dumps(
        {
            "id": "org/v",
            "siblings": [
                {"rfilename": "a.safetensors", "size": 5},
                {"rfilename": "b.safetensors", "size": 7},
                {"rfilename": "consolidated.safetensors", "size": 12},
            ],
        }
    ).encode(),
}
HEADER = json.dumps({"model.norm.weight": {"dtype": "BF16", "shape": [64], "data_offsets": [0, 128]}}).encode()
FILES |= {
    "/org/w/resolve/main/config.json": json.dumps(CONFIG).encode(),
    "/org/w/resolve/main/model.safetensors": len(HEADER).to_bytes(8, "little") + HEADER + bytes(128),
}
ERRORS = {
    "/org/gated/": (403, "GatedRepo"),
    "/org/private/": (401, "RepoNotFound"),
    "/org/m/resolve/old/": (404, "RevisionNotFound"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub of our own and an empty cache."""
    server = Hub(FILES, ERRORS)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server:
        yield server


def test_a_file_is_fetched_once(hub: Hub) -> None:
    """
    The second time it comes from the cache, and the hub is not asked at all.
    """
    spec = make_spec("m", repo="org/m", file="m.gguf")
    first = fetch_gguf(spec)
    asked = len(hub.asked)

    assert first.read_bytes() == FILES["/org/m/resolve/main/m.gguf"]
    assert fetch_gguf(spec) == first
    assert len(hub.asked) == asked


def test_progress_is_told_in_bytes(hub: Hub) -> None:
    """
    The last report is all of the file.
    """
    reports: list[tuple[int, int | None]] = []
    fetch_gguf(make_spec("m", repo="org/m", file="m.gguf"), on_progress=lambda *report: reports.append(report))

    assert reports[-1] == (7000, 7000)


def test_all_shards_are_fetched_and_the_first_is_given(hub: Hub) -> None:
    """
    llama.cpp is told the first, and looks for the others beside it.
    """
    first = fetch_gguf(make_spec("s", repo="org/m", file="s-00001-of-00002.gguf"))

    assert first.read_bytes() == b"first"
    assert (first.parent / "s-00002-of-00002.gguf").read_bytes() == b"second"


@pytest.mark.parametrize(
    ("repo", "revision", "says"),
    [
        ("org/gated", None, "asks for consent first. Accept the terms on its page and set HF_TOKEN"),
        ("org/private", None, "no such repository, or it is private"),
        ("org/m", "old", "no such revision. Correct revision"),
        ("org/m", None, "no such file. Correct file"),
    ],
)
def test_each_refusal_of_the_hub_says_what_to_do(hub: Hub, repo: str, revision: str | None, says: str) -> None:
    """
    Gated, private, wrong revision and wrong file are four mistakes with four cures.
    """
    with pytest.raises(ModelMissing) as caught:
        fetch_gguf(make_spec("x", repo=repo, file="nope.gguf", revision=revision))
    assert says in caught.value.message
    assert f"{repo}/nope.gguf" in caught.value.message


def test_offline_means_the_cache_or_nothing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    HF_HUB_OFFLINE: a cached file is still found, another is missing, and the hub is not asked.
    """
    cached = make_spec("m", repo="org/m", file="m.gguf")
    fetch_gguf(cached)
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert fetch_gguf(cached).is_file()
    with pytest.raises(ModelMissing, match="HF_HUB_OFFLINE is set and the file is not in the cache"):
        fetch_gguf(make_spec("s", repo="org/m", file="other.gguf"))
    assert weights_bytes("org/v") is None
    assert len(hub.asked) == asked
    assert huggingface_hub.is_offline_mode()


def test_a_hub_repository_becomes_an_entry(hub: Hub) -> None:
    """
    VLLM_MODEL=org/name: facts from its config.json, bytes from the hub's list, nothing else fetched.
    """
    spec = spec_from_path("org/v")

    assert (spec.id, spec.engine, spec.repo, spec.max_model_len) == ("v", EngineKind.VLLM, "org/v", 128)
    assert spec.weights_bytes == 12
    assert spec.architecture is not None
    assert (spec.architecture.layers, spec.architecture.heads) == (2, 4)


def test_of_a_hub_repositorys_weights_only_the_headers_are_read(hub: Hub) -> None:
    """
    By range: what an engine will load is known, and no weights are in the cache.
    """
    spec = spec_from_path("org/w")

    assert (spec.weights_bytes, spec.loaded_bytes) == (128, 128)
    assert any(path.endswith("/model.safetensors") for path in hub.asked)
    assert not isinstance(huggingface_hub.try_to_load_from_cache("org/w", "model.safetensors"), str)


def test_what_an_engine_is_told_to_load(tmp_path: Path, hub: Hub) -> None:
    """
    A local path as it is, a GGUF file fetched, for vLLM the repository's name.
    """
    local = make_spec("l", repo=None, file=None, path=tmp_path)

    assert resolve_files(local) == tmp_path
    assert resolve_files(make_spec("v", engine=EngineKind.VLLM, repo="org/v", file=None)) == "org/v"
    assert str(resolve_files(make_spec("m", repo="org/m", file="m.gguf"))).endswith("m.gguf")


def test_a_path_that_does_not_exist_says_what_to_do(tmp_path: Path) -> None:
    """
    The message names the model, the path, and the setting that moves it.
    """
    with pytest.raises(ModelMissing, match=r"gone: there is nothing at .*nope.* MODELS_DIR"):
        resolve_files(make_spec("gone", repo=None, file=None, path=tmp_path / "nope"))


def test_shards_are_named_after_the_first() -> None:
    """
    A whole file is its only shard.
    """
    assert shard_names("m.gguf") == ("m.gguf",)
    assert shard_names("m-00001-of-00003.gguf") == tuple(f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3))
