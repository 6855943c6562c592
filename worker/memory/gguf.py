"""
A GGUF model as far as memory goes: its weights piece by piece, and what each layer keeps for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from worker.catalog.architecture import Cache


@dataclass(frozen=True, kw_only=True)
class GgufWeights:
    """Bytes of the pieces in which llama.cpp places a model."""

    embedding: int  # the table of tokens; it stays on the host always
    layers: tuple[int, ...]  # the last ones go to the card first; 0 for a layer that is not loaded (MTP)
    output: int  # head and last norm, as many bytes as the card takes for them
    head_shared: int = 0  # of those, what is the table of tokens again: copied to the card, once on the host
    largest_tensor: int  # of a layer; batches copy it to the card while the layer stays on the host

    @property
    def total(self) -> int:
        """Bytes of all tensors in the file."""
        return self.embedding + sum(self.layers) + self.output - self.head_shared


@dataclass(frozen=True, kw_only=True)
class GgufModel:
    """
    The facts of a model on which llama.cpp's memory depends.

    `assumed` says what was guessed and why; `unknown` what nobody can tell: while it is not empty there is no
    estimate, but the weights may be known all the same.
    """

    kind: str  # general.architecture, or model_type of a config.json
    weights: GgufWeights | None
    caches: tuple[tuple[Cache, ...], ...]  # of each layer; () for one that keeps nothing
    hidden_size: int
    vocab_size: int
    heads: int  # query heads of the layer that has most
    query_width: int  # query heads x head size
    feed_forward: int  # inner size of the widest MLP; of all experts that one token uses
    context_length: int | None = None  # tokens that the model was made for
    assumed: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    unknown_cache: tuple[str, ...] = ()  # of these, what the KV cache depends on

    @property
    def layers(self) -> int:
        """How many there are; the output counts as one more for `n_gpu_layers`."""
        return len(self.caches)
