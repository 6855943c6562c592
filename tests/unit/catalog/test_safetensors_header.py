"""
Headers of safetensors files: what they say, from a folder and from a hub, and what is said of broken ones.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadModelFile, ModelMissing
from tests.fakes.hub import Hub
from worker.catalog.byte_source import FileBytes
from worker.catalog.safetensors_header import (
    read_safetensors_folder,
    read_safetensors_header,
    read_safetensors_repository,
)
from worker.catalog.tensors import Tensor


class Bytes:
    """A file in memory, for the many that a fuzzer makes."""

    name = "made-up.safetensors"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def read(self, start: int, length: int) -> bytes:
        """Give a part."""
        return self.content[start : start + length]


def file_of(header: object, data: int = 0) -> bytes:
    """A file with this header before *data* bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def entry(dtype: Any = "BF16", shape: Any = (2, 3), begin: Any = 0, end: Any = 12) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# 2 x 3 x 16 bits, 5 x 4 x 4 bits, one scalar of 32 bits: 12 + 10 + 4 bytes, not in the order of their names.
GOOD = {
    "__metadata__": {"format": "pt"},
    "z": entry(),
    "a": entry("F4", (5, 4), 12, 22),
    "scalar": entry("F32", (), 22, 26),
}
TENSORS = (
    Tensor(name="z", dtype="BF16", shape=(2, 3), nbytes=12),
    Tensor(name="a", dtype="F4", shape=(5, 4), nbytes=10),
    Tensor(name="scalar", dtype="F32", shape=(), nbytes=4),
)
GOOD_FILE = file_of(GOOD, 26)


def test_a_header_lists_its_tensors() -> None:
    """
    In the order of their bytes; a scalar has no dimensions, and eight bits may hold two elements.
    """
    assert read_safetensors_header(Bytes(GOOD_FILE)) == TENSORS


def test_a_file_may_hold_nothing() -> None:
    """
    No tensors, and tensors without elements.
    """
    empty = entry("F32", (0, 7), 0, 0)

    assert read_safetensors_header(Bytes(file_of({}))) == ()
    assert [found.nbytes for found in read_safetensors_header(Bytes(file_of({"a": empty, "b": empty})))] == [0, 0]


def test_a_long_header_is_read_to_its_end() -> None:
    """
    Longer than the first read: 5,000 tensors of two bytes.
    """
    header = {f"layer.{n:0100}": entry("BF16", (1,), 2 * n, 2 * n + 2) for n in range(5000)}
    tensors = read_safetensors_header(Bytes(file_of(header, 10_000)))

    assert (len(tensors), sum(tensor.nbytes for tensor in tensors)) == (5000, 10_000)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it has 0 bytes, too few for a header"),
        (b"\x08\0\0", "it has 3 bytes, too few for a header"),
        (struct.pack("<Q", 2**63), "its header claims 9,223,372,036,854,775,808 bytes, and 100,000,000 are allowed"),
        (struct.pack("<Q", 50), "its header claims 50 bytes, and the file has 8"),
        (GOOD_FILE[:-1], "its tensors claim 26 bytes, and 25 follow the header"),
        (GOOD_FILE + b"\0", "its tensors claim 26 bytes, and 27 follow the header"),
        (file_of([]), "its header is no JSON object"),
        (file_of(b'{"a":'), "EOF while parsing"),
        (file_of(b"[" * 100_000), "recursion limit exceeded"),
        (file_of(b"\xff\xfe"), "expected value"),
        (file_of({"a": 7}), "'a': Input should be"),
        (file_of({"a": {"dtype": "F32"}}), "'a.shape': Field required"),
        (file_of({"a": entry("F128", (1,), 0, 16)}, 16), "'a' has the unknown dtype 'F128'"),
        (file_of({"a": entry(7)}, 12), "'a.dtype': Input should be a valid string"),
        (file_of({"a": entry(shape=(-2, -3))}, 12), "'a.shape.0': Input should be greater than or equal to 0"),
        (file_of({"a": entry(shape=(2.0, 3))}, 12), "'a.shape.0': Input should be a valid integer"),
        (file_of({"a": entry(shape=(True, 6))}, 12), "'a.shape.0': Input should be a valid integer"),
        (file_of({"a": entry(shape=(2**63, 1))}, 12), "'a.shape.0': Input should be less than"),
        (file_of({"a": entry(shape=[1] * 65)}, 12), "'a.shape': List should have at most 64 items"),
        # Overflows 64 bits to 12 bytes.
        (file_of({"a": entry(shape=(2**62 + 1, 6))}, 12), "lies at bytes 0 to 12, and should at 0 to 5534023222112"),
        (file_of({"a": entry("F4", (3,), 0, 1)}, 1), "'a' does not end at a whole byte"),
        (file_of({"a": entry(end=4 * 2**40)}, 12), "lies at bytes 0 to 4398046511104, and should at 0 to 12"),
        (file_of({"a": entry(begin=12, end=0)}, 12), "lies at bytes 12 to 0, and should at 0 to 12"),
        # A hole, and two tensors in one place.
        (file_of({"a": entry(), "b": entry(begin=14, end=26)}, 26), "'b' (BF16, 12 bytes) lies at bytes 14 to 26"),
        (file_of({"a": entry(), "b": entry()}, 12), "'b' (BF16, 12 bytes) lies at bytes 0 to 12, and should at 12"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_fault(content: bytes, says: str) -> None:
    """
    Cut off, no JSON, or claims that do not agree with each other or with the file.
    """
    with pytest.raises(BadModelFile) as caught:
        read_safetensors_header(Bytes(content))

    assert caught.value.message.startswith("made-up.safetensors cannot be read as safetensors: ")
    assert says in caught.value.message
    assert caught.value.message.endswith(". Fetch the file again.")


class TestFuzz:
    """Whatever a file holds, the answer is its tensors or that one error."""

    @given(st.binary(max_size=300))
    @settings(max_examples=200, deadline=1000)
    def test_any_bytes(self, content: bytes) -> None:
        """
        Alone, and behind a length that fits.
        """
        for made in (content, file_of(content)):
            answers(made)

    def test_every_truncation_is_noticed(self) -> None:
        """
        A download that stopped is never taken for a smaller model.
        """
        assert [length for length in range(len(GOOD_FILE)) if answers(GOOD_FILE[:length]) is not None] == []

    def test_any_flipped_byte(self) -> None:
        """
        Every byte of the header with each bit flipped; what still reads claims no more than the file holds.
        """
        for position in range(len(GOOD_FILE) - 26):
            for bit in range(8):
                made = bytearray(GOOD_FILE)
                made[position] ^= 1 << bit
                tensors = answers(bytes(made))
                assert tensors is None or sum(tensor.nbytes for tensor in tensors) <= len(made)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), inner, max_size=4)
            ),
            max_leaves=8,
        )
    )
    @settings(max_examples=200, deadline=1000)
    def test_any_json(self, header: object) -> None:
        """
        Valid JSON of any make, as the header and as an entry of it.
        """
        answers(file_of(header))
        answers(file_of({"a": header}))


def answers(content: bytes) -> tuple[Tensor, ...] | None:
    """The tensors, or None for the one error that is allowed."""
    try:
        return read_safetensors_header(Bytes(content))
    except BadModelFile:
        return None


def index_of(**weight_map: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}).encode()


FIRST = file_of({"a": entry(), "a2": entry("U8", (1,), 12, 13)}, 13)
SECOND = file_of({"b": entry("F32", (5,), 0, 20)}, 20)
SHARDED = {
    "model.safetensors.index.json": index_of(a="m-1.safetensors", a2="m-1.safetensors", b="m-2.safetensors"),
    "m-1.safetensors": FIRST,
    "m-2.safetensors": SECOND,
    "consolidated.safetensors": file_of({"c": entry()}, 12),
}


class TestFolder:
    """A model's folder."""

    @pytest.mark.parametrize(
        ("files", "names"),
        [
            (SHARDED, ["a", "a2", "b"]),  # the index says which files count
            ({**SHARDED, "model.safetensors.index.json": index_of(b="m-2.safetensors")}, ["b"]),
            ({"m-1.safetensors": FIRST, "m-2.safetensors": SECOND}, ["a", "a2", "b"]),  # no index: all files
            ({"m-1.safetensors": FIRST, "consolidated.safetensors": SECOND}, ["a", "a2"]),  # the same weights twice
            ({"consolidated.safetensors": SECOND}, ["b"]),
            ({"m-1.safetensors": FIRST, "m-2.safetensors": FIRST}, ["a", "a2"]),  # a tensor in two files counts once
        ],
    )
    def test_its_files_are_read_as_one(self, tmp_path: Path, files: dict[str, bytes], names: list[str]) -> None:
        """
        The index rules; without one, all files but a consolidated second copy.
        """
        write(tmp_path, files)

        assert [tensor.name for tensor in read_safetensors_folder(tmp_path)] == names

    @pytest.mark.parametrize(
        ("files", "says"),
        [
            ({}, "holds no *.safetensors"),
            ({"model.safetensors.index.json": index_of()}, "holds no *.safetensors"),
            ({**SHARDED, "m-2.safetensors": None}, "m-2.safetensors cannot be read: No such file"),
            ({**SHARDED, "m-2.safetensors": SECOND[:-1]}, "m-2.safetensors cannot be read as safetensors"),
            ({"model.safetensors.index.json": b"{"}, "index.json cannot be read as safetensors: '': Invalid JSON"),
            ({"model.safetensors.index.json": index_of(a="../x.safetensors")}, "'weight_map.a': String should match"),
            ({"model.safetensors.index.json": index_of(a=7)}, "'weight_map.a': Input should be a valid string"),
        ],
    )
    def test_a_broken_folder_is_named_with_its_fault(
        self, tmp_path: Path, files: dict[str, bytes | None], says: str
    ) -> None:
        """
        No weights, a shard that is not there or is cut off, an index that is none.
        """
        write(tmp_path, files)
        with pytest.raises(ModelMissing) as caught:
            read_safetensors_folder(tmp_path)

        assert says in caught.value.message
        assert str(tmp_path) in caught.value.message


def write(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)


class TestRepository:
    """A repository of the hub."""

    @pytest.fixture
    def hub(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
        """A hub of our own and an empty cache."""
        files = {
            **{f"/org/sharded/resolve/main/{name}": content for name, content in SHARDED.items()},
            "/org/single/resolve/v1/model.safetensors": GOOD_FILE,
            "/org/gap/resolve/main/model.safetensors.index.json": SHARDED["model.safetensors.index.json"],
            "/org/gap/resolve/main/m-1.safetensors": FIRST,
        }
        server = Hub(files, {"/org/gated/": (403, "GatedRepo")})
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        with server:
            yield server

    def test_every_shard_of_the_index_is_read(self, hub: Hub) -> None:
        """
        In the order of their names whichever answers first, each asked for once, and no other file.
        """
        assert [tensor.name for tensor in read_safetensors_repository("org/sharded")] == ["a", "a2", "b"]
        assert sorted(asked.rpartition("/")[2] for asked in hub.asked if not asked.endswith(".json")) == [
            "m-1.safetensors",
            "m-2.safetensors",
        ]

    def test_without_an_index_there_is_one_file(self, hub: Hub) -> None:
        """
        At the revision that is asked for.
        """
        assert read_safetensors_repository("org/single", revision="v1") == TENSORS

    @pytest.mark.parametrize(
        ("repo", "says"),
        [
            ("org/gap", "m-2.safetensors cannot be read: there is no such file"),
            ("org/none", "model.safetensors cannot be read: there is no such file"),
            ("org/gated", "asks for consent first"),
            ("org--m/m", "org--m/m is no name of a repository"),
        ],
    )
    def test_what_cannot_be_had_is_named(self, hub: Hub, repo: str, says: str) -> None:
        """
        A shard that is not there, no weights at all, no consent, no name.
        """
        with pytest.raises(ModelMissing) as caught:
            read_safetensors_repository(repo)

        assert says in caught.value.message

    def test_offline_the_cache_is_all_there_is(self, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """
        A model that was fetched before is read without asking anybody.
        """
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        snapshot = tmp_path / "models--org--m" / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (snapshot / "model.safetensors").write_bytes(GOOD_FILE)

        assert read_safetensors_repository("org/m", revision="0" * 40) == TENSORS
        with pytest.raises(ModelMissing, match="HF_HUB_OFFLINE is set"):
            read_safetensors_repository("org/sharded")
        assert hub.asked == []


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    """
    Eight gibibytes that take no room on the disk, in no time.
    """
    size = 8 * 1024**3
    path = tmp_path / "large.safetensors"
    path.write_bytes(file_of({"a": entry("BF16", (size // 2,), 0, size)}))
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + size)

    assert read_safetensors_header(FileBytes(path))[0].nbytes == size
