"""
What does a GGUF file say about itself? Reads the header alone, so the rest need not be there.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import BadModelFile
from worker.catalog.byte_source import ByteSource, FileBytes, hub_bytes, hub_client
from worker.catalog.download import shard_names
from worker.catalog.ggml_types import GGML_TYPES
from worker.catalog.tensors import GgufHeader, Scalar, Tensor

_CHUNK = 1024 * 1024  # bytes; one request, or one system call, for a great many tokens
_MAX_HEADER = 128 * 1024**2  # bytes; a vocabulary of 262,144 tokens and its merges take 16 MiB
_MAX_TEXT = 64 * 1024  # bytes; what is longer is no name, and no metadata that a decision needs
_MAX_COUNT = 65_536  # tensors, or metadata keys; all experts of a layer are one tensor, so no model comes near
_MAX_DATA = 2 * 1024**4  # bytes; no model is larger, so the header would be broken
_MAX_DIMENSIONS = 4  # as in ggml
_KEPT_ELEMENTS = 1024  # of an array: enough for a figure for each layer, too few for a vocabulary

# Kinds of metadata: the scalar ones as struct writes them, and two that have a length.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


def read_gguf_header(source: ByteSource) -> GgufHeader:
    """
    Read the header of one file (GGUF 2 or 3, little-endian).

    Raises
    ------
    BadModelFile
        The header is cut off, or claims what cannot be. Missing data is no error: `complete` tells.
    ModelMissing
        The file cannot be read.
    """
    try:
        return _read(_Cursor(source), file_bytes=source.size)
    except ValueError as error:
        raise _bad(source, error) from None


def read_gguf_file(path: Path) -> GgufHeader:
    """
    Read a local file; given the first of several shards, read them all as one.

    Raises
    ------
    BadModelFile, ModelMissing
        As for one header; also if a shard is not there, or is not of this model.
    """
    return read_gguf_shards(FileBytes(path.with_name(name)) for name in shard_names(path.name))


def read_gguf_repository(repo: str, file: str, *, revision: str | None = None) -> GgufHeader:
    """
    Read a file of a hub repository by range, or from the cache; given the first of several shards, all as one.

    Raises
    ------
    BadModelFile, ModelMissing
        As for one header; also if the hub cannot be reached.
    """
    with hub_client() as client:
        return read_gguf_shards(hub_bytes(client, repo, name, revision=revision) for name in shard_names(file))


def read_gguf_shards(sources: Iterable[ByteSource]) -> GgufHeader:
    """
    Read all shards of a model as one; the first has the metadata.

    Raises
    ------
    BadModelFile, ModelMissing
        As for one header; also if the shards are not those that the first one claims.
    """
    sources = list(sources)
    first, *_ = headers = [read_gguf_header(source) for source in sources]
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    number, count = first.metadata.get("split.no", 0), first.metadata.get("split.count") or 1
    if (number, count) != (0, len(headers)) or len({tensor.name for tensor in tensors}) < len(tensors):
        raise BadModelFile(
            f"{sources[0].name} is not the first of {len(headers)} shards of one model. "
            "Name the first shard (-00001-of-), with all the others beside it."
        )
    return GgufHeader(
        metadata=first.metadata,
        lengths=first.lengths,
        tensors=tensors,
        file_bytes=sum(header.file_bytes for header in headers),
        data_bytes=sum(header.data_bytes for header in headers),
        complete=all(header.complete for header in headers),
    )


class _Cursor:
    """Reads a source from its beginning, a chunk at a time; a ValueError says what is wrong."""

    def __init__(self, source: ByteSource) -> None:
        self._source = source
        self._chunk = source.read(0, _CHUNK)
        self._start = 0  # of the chunk, in the file
        self.position = 0  # in the file

    def take(self, size: int) -> bytes:
        """Take *size* bytes."""
        at = self._ready(size)
        self.position += size
        return self._chunk[at : at + size]

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Take the numbers that struct calls *form*."""
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))

    def number(self, form: str) -> int:
        """Take one integer, which struct calls *form*."""
        return int(self.numbers(form)[0])

    def text(self, length: int | None = None) -> str:
        """Take a text of *length* bytes; without one, its length is taken first."""
        length = self.number("Q") if length is None else length
        if length > _MAX_TEXT:
            raise ValueError(f"a name at byte {self.position:,} claims {length:,} bytes")
        return self.take(length).decode(errors="replace")

    def skip(self, size: int) -> None:
        """Go on by *size* bytes, without reading them."""
        self._check(size)
        self.position += size

    def skip_texts(self, count: int) -> None:
        """Go on by *count* texts: one loop over each chunk, because vocabularies are long."""
        length = struct.Struct("<Q")
        while count:
            at = self._ready(length.size)
            last = len(self._chunk) - length.size
            while count and at <= last:
                at += length.size + length.unpack_from(self._chunk, at)[0]
                count -= 1
            self.skip(self._start + at - self.position)

    def _ready(self, size: int) -> int:
        """Have *size* bytes in the chunk; gives where they begin in it."""
        at = self.position - self._start
        if at + size > len(self._chunk):
            self._check(size)
            self._chunk, self._start, at = self._source.read(self.position, max(size, _CHUNK)), self.position, 0
        return at

    def _check(self, size: int) -> None:
        end = self.position + size
        if end > self._source.size:
            raise ValueError(f"it ends after {self._source.size:,} bytes, within its header")
        if end > _MAX_HEADER:
            raise ValueError(f"its header claims more than {_MAX_HEADER:,} bytes")


def _read(cursor: _Cursor, *, file_bytes: int) -> GgufHeader:
    tensor_count, key_count = _counts(cursor)
    metadata: dict[str, Scalar | tuple[Scalar, ...]] = {}
    lengths: dict[str, int] = {}
    for _ in range(key_count):
        key = cursor.text()
        if key in metadata or key in lengths:
            raise ValueError(f"it has the key {key[:80]!r} twice")
        value, length = _value(cursor)
        if value is None:
            lengths[key] = length
        else:
            metadata[key] = value
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"its alignment is {str(alignment)[:20]}, no power of two")
    tensors, data_bytes = _tensors(cursor, tensor_count, alignment)
    data_start = _aligned(cursor.position, alignment) if data_bytes else cursor.position
    return GgufHeader(
        metadata=metadata,
        lengths=lengths,
        tensors=tensors,
        file_bytes=file_bytes,
        data_bytes=data_bytes,
        complete=data_start + data_bytes <= file_bytes,
    )


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Read how many tensors and metadata keys there are, after the mark and version that say we can read them."""
    mark = cursor.take(4)
    if mark != b"GGUF":
        raise ValueError(f"it begins with {mark!r}, not with b'GGUF'")
    version = cursor.number("I")
    if version & 0xFFFF == 0:
        raise ValueError("it is big-endian; make a little-endian one with gguf-convert-endian")
    if version not in (2, 3):
        raise ValueError(f"it is GGUF version {version}, and 2 and 3 are known")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, key_count) > _MAX_COUNT:
        raise ValueError(f"it claims {tensor_count:,} tensors and {key_count:,} metadata keys")
    return tensor_count, key_count


def _value(cursor: _Cursor) -> tuple[Scalar | tuple[Scalar, ...] | None, int]:
    """Read one value of the metadata; of one that is too long to keep, only its length."""
    kind = cursor.number("I")
    if kind == _TEXT:
        length = cursor.number("Q")
        if length > _MAX_TEXT:
            cursor.skip(length)
            return None, length
        return cursor.text(length), length
    if kind != _ARRAY:
        return cursor.numbers(_form(kind))[0], 1
    kind, length = cursor.number("I"), cursor.number("Q")
    if length > _KEPT_ELEMENTS:
        if kind == _TEXT:
            cursor.skip_texts(length)
        else:
            cursor.skip(length * struct.calcsize(f"<{_form(kind)}"))
        return None, length
    if kind == _TEXT:
        return tuple(cursor.text() for _ in range(length)), length
    return cursor.numbers(f"{length}{_form(kind)}"), length


def _form(kind: int) -> str:
    # An array of arrays is in the format's description, but llama.cpp refuses it too.
    if kind not in _SCALARS:
        raise ValueError(f"its metadata has a value of the unknown kind {kind}")
    return _SCALARS[kind]


def _tensors(cursor: _Cursor, count: int, alignment: int) -> tuple[tuple[Tensor, ...], int]:
    """Read the list of tensors; gives also where the data of the last one ends, from the beginning of the data."""
    tensors: dict[str, Tensor] = {}
    end = 0
    for _ in range(count):
        name = cursor.text()
        dimensions = cursor.number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name[:80]!r} claims {dimensions} dimensions")
        shape = cursor.numbers(f"{dimensions}Q")
        kind, offset = cursor.number("I"), cursor.number("Q")
        if kind not in GGML_TYPES:
            raise ValueError(f"{name[:80]!r} has the unknown type {kind}")
        dtype, block_elements, block_bytes = GGML_TYPES[kind]
        row = shape[0] if shape else 1
        if row % block_elements:
            raise ValueError(f"a row of {name[:80]!r} has {row:,} elements, no multiple of {block_elements}")
        nbytes = math.prod(shape) // block_elements * block_bytes
        # As in llama.cpp, each tensor lies behind the last one: the sum is what the file must hold.
        if name in tensors or offset != _aligned(end, alignment):
            raise ValueError(f"{name[:80]!r} is there twice, or does not lie behind the tensor before it")
        tensors[name] = Tensor(name=name, dtype=dtype, shape=shape[::-1], nbytes=nbytes)
        end = offset + nbytes
        if end > _MAX_DATA:
            raise ValueError(f"its header claims {end / 1024**4:,.1f} TiB of data")
    return tuple(tensors.values()), end


def _aligned(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _bad(source: ByteSource, error: ValueError) -> BadModelFile:
    return BadModelFile(f"{source.name} cannot be read as GGUF: {error}. Fetch the file again.")
