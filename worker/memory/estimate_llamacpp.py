"""
How many bytes does llama.cpp take for a GGUF model, on the card and on the host?
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from worker.catalog.architecture import Cache, KeysAndValues, Latent, State
from worker.catalog.ggml_types import is_ggml_type, row_bytes
from worker.memory.estimate import Unknown
from worker.memory.gguf import GgufModel, GgufWeights

_FLOAT_BYTES = 4
_PAD = 256  # cells: llama.cpp rounds the context, and a window's cache, up to these
# nvidia-smi beside the sum of the buffers: 23,508 - (17,295.4 + 5,712 + 192) MiB on an RTX 3090 or 4090
# (https://github.com/ollama/ollama/issues/6160).
_CUDA_CONTEXT_BYTES = 309 * 2**20


@dataclass(frozen=True, kw_only=True)
class LlamaCppOptions:
    """What llama.cpp is told, beside the model and the number of layers on the card."""

    max_model_len: int  # tokens, prompt and answer together, of each slot
    slots: int = 1  # requests that it works on at once
    key_type: str = "F16"  # of the KV cache, as ggml calls it; in capitals or not
    value_type: str = "F16"
    ubatch: int = 512  # tokens of one physical batch
    flash_attention: bool = True  # what "auto" comes to on CUDA and on the CPU
    unified: bool = False  # one pool of cells for all slots, as llama-server has it when it chooses their number

    # Versions before June 2026 reserve the logits of a whole batch, and flash attention's mask in 32 bits beside 16
    # (llama.cpp #23861, #23764): for a vocabulary of 150,000 tokens 300 MiB more.
    old_reserve: bool = True

    @property
    def pools(self) -> int:
        """Pools of cells."""
        return 1 if self.unified else self.slots

    @property
    def pool_cells(self) -> int:
        """Tokens for which a layer that looks at all of them has room in one pool."""
        return _pad(self.max_model_len * self.slots // self.pools)


@dataclass(frozen=True, kw_only=True)
class LlamaCppEstimate:
    """Bytes on the card and on the host; *n_gpu_layers* None: the card is not used at all."""

    n_gpu_layers: int | None
    weights_card: int
    weights_host: int  # mapped from the file
    kv_card: int
    kv_host: int
    state_card: int  # of recurrent layers
    state_host: int
    compute_card: int
    compute_host: int
    cuda_context: int

    @property
    def card(self) -> int:
        """All on the card."""
        return self.weights_card + self.kv_card + self.state_card + self.compute_card + self.cuda_context

    @property
    def host(self) -> int:
        """All on the host, without the program itself."""
        return self.weights_host + self.kv_host + self.state_host + self.compute_host


def estimate_llamacpp(
    model: GgufModel, options: LlamaCppOptions, *, n_gpu_layers: int | None
) -> LlamaCppEstimate | Unknown:
    """
    Estimate the buffers that llama.cpp sets aside at start, by the rules of its source (October 2026).

    weights   the output goes to the card first, then layers from the last to the first; the embedding stays on
              the host, and a tied output is a second copy of it (src/llama-model.cpp, load_tensors).
    KV cache  where its layer is. Each slot has max_model_len cells, rounded up to 256; a sliding layer min(those,
              window + ubatch, rounded) (src/llama-kv-cache-iswa.cpp); a compressed one has keys alone.
    state     of recurrent layers for each slot, 32-bit floats (src/llama-memory-recurrent.cpp).
    compute   the largest of what one batch needs at a time: its logits, one layer's attention, one layer's MLP.
    context   of CUDA, once for each process.

    With *n_gpu_layers* = layers + 1 or more everything is on the card; with 0 large batches still use it, and
    with None nothing does.
    """
    weights = model.weights
    missing = [*model.unknown, *_bad_types(options)]
    if not options.flash_attention and not model.heads and any(map(_is_attention, _all(model.caches))):
        missing.append("attention heads")
    if weights is None or missing:
        return Unknown(missing=tuple(missing) or ("weights",))
    on_host = host_layers(model, n_gpu_layers)
    output_on_card = bool(n_gpu_layers)
    kept = {cache: kept_bytes(cache, options) for cache in set(_all(model.caches))}
    kv = [sum(kept[cache] for cache in layer if _is_attention(cache)) for layer in model.caches]
    state = [sum(kept[cache] for cache in layer if not _is_attention(cache)) for layer in model.caches]
    compute_card, compute_host = _compute(model, weights, options, kv[:on_host], n_gpu_layers)
    return LlamaCppEstimate(
        n_gpu_layers=n_gpu_layers,
        weights_card=sum(weights.layers[on_host:]) + (weights.output if output_on_card else 0),
        weights_host=weights.embedding
        + sum(weights.layers[:on_host])
        + (0 if output_on_card else weights.output - weights.head_shared),
        kv_card=sum(kv[on_host:]),
        kv_host=sum(kv[:on_host]),
        state_card=sum(state[on_host:]),
        state_host=sum(state[:on_host]),
        compute_card=compute_card,
        compute_host=compute_host,
        cuda_context=0 if n_gpu_layers is None else _CUDA_CONTEXT_BYTES,
    )


def host_layers(model: GgufModel, n_gpu_layers: int | None) -> int:
    """How many of the first layers stay on the host; the output is the first of the *n_gpu_layers*."""
    return min(model.layers, max(0, model.layers + 1 - (n_gpu_layers or 0)))


def kept_bytes(cache: Cache, options: LlamaCppOptions) -> int:
    """Bytes that one layer sets aside for all slots."""
    cells = options.pools * _cells(cache, options)
    match cache:
        case State():
            return options.slots * _FLOAT_BYTES * (cache.conv_elements + cache.ssm_elements)
        case Latent():
            return cells * row_bytes(options.key_type.upper(), cache.width)
        case KeysAndValues():
            keys = row_bytes(options.key_type.upper(), cache.kv_heads * cache.head_dim)
            values = row_bytes(options.value_type.upper(), cache.kv_heads * cache.v_head_dim)
            return cells * (keys + values)


def _compute(
    model: GgufModel, weights: GgufWeights, options: LlamaCppOptions, host_kv: list[int], n_gpu_layers: int | None
) -> tuple[int, int]:
    """
    Bytes of the compute buffers, on the card and on the host.

    Counts the rows of activations that the graph's allocator keeps at a time. A layer that stays on the host is
    computed on the card for large batches: its largest matrix, or its keys and values, are copied there.
    """
    tokens = min(options.ubatch, options.slots * options.max_model_len)
    row = _FLOAT_BYTES * tokens
    attending = [cache for cache in set(_all(model.caches)) if _is_attention(cache)]
    cells = {_cells(cache, options) for cache in attending}
    widest_kv = max((_kv_width(cache) for cache in attending), default=0)
    masked = sum(cells) * tokens
    mask = masked * (2 if options.flash_attention and not options.old_reserve else _FLOAT_BYTES)
    cast = 2 * masked if options.flash_attention and options.old_reserve else 0  # replaces the mask after its first use
    scores = 0 if options.flash_attention else model.heads * max(cells, default=0) * row
    outputs = tokens if options.old_reserve else min(tokens, options.slots)

    logits = _FLOAT_BYTES * outputs * model.vocab_size + row * model.hidden_size
    attention = mask + cast + scores + row * (2 * model.hidden_size + 3 * model.query_width + widest_kv)
    mlp = (cast or mask) + 3 * row * (model.hidden_size + model.feed_forward)
    embedded = 2 * row * model.hidden_size
    answers = options.slots * model.vocab_size * _FLOAT_BYTES
    if n_gpu_layers is None:
        return 0, max(logits, attention, mlp) + embedded + answers
    if n_gpu_layers == 0:
        logits += weights.output
    if host_kv:
        attention += max(host_kv)
        mlp += weights.largest_tensor
    return max(logits, attention, mlp), mask + embedded + answers


def _cells(cache: Cache, options: LlamaCppOptions) -> int:
    """Tokens that one layer has room for, in one pool."""
    if isinstance(cache, State):
        return 0
    if cache.window is None:
        return options.pool_cells
    sequences = options.slots // options.pools
    return _pad(min(options.pool_cells, cache.window * sequences + options.ubatch))


def _pad(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def _kv_width(cache: Cache) -> int:
    match cache:
        case KeysAndValues():
            return cache.kv_heads * (cache.head_dim + cache.v_head_dim)
        case Latent():
            return cache.width
        case State():
            return 0


def _is_attention(cache: Cache) -> bool:
    return not isinstance(cache, State)


def _all(caches: Iterable[tuple[Cache, ...]]) -> Iterable[Cache]:
    return (cache for layer in caches for cache in layer)


def _bad_types(options: LlamaCppOptions) -> list[str]:
    types = (options.key_type, options.value_type)
    return [f"the KV cache type {name}" for name in dict.fromkeys(types) if not is_ggml_type(name.upper())]
