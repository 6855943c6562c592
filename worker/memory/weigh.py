"""
How many bytes of weights lie on each card? Counted matrix by matrix, as they are packed and divided.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from worker.catalog.architecture import Architecture, Block, Matrix, Shard
from worker.catalog.quantization import Quantization

_LARGE, _STEP, _SPLIT = 10 * 2**20, 2 * 2**20, 2**20


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes on the fullest card: with several pipeline stages that is the first or the last."""

    embeddings: int  # input and output
    layers: int
    vision: int
    rope: int  # tables that vLLM computes

    @property
    def total(self) -> int:
        """All of them."""
        return self.embeddings + self.layers + self.vision + self.rope


def weigh_model(
    architecture: Architecture,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    dtype_bytes: int | None = None,
) -> Weights:
    """
    Add up the bytes of *architecture*'s weights on each card.

    Tensor parallelism divides a matrix over the cards, copies KV heads where there are more cards than heads,
    and leaves norms and routers whole. Pipeline parallelism gives each stage its share of the layers; the
    input embedding is on the first, the output head on the last.
    """
    scales = _Scales(architecture.quantization, dtype_bytes or architecture.dtype_bytes, tensor_parallel_size)
    layers = sum(scales.block(block) for block in architecture.blocks)
    outside = {matrix.name: _allocated_sum(scales.matrix(matrix, matrix.name)) for matrix in architecture.outside}
    embeddings = sum(outside.values())
    if pipeline_parallel_size > 1:
        layers = -(-layers // pipeline_parallel_size)
        first = outside.get("embed_tokens", 0)
        embeddings = max(first, embeddings - first)
    return Weights(
        embeddings=embeddings,
        layers=layers,
        # vLLM divides towers too (mm_encoder_tp_mode=weights).
        vision=-(-architecture.vision * scales.dtype_bytes // tensor_parallel_size),
        rope=sum(table.rows * table.width * scales.dtype_bytes for table in architecture.rope),
    )


def checkpoint_bytes(architecture: Architecture) -> int:
    """Bytes of the tensors in the files themselves: nothing divided, padded or computed at load."""
    packing = architecture.quantization
    plain = _Scales(packing and dataclasses.replace(packing, pad_to=None), architecture.dtype_bytes, 1)
    counted = [
        dataclasses.replace(block, matrices=tuple(m for m in block.matrices if m.counted))
        for block in architecture.blocks
    ]
    outside = sum(sum(plain.matrix(matrix, matrix.name)) for matrix in architecture.outside)
    return sum(map(plain.block, counted)) + outside + architecture.vision * architecture.dtype_bytes


def correct_weights(estimated: int | None, architecture: Architecture, *, in_files: int, cards: int) -> int:
    """
    Correct the *estimated* bytes on one card by what the files really hold; without an estimate, divide the files.

    The estimate says what dividing, padding and tables do; the files say how much there is.
    """
    expected = 0 if estimated is None else checkpoint_bytes(architecture)
    return estimated * in_files // expected if estimated is not None and expected else -(-in_files // cards)


@dataclass(frozen=True)
class _Scales:
    """Weighs matrices: packed like this, otherwise in so many bytes, divided over so many cards."""

    packing: Quantization | None
    dtype_bytes: int
    cards: int

    def block(self, block: Block) -> int:
        """Bytes of all layers of *block*; one by one where the packing leaves out single layers."""
        if self.packing is not None and self.packing.by_layer:
            return sum(self._layer(block, index) for index in block.layers)
        return len(block.layers) * self._layer(block, block.layers[0]) if block.layers else 0

    def matrix(self, matrix: Matrix, full_name: str, kv_heads: int | None = None) -> list[int]:
        """Bytes of the tensors of *matrix* on one card: the weights alone, or packed with their scales."""
        parts = self._parts(matrix.shard, kv_heads)
        packing = self._packing_of(matrix, full_name)
        if packing is None:
            return [-(-matrix.params * self.dtype_bytes // parts)]
        if packing.pad_to is None:
            return [-(-matrix.count * size // parts) for size in packing.parts_of(matrix.inputs, matrix.outputs)]
        # Experts are divided by their inner size, and then rounded up to the kernel's tiles.
        outer_to, inner_to = packing.pad_to
        if matrix.name.endswith("down_proj"):
            inputs, outputs = _round_up(-(-matrix.inputs // parts), inner_to), _round_up(matrix.outputs, outer_to)
        else:
            inputs, outputs = _round_up(matrix.inputs, outer_to), _round_up(-(-matrix.outputs // parts), inner_to)
        return [matrix.count * size for size in packing.parts_of(inputs, outputs)]

    def _layer(self, block: Block, index: int) -> int:
        kv_heads = getattr(block.cache, "kv_heads", None)
        tensors: defaultdict[tuple[str, int], int] = defaultdict(int)
        for matrix in block.matrices:
            sizes = self.matrix(matrix, f"model.layers.{index}.{matrix.name}", kv_heads)
            for part, size in enumerate(sizes):
                tensors[matrix.tensor, part] += size
        return _allocated_sum(tensors.values())

    def _parts(self, shard: Shard, kv_heads: int | None) -> int:
        """Into how many parts a matrix is divided; keys and values never below one head for each card."""
        if shard is Shard.COPY:
            return 1
        return min(self.cards, kv_heads or self.cards) if shard is Shard.HEADS else self.cards

    def _packing_of(self, matrix: Matrix, full_name: str) -> Quantization | None:
        if self.packing is None or not matrix.quantizable:
            return None
        if matrix.name == "lm_head":
            return self.packing if self.packing.lm_head else None
        return self.packing.scheme_of(full_name)


def _allocated_sum(sizes: Iterable[int]) -> int:
    return sum(map(allocated, sizes))


def allocated(size: int) -> int:
    """
    Bytes that PyTorch's allocator gives a tensor of *size* bytes.

    From 10 MiB on it takes whole steps of 2 MiB from CUDA, and splits off what is left only if that is more than
    1 MiB (c10/cuda/CUDACachingAllocator.cpp). That is 0.7 % of a Qwen3-4B.
    """
    if size < _LARGE:
        return size
    rest = -size % _STEP
    return size + rest if rest <= _SPLIT else size


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
