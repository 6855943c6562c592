"""
What does each layer of a GGUF model keep for its tokens? Read from the metadata, as llama.cpp reads it.
"""

from __future__ import annotations

from collections.abc import Mapping

from worker.catalog.architecture import Cache, KeysAndValues, Latent, State
from worker.catalog.tensors import Scalar

# Architectures with sliding windows: every n-th layer is full (the first of each n, if "first"), and the window
# where the file does not say. (src/models/*.cpp of llama.cpp, load_swa_pattern.) None: the file must say which.
_SLIDING: dict[str, tuple[int | None, bool, int | None]] = {
    "gemma2": (2, False, 4096), "gemma3": (6, False, None), "gemma3n": (5, False, None), "gemma4": (None, False, None),
    "gpt-oss": (2, False, None), "llama4": (4, False, 8192), "cohere2": (4, False, None),
    "cohere2moe": (4, True, None), "olmo2": (4, False, None), "exaone4": (4, False, 4096),
    "exaone-moe": (4, False, 128), "afmoe": (4, False, None), "smallthinker": (4, True, 4096),
    "plamo3": (8, False, None), "laguna": (4, True, None), "mellum": (4, False, None),
    "muse-glimmer": (4, False, None), "mimo2": (None, False, None), "step35": (None, False, None),
    "granite_swa": (None, False, None), "maple": (None, False, None),
}  # fmt: skip
_MAY_BE_FULL = frozenset({"gemma3", "olmo2", "afmoe", "plamo3", "laguna", "mellum"})  # where the file has no window
_EXAONE4_WITH_WINDOW = 64  # layers: the 32B alone slides

# Recurrent throughout, at every layer beside attention, where there are no KV heads, and all but every n-th.
_RECURRENT = frozenset({"mamba", "mamba2", "rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"})
_BOTH = frozenset({"falcon-h1"})
_WITHOUT_HEADS = frozenset({
    "jamba", "granitehybrid", "plamo2", "lfm2", "lfm2moe", "kimi-linear", "nemotron_h", "nemotron_h_moe",
})  # fmt: skip
_MIXER_OR_MLP = frozenset({"nemotron_h", "nemotron_h_moe"})
_INTERVAL = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_USUAL_INTERVAL = 4

WITHOUT_CACHE = frozenset({
    "bert", "jina-bert-v2", "jina-bert-v3", "nomic-bert", "nomic-bert-moe", "neo-bert", "eurobert", "modern-bert",
    "gemma-embedding", "dream", "llada", "llada-moe", "rnd1", "t5encoder", "wavtokenizer-dec",
})  # fmt: skip
# Caches of their own kind (indexers, compressed streams, encoders): better no answer than a wrong one.
_UNLIKE = frozenset({
    "clip", "t5", "deepseek32", "deepseek4", "glm-dsa", "glm5-next", "minimax-01", "minimax-m3", "dots3note",
    "qwen4exp", "hy_v4", "kimi-k3", "bailingmoe3", "nanbeige", "dflash", "eagle3",
})  # fmt: skip
_GEMMA3N_OWN_CACHES = 20  # the later layers use those of earlier ones
_LARGEST = 2**31


class GgufFacts:
    """The metadata with its architecture's prefix taken off; what is missing or nonsense is noted in `unknown`."""

    def __init__(self, metadata: Mapping[str, Scalar | tuple[Scalar, ...]]) -> None:
        self.kind = str(metadata.get("general.architecture") or "")
        self._metadata = metadata
        self.unknown: list[str] = [] if self.kind else ["general.architecture"]
        self.layers = self.number("block_count") or 0
        if not self.layers:
            self.note("block_count")

    def number(self, key: str) -> int | None:
        """A whole number of a sane size, 0 included; None if there is none, or one for each layer."""
        value = self._metadata.get(f"{self.kind}.{key}")
        if value is None or isinstance(value, tuple):
            return None
        return self._sane(key, value)

    def of_layers(self, key: str) -> tuple[int, ...] | None:
        """One number for each layer, or the same for all."""
        value = self._metadata.get(f"{self.kind}.{key}")
        if isinstance(value, tuple):
            if len(value) < self.layers:
                self.note(f"{key} of each layer")
                return None
            return tuple(self._sane(key, each) or 0 for each in value[: self.layers])
        number = self.number(key)
        return None if number is None else (number,) * self.layers

    def needed(self, key: str) -> int:
        """Like `number`; what is missing is noted, and 0."""
        found = self.number(key)
        if found is None:
            self.note(key)
        return found or 0

    def note(self, what: str) -> None:
        """Remember that this cannot be told."""
        if what not in self.unknown:
            self.unknown.append(what)

    def _sane(self, key: str, value: Scalar) -> int | None:
        if isinstance(value, bool):
            return int(value)
        if isinstance(value, int) and 0 <= value < _LARGEST:
            return value
        self.note(f"{key}={value!r:.40} makes no sense")
        return None


def read_caches(facts: GgufFacts) -> tuple[tuple[Cache, ...], ...]:
    """
    Say of each layer what it keeps. The questions, in order (llama.cpp, llama_model::create_memory):

    1. Is it a layer of the model?      the last ones, for predicting several tokens, are not loaded
    2. Does it keep a state?            recurrent architectures, and the recurrent layers of hybrids
    3. Does it keep keys and values?    not if it has no KV heads, or uses an earlier layer's
    4. Of all tokens or of a window?    as the architecture has it
    """
    if facts.kind in _UNLIKE:
        facts.note(f"the cache of the architecture {facts.kind}")
        return ((),) * facts.layers
    if facts.kind in WITHOUT_CACHE:
        return ((),) * facts.layers
    recurrent, attending, windows = _recurrent(facts), _attending(facts), _windows(facts)
    state = _state(facts) if any(recurrent) else None
    # (1) Is it a layer of the model?
    own = facts.layers - (facts.number("nextn_predict_layers") or 0)
    caches = []
    for layer in range(facts.layers):
        kept: list[Cache] = []
        if layer < own:
            # (2) Does it keep a state?
            if recurrent[layer] and state is not None:
                kept.append(state)
            # (3) Keys and values, (4) of all tokens or of a window?
            if attending[layer]:
                kept.append(_keys_and_values(facts, attending[layer], windows[layer]))
        caches.append(tuple(kept))
    return tuple(caches)


def head_size(facts: GgufFacts, which: str = "key") -> int:
    """Elements of a key or value head: hidden size / heads where the file does not say."""
    found = facts.number(f"attention.{which}_length")
    if found is not None:
        return found
    heads = max(facts.of_layers("attention.head_count") or (0,), default=0)
    hidden = facts.number("embedding_length")
    if not heads or not hidden:
        facts.note(f"attention.{which}_length")
        return 0
    return hidden // heads


def _kv_heads(facts: GgufFacts) -> tuple[int, ...]:
    """KV heads of each layer; as many as there are heads where the file does not say."""
    return facts.of_layers("attention.head_count_kv") or facts.of_layers("attention.head_count") or (0,) * facts.layers


def _recurrent(facts: GgufFacts) -> tuple[bool, ...]:
    everywhere = (True,) * facts.layers
    if facts.kind in _RECURRENT | _BOTH:
        return everywhere
    if facts.kind in _WITHOUT_HEADS:
        mlp = _mlp_only(facts)
        return tuple(heads == 0 and not mlp[layer] for layer, heads in enumerate(_kv_heads(facts)))
    if facts.kind in _INTERVAL:
        said = facts.of_layers("attention.recurrent_layers")
        every = facts.number("full_attention_interval") or _USUAL_INTERVAL
        return tuple(bool(said[layer]) if said else (layer + 1) % every != 0 for layer in range(facts.layers))
    return (False,) * facts.layers


def _attending(facts: GgufFacts) -> tuple[int, ...]:
    """KV heads of the layers that keep keys and values of their own; 0 for the others."""
    if facts.kind in _RECURRENT:
        return (0,) * facts.layers
    if facts.number("attention.head_count_kv") is None and facts.of_layers("attention.head_count_kv") is None:
        facts.needed("attention.head_count")
    own = facts.layers
    if facts.kind == "gemma3n":
        own = _GEMMA3N_OWN_CACHES
    elif facts.kind == "gemma4":
        own = facts.layers - (facts.number("attention.shared_kv_layers") or 0)
    recurrent, mlp = _recurrent(facts), _mlp_only(facts)
    return tuple(
        heads if layer < own and not mlp[layer] and (facts.kind in _BOTH or not recurrent[layer]) else 0
        for layer, heads in enumerate(_kv_heads(facts))
    )


def _mlp_only(facts: GgufFacts) -> tuple[bool, ...]:
    """Nemotron-H: a layer is a mixer or an MLP, not both."""
    inner = facts.of_layers("feed_forward_length") if facts.kind in _MIXER_OR_MLP else None
    return tuple(bool(width) for width in inner) if inner else (False,) * facts.layers


def _windows(facts: GgufFacts) -> tuple[int | None, ...]:
    """Tokens that each layer looks back on; None = all."""
    full: tuple[int | None, ...] = (None,) * facts.layers
    window = facts.number("attention.sliding_window")
    if facts.kind in {"lfm2", "lfm2moe"}:
        return (window or None,) * facts.layers
    if facts.kind not in _SLIDING or window == 0 or (facts.kind == "exaone4" and facts.layers != _EXAONE4_WITH_WINDOW):
        return full  # llama.cpp uses a window only where its code for the architecture asks for one
    every, first, usual = _SLIDING[facts.kind]
    window = usual if facts.kind == "llama4" else window or usual
    if window is None:
        if facts.kind not in _MAY_BE_FULL:
            facts.note("attention.sliding_window")
        return full
    key = "attention.sliding_window_pattern"
    period = facts.number(key)
    said = facts.of_layers(key) if period is None else None
    every = period or every
    if said is None and every is None:
        facts.note(key)
        return full
    slides = said or tuple(layer % (every or 1) != (0 if first else (every or 1) - 1) for layer in range(facts.layers))
    return tuple(window if sliding else None for sliding in slides)


def _keys_and_values(facts: GgufFacts, heads: int, window: int | None) -> Cache:
    key, value = head_size(facts), head_size(facts, "value")
    if facts.number("attention.key_length_mla"):
        return Latent(width=heads * key, window=window)
    if window is not None:
        key = facts.number("attention.key_length_swa") or key
        value = facts.number("attention.value_length_swa") or value
    return KeysAndValues(kv_heads=heads, head_dim=key, v_head_dim=value, window=window)


def _state(facts: GgufFacts) -> State:
    """The numbers of one layer's state (llama.cpp, llama_hparams::n_embd_r and n_embd_s); all 32-bit floats."""
    hidden = facts.needed("embedding_length")
    if facts.kind in {"rwkv6", "rwkv6qwen2", "rwkv7", "arwkv7"}:
        shifts = facts.number("token_shift_count") or 2
        return _f32(shifts * hidden, hidden * facts.needed("wkv.head_size"))
    if (cached := facts.number("shortconv.l_cache")) is not None:
        return _f32(hidden * max(0, cached - 1), 0)
    kernel = facts.number("ssm.conv_kernel") or 0
    if (width := facts.number("kda.head_dim")) is not None:
        heads = max(facts.of_layers("attention.head_count") or (0,), default=0)
        return _f32(3 * (kernel - 1 if kernel else 3) * heads * width, width * width * heads)
    inner, size = facts.needed("ssm.inner_size"), facts.needed("ssm.state_size")
    mixed = inner + 2 * (facts.number("ssm.group_count") or 0) * size
    return _f32(max(0, kernel - 1) * mixed, size * inner)


def _f32(conv: int, ssm: int) -> State:
    return State(conv_elements=conv, ssm_elements=ssm, ssm_bytes=4)
