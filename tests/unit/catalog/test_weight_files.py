"""
Which files a load will read: of a file, of shards, of a folder, of the hub's cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.factories import make_spec
from worker.catalog.weight_files import weight_files

SHARDS = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("there", "path", "expected"),
    [
        (["m.gguf", "other.gguf"], "m.gguf", ["m.gguf"]),
        (SHARDS, SHARDS[0], SHARDS),
        (["config.json", "b.safetensors", "a.safetensors", "tokenizer.json"], "", ["a.safetensors", "b.safetensors"]),
        (["a.safetensors", "consolidated.safetensors"], "", ["a.safetensors"]),  # every weight twice
        (["consolidated.safetensors"], "", ["consolidated.safetensors"]),
        (["config.json"], "", []),
        ([], "nowhere.gguf", []),
    ],
)
def test_the_files_on_the_disk(tmp_path: Path, there: list[str], path: str, expected: list[str]) -> None:
    """Rows: what is there, what the catalogue names, what is read."""
    for name in there:
        (tmp_path / name).touch()

    found = weight_files(make_spec(path=tmp_path / path, repo=None, file=None))

    assert [file.name for file in found] == expected


def test_a_model_that_is_not_in_the_cache_has_no_files_yet() -> None:
    """Nobody is asked over the network for it."""
    assert weight_files(make_spec(repo="nobody/has-this", file="m.gguf")) == ()
    assert weight_files(make_spec(path=None, repo=None, file=None)) == ()
