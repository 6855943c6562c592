"""
How many bytes would each piece of a GGUF model have? From its architecture and the name of its quantization.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from worker.catalog.architecture import Architecture, Block, Cache, KeysAndValues, Matrix
from worker.catalog.ggml_types import row_bytes
from worker.memory.gguf import GgufModel, GgufWeights
from worker.memory.gguf_recipe import Role, Shape, find_mix, tensor_type

_FLOAT_BYTES = 4  # norms, biases, routers and convolutions are 32-bit floats in every mix

_ROLES = {
    "self_attn.q_proj": Role.QUERY, "self_attn.k_proj": Role.KEY, "self_attn.v_proj": Role.VALUE,
    "self_attn.o_proj": Role.MIXED, "mlp.up_proj": Role.UP, "mlp.gate_proj": Role.UP, "mlp.down_proj": Role.DOWN,
    "mlp.experts.up_proj": Role.UP, "mlp.experts.gate_proj": Role.UP, "mlp.experts.down_proj": Role.DOWN,
    "mlp.shared_expert.up_proj": Role.UP, "mlp.shared_expert.gate_proj": Role.UP,
    "mlp.shared_expert.down_proj": Role.DOWN, "linear_attn.in_proj_qkv": Role.VALUE,
}  # fmt: skip
# Not packed in Hugging Face's checkpoints, but in GGUF.
_PACKED_TOO = frozenset({"linear_attn.in_proj_ba", "mamba.x_proj", "mamba.dt_proj"})
# Keys, queries and values are one tensor, which has the role of the values.
_FUSED = frozenset({"phi", "phi3", "gpt2", "gpt_neox", "bloom", "falcon", "chatglm", "mpt", "starcoder", "dbrx"})
# A size that differs by less from llama.cpp's recipe may do so by rounding, or by a tensor or two.
_TOLERANCE = 0.03
# How a layer of which only the size is known is divided: as in Llama-3-8B.
_USUAL_SHARES = {
    Role.QUERY: 0.077, Role.KEY: 0.019, Role.VALUE: 0.019, Role.MIXED: 0.077, Role.UP: 0.539, Role.DOWN: 0.269,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Piece:
    """One matrix as GGUF has it; no role: not packed."""

    role: Role | None
    columns: int
    rows: int
    expert: bool = False


def predict_gguf(architecture: Architecture, quantization: str, *, weights_bytes: int | None = None) -> GgufModel:
    """
    Predict the bytes by llama.cpp's recipe for the mix; never raises: what cannot be told is in `unknown`.

    *weights_bytes* is the size of all tensors, as llama.cpp prints it; a file is larger by its header (vocabulary:
    5 to 15 MiB). Where it is known the layers take what embedding and head leave of it.
    """
    mix = find_mix(quantization)
    assumed, unknown = list(architecture.assumed), list(architecture.unknown_cache)
    weights = None
    if mix is None:
        unknown.append(f"the GGUF quantization {quantization or '(none)'}")
    elif not architecture.hidden_size or not architecture.vocab_size or not architecture.layers:
        unknown += [name for name in ("hidden_size", "vocab_size") if not getattr(architecture, name)]
    elif architecture.unknown_weights and weights_bytes is None:
        unknown += [name for name in architecture.unknown_weights if name not in unknown]
    else:
        weights = _weights(architecture, mix, weights_bytes, assumed)
    heads, width = _heads(architecture)
    return GgufModel(
        kind=architecture.kind,
        weights=weights,
        caches=_caches(architecture),
        hidden_size=architecture.hidden_size,
        vocab_size=architecture.vocab_size,
        heads=heads,
        query_width=width,
        feed_forward=max(architecture.mlp_width, architecture.experts_per_token * architecture.expert_width),
        context_length=architecture.max_position_embeddings,
        assumed=tuple(assumed),
        unknown=tuple(dict.fromkeys(unknown)),
        unknown_cache=architecture.unknown_cache,
    )


def _weights(architecture: Architecture, mix: str, weights_bytes: int | None, assumed: list[str]) -> GgufWeights:
    """
    Weigh the pieces by llama.cpp's recipe; by another where that is far from the known size and the other nearer.

    Unsloth's dynamic mixes keep the embedding and the head, and in mixtures of experts all but the experts, in
    8 bits; where the mix is of 8 bits already, in 16 (seen in the logs of Qwen3.5-35B-A3B and Qwen3.6-27B).
    """
    chosen = _weigh(architecture, mix)
    if weights_bytes is None:
        return chosen
    if not architecture.unknown_weights and abs(chosen.total - weights_bytes) > _TOLERANCE * weights_bytes:
        raised = "BF16" if mix == "Q8_0" else "Q8_0"
        dynamic = _weigh(architecture, mix, raised=raised)
        leaves_room = dynamic.total - sum(dynamic.layers) < weights_bytes
        if leaves_room and abs(dynamic.total - weights_bytes) < abs(chosen.total - weights_bytes):
            chosen = dynamic
            assumed.append(f"a guess: {raised} for embedding and head, as the size is far from that of {mix}")
    layers = _scale(chosen.layers, weights_bytes - (chosen.total - sum(chosen.layers)))
    largest = chosen.largest_tensor or layers[0] // 3  # gate, up and down are most of a layer
    return dataclasses.replace(chosen, layers=layers, largest_tensor=largest)


def _weigh(architecture: Architecture, mix: str, *, raised: str | None = None) -> GgufWeights:
    """Weigh the pieces by the recipe; with *raised*, give that type to all but the experts (or the layers)."""
    shape = _shape(architecture)
    layers, largest = _layers(architecture, mix, shape, raised=raised if shape.experts else None)
    vocab, hidden = architecture.vocab_size, architecture.hidden_size
    table, head = (
        vocab * row_bytes(raised or tensor_type(mix, role, shape=shape, columns=hidden), hidden)
        for role in (Role.EMBEDDING, Role.OUTPUT)
    )
    return GgufWeights(
        embedding=table,
        layers=layers,
        output=_FLOAT_BYTES * hidden + (table if shape.tied else head),
        head_shared=table if shape.tied else 0,
        largest_tensor=largest,
    )


def _scale(layers: tuple[int, ...], total: int) -> tuple[int, ...]:
    """Divide *total* bytes among the layers in the proportions they have."""
    total, now = max(0, total), sum(layers)
    if not now:
        layers, now = (1,) * len(layers), len(layers)
    return tuple(total * size // now for size in layers)


def _shape(architecture: Architecture) -> Shape:
    values = sum(len(block.layers) for block in architecture.blocks if _has_values(block))
    experts = max((matrix.count for block in architecture.blocks for matrix in block.matrices), default=0)
    attention = [block for block in architecture.blocks if isinstance(block.cache, KeysAndValues)]
    grouped = 1
    for block in attention:
        cache, mixed = block.cache, _matrix(block, "self_attn.o_proj")
        if isinstance(cache, KeysAndValues) and mixed is not None and cache.kv_heads and cache.v_head_dim:
            grouped = mixed.inputs // (cache.kv_heads * cache.v_head_dim)
            break
    else:
        grouped = _heads(architecture)[0] or 1  # MLA: one compressed head for all
    names = {matrix.name for matrix in architecture.outside}
    return Shape(
        layers=architecture.layers,
        values=values,
        heads_per_kv_head=grouped,
        experts=experts if experts > 1 else 0,
        tied="lm_head" not in names,
    )


def _layers(architecture: Architecture, mix: str, shape: Shape, *, raised: str | None) -> tuple[tuple[int, ...], int]:
    """Bytes of each layer, and of the largest matrix in any; *raised*: all but the experts have that type."""
    blocks = sorted(
        ((layer, block) for block in architecture.blocks for layer in block.layers), key=lambda pair: pair[0]
    )
    sizes, value, largest = [], 0, 0
    for layer, block in blocks:
        size = 0
        for piece in _pieces(block, fused=architecture.kind in _FUSED):
            kind = "F32"
            if piece.role is not None:
                kind = tensor_type(mix, piece.role, shape=shape, columns=piece.columns, layer=layer, value=value)
                kind = raised if raised is not None and not piece.expert else kind
            nbytes = piece.rows * row_bytes(kind, piece.columns)
            size, largest = size + nbytes, max(largest, nbytes)
        value += _has_values(block)
        sizes.append(size)
    return tuple(sizes), largest


def _pieces(block: Block, *, fused: bool) -> Iterator[_Piece]:
    """Take a layer's matrices apart as GGUF stores them."""
    for matrix in block.matrices:
        columns, rows = matrix.inputs, matrix.outputs * matrix.count
        if not matrix.counted:
            continue
        if matrix.name == "all":
            for role, share in _USUAL_SHARES.items():
                yield _Piece(role=role, columns=columns, rows=round(rows * share))
        elif not matrix.quantizable and matrix.name not in _PACKED_TOO:
            yield _Piece(role=None, columns=columns, rows=rows)
        else:
            role = _ROLES.get(matrix.name, Role.OTHER)
            fuse = fused and role in {Role.QUERY, Role.KEY}
            expert = matrix.name.startswith("mlp.experts.")
            yield _Piece(role=Role.VALUE if fuse else role, columns=columns, rows=rows, expert=expert)


def _has_values(block: Block) -> bool:
    names = {"self_attn.v_proj", "linear_attn.in_proj_qkv", "all"}
    return any(matrix.name in names and matrix.counted for matrix in block.matrices)


def _matrix(block: Block, name: str) -> Matrix | None:
    return next((matrix for matrix in block.matrices if matrix.name == name), None)


def _heads(architecture: Architecture) -> tuple[int, int]:
    """Query heads, and their width together, of the layer that has most; (0, 0) where the config does not say."""
    found = [(0, 0)]
    for block in architecture.blocks:
        mixed = _matrix(block, "self_attn.o_proj")
        if isinstance(block.cache, KeysAndValues) and mixed is not None and block.cache.v_head_dim:
            heads = mixed.inputs // block.cache.v_head_dim
            found.append((heads, heads * block.cache.head_dim))
    return max(found)


def _caches(architecture: Architecture) -> tuple[tuple[Cache, ...], ...]:
    kept = {
        layer: () if block.cache is None else (block.cache,) for block in architecture.blocks for layer in block.layers
    }
    return tuple(kept[layer] for layer in sorted(kept))
