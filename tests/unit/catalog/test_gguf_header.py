"""
Headers of GGUF files: as the package gguf writes and reads them, as its shards, and what is said of broken ones.
"""

from __future__ import annotations

import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import BadModelFile, ModelMissing
from tests.fakes.hub import Hub
from worker.catalog.byte_source import FileBytes
from worker.catalog.ggml_types import GGML_TYPES
from worker.catalog.gguf_header import read_gguf_file, read_gguf_header, read_gguf_repository
from worker.catalog.tensors import GgufHeader, Tensor
from worker.demo.tiny_models import make_tiny_gguf


class Bytes:
    """A file in memory, for the many that a fuzzer makes."""

    name = "made-up.gguf"

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)

    def read(self, start: int, length: int) -> bytes:
        """Give a part."""
        return self.content[start : start + length]


class TestAsThePackageWritesThem:
    """The package gguf is the judge."""

    def test_the_table_of_types_is_the_package_s(self) -> None:
        """
        Every type, with the elements and bytes of its blocks.
        """
        assert {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType} == GGML_TYPES

    @pytest.mark.parametrize("kind", GGMLQuantizationType, ids=lambda kind: kind.name)
    def test_a_tensor_of_each_type_has_its_bytes(self, tmp_path: Path, kind: GGMLQuantizationType) -> None:
        """
        Three tensors of odd heights; name, bytes and shape as the package reads them back.
        """
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        elements, size = gguf.GGML_QUANT_SIZES[kind]
        for rows, blocks in ((1, 1), (3, 2), (7, 5)):
            data = np.zeros((rows, blocks * size), np.uint8)
            writer.add_tensor(f"t{rows}", data, raw_shape=(rows, blocks * size), raw_dtype=kind)
        write(writer)
        header = read_gguf_file(path)

        assert header.tensors == as_the_package_reads(path)
        assert header.tensors[1] == Tensor(name="t3", dtype=kind.name, shape=(3, 2 * elements), nbytes=6 * size)
        assert header.complete

    def test_a_model_that_runs_is_read_whole(self, tmp_path: Path) -> None:
        """
        The tiny model of the demo: its tensors, and its metadata without the tokens.
        """
        path = make_tiny_gguf(tmp_path / "m.gguf")
        header = read_gguf_file(path)

        assert header.tensors == as_the_package_reads(path)
        assert (header.metadata["general.architecture"], header.metadata["llama.block_count"]) == ("llama", 2)
        assert (header.file_bytes, header.complete) == (path.stat().st_size, True)
        assert header.data_bytes == sum(tensor.nbytes for tensor in header.tensors)  # each a multiple of 32 here

    def test_every_kind_of_metadata_is_read(self, tmp_path: Path) -> None:
        """
        Scalars and short arrays as values; of a vocabulary and a long text only the length.
        """
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "x")
        numbers = {
            "u8": 200, "i8": -3, "u16": 60_000, "i16": -300, "u32": 2**32 - 1, "i32": -(2**31), "u64": 2**64 - 1,
            "i64": -(2**63), "f32": 0.5, "f64": 0.1,
        }  # fmt: skip
        kinds = ("UINT8", "INT8", "UINT16", "INT16", "UINT32", "INT32", "UINT64", "INT64", "FLOAT32", "FLOAT64")
        for (name, value), kind in zip(numbers.items(), kinds, strict=True):
            writer.add_key_value(name, value, GGUFValueType[kind])
        writer.add_bool("yes", val=True)
        writer.add_string("text", "Grüße")
        writer.add_string("long text", "x" * 70_000)
        writer.add_array("per layer", [8, 0, 8])
        writer.add_array("flags", [True, False])
        writer.add_array("tags", ["a", "bc"])
        writer.add_array("empty", [])
        writer.add_array("tokens", [f"token {n}" for n in range(1025)])
        writer.add_array("scores", [0.5] * 1025)
        write(writer)
        header = read_gguf_file(path)

        assert header.metadata == {
            "general.architecture": "x", **numbers, "yes": True, "text": "Grüße",
            "per layer": (8, 0, 8), "flags": (True, False), "tags": ("a", "bc"),
        }  # fmt: skip
        assert header.lengths == {"long text": 70_000, "tokens": 1025, "scores": 1025}

    @pytest.mark.parametrize("alignment", [8, 32, 4096])
    def test_the_gaps_between_tensors_are_counted(self, tmp_path: Path, alignment: int) -> None:
        """
        Two tensors of 12 bytes: the second begins at the alignment, and the file ends there or later.
        """
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "x")
        writer.add_custom_alignment(alignment)
        for name in ("a", "b"):
            writer.add_tensor(name, np.zeros(3, np.float32))
        write(writer)
        header = read_gguf_file(path)

        assert header.tensors == as_the_package_reads(path)
        assert header.data_bytes == max(alignment, 16) + 12
        assert header.complete


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def as_the_package_reads(path: Path) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(
            name=found.name,
            dtype=found.tensor_type.name,
            shape=tuple(int(length) for length in reversed(found.shape)),
            nbytes=int(found.n_bytes),
        )
        for found in gguf.GGUFReader(path).tensors
    )


def text(content: str | bytes) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return struct.pack("<Q", len(content)) + content


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor_of(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """One entry of the list of tensors; *shape* innermost first, as it is written."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(
    tensors: bytes = b"", *, count: int = 0, keys: bytes = b"", key_count: int = 0, version: int = 3, data: int = 0
) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, count, key_count) + keys + tensors
    return header + bytes(-len(header) % 32 + data)


def read(content: bytes) -> GgufHeader:
    return read_gguf_header(Bytes(content))


ONE = tensor_of("a", (4, 2), 0, 0)  # 4 x 2 x 4 bytes
TYPED = key("n", 4, struct.pack("<I", 7))
LONG = key("v", 9, struct.pack("<IQ", 0, 1025) + bytes(1025))  # too long to keep
ARRAY = struct.pack("<IQ", 4, 2**60)  # an array of 2**60 u32


def test_both_versions_are_read() -> None:
    """
    Version 2 differs from 3 in what it does not allow.
    """
    for version in (2, 3):
        header = read(file_of(ONE, count=1, keys=TYPED, key_count=1, version=version, data=32))
        assert (header.tensors[0].shape, header.metadata, header.complete) == ((2, 4), {"n": 7}, True)


def test_a_tensor_has_up_to_four_dimensions() -> None:
    """
    One without any has one element.
    """
    tensors = b"".join(tensor_of(name, (1,) * n, 0, 32 * n) for n, name in enumerate("abcde"))

    assert [tensor.nbytes for tensor in read(file_of(tensors, count=5, data=200)).tensors] == [4] * 5


@pytest.mark.parametrize(("data", "complete"), [(0, False), (31, False), (32, True), (33, True)])
def test_data_that_is_not_all_there_is_no_error(*, data: int, complete: bool) -> None:
    """
    32 bytes are claimed: a download under way has its header first, and that is enough for an estimate.
    """
    header = read(file_of(ONE, count=1, data=data))

    assert (header.data_bytes, header.complete) == (32, complete)


def test_a_file_without_tensors_ends_with_its_header() -> None:
    """
    As the first shard of some models does, and a vocabulary alone.
    """
    header = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + TYPED

    assert len(header) % 32
    assert read(header).complete


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it ends after 0 bytes, within its header"),
        (b"GGUF\x03", "it ends after 5 bytes, within its header"),
        (b"not a model", "it begins with b'not ', not with b'GGUF'"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "it is big-endian; make a little-endian one with gguf-convert-endian"),
        (file_of(version=1), "it is GGUF version 1, and 2 and 3 are known"),
        (file_of(version=4), "it is GGUF version 4, and 2 and 3 are known"),
        (file_of(count=2**60), "it claims 1,152,921,504,606,846,976 tensors and 0 metadata keys"),
        (file_of(key_count=70_000), "it claims 0 tensors and 70,000 metadata keys"),
        (file_of(count=9), "it ends after 32 bytes, within its header"),
        (file_of(keys=struct.pack("<Q", 2**40), key_count=1), "a name at byte 32 claims 1,099,511,627,776 bytes"),
        (file_of(keys=key("k", 8, struct.pack("<Q", 2**40)), key_count=1), "bytes, within its header"),
        (file_of(keys=key("k", 9, ARRAY), key_count=1), "bytes, within its header"),
        (file_of(keys=key("k", 9, struct.pack("<IQ", 8, 2**60)), key_count=1, data=9999), "bytes, within its header"),
        (file_of(keys=key("k", 9, struct.pack("<IQ", 9, 1) + ARRAY), key_count=1), "a value of the unknown kind 9"),
        (file_of(keys=key("k", 13, b""), key_count=1), "a value of the unknown kind 13"),
        (file_of(keys=TYPED * 2, key_count=2), "it has the key 'n' twice"),
        (file_of(keys=LONG * 2, key_count=2), "it has the key 'v' twice"),
        (file_of(keys=key("general.alignment", 4, struct.pack("<I", 24)), key_count=1), "its alignment is 24, no"),
        (file_of(keys=key("general.alignment", 4, struct.pack("<I", 0)), key_count=1), "its alignment is 0, no"),
        (file_of(keys=key("general.alignment", 8, text("x")), key_count=1), "its alignment is x, no power of two"),
        (file_of(tensor_of("a", (1,) * 5, 0, 0), count=1), "'a' claims 5 dimensions"),
        (file_of(tensor_of("a", (1,), 4, 0), count=1), "'a' has the unknown type 4"),
        (file_of(tensor_of("a", (100,), 12, 0), count=1), "a row of 'a' has 100 elements, no multiple of 256"),
        (file_of(tensor_of("a", (), 12, 0), count=1), "a row of 'a' has 1 elements, no multiple of 256"),
        (file_of(tensor_of("a", (2**20, 2**20), 0, 0), count=1), "its header claims 4.0 TiB of data"),
        # Overflows 64 bits to 0 bytes.
        (file_of(tensor_of("a", (2**32, 2**32), 0, 0), count=1), "its header claims 67,108,864.0 TiB of data"),
        (file_of(ONE + tensor_of("b", (1,), 0, 64), count=2), "'b' is there twice, or does not lie behind"),
        (file_of(ONE + tensor_of("b", (1,), 0, 0), count=2), "'b' is there twice, or does not lie behind"),
        (file_of(ONE + tensor_of("a", (1,), 0, 32), count=2), "'a' is there twice, or does not lie behind"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named_with_its_fault(content: bytes, says: str) -> None:
    """
    Cut off, of another make, or claims that cannot be.
    """
    with pytest.raises(BadModelFile) as caught:
        read(content)

    assert caught.value.message.startswith("made-up.gguf cannot be read as GGUF: ")
    assert says in caught.value.message
    assert caught.value.message.endswith(". Fetch the file again.")


class TestSize:
    """Long headers, true and false, take little time and memory."""

    def test_a_vocabulary_is_skipped_quickly(self, tmp_path: Path) -> None:
        """
        150,000 tokens and as many merges, as Qwen's: 7 MB of header, in a fraction of a second and in small parts.
        """
        path = tmp_path / "m.gguf"
        writer = gguf.GGUFWriter(path, "x")
        writer.add_token_list([f"token {n}" for n in range(150_000)])
        writer.add_token_merges([f"{n} {n}" for n in range(150_000)])
        writer.add_token_types([1] * 150_000)
        writer.add_tensor("a", np.zeros(8, np.float32))
        write(writer)
        tracemalloc.start()
        began = time.process_time()
        header = read_gguf_file(path)
        seconds, (_, most_bytes) = time.process_time() - began, tracemalloc.get_traced_memory()
        tracemalloc.stop()

        assert header.lengths["tokenizer.ggml.tokens"] == header.lengths["tokenizer.ggml.merges"] == 150_000
        assert header.tensors == (Tensor(name="a", dtype="F32", shape=(8,), nbytes=32),)
        assert seconds < 1
        assert most_bytes < 4 * 1024**2

    def test_a_header_has_an_end(self, tmp_path: Path) -> None:
        """
        A terabyte of zeros that takes no room on the disk is not read as a terabyte of empty tokens.
        """
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key("k", 9, struct.pack("<IQ", 4, 2**37)))
        with path.open("ab") as file:
            file.truncate(2**40)

        with pytest.raises(BadModelFile, match="its header claims more than 134,217,728 bytes"):
            read_gguf_file(path)


def a_header() -> bytes:
    """A small valid file with something of everything."""
    keys = (
        key("general.architecture", 8, text("llama")) + TYPED + key("k", 9, struct.pack("<IQ2H", 2, 2, 1, 2))
        + key("t", 9, struct.pack("<IQ", 8, 1) + text("x")) + LONG
    )  # fmt: skip
    return file_of(ONE + tensor_of("b", (256,), 12, 32), count=2, keys=keys, key_count=5, data=176)


GOOD_FILE = a_header()
HEADER_END = len(GOOD_FILE) - 176


def answers(content: bytes) -> GgufHeader | None:
    """The header, or None for the one error that is allowed."""
    try:
        return read(content)
    except BadModelFile:
        return None


class TestFuzz:
    """Whatever a file holds, the answer is its header or that one error."""

    @given(st.binary(max_size=300), st.integers(0, 3), st.integers(0, 3))
    @settings(max_examples=300, deadline=1000)
    def test_any_bytes(self, content: bytes, tensors: int, keys: int) -> None:
        """
        Alone, and behind a beginning that fits.
        """
        for made in (content, file_of(content, count=tensors, key_count=keys)):
            answers(made)

    def test_every_truncation_is_noticed(self) -> None:
        """
        Within the header it is an error; within the data the file is not complete.
        """
        found = [answers(GOOD_FILE[:length]) for length in range(len(GOOD_FILE))]

        assert answers(GOOD_FILE) is not None
        assert not any(header.complete for header in found if header is not None)
        assert all(header is not None for header in found[HEADER_END:])

    def test_any_flipped_byte(self) -> None:
        """
        Every byte of the header with each bit flipped, and set to 255; the data that is claimed stays in bounds.
        """
        for position in range(HEADER_END):
            for value in {GOOD_FILE[position] ^ (1 << bit) for bit in range(8)} | {255}:
                made = bytearray(GOOD_FILE)
                made[position] = value
                header = answers(bytes(made))
                assert header is None or header.data_bytes <= 2 * 1024**4

    @given(st.integers(0, HEADER_END - 8), st.sampled_from([2**16, 2**31, 2**32, 2**40, 2**62, 2**63, 2**64 - 1]))
    @settings(max_examples=300, deadline=1000)
    def test_any_giant_length(self, position: int, length: int) -> None:
        """
        Eight bytes anywhere that claim far too much.
        """
        answers(GOOD_FILE[:position] + struct.pack("<Q", length) + GOOD_FILE[position + 8 :])


def shards(folder: Path, count: int = 3) -> Path:
    """A model in several files, as gguf-split makes them; gives the first."""
    for number in range(count):
        writer = gguf.GGUFWriter(folder / f"m-{number + 1:05}-of-{count:05}.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_tensor(f"t{number}", np.zeros(8 + number, np.float32))
        write(writer)
    return folder / f"m-00001-of-{count:05}.gguf"


class TestShards:
    """A model in several files."""

    def test_all_shards_are_read_as_one(self, tmp_path: Path) -> None:
        """
        32, 36 and 40 bytes, in the order of the shards.
        """
        header = read_gguf_file(shards(tmp_path))

        assert [(tensor.name, tensor.nbytes) for tensor in header.tensors] == [("t0", 32), ("t1", 36), ("t2", 40)]
        assert header.file_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
        assert (header.data_bytes, header.complete, header.metadata["split.count"]) == (108, True, 3)

    def test_one_that_is_cut_off_leaves_the_model_incomplete(self, tmp_path: Path) -> None:
        """
        The last of three has its header, and no data.
        """
        first = shards(tmp_path)
        last = tmp_path / "m-00003-of-00003.gguf"
        last.write_bytes(last.read_bytes()[:-64])

        assert not read_gguf_file(first).complete

    @pytest.mark.parametrize(
        ("copied", "to", "says"),
        [
            (None, "m-00002-of-00003.gguf", "m-00002-of-00003.gguf cannot be read: No such file"),
            ("m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "is not the first of 3 shards of one model"),
            ("m-00002-of-00003.gguf", "m-00001-of-00003.gguf", "is not the first of 3 shards of one model"),
            ("m-00001-of-00003.gguf", "m.gguf", "is not the first of 1 shards of one model"),
        ],
    )
    def test_shards_of_no_one_model_are_refused(self, tmp_path: Path, copied: str | None, to: str, says: str) -> None:
        """
        One is not there, is there twice, is in the first one's place, or is all there is.
        """
        first = shards(tmp_path)
        if copied is None:
            (tmp_path / to).unlink()
        else:
            (tmp_path / to).write_bytes((tmp_path / copied).read_bytes())
        with pytest.raises(ModelMissing) as caught:
            read_gguf_file(tmp_path / to if to == "m.gguf" else first)

        assert says in caught.value.message


def test_a_file_of_the_hub_is_read_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Each shard is asked for once, and nothing is left in the cache.
    """
    first = shards(tmp_path, 2)
    files = {f"/org/m/resolve/main/{file.name}": file.read_bytes() for file in sorted(tmp_path.iterdir())}
    with Hub(files) as hub:
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

        assert read_gguf_repository("org/m", first.name) == read_gguf_file(first)
        assert hub.asked == [f"GET {path}" for path in files]
        with pytest.raises(ModelMissing, match=r"x\.gguf cannot be read: there is no such file"):
            read_gguf_repository("org/m", "x.gguf")
    assert not (tmp_path / "cache").exists()


def test_only_the_header_of_a_large_file_is_read(tmp_path: Path) -> None:
    """
    Eight gibibytes that take no room on the disk, in no time.
    """
    path = tmp_path / "large.gguf"
    path.write_bytes(file_of(tensor_of("a", (2**31,), 0, 0), count=1))
    with path.open("ab") as file:
        file.truncate(path.stat().st_size + 2**33)
    header = read_gguf_header(FileBytes(path))

    assert (header.data_bytes, header.complete) == (2**33, True)
