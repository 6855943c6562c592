"""
Which kind is each layer of a Hugging Face config, and which matrices is it made of?
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from worker.catalog.architecture import Cache, KeysAndValues, Latent, Matrix, Shard, State
from worker.catalog.hf_facts import Facts


class Mixer(StrEnum):
    """What mixes the tokens of a layer."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    LATENT = "latent"
    DELTA = "delta"
    MAMBA2 = "mamba2"
    MAMBA = "mamba"
    CONV = "conv"
    NONE = "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What tells layers of one model apart."""

    mixer: Mixer
    sparse: bool  # a mixture of experts
    heads: int  # query heads
    borrows: bool  # keys and values are those of an earlier layer (Gemma 4)


_LAYER_TYPES = {
    "full_attention": Mixer.FULL, "attention": Mixer.FULL, "indexed_attention": Mixer.FULL,
    "sliding_attention": Mixer.SLIDING, "chunked_attention": Mixer.CHUNKED, "linear_attention": Mixer.DELTA,
    "mamba": Mixer.MAMBA2, "mamba2": Mixer.MAMBA2, "conv": Mixer.CONV, "mlp": Mixer.NONE, "moe": Mixer.NONE,
}  # fmt: skip
_MOST_HEADS = 2**14
_PATTERN_LETTERS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
_FULL_LAYERS = ("attn_layer_indices", "full_attn_idxs")  # lists of the layers with attention: Bamba, LFM2


def kinds_of(facts: Facts) -> tuple[Kind, ...]:
    """Say of each layer what it is."""
    names = _names(facts)
    layers = facts.number("num_hidden_layers") or (len(names) if names else facts.needed("num_hidden_layers"))
    heads = facts.items("num_attention_heads_per_layer") or []
    if heads and not (len(heads) == layers and all(type(count) is int and 0 < count < _MOST_HEADS for count in heads)):
        facts.refuse("num_attention_heads_per_layer does not fit the layers")
        heads = []
    own = layers - (facts.number("num_kv_shared_layers") or 0)
    return tuple(
        Kind(
            mixer=mixer,
            sparse=_has_experts(index, facts, names),
            heads=heads[index] if heads else facts.number("num_attention_heads") or 0,
            borrows=0 < own <= index,
        )
        for index, mixer in enumerate(_mixers(facts, layers, names))
    )


def _mixers(facts: Facts, layers: int, names: list[str] | None) -> tuple[Mixer, ...]:
    """
    The mixer of each layer. The questions, in order, the first that the config answers decides:

    1. Are all layers of one kind?      as the family has it: Mamba
    2. Does it name every layer?        layer_types, layers_block_type, hybrid_override_pattern
    3. Does it say which are full?      the others are recurrent
    4. Is attention compressed?         kv_lora_rank: all layers are MLA
    5. Is only every n-th layer full?   the others are recurrent, chunked or sliding, as the family has it
    6. Is there a window?               all layers slide, or those from max_window_layers on
    7. Otherwise                        full attention everywhere
    """
    recurrent = facts.family("recurrent")
    # (1) All of one kind.
    if (only := facts.family("only")) is not None:
        return (Mixer(only),) * layers
    # (2) Every layer has a name. MLA models name theirs too.
    if names is not None:
        if len(names) == layers and all(name in _LAYER_TYPES for name in names):
            return tuple(_named(name, facts) for name in names)
        facts.refuse("the kinds of its layers are not known here, or not as many as the layers")
    # (3) The full ones are listed, or every so many.
    full = next((found for key in _FULL_LAYERS if (found := facts.items(key))), None)
    if (period := facts.number("attn_layer_period")) is not None:
        full = list(range(facts.number("attn_layer_offset") or 0, layers, period))
    if full is not None and recurrent is not None:
        return tuple(Mixer.FULL if index in full else Mixer(recurrent) for index in range(layers))
    if recurrent is not None and names is None:
        facts.miss("which of its layers are recurrent")
    # (4) MLA.
    if facts.number("kv_lora_rank") is not None:
        return (Mixer.LATENT,) * layers
    # (5) Every n-th.
    others, every = _every(facts, layers)
    if every is not None:
        return tuple(Mixer.FULL if (index + 1) % every == 0 else others for index in range(layers))
    # (6) A window, (7) none.
    if facts.number("sliding_window") is None or not facts.flag("use_sliding_window", default=True):
        return (Mixer.FULL,) * layers
    before = min(layers, facts.number("max_window_layers") or 0)
    return (Mixer.FULL,) * before + (Mixer.SLIDING,) * (layers - before)


def _names(facts: Facts) -> list[str] | None:
    pattern = facts.raw("hybrid_override_pattern")
    if isinstance(pattern, str) and pattern:
        return [_PATTERN_LETTERS.get(letter, letter) for letter in pattern]
    names = facts.items("layer_types") or facts.items("layers_block_type")
    return None if names is None else [str(name) for name in names]


def _named(name: str, facts: Facts) -> Mixer:
    mixer = _LAYER_TYPES[name]
    if mixer is Mixer.FULL and facts.has("kv_lora_rank"):
        return Mixer.LATENT
    if mixer in {Mixer.DELTA, Mixer.MAMBA2} and (recurrent := facts.family("recurrent")) is not None:
        return Mixer(recurrent)
    return Mixer.MAMBA if mixer is Mixer.MAMBA2 and facts.has("dt_rank") else mixer


def _every(facts: Facts, layers: int) -> tuple[Mixer, int | None]:
    interval = facts.number("full_attention_interval")
    if interval is not None:
        return Mixer.DELTA, interval
    if (full := facts.number("kv_layers")) is not None and full < layers:
        return Mixer.DELTA, max(1, layers // full)
    every = facts.number("full_attention_every") or facts.number("global_attn_every_n_layers")
    window = facts.number("sliding_window") is not None
    if every is not None and (facts.flag("chunked_attention") or facts.has("attention_chunk_size")):
        return Mixer.CHUNKED, every
    if (every := every or facts.number("sliding_window_pattern")) is not None and window:
        return Mixer.SLIDING, every
    return Mixer.FULL, None


def layer_parts(kind: Kind, facts: Facts) -> tuple[list[Matrix], Cache | None]:
    """Give the matrices of a layer of this *kind*, and what it keeps for its tokens."""
    matrices, cache = _mixer_parts(kind, facts)
    # Some layers are a mixer or an MLP, not both (Mamba, Nemotron-H).
    if kind.mixer is Mixer.NONE or not facts.flag("one_part"):
        matrices += _mlp_parts(kind, facts)
    hidden = facts.needed("hidden_size")
    matrices.append(small("norms", (facts.number("norms_per_layer") or 2) * hidden))
    if (width := facts.number("hidden_size_per_layer_input")) is not None:  # Gemma 4 E2B and E4B
        matrices.append(Matrix(name="per_layer_input_gate", inputs=hidden, outputs=width, shard=Shard.COPY))
        matrices.append(Matrix(name="per_layer_projection", inputs=width, outputs=hidden, shard=Shard.COPY))
        matrices.append(small("post_per_layer_input_norm", hidden))
    return matrices, cache


# --- What mixes the tokens --------------------------------------------------------------------------------


def _mixer_parts(kind: Kind, facts: Facts) -> tuple[list[Matrix], Cache | None]:
    match kind.mixer:
        case Mixer.FULL | Mixer.SLIDING | Mixer.CHUNKED:
            return _attention(kind, facts)
        case Mixer.LATENT:
            return _latent(facts)
        case Mixer.DELTA:
            return _delta(facts)
        case Mixer.MAMBA2:
            return _mamba2(facts)
        case Mixer.MAMBA:
            return _mamba(facts)
        case Mixer.CONV:
            return _conv(facts)
        case Mixer.NONE:
            return [], None


def head_dim_of(facts: Facts) -> int:
    """The size of a head; hidden size / heads where the config does not say."""
    found = facts.number("head_dim")
    if found is not None:
        return found
    hidden, heads = facts.number("hidden_size"), facts.number("num_attention_heads")
    return hidden // heads if hidden and heads and hidden % heads == 0 else facts.needed("head_dim")


def _kv_heads(facts: Facts, heads: int) -> int:
    """KV heads; one for each head where the config does not say (but one in all for the first Falcons)."""
    if facts.flag("multi_query") and not facts.flag("new_decoder_architecture"):
        return 1
    # A config.json without them means as many as heads; a poor one does not.
    kv_heads = facts.number("num_key_value_heads") or (heads if facts.whole else facts.needed("num_key_value_heads"))
    if kv_heads and heads % kv_heads:
        facts.refuse(f"num_key_value_heads={kv_heads} does not divide {heads} heads")
    return kv_heads


def _attention(kind: Kind, facts: Facts) -> tuple[list[Matrix], Cache | None]:
    hidden, heads = facts.needed("hidden_size"), kind.heads or facts.needed("num_attention_heads")
    kv_heads, head_dim = _kv_heads(facts, heads), head_dim_of(facts)
    shared_kv = False
    if kind.mixer is Mixer.FULL and (global_dim := facts.number("global_head_dim")) is not None:
        head_dim, shared_kv = global_dim, facts.flag("attention_k_eq_v")
        kv_heads = (facts.number("num_global_key_value_heads") if shared_kv else None) or kv_heads
    v_dim = facts.number("n_embd_head_v") or facts.number("v_head_dim") or head_dim
    gate = 2 if facts.flag("attn_output_gate") else 1

    matrices = [
        Matrix(name="self_attn.q_proj", inputs=hidden, outputs=heads * head_dim * gate),
        Matrix(name="self_attn.o_proj", inputs=heads * v_dim, outputs=hidden),
    ]
    if not kind.borrows:
        matrices += [
            Matrix(name="self_attn.k_proj", inputs=hidden, outputs=kv_heads * head_dim, shard=Shard.HEADS),
            # Where values are the keys, vLLM loads them twice all the same (gemma4.py).
            Matrix(
                name="self_attn.v_proj",
                inputs=hidden,
                outputs=kv_heads * v_dim,
                shard=Shard.HEADS,
                counted=not shared_kv,
            ),
        ]
    if facts.flag("head_gate"):
        matrices.append(Matrix(name="self_attn.g_proj", inputs=hidden, outputs=heads))
    matrices.append(small("self_attn.biases", _attention_biases(facts, heads * gate, kv_heads, head_dim, v_dim)))
    if kind.borrows:
        return matrices, None
    window = None
    if kind.mixer is Mixer.SLIDING:
        window = facts.needed("sliding_window")
    elif kind.mixer is Mixer.CHUNKED:
        window = facts.number("attention_chunk_size") or facts.needed("sliding_window")
    chunked = kind.mixer is Mixer.CHUNKED
    cache = KeysAndValues(kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_dim, window=window, chunked=chunked)
    return matrices, cache


def _attention_biases(facts: Facts, heads: int, kv_heads: int, head_dim: int, v_dim: int) -> int:
    """Numbers in the biases, norms and sinks of attention."""
    everywhere = facts.flag("all_bias") or facts.flag("attention_bias")
    biases = facts.needed("hidden_size") if everywhere else 0
    if everywhere or facts.flag("qkv_bias"):
        biases += heads * head_dim + kv_heads * (head_dim + v_dim)
    if facts.flag("sinks"):
        biases += heads
    norms = facts.raw("qk_norm")
    if norms == "full" or facts.flag("qk_norm_full"):
        return biases + (heads + kv_heads) * head_dim
    return biases + (2 * head_dim if norms else 0)


def _latent(facts: Facts) -> tuple[list[Matrix], Cache]:
    """MLA (DeepSeek-V2, arXiv 2405.04434): keys and values come from one compressed vector."""
    hidden, heads = facts.needed("hidden_size"), facts.needed("num_attention_heads")
    rank, rope = facts.needed("kv_lora_rank"), facts.number("qk_rope_head_dim") or 64
    # 128 and 128 in every released model; poorer configs leave them out.
    nope, value = facts.number("qk_nope_head_dim") or 128, facts.number("v_head_dim") or 128
    q_rank = facts.number("q_lora_rank")
    queries = heads * (nope + rope)
    matrices = [
        Matrix(name="self_attn.kv_a_proj_with_mqa", inputs=hidden, outputs=rank + rope, shard=Shard.COPY),
        Matrix(name="self_attn.kv_b_proj", inputs=rank, outputs=heads * (nope + value)),
        Matrix(name="self_attn.o_proj", inputs=heads * value, outputs=hidden),
        # vLLM unfolds kv_b_proj once more for decoding (mla_attention.py, process_weights_after_loading).
        Matrix(
            name="self_attn.kv_b_unfolded",
            inputs=rank,
            outputs=heads * (nope + value),
            quantizable=False,
            counted=False,
        ),
        small("self_attn.norms", rank + (q_rank or 0)),
    ]
    if q_rank is None:
        matrices.append(Matrix(name="self_attn.q_proj", inputs=hidden, outputs=queries))
    else:
        matrices.append(Matrix(name="self_attn.q_a_proj", inputs=hidden, outputs=q_rank, shard=Shard.COPY))
        matrices.append(Matrix(name="self_attn.q_b_proj", inputs=q_rank, outputs=queries))
    width = facts.number("index_head_dim")
    if width is None or q_rank is None:
        return matrices, Latent(width=rank + rope)
    # Sparse attention (DeepSeek-V3.2): an indexer chooses the tokens, whole on every card, with keys of its own.
    heads = facts.needed("index_n_heads")
    matrices += [
        Matrix(name="self_attn.indexer.wq_b", inputs=q_rank, outputs=heads * width, shard=Shard.COPY),
        Matrix(name="self_attn.indexer.wk", inputs=hidden, outputs=width + heads, shard=Shard.COPY, quantizable=False),
        small("self_attn.indexer.k_norm", 2 * width),
    ]
    return matrices, Latent(width=rank + rope, indexer_bytes=width + 4 * -(-width // 128))


def _delta(facts: Facts) -> tuple[list[Matrix], Cache]:
    """Gated DeltaNet, as in Qwen3-Next and Qwen3.5 (vLLM 0.32, MambaStateShapeCalculator)."""
    hidden = facts.needed("hidden_size")
    k_heads = facts.number("linear_num_key_heads") or 16
    # In every released model twice the query heads; poorer configs leave it out.
    v_heads = facts.number("linear_num_value_heads") or 2 * (facts.number("num_attention_heads") or 16)
    k_dim, v_dim = facts.number("linear_key_head_dim") or 128, facts.number("linear_value_head_dim") or 128
    kernel = facts.number("linear_conv_kernel_dim") or 4
    mixed = 2 * k_heads * k_dim + v_heads * v_dim
    matrices = [
        Matrix(name="linear_attn.in_proj_qkv", inputs=hidden, outputs=mixed),
        Matrix(name="linear_attn.in_proj_z", inputs=hidden, outputs=v_heads * v_dim),
        Matrix(name="linear_attn.in_proj_ba", inputs=hidden, outputs=2 * v_heads, quantizable=False),
        Matrix(name="linear_attn.conv1d", inputs=kernel, outputs=mixed, quantizable=False),
        Matrix(name="linear_attn.out_proj", inputs=v_heads * v_dim, outputs=hidden),
        small("linear_attn.norm", v_dim + 2 * v_heads),
    ]
    state = State(conv_elements=(kernel - 1) * mixed, ssm_elements=v_heads * k_dim * v_dim, ssm_bytes=_ssm_bytes(facts))
    return matrices, state


def _mamba2(facts: Facts) -> tuple[list[Matrix], Cache]:
    hidden = facts.needed("hidden_size")
    heads = facts.number("mamba_num_heads") or facts.needed("num_heads")
    head_dim = facts.number("mamba_head_dim") or facts.needed("head_dim")
    groups, size = facts.number("mamba_groups") or 1, facts.number("state_size") or 128
    kernel = facts.number("conv_kernel") or 4
    inner, mixed = heads * head_dim, heads * head_dim + 2 * groups * size
    matrices = [
        Matrix(name="mixer.in_proj", inputs=hidden, outputs=inner + mixed + heads),
        Matrix(name="mixer.conv1d", inputs=kernel + 1, outputs=mixed, quantizable=False),
        Matrix(name="mixer.out_proj", inputs=inner, outputs=hidden),
        small("mixer.norm", inner + 3 * heads),
    ]
    state = State(conv_elements=(kernel - 1) * mixed, ssm_elements=inner * size, ssm_bytes=_ssm_bytes(facts))
    return matrices, state


def _mamba(facts: Facts) -> tuple[list[Matrix], Cache]:
    hidden = facts.needed("hidden_size")
    inner, size = hidden * (facts.number("expand") or 2), facts.number("state_size") or 16
    kernel, rank = facts.number("conv_kernel") or 4, facts.number("dt_rank") or -(-hidden // 16)
    matrices = [
        Matrix(name="mamba.in_proj", inputs=hidden, outputs=2 * inner),
        Matrix(name="mamba.x_proj", inputs=inner, outputs=rank + 2 * size, quantizable=False),
        Matrix(name="mamba.dt_proj", inputs=rank + 1, outputs=inner, quantizable=False),
        Matrix(name="mamba.conv1d", inputs=kernel + 1 + size + 1, outputs=inner, quantizable=False),
        Matrix(name="mamba.out_proj", inputs=inner, outputs=hidden),
    ]
    if facts.flag("inner_norms"):  # Jamba
        matrices.append(small("mamba.norms", rank + 2 * size))
    return matrices, State(conv_elements=(kernel - 1) * inner, ssm_elements=inner * size, ssm_bytes=_ssm_bytes(facts))


def _conv(facts: Facts) -> tuple[list[Matrix], Cache]:
    """The short convolutions of LFM2."""
    hidden, kernel = facts.needed("hidden_size"), facts.number("conv_L_cache") or 3
    matrices = [
        Matrix(name="conv.in_proj", inputs=hidden, outputs=3 * hidden),
        Matrix(name="conv.conv", inputs=kernel, outputs=hidden, quantizable=False),
        Matrix(name="conv.out_proj", inputs=hidden, outputs=hidden),
    ]
    return matrices, State(conv_elements=(kernel - 1) * hidden, ssm_elements=0)


def _ssm_bytes(facts: Facts) -> int:
    return 4 if facts.raw("mamba_ssm_dtype") == "float32" or facts.raw("mamba_ssm_cache_dtype") == "float32" else 2


# --- What thinks about each token --------------------------------------------------------------------------


def _mlp_parts(kind: Kind, facts: Facts) -> list[Matrix]:
    """Give the matrices of one layer's MLP: dense, experts, or (Gemma 4) both."""
    if not kind.sparse:
        return _dense(facts, wide=kind.borrows and facts.flag("use_double_wide_mlp"))
    matrices = _experts(facts)
    return [*matrices, *_dense(facts)] if facts.flag("dense_beside_experts") else matrices


def _has_experts(index: int, facts: Facts, names: list[str] | None) -> bool:
    """Is the MLP of this layer a mixture of experts?"""
    if facts.number("num_experts") is None:
        return False
    if facts.flag("one_part"):
        return names is not None and names[index : index + 1] == ["moe"]
    for key in ("mlp_layer_types", "moe_layer_freq"):
        if (kinds := facts.items(key)) is not None and index < len(kinds):
            return kinds[index] in ("sparse", 1)
    if index in (facts.items("mlp_only_layers") or ()):
        return False
    if (sparse := facts.items("moe_layers")) is not None:  # Llama 4
        return index in sparse
    if index < (facts.number("dense_layers") or 0):
        return False
    if (period := facts.number("expert_layer_period")) is not None:  # Jamba
        return index % period == (facts.number("expert_layer_offset") or 0)
    return (index + 1) % (facts.number("experts_every") or 1) == 0


def _dense(facts: Facts, *, wide: bool = False) -> list[Matrix]:
    hidden = facts.needed("hidden_size")
    inner = _dense_width(facts) * (2 if wide else 1)
    matrices = [
        Matrix(name="mlp.up_proj", inputs=hidden, outputs=inner),
        Matrix(name="mlp.down_proj", inputs=inner, outputs=hidden),
    ]
    if (facts.number("mlp_mats") or 3) > 2:  # noqa: PLR2004 - a gate beside up and down
        matrices.append(Matrix(name="mlp.gate_proj", inputs=hidden, outputs=inner))
    if facts.flag("all_bias") or facts.flag("mlp_bias"):
        matrices.append(small("mlp.biases", inner + hidden))
    return matrices


def _dense_width(facts: Facts) -> int:
    inner = facts.number("intermediate_size_mlp") or facts.number("intermediate_size")
    if facts.number("num_experts") is None:  # Granite 4 without experts keeps only what they shared
        inner = facts.number("shared_intermediate_size") or inner
    if inner is None and (ratio := facts.number("mlp_ratio")) is not None:
        return ratio * facts.needed("hidden_size")
    if inner is None:
        return _usual_width(facts)
    if facts.flag("block_auto_adjust_ff_dim"):  # LFM2: two thirds, in whole steps
        step = facts.number("block_multiple_of") or 256
        return -(-(2 * inner // 3) // step) * step
    return inner


def _usual_width(facts: Facts) -> int:
    """Take an MLP as wide as Llama 1's (8/3 of the hidden size, in steps of 256), where the rest is Llama 1's too."""
    heads, kv_heads = facts.number("num_attention_heads"), facts.number("num_key_value_heads")
    hidden = facts.number("hidden_size")
    if hidden is None or heads != kv_heads or facts.number("total_params") is None:
        return facts.needed("intermediate_size")
    width = -(-8 * hidden // 3 // 256) * 256
    facts.assumed.append(f"intermediate_size {width}, as in a Llama of this hidden size")
    return width


def _experts(facts: Facts) -> list[Matrix]:
    hidden, count = facts.needed("hidden_size"), facts.needed("num_experts")
    inner = expert_width(facts) or facts.needed("moe_intermediate_size")
    narrow = facts.number("moe_latent_size")  # Nemotron 3: experts see a narrower state
    seen = narrow or hidden
    gated = (facts.number("mlp_mats") or 3) > 2  # noqa: PLR2004 - a gate beside up and down
    matrices = [
        Matrix(name="mlp.experts.up_proj", inputs=seen, outputs=inner, count=count),
        Matrix(name="mlp.experts.down_proj", inputs=inner, outputs=seen, count=count),
        Matrix(name="mlp.gate", inputs=hidden, outputs=count, shard=Shard.COPY, quantizable=False),
    ]
    if gated:
        matrices.append(Matrix(name="mlp.experts.gate_proj", inputs=seen, outputs=inner, count=count))
    if narrow is not None:
        matrices.append(Matrix(name="mlp.fc1_latent_proj", inputs=hidden, outputs=narrow, shard=Shard.COPY))
        matrices.append(Matrix(name="mlp.fc2_latent_proj", inputs=narrow, outputs=hidden, shard=Shard.COPY))
    if facts.flag("all_bias"):
        matrices.append(small("mlp.experts.biases", count * (2 * inner + hidden + 1)))
    shared = facts.number("shared_expert_intermediate_size") or (facts.number("num_shared_experts") or 0) * inner
    if facts.flag("shared_like_expert"):
        shared = shared or inner
    if shared:
        matrices += [
            Matrix(name="mlp.shared_expert.up_proj", inputs=hidden, outputs=shared),
            Matrix(name="mlp.shared_expert.down_proj", inputs=shared, outputs=hidden),
        ]
        if gated:
            matrices.append(Matrix(name="mlp.shared_expert.gate_proj", inputs=hidden, outputs=shared))
    return matrices


def expert_width(facts: Facts) -> int | None:
    """The inner size of one routed expert."""
    return facts.number("moe_intermediate_size") or facts.number("intermediate_size")


def small(name: str, params: int) -> Matrix:
    """Norms and biases: never packed, and on every card."""
    return Matrix(name=name, inputs=1, outputs=params, shard=Shard.COPY, quantizable=False)
