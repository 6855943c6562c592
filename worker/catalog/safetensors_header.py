"""
Which tensors do a model's safetensors files hold? Reads the headers alone, here or at the hub.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import from_json

from common.errors import BadModelFile, ModelMissing
from worker.catalog.byte_source import ByteSource, FileBytes, hub_bytes, hub_client
from worker.catalog.download import fetch_file
from worker.catalog.tensors import Tensor

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library refuses more
_FIRST_READ = 128 * 1024  # bytes; 97 % of the hub's headers are under 100 KB (huggingface_hub's count): one request
_AT_ONCE = 8  # requests; some repositories have more than 100 shards, and the hub serves others too

# Every dtype of safetensors 0.8.
_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

_Size = Annotated[int, Field(ge=0, lt=2**63)]


class _Entry(BaseModel):
    """What a header says of one tensor."""

    model_config = ConfigDict(strict=True)

    dtype: str
    shape: Annotated[list[_Size], Field(max_length=64)]
    data_offsets: Annotated[list[_Size], Field(min_length=2, max_length=2)]  # first byte, and the one after the last


class _Index(BaseModel):
    """Which shard holds which tensor."""

    weight_map: dict[str, Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]]


_ENTRIES = TypeAdapter(dict[str, _Entry])


def read_safetensors_header(source: ByteSource) -> tuple[Tensor, ...]:
    """
    List the tensors of one file, in the order of their bytes.

    Raises
    ------
    BadModelFile
        The header is broken, or does not agree with itself or with the file's length.
    ModelMissing
        The file cannot be read.
    """
    try:
        header = _header(source)
        return _tensors(header, data_bytes=source.size - 8 - len(header))
    except ValueError as error:
        raise _bad(source.name, error) from None


def read_safetensors_folder(folder: Path) -> tuple[Tensor, ...]:
    """
    List the tensors of the files that the folder's index names, or without an index of all *.safetensors.

    Raises
    ------
    BadModelFile
        A header or the index is broken.
    ModelMissing
        A file is not there, or there is none.
    """
    index = folder / _INDEX
    if index.is_file():
        shards = _shards(index)
    else:
        every = sorted(file.name for file in folder.glob("*.safetensors"))
        # Mistral's models come with every weight a second time, in one consolidated file.
        shards = [name for name in every if not name.startswith("consolidated")] or every
    if not shards:
        raise ModelMissing(f"{folder} holds no *.safetensors. Fetch the model's weights, or correct the path.")
    return _joined(read_safetensors_header(FileBytes(folder / name)) for name in shards)


def read_safetensors_repository(repo: str, *, revision: str | None = None) -> tuple[Tensor, ...]:
    """
    List the tensors of a hub repository: of the files its index names, or without an index of model.safetensors.

    Fetches the index into the hub's cache and the headers by range, never the weights.

    Raises
    ------
    BadModelFile
        A header or the index is broken.
    ModelMissing
        The repository has neither, or cannot be reached.
    """
    try:
        shards = _shards(fetch_file(repo, _INDEX, revision=revision))
    except ModelMissing as missing:
        # Only the hub itself can tell that there is no index; offline, what the cache has is all there is.
        if not (isinstance(missing.__cause__, RemoteEntryNotFoundError) or huggingface_hub.is_offline_mode()):
            raise
        shards = [_SINGLE]
    with hub_client() as client, ThreadPoolExecutor(_AT_ONCE) as pool:
        sources = [hub_bytes(client, repo, name, revision=revision) for name in shards]
        return _joined(pool.map(read_safetensors_header, sources))


def _header(source: ByteSource) -> bytes:
    start = source.read(0, _FIRST_READ)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8:  # noqa: PLR2004 - the length itself is a u64
        raise ValueError(f"it has {len(start)} bytes, too few for a header")
    if length > _MAX_HEADER:
        raise ValueError(f"its header claims {length:,} bytes, and {_MAX_HEADER:,} are allowed")
    if 8 + length > source.size:
        raise ValueError(f"its header claims {length:,} bytes, and the file has {source.size:,}")
    header = start[8 : 8 + length]
    return header + source.read(8 + len(header), length - len(header)) if len(header) < length else header


def _tensors(header: bytes, *, data_bytes: int) -> tuple[Tensor, ...]:
    """Read a header's JSON; a ValueError says what is wrong with it."""
    content = from_json(header)
    if not isinstance(content, dict):
        raise ValueError("its header is no JSON object")  # noqa: TRY004 - the file is at fault, not a caller
    content.pop("__metadata__", None)
    entries = _ENTRIES.validate_python(content)
    tensors: list[Tensor] = []
    end = 0
    # As in the safetensors library, the data has no holes and no overlaps: the sum is what the file holds.
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end_of_this = entry.data_offsets
        nbytes = _nbytes(name, entry)
        if begin != end or end_of_this - begin != nbytes:
            raise ValueError(
                f"{name[:80]!r} ({entry.dtype}, {nbytes} bytes) lies at bytes {begin} to {end_of_this}, "
                f"and should at {end} to {end + nbytes}"
            )
        tensors.append(Tensor(name=name, dtype=entry.dtype, shape=tuple(entry.shape), nbytes=nbytes))
        end += nbytes
    if end != data_bytes:
        raise ValueError(f"its tensors claim {end:,} bytes, and {data_bytes:,} follow the header")
    return tuple(tensors)


def _nbytes(name: str, entry: _Entry) -> int:
    if entry.dtype not in _BITS:
        raise ValueError(f"{name[:80]!r} has the unknown dtype {entry.dtype[:20]!r}")
    bits = _BITS[entry.dtype] * math.prod(entry.shape)
    if bits % 8:
        raise ValueError(f"{name[:80]!r} does not end at a whole byte")
    return bits // 8


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(_Index.model_validate_json(index.read_bytes()).weight_map.values()))
    except (OSError, ValueError) as error:
        raise _bad(str(index), error) from None


def _joined(headers: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Put the shards together; a tensor that two of them hold is loaded into one place."""
    return tuple({tensor.name: tensor for header in headers for tensor in header}.values())


def _bad(name: str, error: Exception) -> BadModelFile:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        what = f"{'.'.join(str(part)[:80] for part in first['loc'])!r}: {first['msg'][:200]}"
    else:
        what = str(error)
    return BadModelFile(f"{name} cannot be read as safetensors: {what}. Fetch the file again.")
