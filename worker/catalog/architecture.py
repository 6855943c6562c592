"""
What a model is made of: its layers, their matrices, and what each keeps for a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.catalog.quantization import Quantization

_JOINED = {
    "q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up", "up_proj": "gate_up",
    "in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz",
}  # fmt: skip


class Shard(StrEnum):
    """How tensor parallelism divides a matrix."""

    SPLIT = "split"  # over all cards
    HEADS = "heads"  # by KV heads: copied where there are more cards than heads
    COPY = "copy"  # whole on each card


@dataclass(frozen=True, kw_only=True, slots=True)
class Matrix:
    """*count* equal weights of *inputs* x *outputs*, named within their layer."""

    name: str  # as in the checkpoint, without "model.layers.N."
    inputs: int
    outputs: int
    count: int = 1  # experts
    shard: Shard = Shard.SPLIT
    quantizable: bool = True  # norms, biases, convolutions and routers stay as they are
    counted: bool = True  # is it in the checkpoint, or does the engine make it at load?

    @property
    def tensor(self) -> str:
        """The tensor that holds it once loaded: vLLM joins what has the same inputs."""
        place, _, part = self.name.rpartition(".")
        return f"{place}.{_JOINED.get(part, part)}"

    @property
    def params(self) -> int:
        """Numbers in it."""
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class KeysAndValues:
    """What an attention layer keeps: a key and a value for each token, of all of them or of a window."""

    kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None  # tokens; None = all
    chunked: bool = False  # the window is a chunk (Llama 4), not a sliding one


@dataclass(frozen=True, kw_only=True, slots=True)
class Latent:
    """What an MLA layer keeps: one compressed vector for each token, on every card."""

    width: int  # kv_lora_rank + qk_rope_head_dim
    window: int | None = None
    indexer_bytes: int = 0  # for each token beside it: the FP8 keys that sparse attention chooses tokens by


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """What a recurrent layer keeps for each request, however long it is; divided over the cards."""

    conv_elements: int
    ssm_elements: int
    ssm_bytes: int = 2  # of one element; the convolution's are in the model's type


Cache = KeysAndValues | Latent | State


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Equal layers: their numbers in the model, their matrices, and what each of them keeps."""

    layers: tuple[int, ...]
    matrices: tuple[Matrix, ...]
    cache: Cache | None  # None: a layer without attention or state


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeTable:
    """A table of rotations that vLLM computes at load: *rows* x *width* numbers, on every card."""

    rows: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """
    The facts of a config.json that memory depends on.

    `assumed` says what the config leaves open and was taken from elsewhere; `unknown_weights` and
    `unknown_cache` what nobody can tell: while they are not empty there is no estimate of weights, or of KV cache.
    """

    kind: str  # model_type, or "" if the config does not say
    hidden_size: int
    vocab_size: int
    heads: int  # query heads
    max_position_embeddings: int | None
    blocks: tuple[Block, ...]
    outside: tuple[Matrix, ...]  # embeddings, output head, last norm
    vision: int = 0  # numbers in towers and projectors; they stay in 16 bit
    rope: tuple[RopeTable, ...] = ()
    dtype_bytes: int = 2
    quantization: Quantization | None = None
    experts_per_token: int = 0
    expert_width: int = 0  # inner size of a routed expert
    mlp_width: int = 0  # inner size of the widest dense MLP
    multimodal: bool = False
    generates: bool = True  # False: it embeds, and has no sampler
    assumed: tuple[str, ...] = ()
    unknown_weights: tuple[str, ...] = ()
    unknown_cache: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """How many there are."""
        return sum(len(block.layers) for block in self.blocks)

    @property
    def params(self) -> int:
        """All numbers, as counted from the config."""
        inside = sum(len(block.layers) * sum(m.params for m in block.matrices if m.counted) for block in self.blocks)
        return inside + sum(matrix.params for matrix in self.outside) + self.vision
